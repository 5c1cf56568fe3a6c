"""Processes that work together, and what they tell each other through torch.distributed.

Of a single process every question answers itself.
"""

import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from innermax.distributed.fsdp import shard
from innermax.distributed.launch import Parallel, Plan, launched
from innermax.utils.copying import copy_model
from innermax.utils.validation import summarize_error

T = TypeVar("T")
_LONGEST = timedelta(days=7)  # in which the slowest of several processes ends its share of an evaluation
_PATIENCE = 5.0  # seconds in which who started the processes sees which of them has ended, and ends the others


@dataclass(frozen=True)
class Ranks:
    """The processes that work together, as one of them sees them: number `rank` of `count`, computing on `device`.

    fabric: Lightning's, where it was made for them; sharded: whether each holds only a part of the network.
    """

    rank: int
    count: int
    device: torch.device
    fabric: Any = None
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    def share(self, index: Tensor) -> Tensor:
        """Its part of a batch that all know; parts follow one another and differ by at most one example."""
        return index if self.count == 1 else index.tensor_split(self.count)[self.rank]

    def weight(self, share: int, whole: int) -> float:
        """What makes the mean over processes of means over shares the mean over the whole batch."""
        return share * self.count / whole

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value added up over the processes, which name the same ones."""
        if self.count == 1:
            return dict(values)
        told = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        if values:
            dist.all_reduce(told)
        return dict(zip(values, told.tolist(), strict=True))

    def gathered_rows(self, own: Tensor, count: int) -> Tensor:
        """The rows of a whole batch of so many examples, each found by the process whose share it is in."""
        if self.count == 1:
            return own
        rows = own.new_zeros(count, *own.shape[1:])
        rows[self.share(torch.arange(count, device=own.device))] = own
        dist.all_reduce(rows)
        return rows

    def any(self, asked: bool) -> bool:
        """Whether it is so in one of the processes."""
        return asked if self.count == 1 else self.sums({"asked": float(asked)})["asked"] > 0

    def gathered(self, value: T) -> list[T]:
        """Every process's value, in order; none goes on before all have told theirs."""
        if self.count == 1:
            return [value]
        told: list[Any] = [None] * self.count
        dist.all_gather_object(told, value)
        return told

    def same(self, value: T) -> T:
        """The first process's value, in all of them."""
        return value if self.count == 1 else self.gathered(value if self.first else None)[0]  # type: ignore[return-value]

    @contextmanager
    def together(self, *kinds: type[Exception]) -> Iterator[None]:
        """What one process raises inside, of these kinds, all of them raise."""
        raised: Exception | None = None
        try:
            yield
        except kinds as error:
            raised = error
        if self.any(raised is not None):
            raise next(error for error in self.gathered(raised) if error is not None)

    def first_alone(self, work: Callable[[], object]) -> None:
        """The first process does something while the others wait; what it raises, all do."""
        with self.together(ValueError, TypeError, OSError):
            if self.first:
                work()

    @torch.no_grad()
    def share_buffers(self, model: nn.Module) -> None:
        """Gives every process the first one's buffers: BatchNorm's statistics are of each one's own share."""
        if self.count == 1:
            return
        buffers = [buffer for buffer in model.buffers() if buffer.numel() > 0]
        for kind in dict.fromkeys(buffer.dtype for buffer in buffers):
            own = [buffer for buffer in buffers if buffer.dtype == kind]
            flat = torch.cat([buffer.reshape(-1) for buffer in own])
            dist.broadcast(flat, 0)
            for buffer, told in zip(own, torch.split(flat, [buffer.numel() for buffer in own]), strict=True):
                buffer.copy_(told.reshape(buffer.shape))

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Inside, of the processes' warnings only the first one's are heard."""
        if self.first:
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    @contextmanager
    def named(self) -> Iterator[None]:
        """Inside, a lost connection is said to be one.

        Raises:
            ChildProcessError: another process has ended; a little later, so that who started them can say which.
        """
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if self.count == 1 or not _lost(error):
                raise
            time.sleep(_PATIENCE)
            raise ChildProcessError(
                f"rank {self.rank} of {self.count} has lost the others: one of them has ended, or cannot be reached "
                f"({summarize_error(error)[:200]})."
            ) from error


def joined(
    plan: Plan,
    device: torch.device,
    precision: Any = "32-true",
    parallel: Parallel = "ddp",
    timeout: timedelta | None = None,
) -> Ranks:
    """This process among those of the plan, which are all there: connected, on its own device.

    precision: Fabric's; timeout: how long one may wait for another, None: torch's own.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces the precision it was given
    if plan.count == 1:
        devices: Any = [device.index or 0] if device.type == "cuda" else 1
        fabric = Fabric(accelerator=device.type, devices=devices, precision=precision)
        return Ranks(0, 1, fabric.device, fabric)
    strategy = ModelParallelStrategy(shard, plan.count, 1) if parallel == "fsdp" else None
    # Buffers are shared after each update; in a forward pass an objective's second one would change the first one's.
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    options: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    if timeout is not None:
        options["timeout"] = timeout
    threads = torch.get_num_threads()
    fabric = Fabric(
        accelerator=device.type,
        devices=plan.devices,
        num_nodes=plan.nodes,
        strategy=strategy or DDPStrategy(**options),
        precision=precision,
        plugins=[LightningEnvironment()] if plan.launcher is None else None,
    )
    fabric.launch()
    if plan.launcher is None:  # it has its share of the machine already, and Fabric has just set another
        torch.set_num_threads(threads)
    return Ranks(fabric.global_rank, fabric.world_size, fabric.device, fabric, parallel == "fsdp")


def members(processes: int, device: torch.device) -> Ranks:
    """This process among so many that are there already and all ask, or by itself where there are none.

    Raises:
        ValueError: there are others, but not so many.
    """
    found, connected = launched(), dist.is_available() and dist.is_initialized()
    count = dist.get_world_size() if connected else 1 if found is None else found.count
    if processes == 1 or count == 1:
        return Ranks(0, 1, device)
    if count != processes:
        raise ValueError(f"devices must be 1 or the {count} processes that are there already, got {processes}")
    if found is None:
        return Ranks(dist.get_rank(), count, device)
    return joined(found, device, timeout=_LONGEST)


def prepared(
    ranks: Ranks, model: nn.Module, optimizer: Callable[[nn.Module], torch.optim.Optimizer], sync_batch_norm: bool
) -> tuple[nn.Module, Any]:
    """The model and its optimiser as Fabric wraps them; what learns is the model's own tensors."""
    if sync_batch_norm:
        model = synchronised(model.to(ranks.device))
    if ranks.sharded:
        wrapped = ranks.fabric.setup_module(model)
        return wrapped, ranks.fabric.setup_optimizers(optimizer(model))
    wrapped, wrapped_optimizer = ranks.fabric.setup(model, optimizer(model))
    return wrapped, wrapped_optimizer


def synchronised(model: nn.Module) -> nn.Module:
    """A twin of the model, on the same parameters and buffers, whose BatchNorm is over all processes' examples."""
    twin = copy_model(model, {tensor: tensor for tensor in (*model.parameters(), *model.buffers())})
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(twin)  # type: ignore[no-untyped-call]
    return converted


def _lost(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is of the connection to other processes."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
