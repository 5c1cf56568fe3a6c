"""N-FGSM: steps from noise beyond the ball, which they may leave."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from innermax.attacks.pgd import PGD
from innermax.attacks.problem import Problem
from innermax.attacks.search import AttackResult, Final, Observer, gauges
from innermax.losses import Loss
from innermax.threat import FeasibleSet
from innermax.utils.validation import check_number


@dataclass(frozen=True)
class NoisyPGD(PGD):
    """PGD that starts from uniform noise in a ball of another radius, and is projected onto the pixel bounds alone.

    With one step it is N-FGSM (de Jorge et al. 2022, Algorithm 1): x' = x + η + α·sign ∇ℓ(x + η). What it finds lies in
    the bounds, but mostly outside X(x): it is for training, not for evaluation, which projects it onto X(x). Loss and
    logits of a result belong to x_adv, its gauges to the projection of x_adv onto X(x), for one gradient more.

    Args:
        noise: radius of the ball that η is drawn from, over ε; ≥ 0.
    """

    noise: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_start is not True:
            raise ValueError(f"random_start must be True, as noise says where it starts, got {self.random_start}")
        check_number(self.noise, "noise", "a finite number ≥ 0", lambda value: 0 <= value < math.inf)

    def search_once(
        self, problem: Problem, loss: Loss, restart: int, final: Final, observe: Observer | None = None
    ) -> AttackResult:
        """One search within the bounds; x, noise and steps together reach no farther than the ball it is told."""
        feasible, radius = problem.feasible, self.noise * self.threat.eps
        reach = feasible.with_radius(radius + sum(self.step_sizes()))
        start = problem.start
        if start is None or restart > 0:
            start = reach.sample(problem.keys(restart), radius)
        wide = replace(problem, feasible=reach, start=start)
        found = super().search_once(wide, loss, 0, "loss" if final == "gradient" else final, observe)
        if final != "gradient":
            return found
        projected = feasible.project(found.x_adv)
        answer = replace(problem, oracle=problem.oracle.precise).gradient(projected, loss)
        measured = gauges(feasible, answer.gradient, projected)
        return replace(found, gradient_calls=found.gradient_calls + self.eot, **measured)

    def gauged_point(self, feasible: FeasibleSet, x_adv: Tensor) -> Tensor:
        """Where its gauges are measured: the projection of x_adv onto X(x)."""
        return feasible.project(x_adv)
