"""Algorithm 1's outer loop: attack a batch as the strategy says, descend on the objective, repeat."""

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from innermax import randomness, runs
from innermax.attacks.gradient import FGSM, PGD
from innermax.attacks.search import measure
from innermax.checkpoints import write_model
from innermax.checks import check_labels, unknown
from innermax.data import ImageSet, as_image_set, augment
from innermax.distribution import Parallel, Plan, Ranks, check_parallel, joined, planned, prepared
from innermax.elsewhere import trained_elsewhere
from innermax.evaluation import evaluate
from innermax.intake import normalisation_known
from innermax.loggers import Logger, LoggerName, Picture, epoch_logger, picture
from innermax.objectives import Objective, find_objective
from innermax.oracle import Oracle, Precision, has_fast_bf16, unwrapped
from innermax.progress import Progress, held_interrupts, show_progress
from innermax.remaining import FORWARD, TrainingClock, search_cost
from innermax.sharded import ShardedOracle, Whole, number
from innermax.states import alone, due_every, load_state, save_state, states
from innermax.strategies import Strategy

Optimizer = Literal["sgd", "adamw"]
LearningRate = Literal["drops", "cosine", "constant"]
OnNaN = Literal["stop", "skip"]
_EXPLOSION = 10  # a FOSC that grows by this factor is warned of
_GAUGED_BATCHES = 20  # how many batches an epoch also compute the gauge of their final iterates
_SHOWN = 8  # examples in a logger's picture
_SAMPLE = 1000  # examples on which an automatic c_max is measured
# Streams of the run's seed, so that no two draws share a number.
_ORDER, _AUGMENT, _ATTACK, _MODEL = range(4)


