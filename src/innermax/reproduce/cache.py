"""Trains and measures whatever a piece asks for, once: every answer is kept under what it answers."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

import innermax as im
from innermax.data.image_set import Data
from innermax.distributed.launch import find_device
from innermax.models.files import write_model
from innermax.reproduce.answers import Answers
from innermax.reproduce.scales import Setting, Training
from innermax.utils.environment import environment
from innermax.utils.files import LockHeld, lock_file
from innermax.utils.serialization import describe

Answer = dict[str, Any]
_LARGEST = 16_000_000  # bytes of a file that is laid down in float32


@runtime_checkable
class Question(Protocol):
    """Something to be measured: a value that says by itself what it is, and how it is answered."""

    def answer(self, workshop: "Workshop") -> Answer:
        """The measurement, as JSON. It may take hours, and goes on where it was interrupted."""
        ...


class Busy(Exception):
    """Another process works on this."""


@dataclass(frozen=True)
class Workshop:
    """Where answers and models are kept.

    Args:
        answers: those that are kept.
        models: folder of one run folder a training.
        device: as for `im.train`.
        say: takes a line of progress.
        shelf: folder of a copy of each network that is trained here, for others; None: there is none.
    """

    answers: Answers
    models: Path
    device: str = "auto"
    say: Callable[[str], None] = lambda line: None
    shelf: Path | None = None

    def known(self, question: Question) -> Answer | None:
        """The answer that is kept, with the "environment" and "seconds" of when it was measured."""
        kept = self.answers.find(fingerprint(question))
        if kept is None:
            return None
        return {**kept["answer"], "environment": kept["environment"], "seconds": kept["seconds"]}

    def answered(self, question: Question) -> Answer:
        """The answer, measured if it is not kept yet. Raises Busy where another process is at it."""
        name = fingerprint(question)
        with self._alone(name):
            known = self.known(question)
            if known is not None:
                return known
            self.say(f"{name} …")
            began = time.perf_counter()
            answer = question.answer(self)
            seconds = time.perf_counter() - began
            kept = {
                "question": json.loads(json.dumps(describe(question)), parse_constant=str),  # JSON has no infinity
                "answer": answer,
                "environment": environment(seed_of(question)),
                "seconds": round(seconds, 2),
            }
            self.answers.add(name, kept)
        return {**answer, "environment": kept["environment"], "seconds": kept["seconds"]}

    def run(self, training: Training) -> im.Run:
        """The training's run, done now where it is not kept. Raises Busy where another process is at it."""
        folder = self.models / fingerprint(training)
        setting = training.setting
        with self._alone(folder.name):
            done = finished(folder, setting.epochs)
            if done is not None:
                return done
            data = load(setting)
            run = im.train(
                network(setting, data, training.seed),
                data.train[: setting.train],
                training.strategy,
                objective=training.objective,
                validation_set=data.validation,
                validation_attack=setting.pgd(),
                epochs=setting.epochs,
                batch_size=setting.batch_size,
                lr=setting.lr,
                lr_schedule=setting.lr_schedule,
                lr_drops=setting.lr_drops,
                weight_decay=setting.weight_decay,
                ema=setting.ema,
                shift=setting.shift,
                flip=setting.flip,
                seed=training.seed,
                device=self.device,
                run_dir=folder,
                progress=False,
            )
            if self.shelf is not None:
                lay_down(run.model, self.shelf / folder.name)
            return run

    def model(self, training: Training, best: bool = False) -> nn.Module:
        """The trained network of the last epoch, or of the best on the validation split."""
        run, name = self.run(training), fingerprint(training)
        model = im.load_model(self.models / name / "best.safetensors") if best else run.model
        if best and self.shelf is not None:
            lay_down(model, self.shelf / f"{name}-best")
        return model.to(find_device(self.device)).eval()

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Inside, no other process does the same; the system takes the lock back from one that was killed."""
        with ExitStack() as stack:
            try:
                stack.enter_context(lock_file(self.models / f"{name}.lock", name))
            except LockHeld:
                raise Busy(name) from None
            yield


def lay_down(model: nn.Module, folder: Path) -> None:
    """Writes a network for `load_model`; where its file would pass 16 MB, matrices and filters in bf16."""
    weights: Mapping[str, Tensor] = model.state_dict()
    if sum(value.numel() * value.element_size() for value in weights.values()) > _LARGEST:
        weights = {name: value.bfloat16() if value.ndim > 1 else value for name, value in weights.items()}
    write_model(folder, weights, model.config)


def seed_of(question: Question) -> int:
    """The seed of the training that a question is about, 0 where it is about none."""
    training: Training | None = getattr(question, "training", None)
    return 0 if training is None else training.seed


def finished(folder: Path, epochs: int) -> im.Run | None:
    """The run of a folder that holds all its epochs."""
    metrics = folder / "metrics.jsonl"
    rows = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    if len(rows) < epochs:
        return None
    return im.Run(im.load_model(folder).eval(), tuple(map(json.loads, rows)), folder)


def load(setting: Setting) -> Data:
    """The setting's data set."""
    return _loaded(setting.data, setting.validation)


@lru_cache(maxsize=2)
def _loaded(name: str, validation: int) -> Data:
    return im.load_data(name, validation=validation)


def network(setting: Setting, data: Data, seed: int) -> nn.Module:
    """The setting's network with weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return im.build_model(
            setting.model, num_classes=data.num_classes, input_shape=data.train.shape, **setting.options
        )


def fingerprint(question: object) -> str:
    """A file's name for a question: its kind and a hash of all that it says."""
    described = json.dumps(describe(question), sort_keys=True)
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(question).__name__).lower()
    return f"{kind}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"
