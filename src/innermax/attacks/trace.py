"""The trace of a search: loss and FOSC at its start and after each of its steps."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from innermax.attacks.pgd import PGD
from innermax.attacks.problem import Problem
from innermax.attacks.search import AttackResult
from innermax.oracle.oracle import Oracle, Response
from innermax.threat import FeasibleSet


@dataclass(frozen=True)
class Trace:
    """One search of each example, step by step.

    Attributes:
        loss: (K + 1, B), the start first.
        fosc: (K + 1, B) exact FOSC.
        relative_fosc: (K + 1, B), NaN where the gradient is 0.
        start, end: (B, *features) the first and the last iterate.
    """

    loss: Float[Tensor, "steps b"]
    fosc: Float[Tensor, "steps b"]
    relative_fosc: Float[Tensor, "steps b"]
    start: Float[Tensor, "b ..."]
    end: Float[Tensor, "b ..."]


def trace_search(
    attack: PGD,
    model: nn.Module | Oracle,
    x: Float[Tensor, "b ..."],
    y: Int[Tensor, " b"],
    *,
    seed: int = 0,
    index: Int[Tensor, " b"] | None = None,
) -> Trace:
    """The first search of an attack with the same arguments; every example takes all steps, whatever would stop it.

    Raises ValueError or TypeError where x, y or index do not fit.
    """
    return search_with_trace(attack, model, x, y, seed=seed, index=index)[1]


def search_with_trace(
    attack: PGD,
    model: nn.Module | Oracle,
    x: Float[Tensor, "b ..."],
    y: Int[Tensor, " b"],
    *,
    seed: int = 0,
    index: Int[Tensor, " b"] | None = None,
) -> tuple[AttackResult, Trace]:
    """What such a search finds, and its trace; arguments and errors as for `trace_search`."""
    attack = replace(attack, stop_at=None, stop_on_success=False, steps_after_success=0)
    problem = replace(Problem.of(attack.threat, model, x, y, seed=seed, index=index), samples=attack.samples)
    met: list[tuple[Tensor, Tensor, Tensor]] = []
    points: list[Tensor] = []

    def observe(feasible: FeasibleSet, x_adv: Tensor, answer: Response) -> None:
        fosc, relative = (feasible.gap(answer.gradient, x_adv, relative=relative) for relative in (False, True))
        met.append((answer.loss, fosc, relative))
        points[1:] = [x_adv]  # the start stays first

    with problem.oracle.private_randomness(seed):
        maximised = attack.checked_loss(problem)
        problem = problem.prepare(maximised, problem.oracle.precise)
        result = attack.search_once(problem, maximised, 0, "gradient", observe)
    loss, fosc, relative_fosc = (torch.stack(values) for values in zip(*met, strict=True))
    return result, Trace(loss, fosc, relative_fosc, points[0], points[-1])
