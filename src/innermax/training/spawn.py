"""A training by processes that are started for it, as if it had been in this one."""

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
from innermax.models.wrappers import unwrapped
from innermax.training.interrupts import held_interrupts
from innermax.utils.copying import copy_model
from innermax.utils.files import load_tensors, save_tensors


@dataclass(frozen=True)
class _Task:
    """What a process needs: the training, a function (job, launch, stopped), and a folder in which all leave word."""

    train: Callable[[Any, Launch, Callable[[], bool]], Any]
    job: Any
    launch: Launch
    folder: Path

    @property
    def stop(self) -> Path:
        """Is there once the training is to end after its batch."""
        return self.folder / "stop"

    @property
    def interrupted(self) -> Path:
        """Is there once it has."""
        return self.folder / "interrupted"

    @property
    def result(self) -> Path:
        """What came out."""
        return self.folder / "run.safetensors"


def trained_elsewhere(
    train: Callable[[Any, Launch, Callable[[], bool]], Any], job: Any, launch: Launch, device: str
) -> tuple[nn.Module, Sequence[Mapping[str, Any]]]:
    """The network that is evaluated, and the history; the job's own model has learned the same.

    train: a function of a module, (job, launch, whether an interrupt came) → a run; job: what it takes, with the model
    among its options; it must pickle. Raises what `shared` does, KeyboardInterrupt after the processes have saved.
    """
    with TemporaryDirectory(prefix="innermax-") as place, held_interrupts() as interrupted:
        task = _Task(train, job, replace(launch, starts=False), Path(place))

        def watch() -> None:
            if interrupted():
                task.stop.touch()

        try:
            run_processes(_share, task, launch.devices, device, watch, nodes=launch.nodes, backend=None)
        except ChildProcessError:
            if interrupted():  # while they were starting
                raise KeyboardInterrupt from None
            raise
        if task.interrupted.exists():
            raise KeyboardInterrupt
        tensors, told = load_tensors(task.result)
        model: nn.Module = job.options["model"]
        networks = {"model": model, "evaluated": model if job.options["ema"] is None else copy_model(model)}
        for name, network in networks.items():
            own = {key.removeprefix(f"{name}/"): v for key, v in tensors.items() if key.startswith(f"{name}/")}
            network.load_state_dict(own)
            network.eval()
        return networks["evaluated"], tuple(told["history"])


def _share(task: _Task, rank: int, processes: int, device: torch.device) -> None:
    """What one of the processes does; the first of each machine leaves what came out."""
    torch.set_num_threads(max(1, torch.get_num_threads() // task.launch.devices))
    try:
        run = task.train(task.job, task.launch, task.stop.exists)
    except KeyboardInterrupt:
        task.interrupted.touch()
        return
    networks = {"model": unwrapped(task.job.options["model"]), "evaluated": run.model}
    tensors = {f"{name}/{key}": value for name, net in networks.items() for key, value in gather_state(net).items()}
    if rank % task.launch.devices == 0:
        save_tensors(task.result, tensors, {"history": list(run.history)})
