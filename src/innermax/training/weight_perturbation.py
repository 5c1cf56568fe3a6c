"""The worst weights near those of a network: adversarial weight perturbation (Wu et al. 2020)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.linalg import vector_norm


@contextmanager
def perturbed_weights(network: nn.Module, gamma: float) -> Iterator[None]:
    """Context manager: each tensor w of at least two dimensions is w + γ‖w‖·g/‖g‖, with g its present gradient.

    The gradients are taken away at the beginning. At the end the weights are what they were, to the bit: they are
    copied, as a sum and a difference would be rounded.
    """
    slopes = [(weight, weight.grad) for weight in network.parameters() if weight.ndim > 1 and weight.grad is not None]
    before = [weight.detach().clone() for weight, _ in slopes]
    with torch.no_grad():
        for weight, slope in slopes:
            size = vector_norm(slope)
            weight.addcmul_(slope, (gamma * vector_norm(weight) / size).where(size > 0, 0))
    network.zero_grad()
    try:
        yield
    finally:
        with torch.no_grad():
            for (weight, _), own in zip(slopes, before, strict=True):
                weight.copy_(own)
