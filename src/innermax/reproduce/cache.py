"""Trains and measures what experiments need, each once: results and networks are kept by the experiment's name."""

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
from innermax.utils.files import LockHeld, load_tensors, lock_file
from innermax.utils.serialization import describe

Result = dict[str, Any]  # JSON
_LARGEST = 16_000_000  # bytes of an exported network's file in float32


@runtime_checkable
class Experiment(Protocol):
    """A value that says what is measured, and measures it."""

    def run(self, cache: "Cache") -> Result:
        """The result. It may take hours, and is resumed where it was interrupted."""
        ...


class InUse(Exception):
    """Another process runs this experiment or training."""


@dataclass(frozen=True)
class Cache:
    """Where results and networks are kept.

    Args:
        answers: results, as they are stored.
        models: folder with a run folder per training.
        device: as for `im.train`.
        say: takes a line of progress.
        exports: folder for a copy of each network that is trained here, to be shared; None: no copies.
    """

    answers: Answers
    models: Path
    device: str = "auto"
    say: Callable[[str], None] = lambda line: None
    exports: Path | None = None

    def find(self, experiment: Experiment) -> Result | None:
        """The stored result, with "environment" and "seconds" of its measurement; None where there is none."""
        record = self.answers.find(hash_name(experiment))
        if record is None:
            return None
        return {**record["answer"], "environment": record["environment"], "seconds": record["seconds"]}

    def measure(self, experiment: Experiment) -> Result:
        """The stored result, or else the experiment's, which is stored. Raises InUse where another process runs it."""
        name = hash_name(experiment)
        with self._lock(name):
            found = self.find(experiment)
            if found is not None:
                return found
            self.say(f"{name} …")
            began = time.perf_counter()
            result = experiment.run(self)
            seconds = time.perf_counter() - began
            record = {
                "question": json.loads(json.dumps(describe(experiment)), parse_constant=str),  # JSON has no infinity
                "answer": result,
                "environment": environment(find_seed(experiment)),
                "seconds": round(seconds, 2),
            }
            self.answers.add(name, record)
        return {**result, "environment": record["environment"], "seconds": record["seconds"]}

    def train(self, training: Training) -> im.Run:
        """The finished run of a training, trained if need be. Raises InUse where another process trains it."""
        folder = self.models / hash_name(training)
        setting = training.setting
        with self._lock(folder.name):
            finished = find_run(folder, setting.epochs)
            if finished is not None:
                return finished
            data = load_data(setting)
            run = im.train(
                build_network(setting, data, training.seed),
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
            if self.exports is not None:
                export_network(run.model, self.exports / folder.name)
            return run

    def network(self, training: Training, best: bool = False) -> nn.Module:
        """The trained network of the last epoch, or of the best on the validation split.

        Where the run is not in the cache, the shared copy is taken if it holds the weights as they were trained.
        """
        name = hash_name(training)
        if find_run(self.models / name, training.setting.epochs) is None:
            shared = self._find_export(f"{name}-best" if best else name)
            if shared is not None:
                return shared.to(find_device(self.device)).eval()
        run = self.train(training)
        model = im.load_model(self.models / name / "best.safetensors") if best else run.model
        if best and self.exports is not None:
            export_network(model, self.exports / f"{name}-best")
        return model.to(find_device(self.device)).eval()

    def _find_export(self, name: str) -> nn.Module | None:
        """A shared copy in full precision, None where there is none."""
        if self.exports is None or not (self.exports / name).exists():
            return None
        tensors, _ = load_tensors(self.exports / name / "model.safetensors")
        return None if torch.bfloat16 in {t.dtype for t in tensors.values()} else im.load_model(self.exports / name)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Context manager: one process at a time. Raises InUse where another one is in it."""
        with ExitStack() as stack:
            try:
                stack.enter_context(lock_file(self.models / f"{name}.lock", name))
            except LockHeld:
                raise InUse(name) from None
            yield


def export_network(model: nn.Module, folder: Path, largest: int | None = None) -> None:
    """Writes a network for `load_model`; where its file would exceed `largest` bytes, matrices and filters in bf16.

    largest: None: 16 MB.
    """
    weights: Mapping[str, Tensor] = model.state_dict()
    limit = _LARGEST if largest is None else largest
    if sum(value.numel() * value.element_size() for value in weights.values()) > limit:
        weights = {name: value.bfloat16() if value.ndim > 1 else value for name, value in weights.items()}
    write_model(folder, weights, model.config)


def find_seed(experiment: Experiment) -> int:
    """The seed of an experiment's training, 0 where it has none."""
    training: Training | None = getattr(experiment, "training", None)
    return 0 if training is None else training.seed


def find_run(folder: Path, epochs: int) -> im.Run | None:
    """The run in a folder that holds all its epochs, else None."""
    metrics = folder / "metrics.jsonl"
    rows = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    if len(rows) < epochs:
        return None
    return im.Run(im.load_model(folder).eval(), tuple(map(json.loads, rows)), folder)


def load_data(setting: Setting) -> Data:
    """The setting's data set."""
    return _load_data(setting.data, setting.validation)


@lru_cache(maxsize=2)
def _load_data(name: str, validation: int) -> Data:
    return im.load_data(name, validation=validation)


def build_network(setting: Setting, data: Data, seed: int) -> nn.Module:
    """The setting's network with weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return im.build_model(
            setting.model, num_classes=data.num_classes, input_shape=data.train.shape, **setting.options
        )


def hash_name(value: object) -> str:
    """The name of an experiment or training: its class, and a hash of its fields."""
    described = json.dumps(describe(value), sort_keys=True)
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(value).__name__).lower()
    return f"{kind}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"