@dataclass(frozen=True)
class Run:
    """A training that ended: the model as it is now, a row of measures an epoch, and the folder that holds both."""

    model: nn.Module
    history: Sequence[Mapping[str, Any]]
    run_dir: Path | None

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The epoch with the best accuracy on the validation split (robust, where an attack was given)."""
        scored = [row for row in self.history if row.get("validation_accuracy") is not None]
        return max(scored, key=lambda row: float(row["validation_accuracy"]), default=None)


def train(
    model: nn.Module,
    train_set: Any,
    strategy: Strategy,
    *,
    objective: str | Objective = "cross_entropy",
    validation_set: Any = None,
    validation_attack: PGD | None = None,
    epochs: int = 50,
    batch_size: int = 128,
    optimizer: Optimizer = "sgd",
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    lr_schedule: LearningRate = "drops",
    lr_drops: Sequence[float] = (0.4, 0.8),
    clip: float | None = None,
    ema: float | None = None,
    shift: int = 0,
    flip: bool = False,
    precision: Precision = "auto",
    seed: int = 0,
    device: str = "auto",
    devices: int | None = None,
    nodes: int | None = None,
    parallel: Parallel = "ddp",
    sync_batch_norm: bool = False,
    on_nan: OnNaN = "stop",
    run_dir: str | Path | None = None,
    overwrite: bool = False,
    checkpoint_every: int | str | None = None,
    keep_checkpoints: int = 2,
    logger: LoggerName | Logger | None = None,
    progress: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Trains a model against the attacks a strategy chooses (Wang et al. 2019, Algorithm 1); it learns in place.

    A model in training mode keeps its sub-modules' modes (frozen BatchNorm stays frozen); it ends in evaluation mode.
    Resumes where run_dir holds an unfinished run of the same configuration.

    Args:
        model: any nn.Module with logits.
        train_set: (images, labels), an ImageSet, a torch Dataset or a Hugging Face Dataset.
        strategy: which attack to train against at which moment.
        objective: "cross_entropy", "loss_weighted" (the released code's) or a function, see innermax.objectives.
        validation_set: examples held out of training, on which the best epoch is chosen. Never the test set.
        validation_attack: what the validation split is attacked with; None: the strategy's own attack, if it has one.
        epochs: passes over the training set.
        batch_size: examples an update; batches differ by at most one example.
        optimizer: "sgd" or "adamw".
        lr: initial learning rate.
        momentum: of SGD.
        weight_decay: L2 penalty of SGD, decoupled decay of AdamW.
        lr_schedule: "drops" divides by 10 at each of lr_drops; "cosine" falls to 0; "constant".
        lr_drops: shares of the training in (0, 1).
        clip: largest gradient norm of an update; None: unclipped.
        ema: decay in (0, 1) of an exponential moving average of the weights, which is then what is evaluated and
            saved; None: the weights themselves.
        shift: augmentation, random shifts by up to so many pixels.
        flip: augmentation, random horizontal flips.
        precision: "auto" attacks and updates in bf16 where the device computes in it, else "float32".
        seed: decides order, augmentation, random starts and the model's own draws.
        device: "auto", "cpu", "cuda" or "cuda:N".
        devices: processes on each machine that share every batch, on GPUs one a GPU; None: as many as torchrun or SLURM
            started, else one. They start anew, so a script needs its `if __name__ == "__main__"`, and what is trained
            must pickle. The objective must be a mean over examples.
        nodes: machines, each of which runs the same; None: as torchrun or SLURM say, else one.
        parallel: "ddp", the whole network in each process, or "fsdp", a part of every layer, for networks that do not
            fit; what that cannot do is refused.
        sync_batch_norm: BatchNorm over the whole batch instead of each process's share; on GPUs.
        on_nan: what a loss, gradient or FOSC that is no finite number does: "stop" ends the run, "skip" leaves that
            batch out and counts it. Either way run_dir/nonfinite.jsonl names epoch, batch and examples.
        run_dir: folder of the run; None writes nothing.
        overwrite: start afresh where run_dir holds a run.
        checkpoint_every: how often the state is saved within an epoch, too: every so many updates, or a time such as
            "10min", "90s" or "2h". It is always saved at an epoch's end.
        keep_checkpoints: ≥ 1 states that stay. Where the newest is damaged, a run goes on from the one before.
        logger: where each epoch is logged beside metrics.jsonl: "tensorboard", "wandb", "mlflow", or a logger object of
            Lightning Fabric's or PyTorch Lightning's.
        progress: show a live display on a terminal, else a line an epoch.
        settings: anything else that identifies the run, kept in its config.yaml.

    Raises:
        ValueError, TypeError: an argument does not fit, or run_dir belongs to another configuration or process.
        FloatingPointError: a loss, gradient or FOSC is not a finite number.
        ChildProcessError: one of several processes has ended; the others are ended, too.
        OSError: run_dir cannot be written; the states in it stay whole.
        KeyboardInterrupt: after saving; the same call continues.
    """
    options = dict(locals())
    _check(options)
    plan = planned(devices, nodes, chosen_device(device))
    job = _Job.of(options)
    check_parallel(options, plan, chosen_device(device), len(job.train_set))
    if not plan.starts:
        return _trained(job, plan)
    with _said_where(job.folder):
        network = unwrapped(model)
        kind = chosen_device(device).type
        evaluated, history = trained_elsewhere(
            _trained, replace(job, options={**job.options, "model": network}), plan, kind
        )
    return Run(evaluated, history, job.folder)


@dataclass(frozen=True, eq=False)
class _Job:
    """What `train` was told, checked; configuration: what of it identifies the run."""

    options: Mapping[str, Any]
    objective: Objective
    train_set: ImageSet
    validation_set: ImageSet | None
    validation_attack: PGD | None
    configuration: Mapping[str, Any]
    folder: Path | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "_Job":
        objective = find_objective(options["objective"])
        train_set, validation_set = as_image_set(options["train_set"]), options["validation_set"]
        validation_set = None if validation_set is None else as_image_set(validation_set)
        _check_sets(options["model"], train_set, validation_set, options)
        return cls(
            {**options, "train_set": None, "validation_set": None},
            objective,
            train_set,
            validation_set,
            options["validation_attack"] or getattr(options["strategy"], "attack", None),
            _configuration(options, options["model"], train_set, validation_set),
            None if options["run_dir"] is None else Path(options["run_dir"]),
        )

    def open_folder(self, stack: contextlib.ExitStack) -> None:
        """Makes or finds the run folder, which is this process's alone until the stack is closed."""
        if self.folder is None:
            return
        overwrite = self.options["overwrite"]
        runs.check_folder(self.folder, self.configuration, overwrite)
        stack.enter_context(alone(self.folder / runs.LOCK, f"run_dir {self.folder}"))
        runs.open_folder(self.folder, self.configuration, overwrite)


