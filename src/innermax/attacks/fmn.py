"""FMN: projected steps in a ball whose radius shrinks beyond the decision boundary and grows before it."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from innermax.attacks.minimal import Descent, MinimalAttack, unit
from innermax.losses import Loss
from innermax.threat import L1, L2, Flat, Linf, Scalar, Threat

_STEP = 1.0, 0.01  # α: Euclidean length of the first and the last step, over that of the ball's farthest point
_FACTOR = 0.05, 0.001  # γ: by which share the radius changes, at the first and the last step


@dataclass(frozen=True)
class FMN(MinimalAttack):
    """The Fast Minimum-Norm attack (Pintor et al. 2021, Algorithm 1), for L∞, L2 and L1.

    Steps along the gradient of the margin are projected onto ball and bounds together. The ball's radius goes
    5 % beyond the boundary's linearisation until a point beyond the boundary is found. From then on it shrinks where
    an iterate has crossed the boundary and grows where it has not. Steps and changes of the radius decrease along half
    a cosine. Steps are measured in radii, so that a search does not depend on the scale of the inputs.

    Args:
        threat: Linf, L2 or L1, whose ε decides who has fallen; the search goes beyond it.
        steps: ≥ 1 in each search.

    Raises:
        ValueError, TypeError: an argument is not as described above.
    """

    norms: ClassVar[tuple[type[Threat], ...]] = (Linf, L2, L1)

    def followed_loss(self, reach: bool) -> Loss:
        """The margin."""
        return self.reported_loss(0, reach)

    def resize(self, search: Descent) -> Scalar:
        """The norm to which the next step is held."""
        gamma = _decay(_FACTOR, search.share)
        reached = search.size + search.answer.loss.abs()[:, None] / self._dual_norm(search.answer.gradient.flatten(1))
        # Beyond the linearised boundary: on it, where two logits are equal, a search would rest without success.
        outwards = torch.where(torch.isfinite(search.distance), search.radius, reached) * (1 + gamma)
        return torch.where(search.fallen, (search.radius * (1 - gamma)).minimum(search.distance), outwards)

    def move(self, search: Descent, radius: Scalar, floor: Flat, ceiling: Flat) -> Flat:
        """The next perturbation: a step along the gradient, projected."""
        corner = search.u.shape[1] ** 0.5 if isinstance(self.threat, Linf) else 1.0
        stepped = search.u + _decay(_STEP, search.share) * corner * radius * unit(search.answer.gradient)
        return cast("Linf | L2 | L1", self.threat).nearest(stepped, radius, floor, ceiling)

    def _dual_norm(self, gradient: Flat) -> Scalar:
        """What the margin's linear model gains at most per unit of the threat's norm."""
        order = {Linf: 1.0, L2: 2.0, L1: float("inf")}
        kind = next(norm for norm in order if isinstance(self.threat, norm))
        length: Scalar = torch.linalg.vector_norm(gradient, order[kind], dim=1, keepdim=True)
        return length.clamp(min=1e-12)


def _decay(ends: tuple[float, float], share: float) -> float:
    """From the first value to the last as the share falls from 1 to 0."""
    first, last = ends
    return last + (first - last) * share
