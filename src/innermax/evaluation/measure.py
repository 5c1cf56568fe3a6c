"""The course of an evaluation or a transfer: clean images, then one search after another, batch by batch.

Several processes can share the batches, and a folder can keep them.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from innermax.attacks.base import Attack
from innermax.distributed.process_group import Ranks
from innermax.distributed.spawn import run_processes
from innermax.evaluation.arguments import check_images
from innermax.evaluation.scoring import PROBABLE, AttackedBatch, Bench, Settings
from innermax.evaluation.store import CLEAN, IMAGE, Column, Part, Parts, open_rows, read_plan, write_table
from innermax.losses import cross_entropy
from innermax.oracle.oracle import Oracle, Precision
from innermax.utils.copying import copy_model
from innermax.utils.files import hash_tensors
from innermax.utils.serialization import describe
from innermax.utils.version import __version__


@dataclass(frozen=True, eq=False)
class Search:
    """One attack on one model.

    Attributes:
        title: names its parts and its progress.
        name: the attack's name.
        oracle: what it searches with.
        rows: computes the columns to keep of an attacked batch.
        explain: a context manager that names the model in errors.
    """

    title: str
    name: str
    attack: Attack
    oracle: Oracle
    rows: Callable[[AttackedBatch], Mapping[str, Column]]
    explain: Callable[[], AbstractContextManager[None]] = nullcontext


@runtime_checkable
class Scorer(Protocol):
    """Turns batches into the columns that are kept, with models on this process's device."""

    @property
    def plan(self) -> str:
        """How the networks that attacks search with are compiled."""

    def recompile(self, plan: str) -> "Scorer":
        """The same with networks compiled to a plan, whatever the clock says here."""

    def clean_rows(self, x: Tensor, y: Tensor) -> Mapping[str, Column]:
        """The columns to keep of clean images."""

    def searches(self) -> Sequence[Search]:
        """The searches, in order."""


BuildScorer = Callable[[Bench, Mapping[str, nn.Module]], Any]  # a Scorer of these models


@dataclass(frozen=True, eq=False)
class Measurement:
    """What is measured, and where.

    Attributes:
        bench: the examples, in batches.
        models: by name, on the bench's device.
        build: makes the scorer of these models; must pickle where processes are spawned.
        attacks: all attacks, by name.
        parts: the results so far.
        ranks: the processes that make this call.
        devices: how many processes share the batches; they are spawned unless they make this call.
    """

    bench: Bench
    models: Mapping[str, nn.Module]
    build: BuildScorer
    attacks: Mapping[str, Attack]
    parts: Parts
    ranks: Ranks
    devices: int

    def agree(self, scorer: Any, precision: Precision) -> tuple["Measurement", Any]:
        """The measurement and its scorer with networks compiled alike in all processes, each of which has timed them
        for itself: as for the rows that the folder holds, or else as in the first process.
        """
        plan = self.ranks.broadcast(read_plan(self.parts.folder, precision) or scorer.plan)
        return replace(self, build=partial(_build_to, plan, self.build)), scorer.recompile(plan)

    def open_folder(self, configuration: Callable[[], Mapping[str, Any]]) -> None:
        """Makes or finds the folder of the parts, and reads the parts in it."""
        folder = self.parts.folder
        if folder is None:
            return
        told = configuration()
        self.ranks.run_first(lambda: open_rows(folder, told))
        self.parts.read()
        self.ranks.gather(None)  # nobody writes before all have read

    def write_table(self, columns: Callable[[], Mapping[str, Column]]) -> None:
        """Writes the table of all examples into the folder."""
        folder = self.parts.folder
        if folder is not None:
            self.ranks.run_first(lambda: write_table(folder, columns()))

    def score_clean(self, scorer: Scorer) -> None:
        """Adds the clean images' missing parts; checks labels, bounds and bits before the first long search."""
        with _exchange(self.parts, self.ranks):
            mine = self.parts.find_missing(CLEAN)[self.ranks.rank :: self.ranks.count]
            for start, _, x, y in self.bench.batches(CLEAN, mine):
                check_images(x, self.attacks, self.bench.quantize)
                began = time.perf_counter()
                columns = scorer.clean_rows(x, y)
                self.parts.add(CLEAN, start, Part(columns, time.perf_counter() - began))

    def attack(self, scorer: Scorer) -> None:
        """Adds the searches' missing parts."""
        if self.devices == self.ranks.count:
            with _exchange(self.parts, self.ranks):
                _attack_share(self.bench, self.parts, scorer.searches(), self.ranks.rank, self.ranks.count)
        elif any(self.parts.find_missing(name) for name in self.parts.kinds):
            self._attack_in_processes()

    def _attack_in_processes(self) -> None:
        """Adds the missing parts: spawns processes, which write them into a folder."""
        parts, told = self.parts, {name: 0 for name in self.parts.kinds if name != CLEAN}
        with TemporaryDirectory(prefix="innermax-") if parts.folder is None else nullcontext(parts.folder) as place:
            folder, tell = Path(place), self.bench.progress

            def watch() -> None:
                for name in told:
                    done = parts.count_written(folder, name)
                    if tell is not None and done > told[name]:
                        told[name] = done
                        tell(name, done, len(self.bench.images))

            bench = replace(self.bench, progress=None, images=self.bench.images.to("cpu"))
            models = self.models if bench.device.type == "cpu" else _copy_to_cpu(self.models)
            task = _Task(bench, models, self.build, replace(parts, folder=folder))
            run_processes(_run_share, task, self.devices, bench.device.type, watch)
            task.parts.read()  # into the same memory


