"""The state of a training: what it changes, what a checkpoint keeps of it, and how it is resumed."""

import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from innermax.data.streaming import TrainingSet
from innermax.distributed.fsdp import WholeState, is_sharded
from innermax.distributed.process_group import Ranks, set_up
from innermax.models.files import write_model
from innermax.models.wrappers import unwrap
from innermax.oracle.compiled import put_in_order
from innermax.oracle.oracle import Oracle
from innermax.oracle.sharded import ShardedOracle
from innermax.training.alarm import Alarm
from innermax.training.arithmetic import Arithmetic
from innermax.training.batch_attack import Kept
from innermax.training.checkpoints import load_checkpoint, match_layout, save_checkpoint
from innermax.training.metrics import EpochMetrics
from innermax.training.options import TrainingOptions
from innermax.utils.copying import copy_model


@dataclass
class State:
    """Everything that a training changes.

    Attributes:
        network: the user's own module, which learns.
        wrapped: the same as Fabric wraps it.
        optimizer: as Fabric wraps it.
        averaged: the moving average of the network's weights, where one is asked for.
        oracle: the network as attacks see it.
        kept: what the strategy keeps from one batch to another.
        epoch: the one that is trained, from 0.
        batch: the next one of the epoch, from 0.
        metrics: of the epoch's batches so far.
        history: the rows of the epochs before.
        seconds: spent on the epoch before it was interrupted.
        alarm: for catastrophic overfitting.
        arithmetic: what an update computes in.
    """

    network: nn.Module
    wrapped: nn.Module
    optimizer: Any
    averaged: AveragedModel | None
    oracle: Oracle
    kept: Kept
    epoch: int = 0
    batch: int = 0
    metrics: EpochMetrics = field(default_factory=EpochMetrics)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    alarm: Alarm = field(default_factory=Alarm)
    arithmetic: Arithmetic = field(default_factory=Arithmetic)

    @classmethod
    def start(
        cls, model: nn.Module, data: TrainingSet, options: TrainingOptions, ranks: Ranks, arithmetic: Arithmetic
    ) -> "State":
        """The state before the first update; data: on this process's device."""
        network = unwrap(model)
        if not network.training:
            network.train()
        if arithmetic.channels_last:
            put_in_order(network, channels_last=True)
        wrapped, optimizer = set_up(ranks, network, partial(_build_optimizer, options=options), options.sync_batch_norm)
        optimizer.zero_grad()  # the model may come with gradients
        averaged = None
        if options.ema is not None:
            # copy.deepcopy, which it would use, does not copy every network.
            averaged = AveragedModel(nn.Identity(), multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True)  # type: ignore[no-untyped-call]
            averaged.module = copy_model(network)
            if arithmetic.channels_last:
                put_in_order(averaged.module, channels_last=False)
        example, _ = data.head.batch(torch.arange(min(16, len(data.head)), device=ranks.device))
        oracle: Oracle
        oracle = ShardedOracle(network, example) if ranks.sharded else Oracle.fast(network, example, options.precision)
        oracle = _agree(oracle, ranks)
        kept = Kept.start(data, options, ranks)
        return cls(network, wrapped, optimizer, averaged, oracle, kept, arithmetic=arithmetic)

    @property
    def evaluated_network(self) -> nn.Module:
        """The network that is scored and saved."""
        return self.network if self.averaged is None else self.averaged.module

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Puts the epoch's row into the history, and goes to the start of the next epoch."""
        self.history.append(row)
        self.epoch, self.batch, self.metrics, self.seconds = self.epoch + 1, 0, EpochMetrics(), 0.0

    def save_models(self, folder: Path, ranks: Ranks) -> None:
        """Writes the last model, and the best so far where a validation split says which that is."""
        model: Any = WholeState(self.network, self.network).gather() if ranks.sharded else self.evaluated_network
        if not ranks.first:
            return
        tensors, config = model.state_dict(), getattr(model, "config", None)
        write_model(folder, tensors, config)
        scores = [float(row.get("validation_accuracy", -1.0)) for row in self.history]
        if scores[-1] > max(scores[:-1], default=-1.0):
            write_model(folder, tensors, config, "best.safetensors")

    def save(self, folder: Path, ranks: Ranks, seconds: float, keep: int) -> None:
        """Writes a checkpoint, from which any number of processes can go on.

        seconds: spent on the epoch; keep: how many checkpoints stay.
        """
        networks, optimizer = self._parts(ranks)
        if ranks.sharded:
            networks, optimizer = {name: net.gather() for name, net in networks.items()}, optimizer.gather()
        if not ranks.first:
            return
        position = {
            "epoch": self.epoch,
            "batch": self.batch,
            "totals": self.metrics.totals,
            "gauged": self.metrics.gauges,
            "history": self.history,
            "seconds": seconds,
            "attack_network": self.oracle.scheme,
            "micro_batch": self.oracle.micro_batch,
            "alarm": self.alarm.position(),
            "updates": str(self.arithmetic),
        }
        save_checkpoint(folder, networks, optimizer, position, self.kept.tensors, keep)

    def resume(self, folder: Path, ranks: Ranks) -> bool:
        """Goes to the newest checkpoint of the folder; False where there is none.

        Raises:
            ValueError: no checkpoint is whole, it does not fit, or the processes do not find the same one.
        """
        position = load_checkpoint(folder, *self._parts(ranks), self.kept.tensors)
        found = ranks.gather((position.get("epoch"), position.get("batch")))
        if len(set(found)) > 1:
            raise ValueError(f"run_dir {folder} must be one folder for all processes, got {found} (epoch, batch)")
        if not position:
            return False
        self.epoch, self.batch = position.get("epoch", 0), position.get("batch", 0)
        self.metrics = EpochMetrics(position.get("totals", {}), position.get("gauged", {}))
        self.history, self.seconds = position.get("history", []), position.get("seconds", 0.0)
        self.alarm = Alarm.at(position.get("alarm", {}))
        self.oracle.micro_batch = position.get("micro_batch")
        self._compute_as_before(position.get("updates", str(self.arithmetic)), ranks)
        self.oracle.refresh()
        self._recompile(position.get("attack_network", ""))
        return True

    def update(self, ranks: Ranks) -> None:
        """θ ← θ − η · g(θ), and all that follows the weights."""
        _begin_momentum(self.optimizer.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        ranks.broadcast_buffers(self.wrapped)
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        self.oracle.refresh()

    def compute_in(self, arithmetic: Arithmetic, ranks: Ranks) -> None:
        """Updates compute so from now on."""
        if arithmetic.channels_last != self.arithmetic.channels_last:
            put_in_order(unwrap(self.wrapped), arithmetic.channels_last)
            match_layout(self.optimizer.optimizer)
        if ranks.autocast is not None:
            ranks.autocast.enabled = arithmetic.bf16
        self.arithmetic = arithmetic

    def recheck(self, ranks: Ranks) -> None:
        """Compiles the oracle anew where it does not suit what the network has learned."""
        self.oracle = _agree(self.oracle.recheck(), ranks)

    def _compute_as_before(self, known: str, ranks: Ranks) -> None:
        """Updates compute as when the run was interrupted; warns where they cannot."""
        now = next((one for one in self.arithmetic.plainer() if str(one) == known), self.arithmetic)
        self.compute_in(now, ranks)
        if str(now) != known:
            warnings.warn(
                f"updates computed in {known} when the run was interrupted and compute in {now} now: "
                "results may differ from an uninterrupted run's",
                stacklevel=4,
            )

    def _recompile(self, scheme: str) -> None:
        """Compiles the oracle as it was when the run was interrupted; warns where that is not possible."""
        self.oracle = self.oracle.recompile(scheme)
        if self.oracle.scheme != scheme:
            warnings.warn(
                f"the attack network was {scheme!r} when the run was interrupted and is {self.oracle.plan!r} now: "
                "results may differ from an uninterrupted run's",
                stacklevel=4,
            )

    def _parts(self, ranks: Ranks) -> tuple[dict[str, Any], Any]:
        """The networks and the optimiser that a checkpoint holds."""
        if ranks.sharded:
            return {"model": WholeState(self.network, self.network)}, WholeState(self.optimizer, self.network)
        networks = {"model": self.network} | ({} if self.averaged is None else {"ema": self.averaged})
        return networks, self.optimizer


def _agree(oracle: Oracle, ranks: Ranks) -> Oracle:
    """The oracle compiled as rank 0's is: each process has timed for itself."""
    return oracle.recompile(ranks.broadcast(oracle.scheme))


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """A momentum of 0 for weights whose first gradient comes later than others': torch's fused SGD fails on them."""
    for group in optimizer.param_groups:
        if not group.get("momentum") or not group["fused"]:
            continue
        learn = [p for p in group["params"] if p.grad is not None]
        new = [p for p in learn if optimizer.state[p].get("momentum_buffer") is None]
        if len(new) < len(learn):
            for parameter in new:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


def _build_optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """SGD or AdamW on all parameters of a model."""
    # torch has no fused step of sharded or complex ones.
    fused = not any(is_sharded(p) or p.is_complex() for p in model.parameters())
    lr, decay = options.lr, options.weight_decay
    if options.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=decay, fused=fused)
    return torch.optim.SGD(model.parameters(), lr, options.momentum, weight_decay=decay, fused=fused)
