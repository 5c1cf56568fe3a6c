"""A training by processes that this one starts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from innermax.distributed.fsdp import gather_state
from innermax.distributed.launch import Launch
from innermax.distributed.spawn import run_processes
from innermax.models.wrappers import unwrap
from innermax.training.interrupts import defer_interrupts
from innermax.training.job import Job
from innermax.utils.copying import copy_model
from innermax.utils.files import load_tensors, save_tensors

Train = Callable[[Job, Launch, Callable[[], bool]], Any]


@dataclass(frozen=True)
class _Task:
    """What a process needs: a function that trains, its job, and a folder through which the processes communicate."""

    train: Train
    job: Job
    launch: Launch
    folder: Path

    @property
    def stop(self) -> Path:
        """Exists once the training is to end after its batch."""
        return self.folder / "stop"

    @property
    def unfinished(self) -> Path:
        """Exists once the training has ended before its last epoch."""
        return self.folder / "interrupted"

    @property
    def result(self) -> Path:
        """The networks and the history."""
        return self.folder / "run.safetensors"


def train_in_processes(
    train: Train, job: Job, launch: Launch, device: str
) -> tuple[nn.Module, Sequence[Mapping[str, Any]]]:
    """Trains in new processes; the network to evaluate, and the history. The job's own model has learned the same.

    Args:
        train: a function of a module, (job, launch, whether an interrupt came) → a run.
        job: must pickle.
        device: "cpu" or "cuda".

    Raises:
        KeyboardInterrupt: after the processes have saved.
        TypeError, ChildProcessError, …: as `run_processes`.
    """
    with TemporaryDirectory(prefix="innermax-") as place, defer_interrupts() as is_interrupted:
        task = _Task(train, job, replace(launch, starts=False), Path(place))

        def watch() -> None:
            if is_interrupted():
                task.stop.touch()

        try:
            run_processes(_train_share, task, launch.devices, device, watch, nodes=launch.nodes, backend=None)
        except ChildProcessError:
            if is_interrupted():  # while they were starting
                raise KeyboardInterrupt from None
            raise
        if task.unfinished.exists():
            raise KeyboardInterrupt
        tensors, meta = load_tensors(task.result)
        averaged = job.options.ema is not None
        networks = {"model": job.model, "evaluated": copy_model(job.model) if averaged else job.model}
        for name, network in networks.items():
            own = {key.removeprefix(f"{name}/"): v for key, v in tensors.items() if key.startswith(f"{name}/")}
            network.load_state_dict(own)
            network.eval()
        return networks["evaluated"], tuple(meta["history"])


def _train_share(task: _Task, rank: int, processes: int, device: torch.device) -> None:
    """What each process does; the first of each machine writes the result."""
    torch.set_num_threads(max(1, torch.get_num_threads() // task.launch.devices))
    try:
        run = task.train(task.job, task.launch, task.stop.exists)
    except KeyboardInterrupt:
        task.unfinished.touch()
        return
    networks = {"model": unwrap(task.job.model), "evaluated": run.model}
    tensors = {f"{name}/{key}": value for name, net in networks.items() for key, value in gather_state(net).items()}
    if rank % task.launch.devices == 0:
        save_tensors(task.result, tensors, {"history": list(run.history)})
