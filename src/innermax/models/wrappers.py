"""Modules around a model: normalisation in front, its logits alone behind; and the module inside wrappers like DDP."""

import math
from collections.abc import Mapping, Sequence
from typing import cast, no_type_check

import numpy as np
import torch
from torch import Tensor, nn

IMAGENET_STATISTICS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean and std per channel, of images in [0, 1]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module under torch.compile, DataParallel, DDP or Fabric. Raises TypeError for anything else."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        if hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(
            model, "_forward_module"
        ):
            model = cast(nn.Module, model.module)
        else:
            return model


class Normalize(nn.Module):
    """(x − mean) / std per channel; x: (B, C, H, W). The numbers live in the model's config, not in its weights.

    mean, std: one number per channel, or one for all. Raises ValueError where they differ in length, are not finite or
    std is not positive.
    """

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        means, stds = np.ravel(mean).tolist(), np.ravel(std).tolist()
        if len(means) != len(stds) or len(means) == 0:
            raise ValueError(f"mean and std must hold one number per channel each, got {len(means)} and {len(stds)}")
        if not all(map(math.isfinite, [*means, *stds])) or min(stds) <= 0:
            raise ValueError(f"mean and std must be finite and std > 0, got {means} and {stds}")
        self.register_buffer("mean", torch.tensor(means).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(stds).view(-1, 1, 1), persistent=False)

    @no_type_check  # torch.fx calls it with a proxy, which a runtime type checker would refuse
    def forward(self, x):
        return (x - self.mean) / self.std


class LogitsOnly(nn.Module):
    """A model that returns its logits among other things, or one logit for two classes, as one that returns logits.

    Args:
        model: returns an object, a mapping or a tuple.
        output: where the logits are: the name of an attribute or of a mapping's key, such as "logits" of Hugging Face's
            models, or a tuple's position; None: what it returns are the logits. A tensor that it returns is taken as it
            is: networks with auxiliary classifiers return more in training mode alone.
        binary: whether it returns one logit z, (B,) or (B, 1), of the second of two classes; it becomes (0, z).

    Raises:
        ValueError: as it is called, where nothing is there; it says what the model returns.
    """

    def __init__(self, model: nn.Module, output: str | int | None = "logits", binary: bool = False) -> None:
        super().__init__()
        self.model, self.output, self.binary = model, output, binary

    @no_type_check  # as for Normalize
    def forward(self, x):
        found = self.model(x)
        if self.output is not None and not isinstance(found, Tensor):
            found = _take(found, self.output)
        if not self.binary:
            return found
        logit = found.reshape(len(x), 1)
        return torch.cat([torch.zeros_like(logit), logit], 1)


@no_type_check
def _take(found, output):
    try:
        inside = isinstance(output, int) or isinstance(found, Mapping)
        return found[output] if inside else getattr(found, output)
    except (LookupError, AttributeError, TypeError):
        there = f" with {', '.join(map(str, found))}" if isinstance(found, Mapping) else ""
        raise ValueError(f"output {output!r} is not in what the model returns, {type(found).__name__}{there}") from None
