"""The processes of one training or evaluation: which they are, and what they tell each other.

Lightning Fabric starts them, or finds those that torchrun or SLURM started; they talk through torch.distributed. Of a
single process every question answers itself.
"""

import copy
import inspect
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from innermax.checks import check_count, in_short
from innermax.scoring import check_devices
from innermax.sharded import shard

Parallel = Literal["ddp", "fsdp"]
T = TypeVar("T")
_LONGEST = timedelta(days=7)  # in which the slowest of several processes ends its share of an evaluation
_PATIENCE = 5.0  # seconds in which who started the processes sees which of them has ended, and ends the others


@dataclass(frozen=True)
class Plan:
    """So many processes, one a device: `devices` on each of `nodes` machines.

    `starts`: whether this process starts its machine's, else it is one of them already; `launcher`: what started those.
    """

    devices: int = 1
    nodes: int = 1
    starts: bool = False
    launcher: str | None = None

    @property
    def count(self) -> int:
        """Processes in all."""
        return self.devices * self.nodes


def planned(devices: int | None, nodes: int | None, device: torch.device) -> Plan:
    """How many processes there are to be. None: as many as torchrun or SLURM started, else one.

    Raises:
        ValueError, TypeError: there are not so many devices, or not so many processes were started.
    """
    for name, value in (("devices", devices), ("nodes", nodes)):
        if value is not None:
            check_count(value, name)
    found = launched()
    if found is not None and (found.count > 1 or found.launcher == "torchrun"):
        if (devices or found.devices, nodes or found.nodes) != (found.devices, found.nodes):
            raise ValueError(
                f"devices={devices}, nodes={nodes}: {found.launcher} started {found.devices} processes on each of "
                f"{found.nodes} machines; leave both out, or start as many"
            )
        return found
    plan = Plan(devices or 1, nodes or 1, starts=(devices or 1) * (nodes or 1) > 1)
    if plan.count > 1 and device.index is not None:
        raise ValueError(f"device must name no single GPU where there are {plan.count} processes, came {device}")
    check_devices(plan.devices, device)
    if plan.nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= os.environ.keys():
        raise ValueError(
            f"nodes={nodes} needs the same command on each machine with MASTER_ADDR and MASTER_PORT, a free port of "
            "the first one, and NODE_RANK, its number from 0, in the environment; or torchrun, or SLURM"
        )
    return plan


def launched() -> Plan | None:
    """The processes that torchrun or SLURM started this one among; None where it is alone."""
    if dist.is_available() and dist.is_torchelastic_launched():
        devices, count = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return Plan(devices, count // devices, launcher="torchrun")
    if not {"SLURM_NTASKS", "SLURM_STEP_ID"} <= os.environ.keys():  # srun sets both, a batch script has the first
        return None
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    if not SLURMEnvironment.detect():  # an interactive shell
        return None
    count, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
    if count > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ValueError("SLURM must be told the processes of each machine: give it --ntasks-per-node")
    return Plan(count // nodes, nodes, launcher="SLURM")


def launched_count() -> int:
    """How many processes torchrun or SLURM started, 1 where this one is alone."""
    found = launched()
    return 1 if found is None else found.count


def is_first() -> bool:
    """Whether this process is the one that speaks and writes for all: the only one, or the first of all machines."""
    found = launched()
    if found is None or found.count == 1:
        return int(os.environ.get("NODE_RANK", "0")) == 0
    return int(os.environ["RANK" if found.launcher == "torchrun" else "SLURM_PROCID"]) == 0


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
                f"({in_short(error)[:200]})."
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
        raise ValueError(f"devices must be 1 or the {count} processes that are there already, came {processes}")
    if found is None:
        return Ranks(dist.get_rank(), count, device)
    return joined(found, device, timeout=_LONGEST)


def check_parallel(options: Mapping[str, Any], plan: Plan, device: torch.device, examples: int) -> None:
    """Raises where a training's options do not go with so many processes."""
    smallest = examples // math.ceil(examples / options["batch_size"])
    if plan.count > smallest:
        raise ValueError(f"batch_size must leave each of {plan.count} processes an example, came batches of {smallest}")
    if options["sync_batch_norm"] and (plan.count == 1 or device.type != "cuda"):
        raise ValueError(f"sync_batch_norm needs several GPUs, came {plan.count} processes on {device.type}")
    if options["parallel"] != "fsdp":
        return
    if plan.count == 1:
        raise ValueError('parallel="fsdp" needs several processes, came one')
    for name, nothing, instead in (
        ("validation_set", None, "leave it out (validation 0) and evaluate the saved model"),
        ("ema", None, "leave it out"),
        ("sync_batch_norm", False, "leave it out"),
    ):
        if options[name] is not nothing:
            raise ValueError(f'parallel="fsdp" does not support {name}: {instead}, or train with parallel="ddp"')


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
    shared = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(twin)  # type: ignore[no-untyped-call]
    return converted


def _lost(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is of the connection to other processes."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
