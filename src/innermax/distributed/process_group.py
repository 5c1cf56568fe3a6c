"""The process group of a training or an evaluation: what its processes exchange through torch.distributed.

A single process is a group of one, which exchanges nothing.
"""

import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from innermax.distributed.fsdp import shard
from innermax.distributed.launch import Launch, Parallel, find_launch
from innermax.utils.copying import copy_model, write_into
from innermax.utils.validation import summarize_error

T = TypeVar("T")
_LONGEST = timedelta(days=7)  # that one process of an evaluation waits for the slowest
_PATIENCE = 5.0  # seconds for the parent process to see which of its children has ended, and to end the others


@dataclass(frozen=True)
class Ranks:
    """This process in its group: `rank` of `count`, computing on `device`.

    fabric: the Lightning Fabric that connected them, if one did.
    autocast: its plugin for bf16, if it has one.
    sharded: whether each holds only a part of the network.
    """

    rank: int
    count: int
    device: torch.device
    fabric: Any = None
    autocast: Any = None
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether it is rank 0, which writes and prints."""
        return self.rank == 0

    def share(self, index: Tensor) -> Tensor:
        """This process's part of a batch; parts are consecutive and differ by at most one example."""
        return index if self.count == 1 else index.tensor_split(self.count)[self.rank]

    def weight(self, share: int, whole: int) -> float:
        """The factor on a share's mean that makes the mean over processes the mean over the whole batch."""
        return share * self.count / whole

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over the processes, which all give the same names."""
        if self.count == 1:
            return dict(values)
        totals = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        if values:
            dist.all_reduce(totals)
        return dict(zip(values, totals.tolist(), strict=True))

    def add_up(self, values: Tensor) -> Tensor:
        """Each number summed over the processes, on the device: nobody waits for it."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gather_rows(self, own: Tensor, count: int) -> Tensor:
        """The rows of a whole batch of `count` examples, of which each process has those of its share."""
        if self.count == 1:
            return own
        rows = own.new_zeros(count, *own.shape[1:])
        rows[self.share(torch.arange(count, device=own.device))] = own
        dist.all_reduce(rows)
        return rows

    def any(self, asked: bool) -> bool:
        """Whether it is true in at least one process."""
        return asked if self.count == 1 else self.sum({"asked": float(asked)})["asked"] > 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank. Each waits here for all."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value, in all processes."""
        return value if self.count == 1 else self.gather(value if self.first else None)[0]  # type: ignore[return-value]

    @contextmanager
    def raise_together(self, *kinds: type[Exception]) -> Iterator[None]:
        """Context manager: an exception of these kinds that one process raises, all raise."""
        raised: Exception | None = None
        try:
            yield
        except kinds as error:
            raised = error
        if self.any(raised is not None):
            raise next(error for error in self.gather(raised) if error is not None)

    def run_first(self, work: Callable[[], object]) -> None:
        """Rank 0 works while the others wait; what it raises, all raise."""
        with self.raise_together(ValueError, TypeError, OSError):
            if self.first:
                work()

    @torch.no_grad()
    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copies rank 0's buffers to all; otherwise BatchNorm's statistics would be those of each one's share."""
        if self.count == 1:
            return
        buffers = [buffer for buffer in model.buffers() if buffer.numel() > 0]
        for kind in dict.fromkeys(buffer.dtype for buffer in buffers):
            own = [buffer for buffer in buffers if buffer.dtype == kind]
            flat = torch.cat([buffer.reshape(-1) for buffer in own])
            dist.broadcast(flat, 0)
            for buffer, first in zip(own, torch.split(flat, [buffer.numel() for buffer in own]), strict=True):
                write_into(buffer, first.reshape(buffer.shape))

    @contextmanager
    def mute_others(self) -> Iterator[None]:
        """Context manager: only rank 0 shows warnings."""
        if self.first:
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    @contextmanager
    def explain_lost_connection(self) -> Iterator[None]:
        """Context manager: an error of a lost connection becomes a ChildProcessError that says so.

        Raises:
            ChildProcessError: another process has ended; after some seconds, in which the parent can tell which.
        """
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if self.count == 1 or not _is_lost_connection(error):
                raise
            time.sleep(_PATIENCE)
            raise ChildProcessError(
                f"rank {self.rank} of {self.count} has lost the others: one of them has ended, or cannot be reached "
                f"({summarize_error(error)[:200]})."
            ) from error


