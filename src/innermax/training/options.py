"""The options of a training, and their checks."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from innermax.attacks.base import Attack
from innermax.attacks.pgd import PGD
from innermax.data.image_set import ImageSet
from innermax.data.streaming import TrainingSet
from innermax.distributed.launch import Launch, Parallel, find_device
from innermax.evaluation.progress import ProgressCallback, check_progress
from innermax.models.wrappers import unwrap
from innermax.objectives import Objective, differentiates_twice, find_objective, search_loss
from innermax.oracle.oracle import Precision
from innermax.strategies import Strategy, search_for
from innermax.training.alarm import OnOverfit, check_strengthening
from innermax.training.checkpoints import due_every
from innermax.training.loggers import Logger, LoggerName
from innermax.utils.serialization import ADDED_FIELD, describe, described_fields
from innermax.utils.validation import check_choice, check_count, check_flag, check_integer, check_number, is_number

Optimizer = Literal["sgd", "adamw"]
LearningRate = Literal["drops", "cosine", "cyclic", "constant"]
OnNaN = Literal["stop", "skip"]
_PROCESS = {"identifies": False}  # how a run is computed and written: the next call on its folder may say otherwise
_VALUE = {"on_command_line": False}  # a value that no text stands for; the command line builds it


@dataclass(frozen=True)
class TrainingOptions:
    """How to train: the options of `train`, which explains them, in its order and with its defaults.

    A field's metadata: "identifies", whether a run folder belongs to one value of it; "on_command_line", whether the
    command line passes the option on to `train` as it is. Both are True where they are left out.

    Raises:
        ValueError, TypeError: an option is out of range, or of another type.
    """

    strategy: Strategy = field(metadata=_VALUE)
    objective: str | Objective = field(default="cross_entropy", metadata=_VALUE)
    validation_attack: PGD | None = field(default=None, metadata=_VALUE)
    epochs: int = 50
    batch_size: int = 128
    optimizer: Optimizer = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    lr_schedule: LearningRate = "drops"
    lr_drops: Sequence[float] = (0.4, 0.8)
    clip: float | None = None
    ema: float | None = None
    shift: int = 0
    flip: bool = False
    precision: Precision = "auto"
    seed: int = 0
    device: str = field(default="auto", metadata=_PROCESS)
    devices: int | None = field(default=None, metadata=_PROCESS)
    nodes: int | None = field(default=None, metadata=_PROCESS)
    parallel: Parallel = field(default="ddp", metadata=_PROCESS)
    sync_batch_norm: bool = field(default=False, metadata=ADDED_FIELD)
    on_nan: OnNaN = "stop"
    on_overfit: OnOverfit = field(default="ignore", metadata=ADDED_FIELD)
    run_dir: str | Path | None = field(default=None, metadata=_PROCESS)
    overwrite: bool = field(default=False, metadata=_PROCESS)
    checkpoint_every: int | str | None = field(default=None, metadata=_PROCESS)
    keep_checkpoints: int = field(default=2, metadata=_PROCESS)
    logger: LoggerName | Logger | None = field(default=None, metadata=_PROCESS | _VALUE)
    progress: bool | ProgressCallback | None = field(default=True, metadata=_PROCESS | _VALUE)
    settings: Mapping[str, Any] | None = field(default=None, metadata=_PROCESS | _VALUE)  # a section of its own

    def __post_init__(self) -> None:
        if not callable(getattr(self.strategy, "attack_at", None)):
            raise TypeError(f"strategy must have attack_at(progress, history), got {self.strategy!r}")
        search_for(self.strategy, search_loss(find_objective(self.objective)))
        _check_integers(self)
        _check_numbers(self)
        _check_names(self)
        for name in ("flip", "sync_batch_norm", "overwrite"):
            check_flag(getattr(self, name), name)
        if self.on_overfit == "strengthen":
            check_strengthening(self.strategy)
        check_progress(self.progress)
        due_every(self.checkpoint_every)
        for name, kind, requirement in (
            ("validation_attack", Attack, "an attack such as PGD(Linf(8 / 255))"),
            ("run_dir", str | os.PathLike, "a folder"),
            ("settings", Mapping, "a mapping"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be {requirement} or None, got {value!r}")

    def divide_epochs(self) -> "TrainingOptions":
        """The options with the epochs that are trained: where a strategy replays each batch, fewer by that factor."""
        replays = getattr(self.strategy, "replays", 1)
        return self if replays == 1 else replace(self, epochs=max(1, round(self.epochs / replays)))

    @property
    def folder(self) -> Path | None:
        """The run folder."""
        return None if self.run_dir is None else Path(self.run_dir)

    def lr_at(self, moment: float) -> float:
        """The learning rate when a share `moment` in [0, 1) of the training is done."""
        if self.lr_schedule == "drops":
            return self.lr * math.pow(0.1, sum(moment >= drop - 1e-9 for drop in self.lr_drops))
        if self.lr_schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * moment)) / 2
        return self.lr * (1 - abs(2 * moment - 1)) if self.lr_schedule == "cyclic" else self.lr


def option_names(quality: Literal["identifies", "on_command_line"]) -> set[str]:
    """The options that have a quality (see TrainingOptions)."""
    return {option.name for option in fields(TrainingOptions) if option.metadata.get(quality, True)}


def describe_training(
    options: TrainingOptions, model: nn.Module, data: TrainingSet, validation: ImageSet | None
) -> dict[str, Any]:
    """What identifies a run, as plain YAML: only a call with the same configuration resumes its folder."""
    names = [option.name for option in described_fields(options) if option.name in option_names("identifies")]
    return {
        "training": {name: describe(getattr(options, name)) for name in names},
        "model": describe(getattr(unwrap(model), "config", type(unwrap(model)).__qualname__)),
        "examples": {"train": len(data), "validation": 0 if validation is None else len(validation)},
        "settings": describe(dict(options.settings or {})),
    }


def check_parallel(
    options: TrainingOptions, launch: Launch, device: torch.device, data: TrainingSet, validated: bool
) -> None:
    """Raises where the options do not go with the processes; validated: whether there is a validation split."""
    smallest = len(data) // math.ceil(len(data) / options.batch_size)
    if launch.count > smallest:
        raise ValueError(
            f"batch_size must leave each of {launch.count} processes an example, got batches of {smallest}"
        )
    if options.sync_batch_norm and (launch.count == 1 or device.type != "cuda"):
        raise ValueError(f"sync_batch_norm needs several GPUs, got {launch.count} processes on {device.type}")
    if options.parallel != "fsdp":
        return
    if launch.count == 1:
        raise ValueError('parallel="fsdp" needs several processes, got one')
    for name, given, instead in (
        ("validation_set", validated, "leave it out (validation 0) and evaluate the saved model"),
        ("ema", options.ema is not None, "leave it out"),
        ("sync_batch_norm", options.sync_batch_norm, "leave it out"),
        (
            "second derivatives, as of objective grad_align",
            differentiates_twice(find_objective(options.objective)),
            "use another",
        ),
    ):
        if given:
            raise ValueError(f'parallel="fsdp" does not support {name}: {instead}, or train with parallel="ddp"')


def _check_integers(options: TrainingOptions) -> None:
    for name in ("epochs", "batch_size", "keep_checkpoints"):
        check_count(getattr(options, name), name)
    for name in ("devices", "nodes"):
        if getattr(options, name) is not None:
            check_count(getattr(options, name), name)
    check_integer(options.shift, "shift", 0)
    check_integer(options.seed, "seed")


def _check_numbers(options: TrainingOptions) -> None:
    check_number(options.lr, "lr", "a finite number > 0", lambda value: 0 < value < math.inf)
    for name in ("momentum", "weight_decay"):
        check_number(getattr(options, name), name, "a finite number ≥ 0", lambda value: 0 <= value < math.inf)
    if options.clip is not None:
        check_number(options.clip, "clip", "a number > 0 or None", lambda value: value > 0)
    if options.ema is not None:
        check_number(options.ema, "ema", "a number in (0, 1) or None", lambda value: 0 < value < 1)
    drops: Any = options.lr_drops
    if isinstance(drops, str | bytes) or not isinstance(drops, Sequence | np.ndarray) or not all(map(is_number, drops)):
        raise TypeError(f"lr_drops must be a sequence of numbers in (0, 1), got {drops!r}")
    if not all(0 < drop < 1 for drop in drops):
        raise ValueError(f"lr_drops must be a sequence of numbers in (0, 1), got {drops!r}")


def _check_names(options: TrainingOptions) -> None:
    for name, kind in (
        ("optimizer", Optimizer),
        ("lr_schedule", LearningRate),
        ("precision", Precision),
        ("on_nan", OnNaN),
        ("on_overfit", OnOverfit),
        ("parallel", Parallel),
    ):
        check_choice(getattr(options, name), name, get_args(kind))
    if isinstance(options.logger, str):
        check_choice(options.logger, "logger", get_args(LoggerName))
    elif options.logger is not None and not isinstance(options.logger, Logger):
        raise TypeError(f"logger must be a name, a logger of Lightning's or None, got {options.logger!r}")
    if not isinstance(options.device, str | torch.device):
        raise TypeError(f"device must be a name such as cuda or cuda:0, got {options.device!r}")
    find_device(str(options.device))
