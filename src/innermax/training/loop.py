"""The loop of Algorithm 1 (Wang et al. 2019): epochs of batches, each attacked and then learned from."""

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import get_total_norm

from innermax.attacks.pgd import PGD
from innermax.data.streaming import Batch, TrainingSet, batch_count, batches
from innermax.distributed.fsdp import as_whole
from innermax.distributed.process_group import Ranks
from innermax.models.wrappers import unwrap
from innermax.objectives import Objective, search_loss, weight_perturbation
from innermax.oracle.compiled import floating_dtype
from innermax.strategies import awaits_halfway_gauge, search_for
from innermax.training.alarm import PARTS, Overfitting, strengthen
from innermax.training.arithmetic import Arithmetic
from innermax.training.batch_attack import Attacked, attack_batch
from innermax.training.checkpoints import due_every
from innermax.training.fallback import Buffers, try_plainer
from innermax.training.loggers import Picture, draw_picture
from innermax.training.metrics import measure_gauges, median_halfway_gauge, warn_of_fosc
from innermax.training.options import TrainingOptions
from innermax.training.progress import TrainingDisplay
from innermax.training.state import State
from innermax.training.time_left import TrainingClock, mark, seconds_between
from innermax.training.weight_perturbation import perturbed_weights
from innermax.utils import randomness
from innermax.utils.files import refuse_link
from innermax.utils.generators import seed_randomness

_GAUGED_BATCHES = 20  # batches of an epoch whose gauges are measured, about
_SHOWN = 8  # examples in a logger's picture
_MODEL = 3  # a stream of random numbers


