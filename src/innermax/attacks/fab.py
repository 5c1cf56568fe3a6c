"""FAB: the nearest point beyond the decision boundary, by steps onto the boundary's linearisation."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from innermax.attacks.base import VerdictAttack, build_result, search_survivors
from innermax.attacks.cost import SURVIVING
from innermax.attacks.problem import Problem
from innermax.attacks.search import AttackResult, has_won, reassemble, split_rows
from innermax.losses import Paired, difference, margin
from innermax.threat import L1, L2, Flat, Linf, Scalar, Threat, fill
from innermax.utils.validation import check_count

_TOWARDS_X = 0.1  # α_max: largest share of the step that starts from x
_OVERSHOOT = 1.05  # η: how far beyond the linearised boundary a step goes
_BACK = 0.9  # β: what is left of the way from x once the boundary is crossed


@dataclass(frozen=True)
class FAB(VerdictAttack):
    """The targeted Fast Adaptive Boundary attack (Croce & Hein 2020b, Algorithm 1; targeted as in 2020a).

    For one wrong class after the other, it looks for the misclassified point with the smallest perturbation in the
    threat's norm; an example has fallen once that is at most ε. Of the others the nearest such point, or else the last
    iterate, is projected onto X(x).

    Args:
        threat: Linf, L2 or L1.
        steps: ≥ 1 in each search, at most.
        restarts: ≥ 1 searches for each class; the first starts at x, the others at random.
        targets: the number ≥ 1 of wrong classes, the most likely on the clean input first; a class that does not exist
            is left out.

    Raises:
        ValueError, TypeError: an argument is not as described above.
    """

    norms: ClassVar[tuple[type[Threat], ...]] = (Linf, L2, L1)
    steps: int = 100
    restarts: int = 1
    targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "restarts", "targets"):
            check_count(getattr(self, name), name)

    @property
    def cost(self) -> float:
        """About how many gradients per example it takes."""
        return SURVIVING * self.steps * self.restarts * self.targets

    def search(self, problem: Problem, clean: Float[Tensor, "b classes"]) -> AttackResult:
        """What was found, without FOSC, given the clean inputs' logits."""
        found = build_result(problem, problem.feasible.x, margin(clean, problem.y), clean)
        for number, aimed in enumerate(problem.towards(self.targets, clean)):
            for restart in range(self.restarts):
                found = search_survivors(found, partial(self._once, aimed, (number, restart)), problem.oracle)
        return found

    def _once(self, problem: Problem, streams: tuple[int, int], rows: Int[Tensor, " k"]) -> AttackResult:
        """One search of some of the examples."""
        problem = problem[rows]
        start = problem.feasible.x
        if streams[1] > 0:
            start = start + (problem.feasible.sample(problem.keys(*streams)) - start) / 2
        rows = torch.arange(len(start), device=start.device)
        search = _Approach(rows, start, start, torch.full_like(rows, math.inf, dtype=torch.float64))
        pieces: list[tuple[Tensor, AttackResult]] = []
        for step in range(1, self.steps + 1):
            point = _step(problem, search.point)
            logits = problem.logits(point)
            search = search.cross(problem, point, logits)
            fallen = search.distance <= self.threat.eps
            if leaving := int(fallen.sum()):
                going, done = split_rows(fallen, leaving)
                pieces.append((search.rows[done], _end(problem[done], point[done], logits[done], step, step)))
                if len(going) == 0:
                    return reassemble(pieces)
                search, problem = search[going], problem[going]
        x_adv = problem.feasible.project(search.nearest)
        result = _end(problem, x_adv, problem.logits(x_adv), self.steps, self.steps + 1)
        return reassemble([*pieces, (search.rows, result)])


