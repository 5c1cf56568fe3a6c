"""An evaluation shared by several processes."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from torch import nn

from innermax.attacks.base import Attack
from innermax.distributed.process_group import Ranks
from innermax.distributed.spawn import run_processes
from innermax.evaluation.scoring import (
    PROBABLE,
    Bench,
    Progress,
    attack_and_score,
)
from innermax.evaluation.store import (
    Parts,
)
from innermax.oracle.oracle import Oracle, Precision
from innermax.utils.copying import copy_model


@contextmanager
def exchanged(parts: Parts, ranks: Ranks) -> Iterator[None]:
    """Inside, each process adds its share of the parts; afterwards all have them all."""
    before = {name: set(held) for name, held in parts.held.items()}
    with ranks.raise_together(ValueError, TypeError, ArithmeticError, OSError):
        yield
    if ranks.count == 1:
        return
    own = {name: [start for start in held if start not in before[name]] for name, held in parts.held.items()}
    for told in ranks.gather({name: [(start, parts.part(name, start)) for start in own[name]] for name in own}):
        for name, found in told.items():
            for start, part in found:
                parts.keep(name, start, part)


@dataclass(frozen=True, eq=False)
class Task:
    """What a process needs for its share of the missing parts."""

    bench: Bench
    model: nn.Module
    attacks: Mapping[str, Attack]
    precision: Precision
    parts: Parts


def attack_together(task: Task, processes: int) -> None:
    """Adds the attacks' missing parts, computed by processes that meet in a folder."""
    bench, parts = task.bench, task.parts
    if not any(parts.missing(name) for name in task.attacks):
        return
    with TemporaryDirectory(prefix="innermax-") if parts.folder is None else nullcontext(parts.folder) as place:
        folder, told = Path(place), dict.fromkeys(task.attacks, 0)

        def watch() -> None:
            for name in told if bench.progress is not None else ():
                done = parts.written(folder, name)
                if done > told[name]:
                    told[name] = done
                    cast(Progress, bench.progress)(name, done, len(bench.images))

        there = replace(
            task,
            bench=replace(bench, progress=None, images=bench.images.to("cpu")),
            model=task.model if bench.device.type == "cpu" else copy_model(task.model).cpu(),
            parts=replace(parts, folder=folder),
        )
        run_processes(_attack_share, there, processes, bench.device.type, watch)
        there.parts.read()  # into the same memory


def _attack_share(task: Task, rank: int, processes: int, device: torch.device) -> None:
    """What one of the processes does."""
    bench, model = replace(task.bench, device=device), task.model.to(device)
    exact = Oracle(model)
    with bench.in_float32(exact), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=PROBABLE)
        oracle = bench.attack_oracle(model, exact, task.precision)
        attack_and_score(bench, task.attacks, oracle, exact, task.parts, rank, processes)
