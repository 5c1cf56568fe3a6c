"""What a training changes, from networks to the place in the epoch: an update, an epoch, and what is saved of them."""

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from innermax.attacks.pgd import PGD
from innermax.attacks.search import measure
from innermax.data.augmentation import augment
from innermax.data.image_set import ImageSet
from innermax.data.streaming import ORDER, Batch, ImageStream, batch_count, batches
from innermax.distributed.fsdp import WholeState, as_float
from innermax.distributed.process_group import Ranks, set_up
from innermax.models.files import write_model
from innermax.models.wrappers import unwrapped
from innermax.objectives import Objective
from innermax.oracle.oracle import Oracle
from innermax.oracle.sharded import ShardedOracle
from innermax.strategies import Strategy, halfway
from innermax.training.checkpoints import due_every, load_state, save_state
from innermax.training.loggers import Picture, picture
from innermax.training.metrics import SAMPLE, warn_of_fosc
from innermax.training.optimizer import build_optimizer, learning_rate
from innermax.training.progress import Progress
from innermax.training.time_left import TrainingClock
from innermax.utils import randomness
from innermax.utils.files import refuse_link

_GAUGED_BATCHES = 20  # how many batches an epoch also compute the gauge of their final iterates
_SHOWN = 8  # examples in a logger's picture
_AUGMENT, _ATTACK, _MODEL = range(1, 4)  # streams of random numbers, so that no two draws share one; 0 is the order's


