"""GuidedPGD: searches end where the gauge says that they have converged, and new ones head for the nearest classes."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from innermax.attacks.base import VerdictAttack, build_result, search_survivors
from innermax.attacks.cost import SURVIVING
from innermax.attacks.problem import Problem
from innermax.attacks.search import AttackResult, choose_better, choose_rows, reassemble, split_rows
from innermax.losses import Paired, difference, margin
from innermax.oracle.oracle import Response
from innermax.threat import FeasibleSet
from innermax.utils.validation import check_count

_CONVERGED = 0.02  # relative FOSC at or below which a search is done, unless FOSC reaches over the boundary
_PROGRESS = 0.98  # the gauge has made progress where it is below this share of its lowest so far
_PATIENCE = 5  # gradients without progress after which a step is halved
_SMALLEST = 1 / 128  # step, over ε, below which a search is done
_LONGEST = 60  # gradients of one search, at most
_TRIALS = 3  # searches for one class before their spread says anything
_DOUBT = 2.0  # spreads by which further searches might get beyond the best


@dataclass(frozen=True)
class GuidedPGD(VerdictAttack):
    """Projected gradient ascent that spends its gradients where the gauge says that the search has not converged.

    Each example has one search at a time. Its steps begin at ε and are halved, from its best point, whenever its
    relative FOSC stalls. It ends once it is stationary and the linear model no longer reaches over the boundary. Then
    another search begins at another random point: the first maximises the margin, later ones head for a wrong class,
    the more often the nearer that class's logit came to the label's. An example is done where it falls, or where
    further searches promise nothing: for every class, all ended farther below the boundary than the linear model (FOSC)
    and the spread of the searches could make up for. A larger budget continues the search of a smaller one.

    Args:
        threat: any threat model.
        budget: ≥ 1 gradients per example, at most.

    Raises:
        ValueError, TypeError: an argument is not as described above.
    """

    budget: int = 1100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.budget, "budget")

    @property
    def cost(self) -> float:
        """About how many gradients per example it takes."""
        return SURVIVING**2 * self.budget

    def search(self, problem: Problem, clean: Float[Tensor, "b classes"]) -> AttackResult:
        """What was found, without FOSC, given the clean inputs' logits."""
        found = build_result(problem, problem.feasible.x, margin(clean, problem.y), clean)
        return search_survivors(found, partial(self._pursue, problem, found), problem.oracle)

    def _pursue(self, problem: Problem, found: AttackResult, rows: Int[Tensor, " k"]) -> AttackResult:
        """All searches of some of the examples; in each turn one gradient per example."""
        problem, found = problem[rows], found[rows].map(torch.clone)
        found = replace(found, forward_calls=torch.zeros_like(found.forward_calls))
        hunt, rows = _begin(problem, cast(Tensor, found.logits)), torch.arange(len(rows), device=rows.device)
        pieces: list[tuple[Tensor, AttackResult]] = []
        for _ in range(self.budget):
            answer = hunt.ask(problem)
            loss = margin(answer.logits, problem.y)
            found = choose_better(found, build_result(problem, hunt.point, loss, answer.logits, hunt.age, gradients=1))
            hunt = hunt.learn(problem, answer)
            done = cast(Tensor, found.misclassified) | hunt.is_hopeless()
            if leaving := int(done.sum()):
                going, gone = split_rows(done, leaving)
                pieces.append((rows[gone], found[gone]))
                rows, problem, found, hunt = rows[going], problem[going], found[going], hunt[going]
                if len(rows) == 0:
                    break
            hunt = hunt.move(problem.feasible)
        return reassemble([*pieces, (rows, found)])


