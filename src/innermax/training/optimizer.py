"""The optimiser and its learning rate."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from innermax.training.options import TrainingOptions


def build_optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """SGD or AdamW on all parameters of a model."""
    # torch has no fused step of sharded or complex ones.
    fused = not any(isinstance(p, DTensor) or p.is_complex() for p in model.parameters())
    lr, decay = options.lr, options.weight_decay
    if options.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=decay, fused=fused)
    return torch.optim.SGD(model.parameters(), lr, options.momentum, weight_decay=decay, fused=fused)


def learning_rate(moment: float, options: TrainingOptions) -> float:
    """The learning rate when a share `moment` in [0, 1) of the training is done."""
    if options.lr_schedule == "drops":
        return options.lr * math.pow(0.1, sum(moment >= drop - 1e-9 for drop in options.lr_drops))
    if options.lr_schedule == "cosine":
        return options.lr * (1 + math.cos(math.pi * moment)) / 2
    return options.lr * (1 - abs(2 * moment - 1)) if options.lr_schedule == "cyclic" else options.lr