@dataclass
class Loop:
    """Everything that training changes, and the constants its steps need."""

    options: Mapping[str, Any]
    data: ImageSet | ImageStream
    ranks: Ranks
    network: nn.Module  # the user's own
    model: nn.Module  # as Fabric wraps it
    optimizer: torch.optim.Optimizer
    averaged: AveragedModel | None
    oracle: Oracle
    kept: Tensor | None  # each example's last perturbation, in half precision, where the strategy goes on from it
    clock: TrainingClock
    folder: Path | None
    due: Callable[[], bool]  # whether the state is to be saved, asked after each update
    epoch: int = 0
    batch: int = 0  # position in the epoch
    totals: dict[str, float] = field(default_factory=dict)  # sums over the epoch's batches so far
    gauged: dict[str, list[float]] = field(default_factory=dict)  # gauges of single examples, for their distribution
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0  # spent on the epoch before it was interrupted
    began: float = 0.0  # when the epoch would have begun, had it not been interrupted
    whole: bool = True  # no update has begun that has not ended
    agreed: bool = False  # all processes stop here

    @classmethod
    def started(
        cls, options: Mapping[str, Any], data: ImageSet | ImageStream, ranks: Ranks, folder: Path | None = None
    ) -> "Loop":
        """At the beginning. options: of `train`; folder: of the run."""
        model = unwrapped(options["model"])
        if not model.training:
            model.train()
        if len(data.shape) == 3:  # FSDP takes no other memory format than the usual
            memory_format = torch.contiguous_format if ranks.sharded else torch.channels_last
            model.to(memory_format=memory_format)  # type: ignore[call-overload]
        wrapped, optimizer = set_up(ranks, model, partial(build_optimizer, options=options), options["sync_batch_norm"])
        optimizer.zero_grad()  # the model may come with gradients of its past
        averaged = None
        if options["ema"] is not None:
            averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options["ema"]), use_buffers=True)  # type: ignore[no-untyped-call]
        data = data.to(ranks.device)
        example, _ = data.head.batch(torch.arange(min(16, len(data.head)), device=ranks.device))
        oracle = ShardedOracle(model, example) if ranks.sharded else Oracle.fast(model, example, options["precision"])
        kept = None
        if getattr(options["strategy"], "warm_start", False):
            kept = torch.zeros(len(data), *data.shape, dtype=torch.float16, device=ranks.device)
        clock = TrainingClock(options["strategy"], options["epochs"], len(data))
        due = due_every(options["checkpoint_every"])
        return cls(options, data, ranks, model, wrapped, optimizer, averaged, oracle, kept, clock, folder, due)

    @property
    def device(self) -> torch.device:
        return self.data.head.labels.device

    @property
    def evaluated(self) -> nn.Module:
        """The network that is scored and saved."""
        return self.network if self.averaged is None else self.averaged.module

    def run_epoch(
        self, strategy: Strategy, objective: Objective, show: Progress, interrupted: Callable[[], bool]
    ) -> dict[str, Any]:
        """Trains from the current batch to the epoch's end; what was measured, a value a name."""
        epochs, seed = self.options["epochs"], self.options["seed"]
        if self.batch == 0:
            self.oracle = self.oracle.recheck()
        attack = strategy.attack_at(self.epoch / epochs, self.history)
        size = self.options["batch_size"]
        count = batch_count(self.data, size)
        stride = max(1, count // _GAUGED_BATCHES)
        if attack is not None and (not self.history or self.history[-1].get("attack_network") != self.oracle.plan):
            show.say(f"attack network: {self.oracle.plan}")
        show.start(self.epoch, count, getattr(attack, "stop_at", None))
        self.clock.start(self.epoch, self.history)
        with contextlib.closing(batches(self.data, size, seed, self.epoch, self.batch, self.ranks.share)) as coming:
            for batch in coming:
                moment = (self.epoch + self.batch / count) / epochs
                measured = self.update(batch, attack, objective, moment, self.batch % stride == 0)
                for name, value in measured.items():
                    self.totals[name] = self.totals.get(name, 0.0) + value
                self.batch += 1
                self.whole = True
                done = int(self.totals.get("examples", 0))
                left = self.clock.left(done, self.totals.get("gradients", 0.0) / max(done, 1))
                show.batch(self.batch, self.totals, fmean(self.gauged["fosc"]) if self.gauged else None, left)
                if interrupted():
                    self.agreed = True
                    raise KeyboardInterrupt
                due = self.folder is not None and self.due()
                if self.ranks.any(due and self.ranks.first) and self.batch < count:
                    self.save()
        return self._row(attack)

    def update(
        self, batch: Batch, attack: PGD | None, objective: Objective, moment: float, gauge: bool
    ) -> dict[str, float]:
        """One attack and one descent step; sums over the batch's examples, of which this process does its share."""
        began, attacking = time.perf_counter(), 0.0
        index, mine, x, y = batch
        x = self._moved(x, mine)
        x_adv, cost = x, {}
        if attack is not None:
            seed = randomness.derive_seed(self.options["seed"], _ATTACK, self.epoch)
            start = None
            if self.kept is not None and self.epoch > 0:
                start = x + self._moved(self.kept[mine].to(x.dtype), mine)
            asked = time.perf_counter()
            found = attack(self.oracle, x, y, seed=seed, index=mine, start=start, final="none")
            self.oracle.settle()
            x_adv = found.x_adv
            cost["gradients"] = float(found.gradient_calls.sum())
            attacking = time.perf_counter() - asked
            if self.kept is not None:
                found_here = self._moved(x_adv - x, mine, back=True).half()
                self.kept[index] = self.ranks.gather_rows(found_here, len(index))
        cost = self.ranks.sum(cost)
        try:
            with self.ranks.raise_together(FloatingPointError):
                gauges = self._gauges(attack, x, x_adv, y) if attack is not None and gauge else {}
            self.whole = False
            measured = cost | self._descend(objective, x, y, x_adv, moment, len(index))
        except FloatingPointError as error:
            self._note(error, index)
            if self.options["on_nan"] == "stop":
                raise
            return cost | {"skipped": 1.0}
        for told in self.ranks.gather(gauges) if gauge else ():
            for name, values in told.items():
                self.gauged.setdefault(name, []).extend(values)
        updating = time.perf_counter() - began - attacking
        self.clock.batch(len(index), measured.get("gradients", 0.0), attacking, updating)
        return measured

    def _moved(self, images: Tensor, index: Tensor, back: bool = False) -> Tensor:
        """The epoch's augmentation of the examples, or what undoes it."""
        shift, flip = self.options["shift"], self.options["flip"]
        if not (shift or flip):
            return images
        keys = randomness.hash_keys(self.options["seed"], index, _AUGMENT, self.epoch)
        return augment(images, keys, shift=shift, flip=flip, back=back)

    def _descend(
        self, objective: Objective, x: Tensor, y: Tensor, x_adv: Tensor, moment: float, batch: int
    ) -> dict[str, float]:
        """One update of the weights, and of all that follows them; FloatingPointError leaves them as they were.

        batch: examples of all processes.
        """
        # The model's own draws (dropout) belong to the batch and the process, so that a resumed run repeats them.
        own = (self.ranks.rank,) if self.ranks.rank > 0 else ()
        torch.manual_seed(randomness.derive_seed(self.options["seed"], _MODEL, self.epoch, self.batch, *own))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(moment, self.options)
        skips = self.options["on_nan"] == "skip"
        before = (
            [value.clone() for value in self.model.buffers()] if skips else []
        )  # a forward pass changes BatchNorm's
        try:
            loss, logits = objective(self.model, x, y, x_adv, self.epoch)
            told = {"loss": float(loss.detach()) * len(y), "correct": float((logits.detach().argmax(1) == y).sum())}
            measured = {"examples": float(batch)} | self.ranks.sum(told)
            if not math.isfinite(measured["loss"]):
                raise self._not_finite("the loss", measured["loss"] / batch)
            weight = self.ranks.weight(len(y), batch)
            self.ranks.fabric.backward(loss if weight == 1 else weight * loss)
            length = self._clipped()
            if not math.isfinite(length):
                raise self._not_finite("the gradient's norm", length)
        except FloatingPointError:
            self.optimizer.zero_grad()
            for now, then in zip(self.model.buffers(), before, strict=False):
                now.copy_(then)
            raise
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ranks.broadcast_buffers(self.model)
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        self.oracle.refresh()
        return measured

    def _clipped(self) -> float:
        """The gradient's norm, which is clipped where that is asked for."""
        limit = self.options["clip"]
        if limit is None:
            return as_float(get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
        fabric = self.ranks.fabric
        return as_float(fabric.clip_gradients(self.model, self.optimizer, max_norm=limit, error_if_nonfinite=False))

    def _not_finite(self, what: str, value: float) -> FloatingPointError:
        return FloatingPointError(f"{what} is {value} in epoch {self.epoch + 1}, batch {self.batch + 1}; lower lr")

    def _note(self, error: FloatingPointError, index: Tensor) -> None:
        """Names the batch's examples in the error, and writes them down."""
        examples = index.tolist()
        error.add_note(f"The batch holds examples {', '.join(map(str, examples[:8]))}{', …' * (len(examples) > 8)}.")
        if self.folder is not None and self.ranks.first:
            path = self.folder / "nonfinite.jsonl"
            told = {"epoch": self.epoch, "batch": self.batch, "error": str(error), "examples": examples}
            with open(path, "a", encoding="utf-8", opener=refuse_link) as file:
                file.write(json.dumps(told) + "\n")
            error.add_note(f"{path} lists them all.")

    def _gauges(self, attack: PGD, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, list[float]]:
        """How converged a batch's examples are; the gradient this takes is no part of the training's cost."""
        gradient, feasible = self._gradient(attack, x_adv, y), attack.threat.around(x)
        fosc = feasible.gap(gradient, x_adv)
        if not bool(fosc.isfinite().all()):
            raise self._not_finite("FOSC", float(fosc[~fosc.isfinite()][0]))
        return {
            "fosc": fosc.tolist(),
            "relative_fosc": feasible.gap(gradient, x_adv, relative=True).nan_to_num(0.0).tolist(),
            "ball_fosc": feasible.without_bounds().gap(gradient, x_adv).tolist(),
            "zero_gradient": (gradient == 0).flatten(1).all(1).double().tolist(),
        }

    def measures(self, strategy: Strategy) -> dict[str, Any]:
        """What the strategy wants to find in the history, beside what every epoch records."""
        if "halfway_gauge" not in getattr(strategy, "measures", ()) or self.history:
            return {}
        attack, seed, data = halfway(strategy.attack), self.options["seed"], self.data.head  # type: ignore[attr-defined]
        chosen = randomness.permutation(seed, len(data), ORDER)[:SAMPLE].to(self.device)
        gauges: list[float] = []
        for index in chosen.tensor_split(math.ceil(len(chosen) / self.options["batch_size"])):
            mine = self.ranks.share(index)
            if len(mine) == 0:
                continue
            x, y = data.batch(mine)
            found = attack(self.oracle, x, y, seed=seed, index=mine, final="none")
            gradient = self._gradient(attack, found.x_adv, y)
            gauges += measure(attack.threat.around(x), gradient, found.x_adv, attack.gauge).nan_to_num(0.0).tolist()
        self.oracle.settle()
        everyones = [value for own in self.ranks.gather(gauges) for value in own]
        return {"halfway_gauge": float(torch.tensor(everyones).median())}

    def picture(self, strategy: Strategy) -> Picture | None:
        """Some training images under the epoch's attack."""
        attack = strategy.attack_at(self.epoch / self.options["epochs"], self.history)
        if attack is None:
            return None
        data = self.data.head
        index = torch.arange(min(_SHOWN, len(data)), device=self.device)
        x, y = data.batch(index)
        return picture(x, attack(self.oracle, x, y, seed=self.options["seed"], index=index, final="none").x_adv)

    def finish_epoch(self, row: dict[str, Any]) -> dict[str, Any]:
        """Puts the epoch's row, the first process's for all, into the history; stands at the start of the next."""
        seconds = time.perf_counter() - self.began
        row |= {"seconds": round(seconds, 3), "images_per_second": round(len(self.data) / seconds, 1)}
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[name] = None  # nothing was measured: JSON has no NaN
        row = self.ranks.broadcast(row)
        warn_of_fosc(row, self.history)
        self.history.append(row)
        self.epoch, self.batch, self.totals, self.gauged, self.seconds = self.epoch + 1, 0, {}, {}, 0.0
        return row

    def save_models(self) -> None:
        """Writes the last model, and the best so far where a validation split says which that is."""
        if self.folder is None:
            return
        model: Any = WholeState(self.network, self.network).gather() if self.ranks.sharded else self.evaluated
        if not self.ranks.first:
            return
        tensors, config = model.state_dict(), getattr(model, "config", None)
        write_model(self.folder, tensors, config)
        scores = [float(row.get("validation_accuracy", -1.0)) for row in self.history]
        if scores[-1] > max(scores[:-1], default=-1.0):
            write_model(self.folder, tensors, config, "best.safetensors")

    def save(self) -> None:
        """Writes all that a resumed run needs, whatever the number of its processes."""
        if self.folder is None:
            return
        networks, optimizer = self._states()
        if self.ranks.sharded:
            networks, optimizer = {name: net.gather() for name, net in networks.items()}, optimizer.gather()
        if not self.ranks.first:
            return
        names = ("epoch", "batch", "totals", "gauged", "history")
        position = {name: getattr(self, name) for name in names} | {
            "seconds": time.perf_counter() - self.began if self.batch > 0 else 0.0,
            "attack_network": self.oracle.plan,
            "micro_batch": self.oracle.micro_batch,
        }
        save_state(self.folder, networks, optimizer, position, self.kept, self.options["keep_checkpoints"])

    def resume(self) -> None:
        """Takes over the state that the run folder holds; where it holds none yet, writes the one to start from.

        ValueError where the processes do not find the same one.
        """
        position = {} if self.folder is None else load_state(self.folder, *self._states(), self.kept)
        found = self.ranks.gather((position.get("epoch"), position.get("batch")))
        if len(set(found)) > 1:
            raise ValueError(f"run_dir {self.folder} must be one folder for all processes: they found {found}")
        plan, self.oracle.micro_batch = position.pop("attack_network", ""), position.pop("micro_batch", None)
        for name, value in position.items():
            setattr(self, name, value)
        self.oracle.refresh()
        if not position:
            self.save()
        elif self.batch > 0 and self.oracle.plan != plan:  # at an epoch's start it is looked at anyway
            self.oracle = self.oracle.recheck()
            if self.oracle.plan != plan:
                told = f"the attack network was {plan!r} when the run was interrupted and is {self.oracle.plan!r} now"
                warnings.warn(f"{told}: results may differ from an uninterrupted run's", stacklevel=3)

    def _states(self) -> tuple[dict[str, Any], Any]:
        """The networks and the optimiser, as what saves and loads them takes them."""
        if self.ranks.sharded:
            return {"model": WholeState(self.network, self.network)}, WholeState(self.optimizer, self.network)
        networks = {"model": self.network} | ({} if self.averaged is None else {"ema": self.averaged})
        return networks, self.optimizer

    def _gradient(self, attack: PGD, x_adv: Tensor, y: Tensor) -> Tensor:
        """The gradient of the attack's loss at x_adv."""
        with self.oracle.private_randomness(self.options["seed"]):
            return self.oracle.gradient(x_adv, y, attack.objective()).gradient

    def _row(self, attack: PGD | None) -> dict[str, Any]:
        """The epoch's measures, as metrics.jsonl holds them."""
        totals, examples = self.totals, self.totals.get("examples", 0.0)
        if examples == 0:
            raise FloatingPointError(f"all {self.batch} batches of epoch {self.epoch + 1} were skipped; lower lr")
        row: dict[str, Any] = {
            "epoch": self.epoch,
            "lr": learning_rate(self.epoch / self.options["epochs"], self.options),
            "loss": totals["loss"] / examples,
            "accuracy": totals["correct"] / examples,
            "attack_steps": 0 if attack is None else attack.steps,
            "threshold": None if attack is None else attack.stop_at,
            "gradients": totals.get("gradients", 0.0) / len(self.data),
            "attack_network": self.oracle.plan,
        }
        if "skipped" in totals:
            row["skipped_batches"] = int(totals["skipped"])
        if self.gauged:
            row["fosc"] = fmean(self.gauged["fosc"])
            row["zero_gradients"] = fmean(self.gauged["zero_gradient"])
            levels = torch.linspace(0, 1, 101, dtype=torch.float64)
            for name in ("fosc", "relative_fosc", "ball_fosc"):
                quantiles = torch.tensor(self.gauged[name], dtype=torch.float64).quantile(levels)
                row[f"{name}_percentiles"] = [float(f"{value:.5g}") for value in quantiles.tolist()]
        return row
