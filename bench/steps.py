"""A training step, apart from a training."""

from typing import Any

import torch
from torch import Tensor, nn

from innermax.data.image_set import ImageSet
from innermax.data.streaming import Batch
from innermax.distributed.launch import find_device, plan_launch
from innermax.distributed.process_group import connect
from innermax.training.loop import Loop
from innermax.training.train import _precision


def started(
    model: nn.Module, images: Tensor, labels: Tensor, precision: str, device: str = "auto", **more: Any
) -> Loop:
    """The loop before its first update, as `im.train` starts it; more: of its options."""
    options = {
        "model": model, "precision": precision, "ema": None, "optimizer": "sgd", "lr": 0.01, "momentum": 0.9,
        "weight_decay": 1e-4, "seed": 0, "epochs": 1, "batch_size": len(images), "shift": 0, "flip": False,
        "clip": None, "lr_schedule": "constant", "lr_drops": (), "strategy": None, "checkpoint_every": None,
        "sync_batch_norm": False, "on_nan": "stop", "keep_checkpoints": 1, **more,
    }  # fmt: skip
    chosen = find_device(device)
    return Loop.started(
        options, ImageSet(images, labels), connect(plan_launch(1, 1, chosen), chosen, _precision(precision, chosen))
    )


def whole(loop: Loop) -> Batch:
    """All of its images as one batch."""
    index = torch.arange(len(loop.data), device=loop.device)
    return Batch(index, index, *loop.data.batch(index))