@dataclass(frozen=True, eq=False)
class _Approach:
    """The state of searches; each value has a row per example, and rows leave together.

    `nearest` is the misclassified point nearest to x, at `distance` in the threat's norm; as long as there is none, the
    last iterate.
    """

    rows: Int[Tensor, " b"]
    point: Float[Tensor, "b ..."]
    nearest: Float[Tensor, "b ..."]
    distance: Float[Tensor, " b"]

    def __getitem__(self, rows: Tensor) -> "_Approach":
        """Some of the searches."""
        return _Approach(*(value[rows] for value in vars(self).values()))

    def cross(self, problem: Problem, point: Float[Tensor, "b ..."], logits: Float[Tensor, "b classes"]) -> "_Approach":
        """The searches at their next iterates; those beyond the boundary go some of the way back to x."""
        threat, x, column = problem.feasible.threat, problem.feasible.x, (-1, *[1] * (point.ndim - 1))
        distance = threat.norm((point.double() - x.double()).flatten(1))
        wrong = has_won(logits, problem.y, reach=False)
        nearer = wrong & (distance < self.distance)
        fallen = (nearer & (distance <= threat.eps)).nonzero()[:, 0]
        if len(fallen) > 0:  # bf16 guides the search; float32 decides who has fallen
            nearer[fallen] = problem[fallen].won(point[fallen], logits[fallen])
        kept = torch.isfinite(self.distance) & ~nearer
        return replace(
            self,
            point=torch.where(wrong.reshape(column), x + _BACK * (point - x), point),
            nearest=torch.where(kept.reshape(column), self.nearest, point),
            distance=torch.where(nearer, distance, self.distance),
        )


def _step(problem: Problem, point: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """A step beyond the boundary's linearisation, by a mean of the shortest ways there from the iterate and from x."""
    threat, x = problem.feasible.threat, problem.feasible.x.flatten(1)
    answer = problem.gradient(point, Paired(difference))
    slope, there, (low, high) = answer.gradient.flatten(1), point.flatten(1), threat.box(problem.feasible.x)
    lacking = -answer.loss[:, None]
    on = shortest_way(threat, slope, lacking, low - there, high - there)
    afresh = shortest_way(threat, slope, lacking + (slope * (there - x)).sum(1, keepdim=True), low - x, high - x)
    near, far = (threat.norm(way)[:, None].clamp(min=1e-8) for way in (on, afresh))
    share = (near / (near + far)).clamp(max=_TOWARDS_X)
    mean = (1 - share) * (there + _OVERSHOOT * on) + share * (x + _OVERSHOOT * afresh)
    return mean.clamp(low, high).reshape(point.shape)


def shortest_way(threat: Threat, slope: Flat, amount: Scalar, down: Flat, up: Flat) -> Flat:
    """The d in [down, up] with ⟨slope, d⟩ = amount whose norm is smallest; where there is none, as far as it goes.

    The projection onto a hyperplane within a box (Croce & Hein 2020b).
    """
    largest = slope.abs().amax(1, keepdim=True)
    largest = largest.masked_fill(~(largest > 0), 1.0)
    slope, amount = slope / largest, (amount / largest).nan_to_num(0.0, 1e30, -1e30)
    worth, direction = slope.abs(), slope.sign() * amount.sign()
    room = torch.where(direction > 0, up, -down).clamp(min=0).masked_fill(direction == 0, 0.0)
    if isinstance(threat, L1):
        length = fill(worth, worth * room, amount.abs()) / worth.masked_fill(~(worth > 0), 1.0)
    else:
        pace = torch.ones_like(worth) if isinstance(threat, Linf) else worth
        length = _level(pace, worth, room, amount.abs()) * pace
    return direction * length.minimum(room).masked_fill(~(room > 0), 0.0)


def _level(pace: Flat, worth: Flat, room: Flat, amount: Scalar) -> Scalar:
    """The least s ≥ 0 with Σ worth·min(s·pace, room) = amount; infinite where none reaches it.

    The sum is concave and piecewise linear in s, so Newton's method climbs to the root from the left in finitely many
    steps, each of which finds further coordinates without room.
    """
    level = torch.zeros_like(amount)
    while True:
        free = level * pace < room
        left = (amount - (worth * room).masked_fill(free, 0.0).sum(1, keepdim=True)).clamp(min=0)
        rate = (worth * pace).masked_fill(~free, 0.0).sum(1, keepdim=True)
        further = (left / rate).masked_fill(~(rate > 0), math.inf)
        if not bool((further > level * (1 + 4 * torch.finfo(level.dtype).eps)).any()):
            return level
        level = torch.maximum(level, further)


def _end(problem: Problem, x_adv: Tensor, logits: Tensor, steps: int, forwards: int) -> AttackResult:
    return build_result(problem, x_adv, margin(logits, problem.y), logits, steps, steps, forwards)
