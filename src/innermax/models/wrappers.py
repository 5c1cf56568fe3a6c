"""Normalisation as a layer of a model, and the module inside wrappers such as DDP."""

import math
from collections.abc import Sequence
from typing import cast, no_type_check

import numpy as np
import torch
from torch import nn

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
