"""Square: a random search that changes one square of the image at a time and needs nothing but logits; on inputs that
are no images, a block of random coordinates.
"""

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from innermax.attacks.base import VerdictAttack, build_result, search_survivors
from innermax.attacks.cost import FORWARD, SURVIVING
from innermax.attacks.problem import Problem
from innermax.attacks.search import AttackResult, choose_better, reassemble, split_rows
from innermax.losses import margin
from innermax.threat import L1, L2, FeasibleSet, Linf, Threat
from innermax.utils import randomness
from innermax.utils.validation import check_count

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which squares have half the area


@dataclass(frozen=True)
class Square(VerdictAttack):
    """Square Attack (Andriushchenko et al. 2020; for L1: Croce & Hein 2021): random search on the margin.

    A square of random place and sign replaces part of the perturbation, and stays where the margin grows. Squares
    shrink with the number of queries, by the schedule of AutoAttack, which does not depend on `queries`.

    Inputs of another shape than (B, C, H, W), such as vectors and sequences, have no squares. There the analogue of a
    square is a block of coordinates drawn at random, each with a sign of its own, as many as the square would have
    pixels. In L∞ their values become ±ε; in L2 and L1 the block takes over what it and a second one held, spread at
    random, together with a share of what the ball has left. It is our own, not the published attack.

    Args:
        threat: Linf, L2 or L1.
        queries: ≥ 1 in each search, at most.
        restarts: ≥ 1 searches with different draws, of survivors only.
        p_init: share of the image in (0, 1] that the first squares cover.

    Raises:
        ValueError, TypeError: an argument is not as described above.
    """

    norms: ClassVar[tuple[type[Threat], ...]] = (Linf, L2, L1)
    queries: int = 5000
    restarts: int = 1
    p_init: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.queries, "queries")
        check_count(self.restarts, "restarts")
        if isinstance(self.p_init, bool) or not isinstance(self.p_init, int | float):
            raise TypeError(f"p_init must be a number, got {self.p_init!r}")
        if not 0 < self.p_init <= 1:
            raise ValueError(f"p_init must be in (0, 1], got {self.p_init}")

    @property
    def cost(self) -> float:
        """About how many gradients per example it takes."""
        return SURVIVING * self.queries * self.restarts * FORWARD

    def search(self, problem: Problem, clean: Float[Tensor, "b classes"]) -> AttackResult:
        """What was found, without FOSC, given the clean inputs' logits."""
        found = build_result(problem, problem.feasible.x, margin(clean, problem.y), clean)
        for restart in range(self.restarts):
            found = search_survivors(found, partial(self._once, problem, restart), problem.oracle)
        return found

    def _once(self, problem: Problem, restart: int, rows: Int[Tensor, " k"]) -> AttackResult:
        """One search of some of the examples."""
        problem = problem[rows]
        rows = torch.arange(len(rows), device=rows.device)
        are_images = problem.feasible.x.ndim == 4
        begin = _begin if are_images else _begin_flat
        best = _ask(problem, begin(problem.feasible, problem.keys(restart, 0)), 0)
        pieces: list[tuple[Tensor, AttackResult]] = []
        for query in range(1, self.queries):
            won = cast(Tensor, best.misclassified)
            if leaving := int(won.sum()):
                going, done = split_rows(won, leaving)
                pieces.append((rows[done], best[done]))
                if len(going) == 0:
                    return reassemble(pieces)
                rows, problem, best = rows[going], problem[going], best[going]
            key = problem.keys(restart, query)
            if are_images:
                side = self.side(query, *best.x_adv.shape[2:])
                point = _repaint(problem.feasible, best.x_adv, key, side)
            else:
                size = self.block(query, best.x_adv[0].numel())
                point = _redraw(problem.feasible, best.x_adv, key, size)
            best = choose_better(best, _ask(problem, point, query))
        return reassemble([*pieces, (rows, best)])

    def side(self, query: int, height: int, width: int) -> int:
        """The length of the squares' sides at a query; the first square is tried at query 1."""
        side = round(math.sqrt(self._share(query) * height * width))
        if not isinstance(self.threat, Linf):
            side = max(side, 3) // 2 * 2 + 1  # odd, as the pattern has a middle
        return min(max(side, 1), height, width)

    def block(self, query: int, count: int) -> int:
        """How many of `count` coordinates a query changes, of inputs that are no images."""
        return min(max(round(self._share(query) * count), 1), count)

    def _share(self, query: int) -> float:
        """The share of the input that a query changes."""
        return float(self.p_init / 2 ** sum(query > last + 1 for last in _HALVINGS))


