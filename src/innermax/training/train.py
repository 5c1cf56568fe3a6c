"""`im.train`: a training from its arguments to its run, epoch by epoch."""

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
from innermax.distributed.launch import Launch, Parallel, find_device, plan_launch
from innermax.distributed.process_group import connect
from innermax.evaluation.evaluate import evaluate
from innermax.evaluation.model_checks import trust_normalisation
from innermax.evaluation.progress import ProgressCallback
from innermax.models.wrappers import unwrap
from innermax.objectives import Objective
from innermax.oracle.oracle import Precision
from innermax.strategies import Strategy
from innermax.training.alarm import OnOverfit
from innermax.training.arithmetic import Arithmetic, choose_arithmetic, order_restored
from innermax.training.checkpoints import find_checkpoints
from innermax.training.interrupts import defer_interrupts
from innermax.training.job import Job
from innermax.training.loggers import Logger, LoggerName, epoch_logger
from innermax.training.loop import Loop
from innermax.training.options import LearningRate, OnNaN, Optimizer, TrainingOptions, check_parallel
from innermax.training.progress import TrainingDisplay, show_progress
from innermax.training.spawn import train_in_processes
from innermax.utils.allocator import return_freed_memory
from innermax.utils.generators import restore_randomness


@dataclass(frozen=True)
class Run:
    """A finished training: the trained model, a row of measures per epoch, and the run folder."""

    model: nn.Module
    history: Sequence[Mapping[str, Any]]
    run_dir: Path | None

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The row of the epoch with the best accuracy on the validation split (under attack, if there was one)."""
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
    on_overfit: OnOverfit = "ignore",
    run_dir: str | Path | None = None,
    overwrite: bool = False,
    checkpoint_every: int | str | None = None,
    keep_checkpoints: int = 2,
    logger: LoggerName | Logger | None = None,
    progress: bool | ProgressCallback | None = True,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Trains a model against the attacks that a strategy chooses (Wang et al. 2019, Algorithm 1).

    The model learns in place. Where it is in training mode, its modules keep their own modes (frozen BatchNorm stays
    frozen); at the end it is in evaluation mode. If run_dir holds an unfinished run of the same configuration, that run
    is resumed.

    Args:
        model: Any nn.Module that returns logits.
        train_set: (images, labels), an ImageSet, a torch Dataset, a Hugging Face Dataset, or an ImageStream.
        strategy: Which attack to train against at which moment.
        objective: "cross_entropy", "loss_weighted" (of the code released with the paper) or a function, see
            innermax.objectives.
        validation_set: Examples held out of training, on which the best epoch is chosen. Never the test set.
        validation_attack: The attack on the validation split. By default the strategy's own, if it has one.
        epochs: Passes over the training set. The strategy Free makes as many updates in fewer.
        batch_size: Examples per update. Batches differ by at most one example.
        optimizer: "sgd" or "adamw".
        lr: Initial learning rate.
        momentum: Momentum of SGD.
        weight_decay: L2 penalty of SGD, or decoupled decay of AdamW.
        lr_schedule: "drops" divides the learning rate by 10 at each of lr_drops, "cosine" lets it fall to 0, "cyclic"
            lets it climb from 0 for half of the training and fall to 0 again, "constant" keeps it.
        lr_drops: Shares of the training, in (0, 1), after which the learning rate drops.
        clip: Largest gradient norm of an update. By default gradients are not clipped.
        ema: Decay, in (0, 1), of an exponential moving average of the weights, which is then evaluated and saved. By
            default the weights themselves are.
        shift: Augmentation: random shifts by up to so many pixels.
        flip: Augmentation: random horizontal flips.
        precision: "float32", "bf16", or "auto": bf16 where the device computes in it, else float32.
        seed: Decides order, augmentation, random starts and the model's own random numbers.
        device: "auto", "cpu", "cuda" or "cuda:N".
        devices: Processes on each machine that share every batch; on GPUs, one per GPU. By default as many as torchrun
            or SLURM started, else one. They are spawned, so a script needs `if __name__ == "__main__"`, and model,
            strategy and objective must pickle. The objective must be a mean over examples.
        nodes: Machines, each of which runs the same command. By default as torchrun or SLURM say, else one.
        parallel: "ddp" keeps the whole network in each process, "fsdp" a part of every layer, for networks that do not
            fit on a GPU. Options that fsdp does not support are refused.
        sync_batch_norm: BatchNorm over the whole batch instead of each process's share. On GPUs.
        on_nan: What happens at a loss, gradient or FOSC that is not a finite number: "stop" ends the run, "skip" leaves
            the batch out and counts it. nonfinite.jsonl in the run folder names epoch, batch and examples.
        on_overfit: What happens when the relative FOSC says that the training overfits catastrophically, as training
            against a single step may: "warn" says so once, "stop" ends the run, "strengthen" gives the attack a step
            more from then on, each time; "ignore" does not look. metrics.jsonl names the batch and the value.
        run_dir: Folder of the run. By default nothing is written.
        overwrite: Start from scratch where run_dir holds a run, and remove all that innermax wrote about it there.
        checkpoint_every: How often to write a checkpoint within an epoch: every so many updates, or after a time such
            as "10min", "90s" or "2h". One is always written at the end of an epoch.
        keep_checkpoints: How many checkpoints to keep, at least 1. A run goes on from the newest that is not damaged.
        logger: Where to log each epoch, beside metrics.jsonl: "tensorboard", "wandb", "mlflow", or a logger object of
            Lightning Fabric or PyTorch Lightning.
        progress: Show a live display on a terminal, elsewhere a line per epoch. A function is called instead as
            progress(epoch's name, batches done, batches in all) after each batch, in the first process.
        settings: Anything else that identifies the run. config.yaml keeps it.

    Raises:
        ValueError, TypeError: an argument does not fit, or run_dir belongs to another configuration or process.
        FloatingPointError: a loss, gradient or FOSC is not a finite number.
        ArithmeticError: the training overfits catastrophically, and on_overfit says "stop".
        ChildProcessError: one of several processes has ended; the others are ended, too.
        OSError: run_dir cannot be written; the checkpoints in it stay whole.
        KeyboardInterrupt: after a checkpoint was written; the same call continues.
    """
    options = TrainingOptions(
        strategy=strategy, objective=objective, validation_attack=validation_attack, epochs=epochs,
        batch_size=batch_size, optimizer=optimizer, lr=lr, momentum=momentum, weight_decay=weight_decay,
        lr_schedule=lr_schedule, lr_drops=lr_drops, clip=clip, ema=ema, shift=shift, flip=flip, precision=precision,
        seed=seed, device=device, devices=devices, nodes=nodes, parallel=parallel, sync_batch_norm=sync_batch_norm,
        on_nan=on_nan, on_overfit=on_overfit, run_dir=run_dir, overwrite=overwrite,
        checkpoint_every=checkpoint_every, keep_checkpoints=keep_checkpoints, logger=logger, progress=progress,
        settings=settings,
    ).divide_epochs()  # fmt: skip
    chosen = find_device(device)
    launch = plan_launch(devices, nodes, chosen)
    job = Job.of(model, train_set, validation_set, options)
    check_parallel(options, launch, chosen, job.train_set, job.validation_set is not None)
    if not launch.starts:
        return _train(job, launch)
    with _note_checkpoint(options.folder):
        job = replace(job, model=unwrap(model))
        evaluated, history = train_in_processes(_train, job, launch, chosen.type)
    return Run(evaluated, history, options.folder)