def _trained(job: _Job, plan: Plan, stopped: Callable[[], bool] = lambda: False) -> Run:
    """The training, by this process and those it is connected with; stopped: whether an interrupt came elsewhere."""
    options, folder, strategy = job.options, job.folder, job.options["strategy"]
    with contextlib.ExitStack() as stack:
        device = chosen_device(options["device"])
        ranks = joined(plan, device, _precision(options["precision"], device), options["parallel"])
        for context in (_said_where(folder), ranks.named(), ranks.heard()):
            stack.enter_context(context)
        ranks.first_alone(lambda: job.open_folder(stack))
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        loop = _Loop.started(job, ranks)
        loop.clock.validation = _validation_cost(job.validation_set, job.validation_attack)
        loop.resume()
        show = stack.enter_context(show_progress(options["epochs"], options["progress"] and ranks.first))
        logger = options["logger"] if ranks.first else None
        write = stack.enter_context(epoch_logger(logger, folder, job.configuration))
        asked = stack.enter_context(held_interrupts())

        def interrupted() -> bool:
            return ranks.any(asked() or stopped())

        while loop.epoch < options["epochs"]:
            began = time.perf_counter()
            loop.began = began - loop.seconds
            try:
                row = loop.run_epoch(strategy, job.objective, show, interrupted)
            except KeyboardInterrupt:
                if folder is not None and loop.whole and (loop.agreed or not ranks.sharded):
                    loop.save()
                    show.say(f"Interrupted and saved: the same command continues {folder} where it stopped.")
                raise
            row |= loop.measures(strategy)
            shown = None if logger is None or ranks.sharded else loop.picture(strategy)
            if job.validation_set is not None:
                row |= _validated(
                    loop.evaluated,
                    job.validation_set,
                    job.validation_attack,
                    loop.device,
                    options["precision"],
                    ranks.count,
                )
            row = loop.finish_epoch(row)
            loop.save_models()  # first: once the state is written, this epoch does not come again
            loop.save()
            loop.clock.end(time.perf_counter() - began)
            show.epoch(row, loop.clock.left(len(job.train_set), row["gradients"]))
            write(row, shown)
            if interrupted():
                raise KeyboardInterrupt
    loop.network.eval()
    return Run(loop.evaluated.eval(), tuple(loop.history), folder)


