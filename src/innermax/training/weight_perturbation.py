"""The worst weights near those of a network: adversarial weight perturbation (Wu et al. 2020)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from innermax.distributed.fsdp import is_sharded


@contextmanager
def perturbed_weights(network: nn.Module, gamma: float) -> Iterator[None]:
    """Context manager: each tensor w of at least two dimensions is w + γ‖w‖·g/‖g‖, with g its present gradient.

    The gradients are taken away at the beginning. At the end the weights are what they were, to the bit: they are
    copied, as a sum and a difference would be rounded. Each process of a sharded network moves its own part, by norms
    of the whole.
    """
    slopes = [(weight, weight.grad) for weight in network.parameters() if weight.ndim > 1 and weight.grad is not None]
    with torch.no_grad():
        before = [_own_part(weight).clone() for weight, _ in slopes]
        for weight, slope in slopes:
            size = _norm(slope)
            _own_part(weight).addcmul_(_own_part(slope), (gamma * _norm(weight) / size).masked_fill(~(size > 0), 0.0))
    network.zero_grad()
    try:
        yield
    finally:
        with torch.no_grad():
            for (weight, _), own in zip(slopes, before, strict=True):
                _own_part(weight).copy_(own)


def _own_part(value: Tensor) -> Tensor:
    """What of a tensor is in this process, in the same memory."""
    return value.to_local() if is_sharded(value) else value


def _norm(value: Tensor) -> Tensor:
    size = vector_norm(value)
    return size.full_tensor() if is_sharded(size) else size
