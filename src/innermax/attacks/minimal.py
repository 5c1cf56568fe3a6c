"""What attacks have in common that look for the smallest perturbation: they approach the boundary from both sides."""

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from innermax.attacks.base import VerdictAttack, build_result
from innermax.attacks.problem import Problem
from innermax.attacks.search import AttackResult, choose_rows, concatenate, has_won
from innermax.losses import Loss, make_reaching, margin
from innermax.oracle.oracle import Response
from innermax.threat import L1, L2, Flat, Linf, Scalar
from innermax.utils.validation import check_count

_COARSE = 0.75  # share of the steps for which bf16 is precise enough
_NEAREST = 0.5  # at the end, balls from this share of the distance on are searched for the smallest that suffices
_HALVINGS = 8  # of that range


@dataclass(frozen=True)
class MinimalResult(AttackResult):
    """What an attack found that looks for the smallest perturbation.

    Attributes:
        nearest: (B, *features) the nearest input that it found with another class than y, or with the target's, within
            the bounds, be it in X(x) or not; x where it found none.
        distance: (B,) float64, how far that is from x in the threat's norm; infinite where it found none.
    """

    nearest: Float[Tensor, "b ..."]
    distance: Float[Tensor, " b"]


@dataclass(frozen=True, eq=False)
class Descent:
    """Where searches are after a step; a row per example.

    Attributes:
        u: the perturbation that was asked about, flat.
        size: its norm.
        fallen: whether the adversary has what it wants there; where it is the smallest so far, float32 has confirmed
            it.
        distance: the smallest norm of a perturbation that has succeeded so far, infinite where none has.
        radius: the norm to which the step before was held.
        widest: the norm that no perturbation within the bounds exceeds.
        answer: what the network answered.
        share: from 1 at the first step towards 0 at the last, along half a cosine.
    """

    u: Flat
    size: Scalar
    fallen: Bool[Tensor, "b 1"]
    distance: Scalar
    radius: Scalar
    widest: Scalar
    answer: Response
    share: float


