"""Algorithm 1's outer loop: what a training is told, checked, and run epoch by epoch."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from innermax.attacks.cost import FORWARD, search_cost
from innermax.attacks.pgd import PGD
from innermax.data.augmentation import augment
from innermax.data.image_set import ImageSet
from innermax.data.readers import as_image_set
from innermax.data.streaming import ImageStream, as_training_set
from innermax.distributed.launch import Launch, Parallel, find_device, plan_launch
from innermax.distributed.process_group import connect
from innermax.evaluation.evaluate import evaluate
from innermax.evaluation.model_checks import normalisation_known
from innermax.models.wrappers import unwrapped
from innermax.objectives import Objective, find_objective
from innermax.oracle.oracle import Oracle, Precision, has_fast_bf16
from innermax.strategies import Strategy
from innermax.training import run_folder
from innermax.training.checkpoints import states
from innermax.training.interrupts import held_interrupts
from innermax.training.loggers import Logger, LoggerName, epoch_logger
from innermax.training.loop import Loop
from innermax.training.options import LearningRate, OnNaN, Optimizer, check_options, check_parallel, describe_training
from innermax.training.progress import show_progress
from innermax.training.spawn import trained_elsewhere
from innermax.utils.files import LOCK, lock_file
from innermax.utils.validation import check_labels


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
        train_set: (images, labels), an ImageSet, a torch Dataset, a Hugging Face Dataset, or an ImageStream.
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
        overwrite: start afresh where run_dir holds a run, and remove all that innermax wrote there of the run before.
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
    check_options(options)
    launch = plan_launch(devices, nodes, find_device(device))
    job = _Job.of(options)
    check_parallel(options, launch, find_device(device), len(job.train_set))
    if not launch.starts:
        return _trained(job, launch)
    with _said_where(job.folder):
        network = unwrapped(model)
        kind = find_device(device).type
        evaluated, history = trained_elsewhere(
            _trained, replace(job, options={**job.options, "model": network}), launch, kind
        )
    return Run(evaluated, history, job.folder)


@dataclass(frozen=True, eq=False)
class _Job:
    """What `train` was told, checked; configuration: what of it identifies the run."""

    options: Mapping[str, Any]
    objective: Objective
    train_set: ImageSet | ImageStream
    validation_set: ImageSet | None
    validation_attack: PGD | None
    configuration: Mapping[str, Any]
    folder: Path | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "_Job":
        objective = find_objective(options["objective"])
        train_set, validation_set = as_training_set(options["train_set"]), options["validation_set"]
        validation_set = None if validation_set is None else as_image_set(validation_set)
        classes = _check_sets(options["model"], train_set, validation_set, options)
        if isinstance(train_set, ImageStream):
            train_set = train_set.bounded(classes)
        return cls(
            {**options, "train_set": None, "validation_set": None},
            objective,
            train_set,
            validation_set,
            options["validation_attack"] or getattr(options["strategy"], "attack", None),
            describe_training(options, options["model"], train_set, validation_set),
            None if options["run_dir"] is None else Path(options["run_dir"]),
        )

    def open_folder(self, stack: contextlib.ExitStack) -> None:
        """Makes or finds the run folder, which is this process's alone until the stack is closed."""
        if self.folder is None:
            return
        overwrite = self.options["overwrite"]
        run_folder.check_folder(self.folder, self.configuration, overwrite)
        stack.enter_context(lock_file(self.folder / LOCK, f"run_dir {self.folder}"))
        run_folder.open_folder(self.folder, self.configuration, overwrite)


def _trained(job: _Job, launch: Launch, stopped: Callable[[], bool] = lambda: False) -> Run:
    """The training, by this process and those it is connected with; stopped: whether an interrupt came elsewhere."""
    options, folder, strategy = job.options, job.folder, job.options["strategy"]
    with contextlib.ExitStack() as stack:
        device = find_device(options["device"])
        ranks = connect(launch, device, _precision(options["precision"], device), options["parallel"])
        for context in (_said_where(folder), ranks.explain_lost_connection(), ranks.mute_others()):
            stack.enter_context(context)
        ranks.run_first(lambda: job.open_folder(stack))
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        loop = Loop.started(options, job.train_set, ranks, folder)
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


def _precision(precision: Precision, device: torch.device) -> str:
    """What Fabric calls it."""
    lower = precision == "bf16" or (precision == "auto" and has_fast_bf16(device))
    return "bf16-mixed" if lower else "32-true"


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


def _check_sets(
    model: nn.Module, train_set: ImageSet | ImageStream, validation_set: ImageSet | None, options: Mapping[str, Any]
) -> int:
    """The model's classes; raises, before anything is written, where it does not take the images or lacks a class."""
    if isinstance(train_set, ImageStream) and getattr(options["strategy"], "warm_start", False):
        raise ValueError("strategy WarmStart keeps every example's perturbation, which a stream has no place for")
    oracle, classes = Oracle(model), 0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, images in (("train_set", train_set.head), ("validation_set", validation_set)):
        if images is None:
            continue
        example = torch.arange(min(2, len(images)), device=images.labels.device)
        x, _ = images.batch(example)
        if name == "train_set" and (options["shift"] or options["flip"]):
            augment(x, example, shift=options["shift"], flip=options["flip"])
        with oracle.private_randomness(0):
            classes = oracle.logits(x.to(device)).shape[1]
        check_labels(images.labels, len(images), classes, f"{name} labels")
    return classes
