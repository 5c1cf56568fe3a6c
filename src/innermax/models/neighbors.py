"""Whether a network's answer to an image depends on the other images in its batch."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from innermax.utils.generators import private_randomness
from innermax.utils.validation import check_logits

_FAR = 0.5
_CLOSE = 1e-4  # of the largest logit; kernels of one shape differ by less


@torch.no_grad()
def depends_on_neighbors(network: Callable[[Tensor], Any], x: Float[Tensor, " *features"]) -> bool:
    """Whether the answer to x is another one beside another image than beside itself.

    Operators do not tell: BatchNorm without running statistics also standardises weights, or each image by itself.
    A network that answers otherwise when the same is asked again counts as independent: nothing can be said of it.

    Raises whatever the network raises, ValueError where it returns no logits.
    """
    other = torch.where(x < _FAR, x + _FAR, x - _FAR)  # another one at every pixel, within [0, 1] where x is
    alone, again = (_answer(network, x, x) for _ in range(2))
    beside = _answer(network, x, other)
    tolerance = _CLOSE * (1 + alone.abs().max())
    repeats = bool(((again - alone).abs() <= tolerance).all())
    return repeats and not bool(((beside - alone).abs() <= tolerance).all())


def _answer(network: Callable[[Tensor], Any], x: Tensor, neighbor: Tensor) -> Tensor:
    with private_randomness(0, [x.device.index] if x.is_cuda else []):
        return check_logits(network(torch.stack([x, neighbor])), 2)[0]
