"""APGD: projected gradient ascent with momentum that chooses its own step sizes."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from innermax.attacks.base import VerdictAttack, build_result, search_survivors
from innermax.attacks.cost import SURVIVING
from innermax.attacks.problem import Problem
from innermax.attacks.search import AttackResult, choose_rows, reassemble, split_rows
from innermax.losses import (
    Loss,
    Paired,
    TowardsLikeliest,
    dlr,
    find_loss,
    make_reaching,
    make_targeted,
    margin,
    needs_clean,
)
from innermax.oracle.oracle import Response
from innermax.threat import L1, L2, FeasibleSet, Linf
from innermax.utils import randomness
from innermax.utils.validation import check_count

_NEW = 0.75  # α: share of the new step in a move; the rest repeats the move before
_RISES = 0.75  # ρ: a step size lasts while the loss rises in at least this share of the steps
_THINNING = 1.5  # L1: a step moves fewer coordinates than the best point has moved by this factor, and shrinks by it
_SPARSER = 0.95  # L1: below this share of the moved coordinates before, a point has become sparser
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class APGD(VerdictAttack):
    """Auto-PGD (Croce & Hein 2020a, Algorithm 1; for L1: Croce & Hein 2021).

    Steps of 2ε with momentum, halved at checkpoints where the loss rose too seldom, with a new start from the best
    point. L1: steps on a few coordinates, whose number follows the best point's sparsity, first in balls of 3ε and 2ε.
    Returned is the point where an example fell, or else the point of the highest loss.

    Args:
        threat: any threat model. A norm other than L∞, L2 and L1 is searched like L∞ and L2, by the threat's own steps.
        steps: ≥ 1 in each search, at most.
        restarts: ≥ 1 searches from different random starts, of survivors only.
        loss: "cross_entropy", "margin", "dlr" or a function (logits, label) → (B,). With too few classes for "dlr" (2;
            3 with targets) its numerator alone is maximised.
        targets: None, or the number ≥ 1 of wrong classes, the most likely on the clean input first, that the searches
            head for one after the other; a class that does not exist is left out.
        eot: ≥ 1 gradients that are averaged in each step, for models that draw random numbers.

    Raises:
        ValueError, TypeError: an argument is not as described above.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"target"})
    steps: int = 100
    restarts: int = 1
    loss: str | Loss = "cross_entropy"
    targets: int | None = None
    eot: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "restarts", "eot"):
            check_count(getattr(self, name), name)
        if self.targets is not None:
            check_count(self.targets, "targets")
        if needs_clean(find_loss(self.loss)):
            raise ValueError(f"loss of APGD must depend on logits and label alone, got {self.loss!r}; PGD takes it")

    @property
    def cost(self) -> float:
        """About how many gradients per example it takes."""
        return SURVIVING * self.steps * self.restarts * (self.targets or 1) * self.eot

    @property
    def samples(self) -> int:
        """How many answers of the network are averaged each time it is asked."""
        return self.eot

    def check(self, problem: Problem) -> None:
        """Raises ValueError where the attack cannot take the problem on: targets choose the labels to reach."""
        super().check(problem)
        if problem.reach and self.targets is not None:
            raise ValueError(f"target needs targets=None: targets={self.targets} chooses the classes itself")

    def search(self, problem: Problem, clean: Float[Tensor, "b classes"]) -> AttackResult:
        """What was found, without FOSC, given the clean inputs' logits."""
        classes = clean.shape[1]
        if self._loss(classes) is not find_loss(self.loss):
            _log.warning("loss %r needs more than the model's %d classes: the margin is maximised", self.loss, classes)
        loss = self.reported_loss(classes, problem.reach)
        found = build_result(problem, problem.feasible.x, loss(clean, problem.label), clean)
        aimed = (problem,) if self.targets is None else problem.towards(self.targets, clean)
        for number, one in enumerate(aimed):
            for restart in range(self.restarts):
                found = search_survivors(found, partial(self._once, one, loss, (number, restart)), problem.oracle)
        return found

    def reported_loss(self, classes: int, reach: bool) -> Loss:
        """The loss that is maximised; with targets that for the wrong class with the largest logit."""
        loss = self._loss(classes)
        if self.targets is not None:
            return TowardsLikeliest(make_targeted(loss))
        return make_reaching(loss) if reach else loss

    def _loss(self, classes: int) -> Loss:
        loss = find_loss(self.loss)
        return margin if loss is dlr and classes < (3 if self.targets is None else 4) else loss

    def _once(self, problem: Problem, loss: Loss, streams: tuple[int, int], rows: Int[Tensor, " k"]) -> AttackResult:
        """One search of some of the examples; its result holds the reported loss."""
        problem = problem[rows]
        climbed = Paired(loss.loss) if isinstance(loss, TowardsLikeliest) else loss
        key = problem.keys(*streams)
        if isinstance(self.threat, L1):
            found = self._search_l1(problem, climbed, key)
        else:
            found = _climb(problem, climbed, problem.feasible.sample(key), self.steps)
        if climbed is loss:
            return found
        return replace(found, loss=loss(cast(Tensor, found.logits), problem.y))

    def _search_l1(self, problem: Problem, loss: Loss, key: Int[Tensor, " b"]) -> AttackResult:
        """One search in L1: three tenths of the steps each in balls of 3ε and 2ε, where nothing counts as fallen."""
        feasible, third = problem.feasible, 3 * self.steps // 10
        noise = randomness.normal(key, feasible.floor.shape[1]).to(feasible.x)
        point, cost = feasible.x + noise.reshape(feasible.x.shape), torch.zeros_like(problem.y)
        for factor in (3, 2) if third > 0 else ():
            ball = replace(problem, feasible=feasible.with_radius(factor * self.threat.eps))
            found = _climb(ball, loss, ball.feasible.project(point), third, stop=False)
            point, cost = found.x_adv, cost + found.gradient_calls
        found = _climb(problem, loss, feasible.project(point), self.steps - 2 * third)
        return replace(found, steps=found.steps + 2 * third, gradient_calls=found.gradient_calls + cost)