def _build_to(plan: str, build: BuildScorer, bench: Bench, models: Mapping[str, nn.Module]) -> Any:
    return build(bench, models).recompile(plan)


def identify(bench: Bench, models: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """What identifies each model, as plain YAML: class, weights, and its answers to the first examples.

    The answers are there because a model's code can change without its weights.
    """
    _, _, x, y = next(bench.batches(CLEAN))
    found = {}
    for name, model in models.items():
        exact = Oracle(model)
        with exact.private_randomness(bench.seed):
            answer = exact.gradient(x[:8], y[:8], cross_entropy)
        found[name] = {
            "model": type(model).__qualname__,
            "weights": hash_tensors((*model.named_parameters(), *model.named_buffers())),
            "answers": [*answer.loss.tolist(), *answer.gradient.flatten(1).norm(dim=1).tolist()],
        }
    return found


def describe_measurement(bench: Bench, attacks: Mapping[str, Attack], settings: Settings) -> dict[str, Any]:
    """What identifies a measurement besides its models, as plain YAML."""
    tensors = {"images": bench.images.images, "labels": bench.images.labels}
    if bench.images.numbers is not None:
        tensors["numbers"] = bench.images.numbers
    return {
        "test_set": hash_tensors(tensors.items()),
        **describe(asdict(settings)),
        "attacks": describe(attacks),
        "device": bench.device.type,
        "innermax": __version__,
    }


@contextmanager
def _exchange(parts: Parts, ranks: Ranks) -> Iterator[None]:
    """Context manager in which each process adds its share of the parts; at its end all have all of them."""
    before = {name: set(held) for name, held in parts.held.items()}
    with ranks.raise_together(ValueError, TypeError, ArithmeticError, OSError):
        yield
    if ranks.count == 1:
        return
    own = {name: [start for start in held if start not in before[name]] for name, held in parts.held.items()}
    for told in ranks.gather({name: [(start, parts.get(name, start)) for start in own[name]] for name in own}):
        for name, found in told.items():
            for start, part in found:
                parts.keep(name, start, part)


def _attack_share(bench: Bench, parts: Parts, searches: Sequence[Search], rank: int, processes: int) -> None:
    """Adds one process's share of the searches' missing parts."""
    for search in searches:
        mine = parts.find_missing(search.title)[rank::processes]
        with search.explain():
            for batch in bench.attack_batches(search.title, search.name, search.attack, search.oracle, mine):
                columns = dict(search.rows(batch))
                if parts.image_shape is not None:
                    columns[IMAGE] = batch.image.cpu().numpy()
                parts.add(search.title, batch.start, Part(columns, batch.seconds))


@dataclass(frozen=True, eq=False)
class _Task:
    """What a spawned process needs for its share."""

    bench: Bench
    models: Mapping[str, nn.Module]
    build: BuildScorer
    parts: Parts


def _run_share(task: _Task, rank: int, processes: int, device: torch.device) -> None:
    """What a spawned process does."""
    bench = replace(task.bench, device=device)
    models = {name: model.to(device) for name, model in task.models.items()}
    with bench.isolate(*models.values()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=PROBABLE)
        _attack_share(bench, task.parts, task.build(bench, models).searches(), rank, processes)


def _copy_to_cpu(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies of the models on the CPU; a model with two names is copied once."""
    moved = {model: copy_model(model).cpu() for model in models.values()}
    return {name: moved[model] for name, model in models.items()}