@dataclass
class _Loop:
    """Everything that training changes, and the constants its steps need."""

    options: Mapping[str, Any]
    data: ImageSet
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
    def started(cls, job: _Job, ranks: Ranks) -> "_Loop":
        options, data = job.options, job.train_set
        model = unwrapped(options["model"])
        if not model.training:
            model.train()
        if len(data.shape) == 3:  # FSDP takes no other memory format than the usual
            memory_format = torch.contiguous_format if ranks.sharded else torch.channels_last
            model.to(memory_format=memory_format)  # type: ignore[call-overload]
        wrapped, optimizer = prepared(ranks, model, partial(_optimizer, options=options), options["sync_batch_norm"])
        optimizer.zero_grad()  # the model may come with gradients of its past
        averaged = None
        if options["ema"] is not None:
            averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options["ema"]), use_buffers=True)  # type: ignore[no-untyped-call]
        data = data.to(ranks.device)
        example, _ = data.batch(torch.arange(min(16, len(data)), device=ranks.device))
        oracle = ShardedOracle(model, example) if ranks.sharded else Oracle.fast(model, example, options["precision"])
        kept = None
        if getattr(options["strategy"], "warm_start", False):
            kept = torch.zeros(len(data), *data.shape, dtype=torch.float16, device=ranks.device)
        clock = TrainingClock(options["strategy"], options["epochs"], len(data))
        due = due_every(options["checkpoint_every"])
        return cls(options, data, ranks, model, wrapped, optimizer, averaged, oracle, kept, clock, job.folder, due)

    @property
    def device(self) -> torch.device:
        return self.data.labels.device

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
            self.oracle = self.oracle.rechecked()
        attack = strategy.attack_at(self.epoch / epochs, self.history)
        order = randomness.permutation(seed, len(self.data), _ORDER, self.epoch).to(self.device)
        batches = order.tensor_split(math.ceil(len(order) / self.options["batch_size"]))
        stride = max(1, len(batches) // _GAUGED_BATCHES)
        if attack is not None and (not self.history or self.history[-1].get("attack_network") != self.oracle.plan):
            show.say(f"attack network: {self.oracle.plan}")
        show.start(self.epoch, len(batches), getattr(attack, "stop_at", None))
        self.clock.start(self.epoch, self.history)
        while self.batch < len(batches):
            moment = (self.epoch + self.batch / len(batches)) / epochs
            measured = self.update(batches[self.batch], attack, objective, moment, self.batch % stride == 0)
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
            if self.ranks.any(due and self.ranks.first) and self.batch < len(batches):
                self.save()
        return self._row(attack)

    def update(
        self, index: Tensor, attack: PGD | None, objective: Objective, moment: float, gauge: bool
    ) -> dict[str, float]:
        """One attack and one descent step; sums over the batch's examples, of which this process does its share."""
        began, attacking = time.perf_counter(), 0.0
        mine = self.ranks.share(index)
        x, y = self.data.batch(mine)
        x = self._moved(x, mine)
        x_adv, cost = x, {}
        if attack is not None:
            seed = randomness.number(self.options["seed"], _ATTACK, self.epoch)
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
                self.kept[index] = self.ranks.gathered_rows(found_here, len(index))
        cost = self.ranks.sums(cost)
        try:
            with self.ranks.together(FloatingPointError):
                gauges = self._gauges(attack, x, x_adv, y) if attack is not None and gauge else {}
            self.whole = False
            measured = cost | self._descend(objective, x, y, x_adv, moment, len(index))
        except FloatingPointError as error:
            self._note(error, index)
            if self.options["on_nan"] == "stop":
                raise
            return cost | {"skipped": 1.0}
        for told in self.ranks.gathered(gauges) if gauge else ():
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
        keys = randomness.keys(self.options["seed"], index, _AUGMENT, self.epoch)
        return augment(images, keys, shift=shift, flip=flip, back=back)

    def _descend(
        self, objective: Objective, x: Tensor, y: Tensor, x_adv: Tensor, moment: float, batch: int
    ) -> dict[str, float]:
        """One update of the weights, and of all that follows them; FloatingPointError leaves them as they were.

        batch: examples of all processes.
        """
        # The model's own draws (dropout) belong to the batch and the process, so that a resumed run repeats them.
        own = (self.ranks.rank,) if self.ranks.rank > 0 else ()
        torch.manual_seed(randomness.number(self.options["seed"], _MODEL, self.epoch, self.batch, *own))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(moment, self.options)
        skips = self.options["on_nan"] == "skip"
        before = (
            [value.clone() for value in self.model.buffers()] if skips else []
        )  # a forward pass changes BatchNorm's
        try:
            loss, logits = objective(self.model, x, y, x_adv, self.epoch)
            told = {"loss": float(loss.detach()) * len(y), "correct": float((logits.detach().argmax(1) == y).sum())}
            measured = {"examples": float(batch)} | self.ranks.sums(told)
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
        self.ranks.share_buffers(self.model)
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        self.oracle.refresh()
        return measured

    def _clipped(self) -> float:
        """The gradient's norm, which is clipped where that is asked for."""
        limit = self.options["clip"]
        if limit is None:
            return number(get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
        fabric = self.ranks.fabric
        return number(fabric.clip_gradients(self.model, self.optimizer, max_norm=limit, error_if_nonfinite=False))

    def _not_finite(self, what: str, value: float) -> FloatingPointError:
        return FloatingPointError(f"{what} is {value} in epoch {self.epoch + 1}, batch {self.batch + 1}; lower lr")

    def _note(self, error: FloatingPointError, index: Tensor) -> None:
        """Names the batch's examples in the error, and writes them down."""
        examples = index.tolist()
        error.add_note(f"The batch holds examples {', '.join(map(str, examples[:8]))}{', …' * (len(examples) > 8)}.")
        if self.folder is not None and self.ranks.first:
            path = self.folder / "nonfinite.jsonl"
            told = {"epoch": self.epoch, "batch": self.batch, "error": str(error), "examples": examples}
            with path.open("a", encoding="utf-8") as file:
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
        if "fgsm_gauge" not in getattr(strategy, "measures", ()) or self.history:
            return {}
        attack: PGD = strategy.attack  # type: ignore[attr-defined]
        chosen = randomness.permutation(self.options["seed"], len(self.data), _ORDER)[:_SAMPLE].to(self.device)
        total = 0.0
        for index in chosen.tensor_split(math.ceil(len(chosen) / self.options["batch_size"])):
            mine = self.ranks.share(index)
            if len(mine) == 0:
                continue
            x, y = self.data.batch(mine)
            found = FGSM(attack.threat, attack.loss)(self.oracle, x, y, final="none")
            gradient = self._gradient(attack, found.x_adv, y)
            total += float(measure(attack.threat.around(x), gradient, found.x_adv, attack.gauge).nansum())
        self.oracle.settle()
        return {"fgsm_gauge": self.ranks.sums({"total": total})["total"] / len(chosen)}

    def picture(self, strategy: Strategy) -> Picture | None:
        """Some training images under the epoch's attack."""
        attack = strategy.attack_at(self.epoch / self.options["epochs"], self.history)
        if attack is None:
            return None
        index = torch.arange(min(_SHOWN, len(self.data)), device=self.device)
        x, y = self.data.batch(index)
        return picture(x, attack(self.oracle, x, y, seed=self.options["seed"], index=index, final="none").x_adv)

    def finish_epoch(self, row: dict[str, Any]) -> dict[str, Any]:
        """Puts the epoch's row, the first process's for all, into the history; stands at the start of the next."""
        seconds = time.perf_counter() - self.began
        row |= {"seconds": round(seconds, 3), "images_per_second": round(len(self.data) / seconds, 1)}
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[name] = None  # nothing was measured: JSON has no NaN
        row = self.ranks.same(row)
        _warn_of_fosc(row, self.history)
        self.history.append(row)
        self.epoch, self.batch, self.totals, self.gauged, self.seconds = self.epoch + 1, 0, {}, {}, 0.0
        return row

    def save_models(self) -> None:
        """Writes the last model, and the best so far where a validation split says which that is."""
        if self.folder is None:
            return
        model: Any = Whole(self.network, self.network).gathered() if self.ranks.sharded else self.evaluated
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
            networks, optimizer = {name: net.gathered() for name, net in networks.items()}, optimizer.gathered()
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
        found = self.ranks.gathered((position.get("epoch"), position.get("batch")))
        if len(set(found)) > 1:
            raise ValueError(f"run_dir {self.folder} must be one folder for all processes: they found {found}")
        plan, self.oracle.micro_batch = position.pop("attack_network", ""), position.pop("micro_batch", None)
        for name, value in position.items():
            setattr(self, name, value)
        self.oracle.refresh()
        if not position:
            self.save()
        elif self.batch > 0 and self.oracle.plan != plan:  # at an epoch's start it is looked at anyway
            self.oracle = self.oracle.rechecked()
            if self.oracle.plan != plan:
                told = f"the attack network was {plan!r} when the run was interrupted and is {self.oracle.plan!r} now"
                warnings.warn(f"{told}: results may differ from an uninterrupted run's", stacklevel=3)

    def _states(self) -> tuple[dict[str, Any], Any]:
        """The networks and the optimiser, as what saves and loads them takes them."""
        if self.ranks.sharded:
            return {"model": Whole(self.network, self.network)}, Whole(self.optimizer, self.network)
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


@contextlib.contextmanager
def _said_where(folder: Path | None) -> Iterator[None]:
    """Inside, an OSError's notes say what a run can go on from."""
    try:
        yield
    except OSError as error:
        kept = [] if folder is None else states(folder)
        if kept:
            note = f"The run's last state is whole: the same command goes on from {kept[0]}."
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
        raise


def _warn_of_fosc(row: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
    """Warns of a FOSC that explodes: far above what it was and above the loss, which it would raise by as much."""
    before = [past["fosc"] for past in history if past.get("fosc")]
    if before and row.get("fosc") is not None and row["fosc"] > _EXPLOSION * max(*before, abs(row["loss"])):
        warnings.warn(
            f"FOSC is {row['fosc']:.3g} on average in epoch {row['epoch'] + 1}, more than {_EXPLOSION} times the loss "
            f"and what it was in any epoch before ({max(before):.3g} at most); lower lr",
            stacklevel=3,
        )


def learning_rate(moment: float, options: Mapping[str, Any]) -> float:
    """The learning rate when a share `moment` in [0, 1) of the training is done."""
    lr: float = options["lr"]
    if options["lr_schedule"] == "drops":
        return lr * math.pow(0.1, sum(moment >= drop - 1e-9 for drop in options["lr_drops"]))
    return lr * (1 + math.cos(math.pi * moment)) / 2 if options["lr_schedule"] == "cosine" else lr


def chosen_device(device: str) -> torch.device:
    """The device a name means; "auto" is a GPU where there is one. Raises ValueError where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise unknown("device", device, ["auto", "cpu", "cuda", "cuda:0"]) from None
    if chosen.type not in ("cpu", "cuda"):
        raise unknown("device", device, ["auto", "cpu", "cuda", "cuda:0"])
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return chosen


def _precision(precision: Precision, device: torch.device) -> str:
    """What Fabric calls it."""
    lower = precision == "bf16" or (precision == "auto" and has_fast_bf16(device))
    return "bf16-mixed" if lower else "32-true"


def _optimizer(model: nn.Module, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    fused = not any(
        isinstance(p, DTensor) for p in model.parameters()
    )  # torch has no fused step of parameters in parts
    lr, decay = options["lr"], options["weight_decay"]
    if options["optimizer"] == "adamw":
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=decay, fused=fused)
    return torch.optim.SGD(model.parameters(), lr, options["momentum"], weight_decay=decay, fused=fused)


def _validated(
    model: nn.Module,
    validation_set: ImageSet,
    attack: PGD | None,
    device: torch.device,
    precision: Precision,
    processes: int = 1,
) -> dict[str, Any]:
    """Clean accuracy, and accuracy and convergence under the attack, on the validation split."""
    attacks = {} if attack is None else {"attack": attack}
    with normalisation_known():
        scored = evaluate(
            model, validation_set, attacks, precision=precision, device=device, devices=processes, audit=False
        )
    row: dict[str, Any] = {"validation_clean": scored.accuracy["clean"].value}
    if attack is not None:
        row["validation_robust"] = scored.accuracy["attack"].value
        row["validation_fosc"] = scored.convergence["attack"].fosc_median
    return row | {"validation_accuracy": row.get("validation_robust", row["validation_clean"])}


def _validation_cost(validation_set: ImageSet | None, attack: PGD | None) -> float:
    """Gradients that scoring the validation split takes, more or less."""
    if validation_set is None:
        return 0.0
    return len(validation_set) * (FORWARD if attack is None else FORWARD + search_cost(attack))


def _configuration(
    options: Mapping[str, Any], model: nn.Module, data: ImageSet, validation: ImageSet | None
) -> dict[str, Any]:
    """What identifies a run: a folder is resumed by the same configuration alone."""
    left_out = {
        "model",
        "train_set",
        "validation_set",
        "run_dir",
        "overwrite",
        "checkpoint_every",
        "keep_checkpoints",
        "logger",
        "progress",
        "device",
        "devices",
        "nodes",
        "parallel",
        "settings",
    } | (set() if options["sync_batch_norm"] else {"sync_batch_norm"})
    described = {name: runs.describe(value) for name, value in options.items() if name not in left_out}
    return {
        "training": described,
        "model": runs.describe(getattr(unwrapped(model), "config", type(unwrapped(model)).__qualname__)),
        "examples": {"train": len(data), "validation": 0 if validation is None else len(validation)},
        "settings": runs.describe(dict(options["settings"] or {})),
    }


def _check_sets(
    model: nn.Module, train_set: ImageSet, validation_set: ImageSet | None, options: Mapping[str, Any]
) -> None:
    """Raises, before anything is written, where the model does not take the images or lacks a class."""
    oracle = Oracle(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, images in (("train_set", train_set), ("validation_set", validation_set)):
        if images is None:
            continue
        example = torch.arange(min(2, len(images)), device=images.labels.device)
        x, _ = images.batch(example)
        if name == "train_set" and (options["shift"] or options["flip"]):
            augment(x, example, shift=options["shift"], flip=options["flip"])
        with oracle.private_randomness(0):
            classes = oracle.logits(x.to(device)).shape[1]
        check_labels(images.labels, len(images), classes, f"{name} labels")


def _check(options: Mapping[str, Any]) -> None:
    """Raises for options out of range."""
    for name in ("epochs", "batch_size", "keep_checkpoints"):
        if not isinstance(options[name], int) or options[name] < 1:
            raise ValueError(f"{name} must be an integer ≥ 1, came {options[name]!r}")
    for name, kind in (
        ("optimizer", Optimizer),
        ("lr_schedule", LearningRate),
        ("precision", Precision),
        ("on_nan", OnNaN),
        ("parallel", Parallel),
    ):
        if options[name] not in get_args(kind):
            raise unknown(name, options[name], get_args(kind))
    if isinstance(options["logger"], str) and options["logger"] not in get_args(LoggerName):
        raise unknown("logger", options["logger"], get_args(LoggerName))
    if options["logger"] is not None and not isinstance(options["logger"], str | Logger):
        raise TypeError(f"logger must be a name or a logger of Lightning's, came {options['logger']!r}")
    if not isinstance(options["seed"], int):
        raise TypeError(f"seed must be an integer, came {options['seed']!r}")
    chosen_device(options["device"])
    due_every(options["checkpoint_every"])
    if not 0 < options["lr"] < math.inf:
        raise ValueError(f"lr must be a finite number > 0, came {options['lr']}")
    for name in ("momentum", "weight_decay"):
        if not 0 <= options[name] < math.inf:
            raise ValueError(f"{name} must be a finite number ≥ 0, came {options[name]}")
    if options["clip"] is not None and not options["clip"] > 0:
        raise ValueError(f"clip must be > 0 or None, came {options['clip']}")
    if options["ema"] is not None and not 0 < options["ema"] < 1:
        raise ValueError(f"ema must be in (0, 1) or None, came {options['ema']}")
    if not all(0 < drop < 1 for drop in options["lr_drops"]):
        raise ValueError(f"lr_drops must lie in (0, 1), came {options['lr_drops']}")
    if not callable(getattr(options["strategy"], "attack_at", None)):
        raise TypeError(f"strategy must have attack_at(progress, history), came {options['strategy']!r}")
