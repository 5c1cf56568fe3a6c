"""DDN: steps whose direction and norm are chosen apart, on a sphere that shrinks or grows around the clean input."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from innermax.attacks.minimal import Descent, MinimalAttack, unit
from innermax.losses import Loss, cross_entropy, make_reaching
from innermax.threat import L2, Flat, Scalar, Threat

_STEP = 1.0, 0.01  # α: length of the first and the last step, over the norm
_FACTOR = 0.05  # γ: by which share the norm changes


@dataclass(frozen=True)
class DDN(MinimalAttack):
    """The attack that decouples direction and norm (Rony et al. 2019, Algorithm 1), for L2.

    After a step along the gradient of the cross-entropy, the perturbation is scaled, within the bounds, to a norm that
    is 5 % smaller than the one before where that has crossed the boundary, and 5 % larger where it has not. The first
    norm is ε, or 1 where ε is 0; it doubles until a point beyond the boundary is found. Steps are measured in the norm,
    so that a search does not depend on the scale of the inputs.

    Args:
        threat: L2, whose ε decides who has fallen; the search goes beyond it.
        steps: ≥ 1 in each search.

    Raises:
        ValueError, TypeError: an argument is not as described above.
    """

    norms: ClassVar[tuple[type[Threat], ...]] = (L2,)

    def followed_loss(self, reach: bool) -> Loss:
        """The cross-entropy."""
        return make_reaching(cross_entropy) if reach else cross_entropy

    def resize(self, search: Descent) -> Scalar:
        """The norm to which the next step is held."""
        if search.share == 1:
            return torch.full_like(search.size, self.threat.eps or 1.0)
        outwards = torch.full_like(search.radius, 1 + _FACTOR).masked_fill(torch.isinf(search.distance), 2.0)
        return search.radius * outwards.masked_fill(search.fallen, 1 - _FACTOR)

    def move(self, search: Descent, radius: Scalar, floor: Flat, ceiling: Flat) -> Flat:
        """The next perturbation: a step along the gradient, scaled."""
        first, last = _STEP
        length = (last + (first - last) * search.share) * radius
        stepped = search.u + length * unit(search.answer.gradient)
        return cast(L2, self.threat).stretch(stepped, radius, floor, ceiling)