@dataclass
class Loop:
    """The epochs of a training: what they need, and how far they are.

    Attributes:
        options: of the training; the strategy's attacks maximise what the objective says.
        objective: what an update minimises.
        data: the training set, on this process's device.
        ranks: this process in its group.
        state: what changes.
        clock: estimates the time left.
        due: whether the next checkpoint within an epoch is due; asked once per update.
        began: when this process began the epoch, as `time.perf_counter` says it.
        whole: whether no update is half done, so that the state may be saved.
        agreed: whether all processes stop at this batch.
    """

    options: TrainingOptions
    objective: Objective
    data: TrainingSet
    ranks: Ranks
    state: State
    clock: TrainingClock
    due: Callable[[], bool]
    began: float = 0.0
    whole: bool = True
    agreed: bool = False

    @classmethod
    def start(
        cls,
        model: nn.Module,
        data: TrainingSet,
        options: TrainingOptions,
        objective: Objective,
        ranks: Ranks,
        arithmetic: Arithmetic,
    ) -> "Loop":
        """The loop before its first update."""
        data = data.to(ranks.device)
        options = replace(options, strategy=search_for(options.strategy, search_loss(objective)))
        state = State.start(model, data, options, ranks, arithmetic)
        clock = TrainingClock(options.strategy, options.epochs, len(data))
        return cls(options, objective, data, ranks, state, clock, due_every(options.checkpoint_every))

    def resume(self) -> None:
        """Goes to the run folder's newest checkpoint; where there is none yet, writes the one to start from."""
        folder = self.options.folder
        if folder is not None and not self.state.resume(folder, self.ranks):
            self.save()

    def train_epoch(self, show: TrainingDisplay, must_stop: Callable[[], bool]) -> dict[str, Any]:
        """Trains from the current batch to the epoch's end; the epoch's row, without what is measured at its end.

        show: is told what happens; must_stop: whether to stop after a batch, asked by all processes together.

        Raises:
            KeyboardInterrupt: must_stop said so.
            FloatingPointError: a loss, gradient or FOSC is not a finite number.
        """
        state, options = self.state, self.options
        self.began = time.perf_counter()
        if state.batch == 0:
            state.recheck(self.ranks)
        attack = options.strategy.attack_at(state.epoch / options.epochs, state.history)
        count = batch_count(self.data, options.batch_size)
        if attack is not None and (not state.history or state.history[-1].get("attack_network") != state.oracle.scheme):
            show.say(f"attack network: {state.oracle.plan}")
        if state.epoch == state.batch == 0 and state.kept.plan:
            show.say(state.kept.plan)
        show.start(state.epoch, count, getattr(attack, "stop_at", None))
        self.clock.start(state.epoch, state.history)
        stride = max(1, count // _GAUGED_BATCHES)
        coming = batches(self.data, options.batch_size, options.seed, state.epoch, state.batch, self.ranks.share)
        with contextlib.closing(coming):
            for batch in coming:
                moment = (state.epoch + state.batch / count) / options.epochs
                strong = self._strengthen(attack)
                state.metrics.add(self.step(batch, strong, moment, gauge=state.batch % stride == 0))
                if PARTS * (state.batch + 1) // count > PARTS * state.batch // count:
                    self._look_for_overfitting(show)
                state.batch += 1
                self.whole = True
                self._show(show)
                if must_stop():
                    self.agreed = True
                    raise KeyboardInterrupt
                due = options.folder is not None and self.due()
                if self.ranks.any(due and self.ranks.first) and state.batch < count:
                    self.save()
        rate = options.lr_at(state.epoch / options.epochs)
        row = state.metrics.row(state.epoch, rate, self._strengthen(attack), state.oracle.scheme, len(self.data))
        return row | state.alarm.row(state.epoch)

    def _strengthen(self, attack: PGD | None) -> PGD | None:
        """The epoch's attack, with a step more for each time that the alarm was raised, where that is asked for."""
        more = len(self.state.alarm.raised) if self.options.on_overfit == "strengthen" else 0
        return attack if attack is None else strengthen(attack, more)

    def _look_for_overfitting(self, show: TrainingDisplay) -> None:
        """The alarm at the end of a part of the epoch, and what follows where it is raised."""
        state, reaction = self.state, self.options.on_overfit
        before = state.alarm.raised
        state.alarm = state.alarm.end_part(state.epoch, state.batch)
        if state.alarm.raised == before:
            return
        told = state.alarm.explain()
        if reaction == "stop":
            raise Overfitting(f"{told}; on_overfit strengthen adds steps to the attack from there on")
        if reaction == "strengthen":
            show.say(f"{told}: its attack has a step more from here on")
        elif not before:
            warnings.warn(f"{told}; on_overfit strengthen would add a step to its attack", stacklevel=3)

    def _show(self, show: TrainingDisplay) -> None:
        """Shows the epoch so far, and the time left."""
        metrics = self.state.metrics
        done = int(metrics.totals.get("examples", 0))
        left = self.clock.left(done, metrics.totals.get("gradients", 0.0) / max(done, 1))
        show.batch(self.state.batch, metrics.totals, metrics.fosc, left)

    def step(self, batch: Batch, attack: PGD | None, moment: float, gauge: bool = False) -> dict[str, float]:
        """One batch of Algorithm 1: an attack, then a descent; sums over the batch's examples, of which this process
        has a share.

        attack: the epoch's, which stops an example once its FOSC is ≤ c_t; None trains on clean examples.
        moment: the share of the training that is done, in [0, 1).
        gauge: whether to measure how converged the attack is.
        """
        began, state = time.perf_counter(), self.state
        x = state.kept.augment(batch.x, batch.mine, state.epoch)
        attacked, asked = Attacked(x), mark(x.device)
        if attack is not None:  # x^{k+1} ← x^k + V · α · sign ∇ℓ, with V = 1(c(x^k) > c_t), while ΣV > 0 and k < K
            attacked = attack_batch(state.oracle, attack, x, batch, state.kept, state.epoch)
            self.whole = False  # it has written what the strategy keeps
            state.oracle.settle()
        x_adv, calls, answered = attacked.x_adv, attacked.calls, mark(x.device)
        try:
            with self.ranks.raise_together(FloatingPointError):
                gauges = self._measure_gauges(attack, x, x_adv, batch.y) if attack is not None and gauge else {}
            self.whole = False
            if attack is not None and hasattr(self.options.strategy, "replays"):
                sums = self._replay(attack, x, batch, attacked, moment)
            else:
                sums = self.descend(x, batch.y, attacked, moment, len(batch.whole))  # θ ← θ − η · g(θ)
        except FloatingPointError as error:
            self._note(error, batch.whole)
            if self.options.on_nan == "stop":
                raise
            return self.ranks.sum({} if calls is None else {"gradients": float(calls)}) | {"skipped": 1.0}
        if gauge:
            measured = self.ranks.gather(gauges)
            state.metrics.add_gauges(measured)
            if self.options.on_overfit != "ignore" and not hasattr(self.options.strategy, "replays"):
                state.alarm = state.alarm.hear(value for own in measured for value in own.get("relative_fosc", ()))
        attacking = 0.0 if calls is None else seconds_between(asked, answered)
        updating = time.perf_counter() - began - attacking
        self.clock.batch(len(batch.whole), sums.get("gradients", 0.0), attacking, updating)
        return sums

    def _replay(self, attack: PGD, x: Tensor, batch: Batch, attacked: Attacked, moment: float) -> dict[str, float]:
        """Several updates with a batch, each of whose own input gradients moves the perturbations for the next one
        (Shafahi et al. 2019, Algorithm 1); the mean of what each adds up.
        """
        state, options, feasible = self.state, self.options, attack.threat.around(x)
        replays: int = options.strategy.replays  # type: ignore[attr-defined]  # the caller has seen it
        of_batch = 1 / (options.epochs * batch_count(self.data, options.batch_size))  # a share of the training
        total: dict[str, float] = {}
        for replay in range(replays):
            point = attacked.x_adv.detach().requires_grad_()
            now = moment + replay / replays * of_batch
            sums = self.descend(x, batch.y, attacked._replace(x_adv=point), now, len(batch.whole), replay)
            slope = torch.zeros_like(x) if point.grad is None else point.grad.nan_to_num(0.0, 0.0, 0.0)
            attacked = attacked._replace(x_adv=feasible.step(point.detach(), slope, attack.step_sizes()[0]))
            total = {name: total.get(name, 0.0) + value / replays for name, value in sums.items()}
        state.kept.write_replayed(attacked.x_adv - x, batch)
        return total

    def descend(
        self, x: Tensor, y: Tensor, attacked: Attacked, moment: float, count: int, replay: int = 0
    ) -> dict[str, float]:
        """One update of the weights, and of all that follows them; a FloatingPointError leaves them as they were.

        count: the batch's examples in all processes; replay: how many updates there were with this batch.
        """
        state, options = self.state, self.options
        dtype = floating_dtype(state.network) or x.dtype
        x_adv, calls, prior = attacked
        inputs = x.to(dtype), y, x_adv.to(dtype), None if prior is None else prior.to(dtype)
        for group in state.optimizer.param_groups:
            group["lr"] = options.lr_at(moment)
        gamma = weight_perturbation(self.objective)
        repeats = options.on_nan == "skip" or gamma is not None or state.arithmetic.plainer()
        before = Buffers.of(state.wrapped) if repeats else Buffers()
        # The model's own draws (dropout) belong to the batch and the process, so that a resumed run repeats them.
        own = (self.ranks.rank, replay) if replay > 0 else (self.ranks.rank,) if self.ranks.rank > 0 else ()
        seed = randomness.derive_seed(options.seed, _MODEL, state.epoch, state.batch, *own)

        def attempt() -> dict[str, Tensor]:
            seed_randomness(seed)
            counts = self._pass_back(*inputs, count)
            if gamma is not None:
                before.restore()
                x_adv.grad = None
                with perturbed_weights(state.network, gamma):
                    counts["perturbed"] = self._pass_back(*inputs, count)["loss"]
            return counts

        def undo() -> None:
            state.optimizer.zero_grad()
            x_adv.grad = None
            before.restore()

        try:
            counts = try_plainer(attempt, undo, state, self.ranks)
            sums, norm = self._read(counts if calls is None else {"gradients": calls} | counts, self._clip())
            for loss in (sums["loss"], sums.pop("perturbed", 0.0)):
                self._check_finite("the loss", loss / count)
            self._check_finite("the gradient's norm", norm)
        except FloatingPointError:
            undo()
            raise
        state.update(self.ranks)
        return {"examples": float(count)} | sums

    def _pass_back(self, x: Tensor, y: Tensor, x_adv: Tensor, prior: Tensor | None, count: int) -> dict[str, Tensor]:
        """Adds the objective's gradients to the weights'; sums over this process's examples."""
        model, strategy = self.state.wrapped, self.options.strategy
        # Checkpointed layers are asked again in the backward pass.
        with self.state.arithmetic.keep_images(unwrap(model), x.device.type):
            told = None if prior is None else model(prior)
            loss, logits = self.objective(model, x, y, x_adv, self.state.epoch)
            if not loss.requires_grad:
                raise ValueError(
                    "objective must return a loss that passes gradients back to the weights, got one without"
                )
            if told is not None:
                loss = loss + strategy.weight * mse_loss(logits.float(), told.float())  # type: ignore[attr-defined]
            weight = self.ranks.weight(len(y), count)
            self.ranks.fabric.backward(loss if weight == 1 else weight * loss)
        return {"loss": loss.detach().double() * len(y), "correct": (logits.detach().argmax(1) == y).sum()}

    def _read(self, counts: Mapping[str, Tensor], norm: Tensor) -> tuple[dict[str, float], float]:
        """Each count summed over the processes, and the norm.

        Of all that an update computes this is what is waited for: once, and when the device has been told the rest.
        """
        summed = self.ranks.add_up(torch.stack([value.double().reshape(()) for value in counts.values()]))
        *sums, last = torch.cat([summed, norm.to(summed).reshape(1)]).tolist()
        return dict(zip(counts, sums, strict=True)), last

    def _clip(self) -> Tensor:
        """The norm of the gradient, which is clipped where that is asked for."""
        state, limit = self.state, self.options.clip
        if limit is None:
            return as_whole(get_total_norm([p.grad for p in state.wrapped.parameters() if p.grad is not None]))
        fabric = self.ranks.fabric
        return as_whole(fabric.clip_gradients(state.wrapped, state.optimizer, max_norm=limit, error_if_nonfinite=False))

    def _measure_gauges(self, attack: PGD, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, list[float]]:
        """How converged the examples are; the gradient this takes is no part of the training's cost."""
        gauges = measure_gauges(self.state.oracle, attack, x, x_adv, y, self.options.seed)
        for value in gauges["fosc"]:
            self._check_finite("FOSC", value)
        return gauges

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            place = f"epoch {self.state.epoch + 1}, batch {self.state.batch + 1}"
            raise FloatingPointError(f"{what} is {value} in {place}; lower lr")

    def _note(self, error: FloatingPointError, index: Tensor) -> None:
        """Names the batch's examples in the error and in nonfinite.jsonl."""
        examples, folder = index.tolist(), self.options.folder
        error.add_note(f"The batch holds examples {', '.join(map(str, examples[:8]))}{', …' * (len(examples) > 8)}.")
        if folder is not None and self.ranks.first:
            path = folder / "nonfinite.jsonl"
            line = {"epoch": self.state.epoch, "batch": self.state.batch, "error": str(error), "examples": examples}
            with open(path, "a", encoding="utf-8", opener=refuse_link) as file:
                file.write(json.dumps(line) + "\n")
            error.add_note(f"{path} lists them all.")

    def measure(self) -> dict[str, float]:
        """What the strategy asks for at the epoch's end, beside what every epoch measures."""
        state, options = self.state, self.options
        if not awaits_halfway_gauge(options.strategy, state.history):
            return {}
        sizes = {"seed": options.seed, "batch_size": options.batch_size}
        gauge = median_halfway_gauge(options.strategy, state.oracle, self.data.head, self.ranks, **sizes)
        return {"halfway_gauge": gauge}

    def draw_picture(self) -> Picture | None:
        """Some training images under the epoch's attack; None where there is no attack, or no picture of such data."""
        state, options = self.state, self.options
        attack = options.strategy.attack_at(state.epoch / options.epochs, state.history)
        if attack is None:
            return None
        data = self.data.head
        index = torch.arange(min(_SHOWN, len(data)), device=self.ranks.device)
        x, y = data.batch(index)
        return draw_picture(x, attack(state.oracle, x, y, seed=options.seed, index=index, final="none").x_adv)

    def end_epoch(self, row: dict[str, Any]) -> dict[str, Any]:
        """Adds the epoch's time to its row, and goes to the next epoch; the row of rank 0, in all processes."""
        seconds = self._seconds()
        row |= {"seconds": round(seconds, 3), "images_per_second": round(len(self.data) / seconds, 1)}
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[name] = None  # nothing was measured: JSON has no NaN
        row = self.ranks.broadcast(row)
        warn_of_fosc(row, self.state.history)
        self.state.end_epoch(row)
        return row

    def save(self) -> None:
        """Writes a checkpoint into the run folder, if there is one."""
        if self.options.folder is not None:
            seconds = self._seconds() if self.state.batch > 0 else 0.0
            self.state.save(self.options.folder, self.ranks, seconds, self.options.keep_checkpoints)

    def _seconds(self) -> float:
        """Spent on the epoch, before an interruption and since."""
        return self.state.seconds + time.perf_counter() - self.began