def _train(job: Job, launch: Launch, is_stopped: Callable[[], bool] = lambda: False) -> Run:
    """Trains in this process and those of its group; is_stopped: whether an interrupt came in another process."""
    options, device = job.options, find_device(job.options.device)
    with contextlib.ExitStack() as stack:
        arithmetic = _arithmetic(job, device)
        ranks = connect(launch, device, arithmetic.bf16, options.parallel)
        stack.enter_context(_note_checkpoint(options.folder))
        stack.enter_context(ranks.explain_lost_connection())
        stack.enter_context(ranks.mute_others())
        ranks.run_first(lambda: job.open_folder(stack))
        stack.enter_context(order_restored(unwrap(job.model)))
        stack.enter_context(restore_randomness(range(torch.cuda.device_count())))
        loop = Loop.start(job.model, job.train_set, options, job.objective, ranks, arithmetic)
        loop.clock.validation = _validation_cost(job)
        loop.resume()
        show = stack.enter_context(show_progress(options.epochs, ranks.first and options.progress))
        logger = options.logger if ranks.first else None
        log = stack.enter_context(epoch_logger(logger, options.folder, job.configuration))
        is_interrupted = stack.enter_context(defer_interrupts())

        def must_stop() -> bool:
            return ranks.any(is_interrupted() or is_stopped())

        while loop.state.epoch < options.epochs:
            row = _train_epoch(job, loop, show, must_stop)
            drawn = None if logger is None or ranks.sharded else loop.draw_picture()
            row = _end_epoch(job, loop, row)
            show.epoch(row, loop.clock.left(len(job.train_set), row["gradients"]))
            log(row, drawn)
            if must_stop():
                raise KeyboardInterrupt
    loop.state.network.eval()
    return_freed_memory()
    return Run(loop.state.evaluated_network.eval(), tuple(loop.state.history), options.folder)


