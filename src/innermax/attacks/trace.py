"""A search watched: what it met at its start and after each of its steps."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from innermax.attacks.base import Problem
from innermax.attacks.pgd import PGD
from innermax.oracle.oracle import Oracle


@dataclass(frozen=True)
class Trace:
    """(K + 1, B) each, the start first: the loss, exact FOSC, and relative FOSC (NaN where the gradient is 0)."""

    loss: Float[Tensor, "steps b"]
    fosc: Float[Tensor, "steps b"]
    relative_fosc: Float[Tensor, "steps b"]


def trace_search(
    attack: PGD,
    model: nn.Module | Oracle,
    x: Float[Tensor, "b ..."],
    y: Int[Tensor, " b"],
    *,
    seed: int = 0,
    index: Int[Tensor, " b"] | None = None,
) -> Trace:
    """The first search of an attack with the same arguments, all of its steps whatever would end it earlier.

    Raises ValueError or TypeError where x, y or index do not fit.
    """
    problem = Problem.of(attack.threat, model, x, y, target=None, seed=seed, index=index, final="gradient")
    feasible, loss = problem.feasible, attack.objective()
    x_adv = feasible.sample(problem.keys(0)) if attack.random_start else feasible.x
    met = []
    with problem.oracle.private_randomness(seed):
        for size in (*attack.step_sizes(), None):
            found = problem.oracle.gradient(x_adv, y, loss)
            gaps = [feasible.gap(found.gradient, x_adv, relative=relative) for relative in (False, True)]
            met.append((found.loss, *gaps))
            x_adv = x_adv if size is None else feasible.step(x_adv, found.gradient, size)
    return Trace(*(torch.stack(values) for values in zip(*met, strict=True)))
