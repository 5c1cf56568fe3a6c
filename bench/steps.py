"""A training step, apart from a training."""

from typing import Any

import torch
from torch import Tensor, nn

from innermax.data.image_set import ImageSet
from innermax.data.streaming import Batch
from innermax.distributed.launch import find_device, plan_launch
from innermax.distributed.process_group import connect
from innermax.objectives import Objective, cross_entropy
from innermax.strategies import Strategy, Unsecured
from innermax.training.arithmetic import choose_arithmetic
from innermax.training.loop import Loop
from innermax.training.options import TrainingOptions


def started(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    precision: Any,
    device: str = "auto",
    strategy: Strategy | None = None,
    objective: Objective = cross_entropy,
    **more: Any,
) -> Loop:
    """The loop before its first update, as `im.train` starts it; more: of its options."""
    options = TrainingOptions(
        strategy or Unsecured(), batch_size=len(images), lr_schedule="constant", precision=precision, **more
    )
    chosen = find_device(device)
    data = ImageSet(images, labels)
    arithmetic = choose_arithmetic(model, data.batch(torch.arange(4))[0], precision, chosen)
    ranks = connect(plan_launch(1, 1, chosen), chosen, arithmetic.bf16)
    return Loop.start(model, data, options, objective, ranks, arithmetic)


def whole(loop: Loop) -> Batch:
    """All of its images as one batch."""
    index = torch.arange(len(loop.data), device=loop.ranks.device)
    return Batch(index, index, *loop.data.batch(index))