def _ask(problem: Problem, point: Float[Tensor, "b ..."], query: int) -> AttackResult:
    """The result of one query."""
    logits = problem.logits(point)
    return build_result(problem, point, margin(logits, problem.y), logits, query, forwards=1)


def _begin(feasible: FeasibleSet, key: Int[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    """L∞: vertical stripes of ±ε; L2 and L1: a grid of tiles with the pattern of later squares."""
    x, threat = feasible.x, feasible.threat
    batch, channels, height, width = x.shape
    if isinstance(threat, Linf):
        stripes = _signs(randomness.uniform(key, channels * width)).reshape(batch, channels, 1, width).to(x)
        return feasible.project(x + threat.eps * stripes)
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    draws = randomness.uniform(key, (channels + 1) * down * across).reshape(batch, -1, down, across)
    tiles = _patterns(isinstance(threat, L1), side).to(x)[(draws[:, 0] > 0.5).long()]
    tiles = tiles.transpose(2, 3).reshape(batch, 1, down * side, across * side)
    signs = _signs(draws[:, 1:]).to(x).repeat_interleave(side, 2).repeat_interleave(side, 3)
    u, top, left = torch.zeros_like(x), (height - down * side) // 2, (width - across * side) // 2
    u[:, :, top : top + down * side, left : left + across * side] = signs * tiles
    return feasible.project(x + _stretch(feasible, u))


def _repaint(
    feasible: FeasibleSet, x_adv: Float[Tensor, "b c h w"], key: Int[Tensor, " b"], side: int
) -> Float[Tensor, "b c h w"]:
    """x_adv with one square of the perturbation replaced; L2 and L1: the mass of a second square moves there, too."""
    x, threat = feasible.x, feasible.threat
    channels, height, width = x.shape[1:]
    draws = randomness.uniform(key, 5 + channels)
    signs, u = _signs(draws[:, 5:])[:, :, None, None].to(x), x_adv - x
    down, across = _offsets(draws[:, 0], height, side), _offsets(draws[:, 1], width, side)
    here = _in_square(down, across, side)
    if isinstance(threat, Linf):
        return feasible.project(x + torch.where(here, threat.eps * signs, u))
    there = _in_square(_offsets(draws[:, 2], height, side), _offsets(draws[:, 3], width, side), side)
    turned = (draws[:, 4] > 0.5).long()[:, None, None]
    place = turned, down.clamp(0, side - 1)[:, :, None], across.clamp(0, side - 1)[:, None, :]
    pattern = _patterns(isinstance(threat, L1), side).to(x)[place][:, None]
    old = u.masked_fill(~here, 0.0)
    new = (signs * pattern).masked_fill(~here, 0.0) + old / _length(threat, old).clamp(min=1e-12)
    new = new / _length(threat, new).clamp(min=1e-12) * _budget(feasible, u, here | there)
    return feasible.project(x + _stretch(feasible, torch.where(here, new, u.masked_fill(there, 0.0))))


def _begin_flat(feasible: FeasibleSet, key: Int[Tensor, " b"]) -> Float[Tensor, "b ..."]:
    """L∞: ±ε in each coordinate; L2 and L1: a random direction, as long as the ball allows."""
    x, threat = feasible.x, feasible.threat
    draws = randomness.uniform(key, x[0].numel()).to(x)
    if isinstance(threat, Linf):
        u = threat.eps * _signs(draws)
    else:
        u = _scatter(draws)
        u = u * (threat.eps / threat.norm(u).clamp(min=1e-12))[:, None]
    return feasible.project(x + u.reshape(x.shape).to(x))


def _redraw(
    feasible: FeasibleSet, x_adv: Float[Tensor, "b ..."], key: Int[Tensor, " b"], size: int
) -> Float[Tensor, "b ..."]:
    """x_adv with the perturbation of `size` random coordinates replaced; L2, L1: that of a second block moves there."""
    x, threat = feasible.x, feasible.threat
    d = x[0].numel()
    draws = randomness.uniform(key, 3 * d).to(x)
    u, values = (x_adv - x).flatten(1), draws[:, 2 * d :]
    here = _choose(draws[:, :d], size)
    if isinstance(threat, Linf):
        return feasible.project(x + torch.where(here, threat.eps * _signs(values).to(x), u).reshape(x.shape))
    there = _choose(draws[:, d : 2 * d], size)
    new = _scatter(values).masked_fill(~here, 0.0)
    planes = (u.reshape(len(x), 1, 1, d), (here | there).reshape(len(x), 1, 1, d))
    new = new / threat.norm(new)[:, None].clamp(min=1e-12) * _budget(feasible, *planes).reshape(-1, 1)
    changed = torch.where(here, new, u.masked_fill(there, 0.0)).reshape(len(x), 1, 1, d)
    return feasible.project(x + _stretch(feasible, changed).reshape(x.shape))


def _scatter(draws: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Values of random sign and, exponentially distributed, random size, from numbers in (0, 1)."""
    twice = 2 * draws - 1
    return -twice.sign() * (1 - twice.abs()).clamp(min=1e-7).log()


def _choose(draws: Float[Tensor, "b d"], size: int) -> Bool[Tensor, "b d"]:
    """`size` coordinates of each row, at random."""
    return torch.zeros_like(draws, dtype=torch.bool).scatter_(1, draws.topk(size, dim=1).indices, value=True)


def _budget(feasible: FeasibleSet, u: Tensor, windows: Tensor) -> Float[Tensor, "b c 1 1"]:
    """The norm of a new square in each channel: what both squares held, and a share of what the ball has left."""
    threat, channels = feasible.threat, u.shape[1]
    held = _length(threat, u.masked_fill(~windows, 0.0))
    size = threat.norm(u.flatten(1))[:, None, None, None]
    if isinstance(threat, L1):
        return (threat.eps - size).clamp(min=0) + channels * held
    return ((threat.eps**2 - size.square()).clamp(min=0) / channels + held.square()).sqrt()


def _stretch(feasible: FeasibleSet, u: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """L2: the perturbation at length ε; L1: unchanged, since projection brings it to ε."""
    threat = feasible.threat
    if isinstance(threat, L1):
        return u
    return u * (threat.eps / threat.norm(u.flatten(1)).clamp(min=1e-12))[:, None, None, None]


def _length(threat: Threat, u: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
    """The norm of each channel."""
    return threat.norm(u.flatten(0, 1).flatten(1)).reshape(*u.shape[:2], 1, 1)


def _signs(draws: Tensor) -> Tensor:
    return 1.0 - 2.0 * (draws < 0.5)


def _offsets(draw: Float[Tensor, " b"], length: int, side: int) -> Int[Tensor, "b n"]:
    """Each coordinate's distance from the start of an interval of that length, at random in 0…length − 1."""
    start = (draw * (length - side + 1)).long()
    return torch.arange(length, device=draw.device) - start[:, None]


def _in_square(down: Int[Tensor, "b h"], across: Int[Tensor, "b w"], side: int) -> Bool[Tensor, "b 1 h w"]:
    """The pixels of a square."""
    rows, columns = (down >= 0) & (down < side), (across >= 0) & (across < side)
    return rows[:, None, :, None] & columns[:, None, None, :]


@cache
def _patterns(sparse: bool, side: int) -> Float[Tensor, "2 s s"]:
    """Two peaks of opposite sign, one above the other and then side by side; of L2 norm 1, if sparse of L1 norm 1."""
    half = side // 2
    pattern = torch.cat([_peak(half, side, sparse), -_peak(side - half, side, sparse)])
    pattern = pattern / torch.linalg.vector_norm(pattern, ord=1 if sparse else 2)
    return torch.stack([pattern, pattern.T])


def _peak(height: int, width: int, sparse: bool) -> Float[Tensor, "h w"]:
    """Square rings around the middle: the n-th of N is Σ 1/k² over k = n…N high, in L1 Σ 1/k⁴; of norm 1."""
    rows, columns = ((torch.arange(size, device="cpu") - size // 2).abs() for size in (height, width))
    away = rows[:, None].maximum(columns)
    numbers = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64, device="cpu")
    rings = numbers.pow(-4.0 if sparse else -2.0)
    peak = rings.flip(0).cumsum(0).flip(0)[away]
    length: Tensor = torch.linalg.vector_norm(peak, ord=1 if sparse else 2)
    return peak / length
