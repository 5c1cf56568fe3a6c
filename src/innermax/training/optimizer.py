"""The optimiser and its learning rate."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def build_optimizer(model: nn.Module, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    fused = not any(
        isinstance(p, DTensor) for p in model.parameters()
    )  # torch has no fused step of parameters in parts
    lr, decay = options["lr"], options["weight_decay"]
    if options["optimizer"] == "adamw":
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=decay, fused=fused)
    return torch.optim.SGD(model.parameters(), lr, options["momentum"], weight_decay=decay, fused=fused)


def learning_rate(moment: float, options: Mapping[str, Any]) -> float:
    """The learning rate when a share `moment` in [0, 1) of the training is done."""
    lr: float = options["lr"]
    if options["lr_schedule"] == "drops":
        return lr * math.pow(0.1, sum(moment >= drop - 1e-9 for drop in options["lr_drops"]))
    return lr * (1 + math.cos(math.pi * moment)) / 2 if options["lr_schedule"] == "cosine" else lr
