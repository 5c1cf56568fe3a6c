"""By how much a compiled network's logits and gradients differ from the model's own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from innermax.utils.generators import private_randomness
from innermax.utils.validation import check_logits

Network = Callable[[Tensor], Any]
_NOISE = 0.02


@dataclass(frozen=True)
class Difference:
    """Between two networks' answers to the same inputs.

    Attributes:
        logits: the largest difference of two logits, centered.
        scale: 1 + the model's largest logit, centered.
        gradient: the largest difference of two entries of an example's gradient, over the gradient's largest entry.
        cosine: of the gradients, the mean over the examples.
    """

    logits: float
    scale: float
    gradient: float
    cosine: float


@dataclass(frozen=True)
class Reference:
    """What a model answers to a few inputs: logits, and each example's gradient of the margin that attacks lower.

    Attributes:
        x: (B, *features) the inputs.
        logits: (B, classes).
        gradient: (B, *features), of the largest logit minus the second largest.
    """

    x: Tensor
    logits: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, model: Network, x: Tensor) -> "Reference":
        """What the model answers to x. Raises whatever the model raises, ValueError where it returns no logits."""
        logits, gradient = _answers(model, x, None)
        return cls(x, logits, gradient)

    @property
    def finite(self) -> bool:
        """Whether the model answers in finite numbers."""
        return bool(self.logits.isfinite().all())

    def difference(self, network: Network) -> Difference:
        """Of another network's answers. Raises whatever the network raises."""
        logits, gradient = _answers(network, self.x, self.logits)
        truth, found = (g.to(torch.float64).flatten(1) for g in (self.gradient, gradient))
        largest = truth.abs().amax(1)
        off = (found - truth).abs().amax(1) / largest.where(largest > 0, 1)
        cosine = torch.nn.functional.cosine_similarity(found, truth, eps=1e-300)
        cosine = cosine.where((largest > 0) | (found != 0).any(1), 1)  # two zeros point the same way
        return Difference(
            logits=_largest(center(logits.to(self.logits.dtype)) - center(self.logits)),
            scale=1 + _largest(center(self.logits)),
            gradient=float(off.max()),
            cosine=float(cosine.mean()),
        )


def center(logits: Tensor) -> Tensor:
    """(B, classes) logits less each example's mean: what they have in common, softmax ignores."""
    return logits - logits.mean(1, keepdim=True)


def break_ties(x: Tensor) -> Tensor:
    """x with a little noise, within its own range: where pixels are equal, as on a black margin, so are the values a
    maximum is taken of, and each of them may pass the gradient on.
    """
    if not x.is_floating_point() or len(x) == 0:
        return x
    noise = torch.rand(x.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(x)
    return x.lerp(x.amin() + noise * (x.amax() - x.amin()), _NOISE)


def _answers(network: Network, x: Tensor, choose: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits and margin gradients; choose: the logits that say of which two classes the margin is, None: its own."""
    devices = [x.device.index] if x.is_cuda else []
    with torch.inference_mode(False), torch.enable_grad(), private_randomness(0, devices):
        point = x.clone().requires_grad_()
        logits = check_logits(network(point), len(x))
        best = (logits if choose is None else choose).detach().topk(2).indices
        first, second = logits.gather(1, best).unbind(1)
        margin = (first - second).sum()
        gradient = torch.autograd.grad(margin, point, allow_unused=True)[0] if margin.requires_grad else None
    gradient = torch.zeros_like(x) if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
    return logits.detach(), gradient


def _largest(value: Tensor) -> float:
    return float(value.abs().max())