@dataclass(frozen=True, eq=False)
class _Climb:
    """The state of searches; each value has a row per example, and rows leave together.

    `best` is the iterate of the highest loss. `rises` counts the increases of the loss since the last checkpoint; there
    `checked` was the highest loss, `reduced` says whether the step size was halved, and `sparsity` in how many
    coordinates the best point differed from x.
    """

    rows: Int[Tensor, " b"]
    point: Float[Tensor, "b ..."]
    previous: Float[Tensor, "b ..."]
    answer: Response
    best: Float[Tensor, "b ..."]
    best_answer: Response
    best_step: Int[Tensor, " b"]
    step_size: Float[Tensor, " b"]
    rises: Int[Tensor, " b"]
    checked: Float[Tensor, " b"]
    reduced: Bool[Tensor, " b"]
    sparsity: Int[Tensor, " b"]

    def __getitem__(self, rows: Tensor) -> "_Climb":
        """Some of the searches."""
        return replace(self, **{name: value[rows] for name, value in vars(self).items()})

    def move(self, feasible: FeasibleSet, first: bool) -> Float[Tensor, "b ..."]:
        """The next iterates: a step and, except in L1, some of the last move; projected."""
        stepped = self._step(feasible)
        if first or isinstance(feasible.threat, L1):
            return stepped
        move = _NEW * (stepped - self.point) + (1 - _NEW) * (self.point - self.previous)
        return feasible.project(self.point + move)

    def _step(self, feasible: FeasibleSet) -> Float[Tensor, "b ..."]:
        """The projected steps; of a norm whose steepest ascent is not written here, the threat's own."""
        if type(feasible.threat) not in (Linf, L2) and not isinstance(feasible.threat, L1):
            return feasible.step(self.point, self.answer.gradient, self.step_size)
        direction = _direction(feasible, self.answer.gradient.flatten(1), self.sparsity).reshape(self.point.shape)
        step = self.step_size.reshape(-1, *[1] * (direction.ndim - 1)) * direction
        return feasible.project(self.point + step)

    def advance(self, point: Float[Tensor, "b ..."], answer: Response, step: int) -> "_Climb":
        """The searches at their next iterates."""
        higher = answer.loss > self.best_answer.loss
        return replace(
            self,
            point=point,
            previous=self.point,
            answer=answer,
            best=choose_rows(higher, point, self.best),
            best_answer=_choose_answers(higher, answer, self.best_answer),
            best_step=self.best_step.masked_fill(higher, step),
            rises=self.rises + (answer.loss > self.answer.loss),
        )

    def checkpoint(self, feasible: FeasibleSet, interval: int) -> "_Climb":
        """The searches with the step sizes until the next checkpoint; some start again from their best point."""
        if isinstance(feasible.threat, L1):
            sparsity, eps = _nonzeros(self.best - feasible.x), feasible.threat.eps
            again = sparsity < _SPARSER * self.sparsity
            step_size = (self.step_size / _THINNING).clamp(min=eps / 10).masked_fill(again, eps)
            return replace(self, step_size=step_size, sparsity=sparsity)._restart(again)
        highest = self.best_answer.loss
        again = (self.rises < _RISES * interval) | (~self.reduced & (highest == self.checked))
        step_size = torch.where(again, self.step_size / 2, self.step_size)
        rises = torch.zeros_like(self.rises)
        return replace(self, step_size=step_size, rises=rises, checked=highest, reduced=again)._restart(again)

    def _restart(self, again: Bool[Tensor, " b"]) -> "_Climb":
        """The searches, some of them back at their best point."""
        answer = _choose_answers(again, self.best_answer, self.answer)
        return replace(self, point=choose_rows(again, self.best, self.point), answer=answer)


