"""Starts processes, one per device, through Lightning Fabric, and runs a function in each."""

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
_CALL_EVERY = 0.5  # seconds


def run_processes(
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

    They are spawned, not forked, so that this process's threads and CUDA contexts do no harm; a script must guard its
    main part with `if __name__ == "__main__"`. Each computes with as many threads as this one.

    Args:
        work: a function of a module, which the processes import.
        arguments: anything that pickles.
        device: "cpu" or "cuda".
        watch: called every half second from another thread while they work, and once at the end.
        nodes: machines that all make this call, and whose processes are connected.
        backend: of torch.distributed; None: the device's own. gloo is enough on GPUs that exchange nothing, and takes
            none of their memory.

    Raises:
        TypeError: the arguments do not pickle.
        ValueError, TypeError, ArithmeticError, OSError: what the first failing process raised, with its notes.
        ChildProcessError: a process ended without raising one of these; the others are ended.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy
    from torch.multiprocessing.spawn import ProcessException

    with TemporaryDirectory(prefix="innermax-") as folder, _silence(), _end_children(), _call_regularly(watch):
        payload = _pickle((work, arguments), Path(folder), processes)
        strategy = DDPStrategy(start_method="spawn", process_group_backend=backend)
        fabric = Fabric(
            accelerator=device,
            devices=processes,
            num_nodes=nodes,
            strategy=strategy,
            plugins=[LightningEnvironment()],
        )
        try:
            fabric.launch(_worker, _Payload(payload, Path(folder)))
        except ProcessException as error:
            for failure in sorted(Path(folder).glob("*.json")):
                name, message, notes = json.loads(failure.read_text(encoding="utf-8"))
                known = _ERRORS[name](message)
                for note in notes:
                    known.add_note(note)
                raise known from None
            reason = re.sub(r"^process (\d+)", r"rank \1", str(error).strip().splitlines()[-1])
            hint = ", as the system does where memory runs out" if "SIGKILL" in reason else ""
            raise ChildProcessError(f"one of {processes} processes ended early: {reason}{hint}.") from error


def _pickle(value: object, folder: Path, processes: int) -> bytes:
    """Pickles a value; tensors too large for memory go into files of the folder."""
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
    """Writes tensors that are too large for memory into files, which all processes map instead of copying them."""

    def __init__(self, buffer: io.BytesIO, folder: Path) -> None:
        super().__init__(buffer)
        self.folder = folder

    def reducer_override(self, value: Any) -> Any:
        """A large tensor as its file; anything else as by default."""
        if type(value) is not Tensor or value.device.type != "cpu" or value.nbytes <= IN_MEMORY:
            return NotImplemented
        path = self.folder / f"{len(list(self.folder.iterdir()))}.npy"
        np.save(path, value.numpy())
        return _map_file, (path,)


def _map_file(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="r+"))


class _Payload:
    """What each process unpickles, after it has taken over this process's settings and silenced Fabric."""

    def __init__(self, payload: bytes, folder: Path) -> None:
        self.payload, self.folder = payload, folder
        # Settings that decide the last bits of a result; Fabric hands over the others.
        self.threads, self.matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
        self.tf32 = torch.backends.cudnn.allow_tf32

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        torch.set_float32_matmul_precision(self.matmul)
        torch.backends.cudnn.allow_tf32 = self.tf32


def _worker(fabric: Any, *arguments: _Payload) -> None:
    """Runs the work in a started process; an error that the caller can understand is written into the folder."""
    (payload,) = arguments
    torch.set_num_threads(payload.threads)  # Fabric has just set its own number
    try:
        work, task = pickle.loads(payload.payload)  # this package's own bytes, from the process that started this one
        work(task, fabric.global_rank, fabric.world_size, fabric.device)
    except tuple(_ERRORS.values()) as error:
        name = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS)
        notes = getattr(error, "__notes__", [])
        write_json(payload.folder / f"{fabric.global_rank}.json", [name, str(error), notes])
        raise


@contextmanager
def _silence() -> Iterator[None]:
    """Context manager: Fabric and torch print nothing; MASTER_PORT in the environment is as before at the end."""
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
def _end_children() -> Iterator[None]:
    """Context manager: ends the processes that were started in it and are still running."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
            child.join()


@contextmanager
def _call_regularly(watch: Callable[[], None]) -> Iterator[None]:
    """Context manager: a thread calls `watch` every half second; at the end this one calls it."""
    ended = threading.Event()

    def call() -> None:
        while not ended.wait(_CALL_EVERY):
            watch()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    watch()
