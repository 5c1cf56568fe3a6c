"""What a training is asked for, checked."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from innermax.data.image_set import ImageSet
from innermax.data.streaming import ImageStream
from innermax.distributed.launch import Launch, Parallel, find_device
from innermax.models.wrappers import unwrapped
from innermax.oracle.oracle import Precision
from innermax.training.checkpoints import due_every
from innermax.training.loggers import Logger, LoggerName
from innermax.utils.serialization import describe
from innermax.utils.validation import unknown

Optimizer = Literal["sgd", "adamw"]
LearningRate = Literal["drops", "cosine", "constant"]
OnNaN = Literal["stop", "skip"]


def describe_training(
    options: Mapping[str, Any], model: nn.Module, data: ImageSet | ImageStream, validation: ImageSet | None
) -> dict[str, Any]:
    """What identifies a run: a folder is resumed by the same configuration alone."""
    left_out = {
        "model",
        "train_set",
        "validation_set",
        "run_dir",
        "overwrite",
        "checkpoint_every",
        "keep_checkpoints",
        "logger",
        "progress",
        "device",
        "devices",
        "nodes",
        "parallel",
        "settings",
    } | (set() if options["sync_batch_norm"] else {"sync_batch_norm"})
    described = {name: describe(value) for name, value in options.items() if name not in left_out}
    return {
        "training": described,
        "model": describe(getattr(unwrapped(model), "config", type(unwrapped(model)).__qualname__)),
        "examples": {"train": len(data), "validation": 0 if validation is None else len(validation)},
        "settings": describe(dict(options["settings"] or {})),
    }


def check_options(options: Mapping[str, Any]) -> None:
    """Raises for options out of range."""
    for name in ("epochs", "batch_size", "keep_checkpoints"):
        if not isinstance(options[name], int) or options[name] < 1:
            raise ValueError(f"{name} must be an integer ≥ 1, got {options[name]!r}")
    for name, kind in (
        ("optimizer", Optimizer),
        ("lr_schedule", LearningRate),
        ("precision", Precision),
        ("on_nan", OnNaN),
        ("parallel", Parallel),
    ):
        if options[name] not in get_args(kind):
            raise unknown(name, options[name], get_args(kind))
    if isinstance(options["logger"], str) and options["logger"] not in get_args(LoggerName):
        raise unknown("logger", options["logger"], get_args(LoggerName))
    if options["logger"] is not None and not isinstance(options["logger"], str | Logger):
        raise TypeError(f"logger must be a name or a logger of Lightning's, got {options['logger']!r}")
    if not isinstance(options["seed"], int):
        raise TypeError(f"seed must be an integer, got {options['seed']!r}")
    find_device(options["device"])
    due_every(options["checkpoint_every"])
    if not 0 < options["lr"] < math.inf:
        raise ValueError(f"lr must be a finite number > 0, got {options['lr']}")
    for name in ("momentum", "weight_decay"):
        if not 0 <= options[name] < math.inf:
            raise ValueError(f"{name} must be a finite number ≥ 0, got {options[name]}")
    if options["clip"] is not None and not options["clip"] > 0:
        raise ValueError(f"clip must be > 0 or None, got {options['clip']}")
    if options["ema"] is not None and not 0 < options["ema"] < 1:
        raise ValueError(f"ema must be in (0, 1) or None, got {options['ema']}")
    if not all(0 < drop < 1 for drop in options["lr_drops"]):
        raise ValueError(f"lr_drops must lie in (0, 1), got {options['lr_drops']}")
    if not callable(getattr(options["strategy"], "attack_at", None)):
        raise TypeError(f"strategy must have attack_at(progress, history), got {options['strategy']!r}")


def check_parallel(options: Mapping[str, Any], launch: Launch, device: torch.device, examples: int) -> None:
    """Raises where a training's options do not go with so many processes."""
    smallest = examples // math.ceil(examples / options["batch_size"])
    if launch.count > smallest:
        raise ValueError(
            f"batch_size must leave each of {launch.count} processes an example, got batches of {smallest}"
        )
    if options["sync_batch_norm"] and (launch.count == 1 or device.type != "cuda"):
        raise ValueError(f"sync_batch_norm needs several GPUs, got {launch.count} processes on {device.type}")
    if options["parallel"] != "fsdp":
        return
    if launch.count == 1:
        raise ValueError('parallel="fsdp" needs several processes, got one')
    for name, nothing, instead in (
        ("validation_set", None, "leave it out (validation 0) and evaluate the saved model"),
        ("ema", None, "leave it out"),
        ("sync_batch_norm", False, "leave it out"),
    ):
        if options[name] is not nothing:
            raise ValueError(f'parallel="fsdp" does not support {name}: {instead}, or train with parallel="ddp"')