def _climb(problem: Problem, loss: Loss, start: Float[Tensor, "b ..."], steps: int, stop: bool = True) -> AttackResult:
    """Climbs from `start` over X(x); with `stop`, an example stops once the adversary has what it wants."""
    search = _begin(problem, start, problem.gradient(start, loss))
    checkpoints = _checkpoints(steps, isinstance(problem.feasible.threat, L1))
    pieces: list[tuple[Tensor, AttackResult]] = []
    for step in range(steps + 1):
        if step > 0:
            point = search.move(problem.feasible, step == 1)
            search = search.advance(point, problem.gradient(point, loss), step)
        won = problem.won(search.point, search.answer.logits)
        if stop and (leaving := int(won.sum())):
            going, done = split_rows(won, leaving)
            pieces.append((search.rows[done], _end(problem[done], search.point[done], search.answer[done], step, step)))
            if len(going) == 0:
                return reassemble(pieces)
            search, problem = search[going], problem[going]
        if step in checkpoints:
            search = search.checkpoint(problem.feasible, checkpoints[step])
    return reassemble([*pieces, (search.rows, _end(problem, search.best, search.best_answer, search.best_step, steps))])


def _end(problem: Problem, x_adv: Tensor, answer: Response, reached: int | Tensor, steps: int) -> AttackResult:
    """The result of searches that took so many steps; x_adv is where they were at step `reached`."""
    return build_result(problem, x_adv, answer.loss, answer.logits, reached, gradients=steps + 1)


def _begin(problem: Problem, start: Tensor, answer: Response) -> _Climb:
    """Searches at their starts."""
    eps, zeros = problem.feasible.threat.eps, torch.zeros_like(problem.y)
    return _Climb(
        rows=torch.arange(len(start), device=start.device),
        point=start,
        previous=start,
        answer=answer,
        best=start,
        best_answer=answer,
        best_step=zeros,
        step_size=torch.full_like(answer.loss, eps if isinstance(problem.feasible.threat, L1) else 2 * eps),
        rises=zeros,
        checked=answer.loss,
        reduced=torch.ones_like(zeros, dtype=torch.bool),
        sparsity=_nonzeros(start - problem.feasible.x),
    )


def _checkpoints(steps: int, sparse: bool) -> dict[int, int]:
    """The steps after which step sizes are reconsidered, each with the number of steps since the one before."""
    if sparse:
        every = max(4 * steps // 100, 1)
        return dict.fromkeys(range(every, steps + 1, every), every)
    per_cent, gap, last, found = 22, 22, 0, {}
    while per_cent < 100:
        step = -(-per_cent * steps // 100)
        if step > last:
            found[step], last = step - last, step
        gap = max(gap - 3, 6)
        per_cent += gap
    return found


def _direction(feasible: FeasibleSet, gradient: Float[Tensor, "b d"], sparsity: Int[Tensor, " b"]) -> Tensor:
    """Steepest ascent, of length 1 in the threat's norm; L1: equal shares of as many coordinates as sparsity grants."""
    if isinstance(feasible.threat, Linf):
        return gradient.sign()
    size = gradient.abs()
    if isinstance(feasible.threat, L1):
        count = (sparsity / _THINNING).long().clamp(min=1)
        smallest = size.topk(int(count.max()), dim=1).values.gather(1, count[:, None] - 1)
        chosen = gradient.sign() * (size >= smallest)
        return chosen / chosen.abs().sum(1, keepdim=True).clamp(min=1)
    largest = size.amax(1, keepdim=True)  # divided out first: squares of tiny gradients would underflow
    scaled = gradient / largest.masked_fill(~(largest > 0), 1.0)
    return scaled / feasible.threat.norm(scaled)[:, None].clamp(min=1)


def _nonzeros(difference: Float[Tensor, "b ..."]) -> Int[Tensor, " b"]:
    return difference.flatten(1).count_nonzero(dim=1)


def _choose_answers(take: Bool[Tensor, " b"], one: Response, other: Response) -> Response:
    """The answers of `one` where `take` is true, else those of `other`."""
    return Response(*(choose_rows(take, getattr(one, name), getattr(other, name)) for name in vars(one)))