@dataclass(frozen=True)
class MinimalAttack(VerdictAttack):
    """An attack that looks for the smallest perturbation, whatever its size; it returns a `MinimalResult`.

    An example has fallen where that distance is at most ε. Of the others the nearest point, or else the last iterate,
    is projected onto X(x). Every example that is classified correctly takes every step, each of which costs a gradient.
    At the end, 8 forward passes project the nearest point onto smaller balls, in search of the smallest one in which it
    still succeeds. A point counts only where float32 confirms it.

    A class of such attacks says by `resize` and `move` how a search goes on.

    Args:
        threat: the norm, the bounds, and the ε that decides who has fallen.
        steps: ≥ 1 in each search.

    Raises:
        ValueError, TypeError: an argument is not as described above.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"target"})
    steps: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.steps, "steps")

    @property
    def cost(self) -> float:
        """About how many gradients per example it takes."""
        return float(self.steps)

    def reported_loss(self, classes: int, reach: bool) -> Loss:
        """The margin, whichever loss the search follows."""
        return make_reaching(margin) if reach else margin

    @abstractmethod
    def followed_loss(self, reach: bool) -> Loss:
        """The loss whose gradient the search follows."""

    @abstractmethod
    def resize(self, search: Descent) -> Scalar:
        """The norm to which the next step is held."""

    @abstractmethod
    def move(self, search: Descent, radius: Scalar, floor: Flat, ceiling: Flat) -> Flat:
        """The next perturbation, within [floor, ceiling] and of a norm of at most `radius`."""

    def search(self, problem: Problem, clean: Float[Tensor, "b classes"]) -> AttackResult:
        """What was found, without FOSC, given the clean inputs' logits."""
        x, loss = problem.feasible.x, self.reported_loss(clean.shape[1], problem.reach)
        found = build_result(problem, x, loss(clean, problem.label), clean)
        fallen = cast(Tensor, found.misclassified)
        untouched = torch.zeros_like(fallen, dtype=torch.float64).masked_fill(~fallen, math.inf)
        whole = MinimalResult(**vars(found), nearest=x, distance=untouched)
        rows = (~fallen).nonzero()[:, 0]
        if len(rows) == 0:
            return whole
        parts = problem.oracle.side_by_side(lambda some: self._once(problem[some]), rows)
        return whole.with_rows(rows, concatenate(parts))

    def _once(self, problem: Problem) -> MinimalResult:
        """One search from each x."""
        x, threat = problem.feasible.x, self.threat
        low, high = threat.box(x)
        floor, ceiling = low - x.flatten(1), high - x.flatten(1)
        widest = threat.norm(torch.maximum(-floor, ceiling))[:, None]
        point, nearest = x, x
        radius = distance = torch.full_like(widest, math.inf)
        for step in range(self.steps):
            if step == int(_COARSE * self.steps):
                problem = _precise(problem)
            answer = problem.gradient(point, self.followed_loss(problem.reach))
            size = _distance(problem, point)[:, None].to(x.dtype)
            fallen = _confirm_nearer(problem, point, answer.logits, size < distance)
            nearer = fallen & (size < distance)
            nearest, distance = choose_rows(nearer[:, 0], point, nearest), torch.where(nearer, size, distance)
            share = (1 + math.cos(math.pi * step / self.steps)) / 2
            u = (point - x).flatten(1)
            search = Descent(u, size, fallen, distance, radius, widest, answer, share)
            radius = self.resize(search).minimum(widest)
            moved = self.move(search, radius, floor, ceiling)
            point = (x.flatten(1) + moved).clamp(low, high).reshape(x.shape)
        found = torch.isfinite(distance)
        return self._end(_precise(problem), choose_rows(found[:, 0], nearest, point), found[:, 0])

    def _end(self, problem: Problem, point: Float[Tensor, "b ..."], found: Bool[Tensor, " b"]) -> MinimalResult:
        """The result of searches whose nearest adversarial point, or else last iterate, is `point`."""
        x = problem.feasible.x
        point = self._draw_back(problem, point, found)
        distance = _distance(problem, point).masked_fill(~found, math.inf)
        x_adv = choose_rows(distance <= self.threat.eps, point, problem.feasible.project(point))
        logits = problem.logits(x_adv)
        loss = self.reported_loss(logits.shape[1], problem.reach)(logits, problem.label)
        result = build_result(problem, x_adv, loss, logits, self.steps, self.steps, _HALVINGS + 1)
        own = _distance(problem, x_adv).masked_fill(~cast(Tensor, result.misclassified), math.inf)
        nearest = choose_rows(own < distance, x_adv, choose_rows(found, point, x))
        return MinimalResult(**vars(result), nearest=nearest, distance=torch.minimum(own, distance))

    def _draw_back(self, problem: Problem, point: Float[Tensor, "b ..."], found: Bool[Tensor, " b"]) -> Tensor:
        """The adversarial points, projected onto the smallest ball in which they stay so, by bisection."""
        x, threat = problem.feasible.x, cast("Linf | L2 | L1", self.threat)
        low, high = threat.box(x)
        u, clean = (point - x).flatten(1), x.flatten(1)
        size = threat.norm(u)[:, None]
        inner, outer, best = _NEAREST * size, size, point
        for _ in range(_HALVINGS):
            middle = (inner + outer) / 2
            moved = threat.nearest(u, middle, low - clean, high - clean)
            tried = (clean + moved).clamp(low, high).reshape(x.shape)
            fallen = found & problem.won(tried, problem.logits(tried))
            best = choose_rows(fallen, tried, best)
            inner, outer = choose_rows(fallen, inner, middle), choose_rows(fallen, middle, outer)
        return best


def unit(gradient: Float[Tensor, "b ..."]) -> Flat:
    """Each gradient, flat, over its Euclidean length; 0 where it is 0."""
    flat = gradient.flatten(1)
    largest = flat.abs().amax(1, keepdim=True)  # divided out first: squares of tiny gradients would underflow
    flat = flat / largest.masked_fill(largest == 0, 1.0)
    length: Tensor = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return flat / length.clamp(min=1.0)


def _precise(problem: Problem) -> Problem:
    """The problem on the float32 network."""
    return replace(problem, oracle=problem.oracle.precise)


def _distance(problem: Problem, point: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """How far each point is from x, in the threat's norm; float64."""
    return problem.feasible.threat.norm((point.double() - problem.feasible.x.double()).flatten(1))


def _confirm_nearer(
    problem: Problem, point: Tensor, logits: Tensor, nearer: Bool[Tensor, "b 1"]
) -> Bool[Tensor, "b 1"]:
    """Who has fallen; where a point is nearer than any before, float32 decides."""
    fallen = has_won(logits, problem.label, problem.reach)
    if problem.oracle.lowered:
        rows: Int[Tensor, " k"] = (fallen & nearer[:, 0]).nonzero()[:, 0]
        if len(rows) > 0:
            fallen[rows] = problem[rows].won(point[rows], logits[rows])
    return fallen[:, None]