@dataclass(frozen=True, eq=False)
class _Hunt:
    """The state of each example's present search, and what its earlier ones found; a row per example.

    `aim` is the class to reach, or the label itself for the margin. Of the present search: `point` is where it is,
    `gradient` what it follows, `age` its number of steps; `best` is its point of the highest loss; `gauge` its lowest
    relative FOSC, `stalled` the number of gradients since that made progress. `number` counts searches. For each aim:
    `reached` is the highest loss at any point; of the `tries` searches that have ended, `highest` and `lowest` are
    their losses, `bound` is the highest loss that the linear model promised at their ends.
    """

    aim: Int[Tensor, " b"]
    point: Float[Tensor, "b ..."]
    gradient: Float[Tensor, "b ..."]
    best: Float[Tensor, "b ..."]
    best_gradient: Float[Tensor, "b ..."]
    best_loss: Float[Tensor, " b"]
    best_bound: Float[Tensor, " b"]
    gauge: Float[Tensor, " b"]
    stalled: Int[Tensor, " b"]
    step_size: Float[Tensor, " b"]
    age: Int[Tensor, " b"]
    number: Int[Tensor, " b"]
    reached: Float[Tensor, "b classes"]
    tries: Int[Tensor, "b classes"]
    highest: Float[Tensor, "b classes"]
    lowest: Float[Tensor, "b classes"]
    bound: Float[Tensor, "b classes"]

    def __getitem__(self, rows: Tensor) -> "_Hunt":
        """Some of the examples."""
        return replace(self, **{name: value[rows] for name, value in vars(self).items()})

    def ask(self, problem: Problem) -> Response:
        """The network's answer at the present points, for the present aims."""
        pair = problem.y * self.reached.shape[1] + self.aim
        return replace(problem, pair=pair).gradient(self.point, Paired(_towards))

    def learn(self, problem: Problem, answer: Response) -> "_Hunt":
        """The hunt after the network's answer: with other step sizes, and with new searches where some have ended."""
        feasible, gradient = problem.feasible, answer.gradient
        gap, gauge = feasible.gap(gradient, self.point), feasible.gap(gradient, self.point, relative=True)
        bound = (answer.loss + gap).masked_fill(gauge.isnan(), math.inf)  # no slope, no bound
        done = gauge.isnan() | ((gauge <= _CONVERGED) & (bound < 0))
        gauge = gauge.nan_to_num(0.0)
        higher = answer.loss > self.best_loss
        stalled = (self.stalled + 1).masked_fill(gauge <= _PROGRESS * self.gauge, 0)
        halved = stalled >= _PATIENCE
        best, best_gradient = (
            choose_rows(higher, self.point, self.best),
            choose_rows(higher, gradient, self.best_gradient),
        )
        hunt = replace(
            self,
            point=choose_rows(halved, best, self.point),
            gradient=choose_rows(halved, best_gradient, gradient),
            best=best,
            best_gradient=best_gradient,
            best_loss=answer.loss.maximum(self.best_loss),
            best_bound=torch.where(higher, bound, self.best_bound),
            gauge=gauge.minimum(self.gauge),
            stalled=stalled.masked_fill(halved, 0),
            step_size=torch.where(halved, self.step_size / 2, self.step_size),
            age=self.age + 1,
            reached=self.reached.maximum(_losses(answer.logits, problem.y)),
        )
        smallest = _SMALLEST * feasible.threat.eps
        ended = done | (hunt.step_size < smallest) | (hunt.age >= _LONGEST)
        rows = ended.nonzero()[:, 0]
        return hunt._with_rows(rows, hunt[rows]._renew(problem[rows])) if len(rows) > 0 else hunt

    def _with_rows(self, rows: Int[Tensor, " k"], part: "_Hunt") -> "_Hunt":
        """The hunt with some examples replaced by those of `part`."""
        return replace(self, **{name: old.index_copy(0, rows, getattr(part, name)) for name, old in vars(self).items()})

    def _renew(self, problem: Problem) -> "_Hunt":
        """The next searches, where the present ones have ended: another class, another random point."""
        aim, column = self.aim[:, None], self.best_loss[:, None]
        highest = self.highest.scatter(1, aim, self.highest.gather(1, aim).maximum(column))
        lowest = self.lowest.scatter(1, aim, self.lowest.gather(1, aim).minimum(column))
        bound = self.bound.scatter(1, aim, self.bound.gather(1, aim).maximum(self.best_bound[:, None]))
        tries = self.tries.scatter_add(1, aim, torch.ones_like(aim))
        ended = replace(self, highest=highest, lowest=lowest, bound=bound, tries=tries, number=self.number + 1)
        nearest = (-self.reached * (1 + tries).square()).argmin(1)
        return ended._begin(problem, nearest)

    def _begin(self, problem: Problem, aim: Int[Tensor, " b"]) -> "_Hunt":
        """Searches at their starts."""
        nothing, zeros = torch.full_like(self.best_loss, -math.inf), torch.zeros_like(aim)
        return replace(
            self,
            aim=aim,
            point=problem.feasible.sample(problem.keys(self.number)),
            best_loss=nothing,
            best_bound=nothing,
            gauge=-nothing,
            stalled=zeros,
            step_size=torch.full_like(nothing, problem.feasible.threat.eps),
            age=zeros,
        )

    def move(self, feasible: FeasibleSet) -> "_Hunt":
        """The next points; searches that begin stay at their starts."""
        rows = (self.age > 0).nonzero()[:, 0]
        stepped = feasible[rows].step(self.point[rows], self.gradient[rows], self.step_size[rows])
        return replace(self, point=self.point.index_copy(0, rows, stepped))

    def is_hopeless(self) -> Bool[Tensor, " b"]:
        """Whose searches for every class all ended too far from the boundary for further ones to get there."""
        spread = (self.highest - self.lowest).masked_fill(self.tries <= 1, 0.0).amax(1, keepdim=True)
        short = (self.tries > 0) & (self.bound + _DOUBT * spread < 0)
        return short.all(1) & (self.tries.amax(1) >= _TRIALS)


def _begin(problem: Problem, clean: Float[Tensor, "b classes"]) -> _Hunt:
    """The first searches: on the margin."""
    x, zeros, none = problem.feasible.x, torch.zeros_like(problem.y), torch.full_like(clean, -math.inf)
    nothing = none[:, 0]
    hunt = _Hunt(
        aim=problem.y,
        point=x,
        gradient=torch.zeros_like(x),
        best=x,
        best_gradient=torch.zeros_like(x),
        best_loss=nothing,
        best_bound=nothing,
        gauge=-nothing,
        stalled=zeros,
        step_size=nothing,
        age=zeros,
        number=zeros,
        reached=_losses(clean, problem.y),
        tries=torch.zeros_like(clean, dtype=torch.int64),
        highest=none,
        lowest=-none,
        bound=none,
    )
    return hunt._begin(problem, problem.y)


def _towards(logits: Tensor, label: Tensor, aim: Tensor) -> Float[Tensor, " b"]:
    """The aim's logit − the label's; the margin where the aim is the label itself."""
    return torch.where(aim == label, margin(logits, label), difference(logits, label, aim))


def _losses(logits: Float[Tensor, "b classes"], label: Int[Tensor, " b"]) -> Float[Tensor, "b classes"]:
    """The loss of each aim."""
    own = label[:, None]
    return (logits - logits.gather(1, own)).scatter(1, own, margin(logits, label)[:, None])
