"""Work shared by processes, one a device, that Lightning Fabric starts."""

import io
import json
import logging
import multiprocessing
import os
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from innermax.utils.files import IN_MEMORY, write_json

Work = Callable[..., None]
_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (ValueError, TypeError, ArithmeticError, FloatingPointError, OSError)
}
_LOOK_EVERY = 0.5  # seconds


def shared(
    work: Work,
    arguments: Any,
    processes: int,
    device: str,
    watch: Callable[[], None],
    *,
    nodes: int = 1,
    backend: str | None = "gloo",
) -> None:
    """Runs work(arguments, rank, processes in all, device) in so many new processes, each on a device of its own.

    They start from nothing ("spawn"), so that threads and CUDA contexts of this process do no harm; a script must guard
    its main part with `if __name__ == "__main__"`. Each computes with as many threads as this one.

    Args:
        work: a function of a module, which the processes import.
        arguments: anything that pickles.
        device: "cpu" or "cuda".
        watch: called now and then from another thread while they work, and once at the end.
        nodes: machines on which the same is called, so that their processes are connected.
        backend: of torch.distributed; gloo on GPUs too where nothing is ever sent, since NCCL would hold memory; None:
            the device's own.

    Raises:
        TypeError: the arguments do not pickle.
        ValueError, TypeError, ArithmeticError, OSError: what the first failing process raised, with its notes.
        ChildProcessError: a process ended without an answer; the others are ended.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy
    from torch.multiprocessing.spawn import ProcessException

    with TemporaryDirectory(prefix="innermax-") as folder, _quiet(), _no_orphans(), _watched(watch):
        payload = _pickled((work, arguments), Path(folder), processes)
        strategy = DDPStrategy(start_method="spawn", process_group_backend=backend)
        fabric = Fabric(
            accelerator=device,
            devices=processes,
            num_nodes=nodes,
            strategy=strategy,
            plugins=[LightningEnvironment()],
        )
        try:
            fabric.launch(_worker, _Handed(payload, Path(folder)))
        except ProcessException as error:
            for told in sorted(Path(folder).glob("*.json")):
                name, message, notes = json.loads(told.read_text())
                known = _ERRORS[name](message)
                for note in notes:
                    known.add_note(note)
                raise known from None
            reason = re.sub(r"^process (\d+)", r"rank \1", str(error).strip().splitlines()[-1])
            hint = ", as the system does where memory runs out" if "SIGKILL" in reason else ""
            raise ChildProcessError(f"one of {processes} processes ended early: {reason}{hint}.") from error


def _pickled(value: object, folder: Path, processes: int) -> bytes:
    """Its pickle; tensors that are too large for memory are in files of the folder."""
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, folder).dump(value)
    except OSError:  # no room for a file
        raise
    except Exception as error:  # whatever an object's own pickling raises
        reason = f"{type(error).__name__}: {error}"
        raise TypeError(
            f"devices={processes} needs a model and attacks that pickle, and these do not: {reason}"
        ) from error
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Puts what is too large for memory into files, which all processes map instead of copying it."""

    def __init__(self, buffer: io.BytesIO, folder: Path) -> None:
        super().__init__(buffer)
        self.folder = folder

    def reducer_override(self, value: Any) -> Any:
        """How a value is pickled: as by default, unless it is a large tensor."""
        if type(value) is not Tensor or value.device.type != "cpu" or value.nbytes <= IN_MEMORY:
            return NotImplemented
        path = self.folder / f"{len(list(self.folder.iterdir()))}.npy"
        np.save(path, value.numpy())
        return _mapped, (path,)


def _mapped(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="r+"))


class _Handed:
    """What the processes are given; each that unpickles it computes as this one does, and lets Fabric be silent."""

    def __init__(self, payload: bytes, folder: Path) -> None:
        self.payload, self.folder = payload, folder
        # What of a process decides the last bits of a result, beside what Fabric hands over itself.
        self.threads, self.matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
        self.tf32 = torch.backends.cudnn.allow_tf32

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        torch.set_float32_matmul_precision(self.matmul)
        torch.backends.cudnn.allow_tf32 = self.tf32


def _worker(fabric: Any, *arguments: _Handed) -> None:
    """What each process does; an error that the caller can understand is left in the folder."""
    (handed,) = arguments
    torch.set_num_threads(handed.threads)  # Fabric has just set its own number
    try:
        work, task = pickle.loads(handed.payload)  # this package's own bytes, from the process that started this one
        work(task, fabric.global_rank, fabric.world_size, fabric.device)
    except tuple(_ERRORS.values()) as error:
        name = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS)
        notes = getattr(error, "__notes__", [])
        write_json(handed.folder / f"{fabric.global_rank}.json", [name, str(error), notes])
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, Fabric and torch announce nothing; the port that is put into the environment is taken out again."""
    levels = {"lightning_fabric": logging.WARNING, "torch.multiprocessing.spawn": logging.ERROR}
    loggers, port = {name: logging.getLogger(name) for name in levels}, os.environ.get("MASTER_PORT")
    before = {name: logger.level for name, logger in loggers.items()}
    for name, level in levels.items():
        loggers[name].setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            loggers[name].setLevel(level)
        os.environ.pop("MASTER_PORT", None)
        if port is not None:
            os.environ["MASTER_PORT"] = port


@contextmanager
def _no_orphans() -> Iterator[None]:
    """Processes that are started inside do not outlive it."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
            child.join()


@contextmanager
def _watched(watch: Callable[[], None]) -> Iterator[None]:
    """Inside, a thread looks now and then."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_EVERY):
            watch()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    watch()
