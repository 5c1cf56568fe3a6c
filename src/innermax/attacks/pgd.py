"""FGSM, PGD and C&W∞: a loss, step sizes and a stopping rule over the one search."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from innermax.attacks.base import Problem, inspected
from innermax.attacks.search import AttackResult, Final, Gauge, better, concatenated, search
from innermax.losses import CappedMargin, Loss, find_loss, reaching
from innermax.oracle.oracle import Oracle
from innermax.threat import Threat
from innermax.utils.validation import check_count, check_inputs, check_labels, unknown


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent (Madry et al. 2018): `steps` steepest-ascent steps on the loss, inside X(x).

    Args:
        threat: the threat model.
        steps: K ≥ 1, at most.
        step_size: length of a step in the threat's norm; None for ε/4 (Wang et al. 2019), a number > 0, a sequence of
            one a step, or "annealed": ε for the first quarter of the steps, then half as long with every quarter.
            math.inf jumps to the maximizer.
        random_start: start from a random point of X(x) instead of x.
        loss: "cross_entropy", "margin", "dlr" or a function (logits, label) → (B,).
        restarts: searches from different random starts; the best is kept for each example.
        stop_at: value of the gauge at or below which an example stops, after at least one step; None: never.
        gauge: FOSC "exact" over X(x), over the "ball" alone (the paper's closed form), or "relative", in [0, 1].
        stop_on_success: an example that has fallen leaves the search.

    Raises:
        ValueError, TypeError: an argument is outside what is said above.
    """

    threat: Threat
    steps: int = 10
    step_size: float | Sequence[float] | str | None = None
    random_start: bool = True
    loss: str | Loss = "cross_entropy"
    restarts: int = 1
    stop_at: float | None = None
    gauge: Gauge = "exact"
    stop_on_success: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Threat):
            raise TypeError(f"threat must be a threat model such as Linf(8 / 255), got {self.threat!r}")
        check_count(self.steps, "steps")
        check_count(self.restarts, "restarts")
        if self.restarts > 1 and not self.random_start:
            raise ValueError("restarts need random_start=True: without it every restart is the same search")
        if self.gauge not in get_args(Gauge):
            raise unknown("gauge", self.gauge, get_args(Gauge))
        if self.stop_at is not None and (isinstance(self.stop_at, bool) or not isinstance(self.stop_at, int | float)):
            raise TypeError(f"stop_at must be a number or None, got {self.stop_at!r}")
        if self.stop_at is not None and not self.stop_at >= 0:
            raise ValueError(f"stop_at must be ≥ 0 or None, got {self.stop_at}")
        self.objective()
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
            raise ValueError(f"step_size must hold one length a step ({self.steps}), got {len(sizes)}")
        if not all(size > 0 for size in sizes):
            raise ValueError(f"step_size must be > 0, got {self.step_size}")
        return sizes

    def objective(self) -> Loss:
        """The function behind `loss`."""
        return find_loss(self.loss)

    def __call__(
        self,
        model: nn.Module | Oracle,
        x: Float[Tensor, "b ..."],
        y: Int[Tensor, " b"],
        *,
        target: Int[Tensor, " b"] | None = None,
        seed: int = 0,
        index: Int[Tensor, " b"] | None = None,
        start: Float[Tensor, "b ..."] | None = None,
        final: Final = "gradient",
    ) -> AttackResult:
        """Attacks a batch.

        Args:
            model: any nn.Module with logits, in any mode, left exactly as found; or an Oracle of one.
            x: (B, *features) clean inputs within the threat's bounds; half precision is attacked in float32.
            y: (B,) int64 true labels.
            target: (B,) int64 labels to reach instead of y to leave.
            seed: any integer; with `index` it alone decides the random starts.
            index: (B,) int64 example numbers; 0…B − 1 unless told.
            start: (B, *features) where the first search begins, projected onto X(x): where an earlier one ended. An
                example whose gauge is ≤ stop_at there takes no step. None: as random_start says.
            final: what is computed where the steps end: "gradient" (loss, logits, FOSC), "loss" (loss, logits) or
                "none".

        Raises:
            ValueError, TypeError: x, y, target, index or start do not fit, or the model's answer is not (B, classes)
                numbers.
        """
        problem = Problem.of(self.threat, model, x, y, target=target, seed=seed, index=index, final=final)
        if start is not None:
            check_inputs(start, "start")
            if start.shape != x.shape:
                raise ValueError(f"start must have x's shape {tuple(x.shape)}, got {tuple(start.shape)}")
            start = self.threat.project(start.to(problem.feasible.x.dtype), problem.feasible.x)
        with problem.oracle.private_randomness(seed):
            result = self._best(problem, start, final)
        return inspected(result, y)

    def _best(self, problem: Problem, given: Tensor | None, final: Final) -> AttackResult:
        """The best of the restarts; with stop_on_success only survivors start again."""
        loss, label, reach = self.objective(), problem.label, problem.reach
        options: dict[str, Any] = {
            "loss": _Checked(reaching(loss) if reach else loss, "target" if reach else "y", int(label.max())),
            "step_sizes": self.step_sizes(),
            "reach": reach,
            "gauge": self.gauge,
            "stop_at": self.stop_at,
            "stop_on_success": self.stop_on_success,
            "final": "loss" if final == "none" and self.restarts > 1 else final,
        }

        def once(rows: Tensor, restart: int) -> AttackResult:
            part = problem[rows]
            start = given[rows] if given is not None and restart == 0 else None
            warm = start is not None
            if start is None:
                start = part.feasible.sample(part.keys(restart)) if self.random_start else part.feasible.x
            return search(part.oracle, part.feasible, start, part.label, warm=warm, **options)

        def best_of(rows: Tensor) -> AttackResult:
            best, again = once(rows, 0), torch.arange(len(rows), device=rows.device)
            for restart in range(1, self.restarts):
                if self.stop_on_success:
                    again = (~cast(Tensor, best.misclassified)).nonzero()[:, 0]
                if len(again) > 0:
                    best = best.updated(again, better(best[again], once(rows[again], restart)))
            return best

        return concatenated(problem.oracle.side_by_side(best_of, torch.arange(len(label), device=label.device)))


def FGSM(threat: Threat, loss: str | Loss = "cross_entropy") -> PGD:
    """The fast gradient sign method (Goodfellow et al. 2015): one jump from x to the maximizer of the linear model."""
    return PGD(threat, steps=1, step_size=math.inf, random_start=False, loss=loss)


def CW(threat: Threat, steps: int = 30, confidence: float = 0.0) -> PGD:
    """C&W∞: the margin, capped at `confidence` ≥ 0, maximised by PGD (Carlini & Wagner 2017; Wang et al. 2019, §5.1).

    An example whose margin has reached the cap has a zero gradient: it has fallen, and stays where it is.
    """
    if not (math.isfinite(confidence) and confidence >= 0):
        raise ValueError(f"confidence must be a finite number ≥ 0, got {confidence}")
    return PGD(threat, steps=steps, loss=CappedMargin(confidence))


@dataclass(frozen=True)
class _Checked:
    """A loss that refuses labels the model has no class for; a value, so that a recorded computation is found again."""

    loss: Loss
    name: str
    highest: int  # read once: every look at a device's numbers waits for it

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.highest >= logits.shape[1]:
            check_labels(label, len(label), logits.shape[1], self.name)
        return self.loss(logits, label)