def _arithmetic(job: Job, device: torch.device) -> Arithmetic:
    head = job.train_set.head
    example, _ = head.batch(torch.arange(min(4, len(head)), device=head.labels.device))
    options = job.options
    return choose_arithmetic(job.model, example, options.precision, device, options.parallel == "fsdp")


def _train_epoch(job: Job, loop: Loop, show: TrainingDisplay, must_stop: Callable[[], bool]) -> dict[str, Any]:
    """Trains to the epoch's end; the epoch's row. A KeyboardInterrupt saves first where that is possible."""
    folder = job.options.folder
    try:
        return loop.train_epoch(show, must_stop)
    except KeyboardInterrupt:
        if folder is not None and loop.whole and (loop.agreed or not loop.ranks.sharded):
            loop.save()
            show.say(f"Interrupted and saved: the same command continues {folder} where it stopped.")
        raise


def _end_epoch(job: Job, loop: Loop, row: dict[str, Any]) -> dict[str, Any]:
    """Measures what belongs to the epoch's end, and saves models and checkpoint; the whole row."""
    row |= loop.measure()
    row |= _validate(job, loop)
    row = loop.end_epoch(row)
    if job.options.folder is not None:  # before the checkpoint, after which this epoch is not trained again
        loop.state.save_models(job.options.folder, loop.ranks)
    loop.save()
    loop.clock.end(time.perf_counter() - loop.began)
    return row


@contextlib.contextmanager
def _note_checkpoint(folder: Path | None) -> Iterator[None]:
    """Context manager: an OSError's notes name the checkpoint that the run can go on from."""
    try:
        yield
    except OSError as error:
        kept = [] if folder is None else find_checkpoints(folder)
        if kept:
            note = f"The last checkpoint is whole: the same command goes on from {kept[0]}."
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
        raise


def _validate(job: Job, loop: Loop) -> dict[str, Any]:
    """Clean accuracy, and accuracy and convergence under the attack, on the validation split, if there is one."""
    if job.validation_set is None:
        return {}
    attacks = {} if job.validation_attack is None else {"attack": job.validation_attack}
    with trust_normalisation():
        scored = evaluate(
            loop.state.evaluated_network,
            job.validation_set,
            attacks,
            precision=job.options.precision,
            device=loop.ranks.device,
            devices=loop.ranks.count,
            audit=False,
        )
    row: dict[str, Any] = {"validation_clean": scored.accuracy["clean"].value}
    if attacks:
        row["validation_robust"] = scored.accuracy["attack"].value
        row["validation_fosc"] = scored.convergence["attack"].fosc_median
    return row | {"validation_accuracy": row.get("validation_robust", row["validation_clean"])}


def _validation_cost(job: Job) -> float:
    """About how many gradients scoring the validation split takes."""
    if job.validation_set is None:
        return 0.0
    attack = job.validation_attack
    return len(job.validation_set) * (FORWARD if attack is None else FORWARD + search_cost(attack))
