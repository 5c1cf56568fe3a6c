"""FGSM, PGD and C&W∞: a loss, step sizes and a stopping rule over the one search."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast, get_args

import torch
from torch import Tensor

from innermax.attacks.base import BaseAttack
from innermax.attacks.cost import FORWARD
from innermax.attacks.problem import Problem
from innermax.attacks.search import (
    AttackResult,
    Final,
    Gauge,
    Observer,
    choose_better,
    choose_rows,
    concatenate,
    search,
)
from innermax.losses import CappedMargin, Loss, find_loss, is_stationary_at_clean, make_reaching, needs_clean
from innermax.oracle.oracle import Oracle, Response
from innermax.threat import FeasibleSet, Threat
from innermax.utils.serialization import ADDED_FIELD
from innermax.utils.validation import check_count, check_integer, check_labels, check_number, unknown


@dataclass(frozen=True)
class PGD(BaseAttack):
    """Projected gradient descent (Madry et al. 2018): `steps` steepest-ascent steps on the loss, inside X(x).

    Args:
        threat: the threat model.
        steps: K ≥ 1, at most.
        step_size: length of a step in the threat's norm; None for ε/4 (Wang et al. 2019), a number > 0, a sequence of
            one per step, or "annealed": ε for the first quarter of the steps, then half as long with every quarter.
            math.inf jumps to the maximizer.
        random_start: start from a random point of X(x) instead of x; a number σ > 0: from x and Gaussian noise of that
            standard deviation, projected onto X(x).
        loss: "cross_entropy", "margin", "dlr" or a function (logits, label) → (B,); or a value that also depends on the
            network's answer to the clean input (see innermax.losses), for one forward pass.
        restarts: searches from different random starts; the best is kept for each example.
        stop_at: value of the gauge at or below which an example stops, after at least one step; None: never.
        gauge: FOSC "exact" over X(x), over the "ball" alone (the paper's closed form), or "relative", in [0, 1].
        stop_on_success: an example that has fallen leaves the search.
        steps_after_success: with stop_on_success, it leaves only after so many further steps from points where it has
            fallen (Zhang et al. 2020, Algorithm 1).
        eot: ≥ 1 answers whose mean gradient, loss and logits each step follows, for models that draw random numbers
            (expectation over transformation, Athalye et al. 2018). They count as so many gradients; FOSC is that of the
            mean gradient. The draws repeat with the seed.

    Raises:
        ValueError, TypeError: an argument is not as described above.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"target", "start"})
    steps: int = 10
    step_size: float | Sequence[float] | str | None = None
    random_start: bool | float = True
    loss: str | Loss = "cross_entropy"
    restarts: int = 1
    stop_at: float | None = None
    gauge: Gauge = "exact"
    stop_on_success: bool = False
    steps_after_success: int = field(default=0, metadata=ADDED_FIELD)
    eot: int = field(default=1, metadata=ADDED_FIELD)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.steps, "steps")
        check_count(self.restarts, "restarts")
        check_count(self.eot, "eot")
        if not isinstance(self.random_start, bool):
            check_number(
                self.random_start, "random_start", "a bool or a finite number > 0", lambda sd: 0 < sd < math.inf
            )
        check_integer(self.steps_after_success, "steps_after_success", 0)
        if self.steps_after_success and not self.stop_on_success:
            raise ValueError(f"steps_after_success needs stop_on_success=True, got {self.steps_after_success} without")
        if self.restarts > 1 and not self.random_start:
            raise ValueError("restarts need random_start=True: without it every restart is the same search")
        if self.gauge not in get_args(Gauge):
            raise unknown("gauge", self.gauge, get_args(Gauge))
        if self.stop_at is not None and (isinstance(self.stop_at, bool) or not isinstance(self.stop_at, int | float)):
            raise TypeError(f"stop_at must be a number or None, got {self.stop_at!r}")
        if self.stop_at is not None and not self.stop_at >= 0:
            raise ValueError(f"stop_at must be ≥ 0 or None, got {self.stop_at}")
        if is_stationary_at_clean(self.objective()) and not self.random_start:
            raise ValueError(
                f"random_start must be True with loss {self.loss!r}, which has no slope at x to follow, got False"
            )
        self.step_sizes()

    def step_sizes(self) -> tuple[float, ...]:
        """The length of each step."""
        if self.step_size is None:
            return (self.threat.eps / 4,) * self.steps
        if isinstance(self.step_size, str):
            if self.step_size != "annealed":
                raise unknown("step_size", self.step_size, ["annealed"])
            return tuple(self.threat.eps * 0.5 ** (4 * step // self.steps) for step in range(self.steps))
        try:
            sizes = (
                tuple(float(size) for size in self.step_size)
                if isinstance(self.step_size, Sequence)
                else (float(self.step_size),) * self.steps
            )
        except (TypeError, ValueError):
            raise TypeError(f"step_size must be None, a number, numbers or 'annealed', got {self.step_size}") from None
        if len(sizes) != self.steps:
            raise ValueError(f"step_size must hold one length per step ({self.steps}), got {len(sizes)}")
        # A share of ε is 0 where ε is.
        if not all(size > 0 or size == self.threat.eps == 0 for size in sizes):
            raise ValueError(f"step_size must be > 0, got {self.step_size}")
        return sizes

    def objective(self) -> Loss:
        """The function behind `loss`."""
        return find_loss(self.loss)

    @property
    def cost(self) -> float:
        """About how many gradients per example it takes."""
        return self.eot * (self.steps * self.restarts + 1 + FORWARD * (2 if needs_clean(self.objective()) else 1))

    @property
    def samples(self) -> int:
        """How many answers of the network are averaged each time it is asked."""
        return self.eot

    def solve(self, problem: Problem, final: Final) -> AttackResult:
        """The best of the restarts; with stop_on_success only survivors start again."""
        loss = self.checked_loss(problem)
        each = "loss" if final == "none" and self.restarts > 1 else final  # restarts are compared by their loss

        def best_of(rows: Tensor) -> AttackResult:
            some, again = _prepare(problem[rows], loss, each), torch.arange(len(rows), device=rows.device)
            best = self.search_once(some, loss, 0, each)
            for restart in range(1, self.restarts):
                if self.stop_on_success:
                    again = (~cast(Tensor, best.misclassified)).nonzero()[:, 0]
                if len(again) > 0:
                    other = self.search_once(some[again], loss, restart, each)
                    best = best.with_rows(again, choose_better(best[again], other))
            return replace(best, forward_calls=best.forward_calls + self.eot) if needs_clean(loss) else best

        rows = torch.arange(len(problem.y), device=problem.y.device)
        return concatenate(problem.oracle.side_by_side(best_of, rows))

    def search_once(
        self, problem: Problem, loss: Loss, restart: int, final: Final, observe: Observer | None = None
    ) -> AttackResult:
        """One search of all examples; the first, restart 0, begins at the problem's start where it has one.

        problem: with what the loss is given.
        """
        warm = problem.start is not None and restart == 0
        found = search(
            problem.asked,
            problem.feasible,
            self.start(problem, loss, restart),
            problem.label,
            loss,
            self.step_sizes(),
            given=problem.given,
            reach=problem.reach,
            gauge=self.gauge,
            stop_at=self.stop_at,
            stop_on_success=self.stop_on_success,
            steps_after_success=self.steps_after_success,
            warm=warm,
            final=final,
            observe=observe,
        )
        if self.eot == 1:
            return found
        gradients, forwards = found.gradient_calls * self.eot, found.forward_calls * self.eot
        return replace(found, gradient_calls=gradients, forward_calls=forwards)

    def start(self, problem: Problem, loss: Loss, restart: int) -> Tensor:
        """Where a search begins: where it was told to, at x, or at a random point, as is each that would have no slope
        to follow.
        """
        feasible, told = problem.feasible, problem.start if restart == 0 else None
        if told is None:
            return self._draw_start(problem, restart) if self.random_start else feasible.x
        if is_stationary_at_clean(loss):
            clean = (told == feasible.x).flatten(1).all(1)
            if told.is_cuda or bool(clean.any()):  # usually none; on a GPU a choice costs less than waiting
                return choose_rows(clean, feasible.sample(problem.keys(restart)), told)
        return told

    def _draw_start(self, problem: Problem, restart: int) -> Tensor:
        """A random start, in the ball or near x."""
        key = problem.keys(restart)
        if self.random_start is True:
            return problem.feasible.sample(key)
        return problem.feasible.sample_near(key, self.random_start)

    def gauged_point(self, feasible: FeasibleSet, x_adv: Tensor) -> Tensor:
        """Where the gauges of a point that the attack has found are measured: there, as it lies in X(x)."""
        return x_adv

    def checked_loss(self, problem: Problem) -> Loss:
        """What a search of the problem maximises; labels that the model has no class for raise ValueError."""
        loss = make_reaching(self.objective()) if problem.reach else self.objective()
        # The problem's labels are checked where the number of classes is known, else once the clean inputs are asked.
        if problem.oracle.classes is not None or needs_clean(loss):
            return loss
        name = "target" if problem.reach else "y"
        highest = int(problem.label.max())  # read once: every look at a device's numbers waits for it

        def checked(logits: Tensor, label: Tensor) -> Tensor:
            if highest >= logits.shape[1]:
                check_labels(label, len(label), logits.shape[1], name)
            return loss(logits, label)

        return checked  # a network that nobody has asked before is asked as it is, and nothing is recorded

    def gradient_at(self, oracle: Oracle, x: Tensor, y: Tensor, x_adv: Tensor, seed: int = 0) -> Response:
        """The gradient of the attack's loss at points x_adv of X(x), with which their gauges are measured.

        x, x_adv: (B, *features); y: (B,); seed: of what the model draws.
        """
        with oracle.private_randomness(seed):
            loss = self.objective()
            problem = replace(Problem.of(self.threat, oracle, x, y, seed=seed), samples=self.samples)
            return problem.prepare(loss, oracle).gradient(x_adv, loss)


def _prepare(problem: Problem, loss: Loss, final: Final) -> Problem:
    """The problem with what the loss is given; from float32 logits where the end of the search is scored in float32."""
    return problem.prepare(loss, problem.oracle if final == "none" else problem.oracle.precise)


def FGSM(threat: Threat, loss: str | Loss = "cross_entropy") -> PGD:
    """The fast gradient sign method (Goodfellow et al. 2015): one jump from x to the maximizer of the linear model.

    A loss that has no slope at x, such as the KL divergence from the clean prediction, is followed from a random point.
    """
    random_start = is_stationary_at_clean(find_loss(loss))
    return PGD(threat, steps=1, step_size=math.inf, random_start=random_start, loss=loss)


def CW(threat: Threat, steps: int = 30, confidence: float = 0.0) -> PGD:
    """C&W∞: the margin, capped at `confidence` ≥ 0, maximised by PGD (Carlini & Wagner 2017; Wang et al. 2019, §5.1).

    An example whose margin has reached the cap has a zero gradient: it has fallen, and stays where it is.
    """
    if not (math.isfinite(confidence) and confidence >= 0):
        raise ValueError(f"confidence must be a finite number ≥ 0, got {confidence}")
    return PGD(threat, steps=steps, loss=CappedMargin(confidence))