def connect(
    launch: Launch,
    device: torch.device,
    bf16: bool = False,
    parallel: Parallel = "ddp",
    timeout: timedelta | None = None,
) -> Ranks:
    """Connects this process with the others of the launch, which all call this, each on its own device.

    bf16: of forward passes; timeout: how long one process waits for another, None: torch's default.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it would print the precision
    autocast = _autocast(device) if bf16 else None
    plugins: list[Any] = [] if autocast is None else [autocast]
    if launch.count == 1:
        devices: Any = [device.index or 0] if device.type == "cuda" else 1
        fabric = Fabric(accelerator=device.type, devices=devices, plugins=plugins)
        return Ranks(0, 1, fabric.device, fabric, autocast)
    strategy = ModelParallelStrategy(shard, launch.count, 1) if parallel == "fsdp" else None
    # Buffers are broadcast after each update. DDP would do so in each forward pass, and an objective's second forward
    # pass would then change what the first one's backward pass needs.
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    options: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    if timeout is not None:
        options["timeout"] = timeout
    threads = torch.get_num_threads()
    fabric = Fabric(
        accelerator=device.type,
        devices=launch.devices,
        num_nodes=launch.nodes,
        strategy=strategy or DDPStrategy(**options),
        plugins=[*plugins, *([LightningEnvironment()] if launch.launcher is None else [])],
    )
    fabric.launch()
    if launch.launcher is None:  # the parent has divided the cores already, and Fabric has just set another number
        torch.set_num_threads(threads)
    return Ranks(fabric.global_rank, fabric.world_size, fabric.device, fabric, autocast, parallel == "fsdp")


def _autocast(device: torch.device) -> Any:
    """Fabric's plugin for bf16, which can be switched off; its own would round images before the network sees them."""
    from lightning_fabric.plugins.precision.amp import MixedPrecision

    class Autocast(MixedPrecision):
        enabled = True

        def convert_input(self, data: Any) -> Any:
            return data

        def convert_output(self, data: Any) -> Any:
            return super().convert_output(data) if self.enabled else data

        def forward_context(self) -> AbstractContextManager[Any]:
            return super().forward_context() if self.enabled else nullcontext()

    return Autocast("bf16-mixed", device.type)


def find_members(processes: int, device: torch.device) -> Ranks:
    """The group of `processes` that are running and all call this; a group of one where there are no others.

    Raises:
        ValueError: another number of processes is running.
    """
    found, connected = find_launch(), dist.is_available() and dist.is_initialized()
    count = dist.get_world_size() if connected else 1 if found is None else found.count
    if processes == 1 or count == 1:
        return Ranks(0, 1, device)
    if count != processes:
        raise ValueError(f"devices must be 1 or {count}, the processes that are running, got {processes}")
    if found is None:
        return Ranks(dist.get_rank(), count, device)
    return connect(found, device, timeout=_LONGEST)


def set_up(
    ranks: Ranks, model: nn.Module, optimizer: Callable[[nn.Module], torch.optim.Optimizer], sync_batch_norm: bool
) -> tuple[nn.Module, Any]:
    """Wraps the model and its optimiser by Fabric; the model's own tensors are what learns."""
    if sync_batch_norm:
        model = synchronise_batch_norm(model.to(ranks.device))
    if ranks.sharded:
        wrapped = ranks.fabric.setup_module(model)
        return wrapped, ranks.fabric.setup_optimizers(optimizer(model))
    wrapped, wrapped_optimizer = ranks.fabric.setup(model, optimizer(model))
    return wrapped, wrapped_optimizer


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of the model on the same parameters and buffers, whose BatchNorm is over all processes' examples."""
    twin = copy_model(model, {tensor: tensor for tensor in (*model.parameters(), *model.buffers())})
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(twin)  # type: ignore[no-untyped-call]
    return converted


def _is_lost_connection(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is a lost connection."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
