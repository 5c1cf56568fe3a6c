"""Scores a model under attack: who is still right, with what certainty, and how far each search got."""

import copy
import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from innermax.attacks.base import looks_like_probabilities
from innermax.attacks.search import AttackResult
from innermax.audit import Audit
from innermax.checkpoints import write_bytes
from innermax.checks import check_count, unknown
from innermax.data import as_image_set
from innermax.intake import misgivings
from innermax.losses import cross_entropy
from innermax.oracle import Oracle, Precision
from innermax.probes import Subject, audited
from innermax.ranks import Ranks, members
from innermax.reading import parsed_json, value_as
from innermax.rows import (
    CLEAN,
    AttackRows,
    CleanRows,
    Column,
    Part,
    Parts,
    check_column,
    fingerprint,
    kept_rows,
    open_rows,
    write_table,
)
from innermax.runs import describe
from innermax.scoring import (
    Attack,
    Bench,
    Progress,
    Settings,
    about,
    check_arguments,
    check_devices,
    check_images,
    check_models,
    on_device,
    scoring_logits,
)
from innermax.sharing import shared
from innermax.statistics import Accuracy, Interval, accuracy, paired_difference

if TYPE_CHECKING:
    import pandas

_PROBABLE = "the model seems to return probabilities"


@dataclass(frozen=True)
class Summary:
    """How far the searches of some examples got: quantiles of FOSC, and the share of zero gradients.

    Quantiles are over the examples whose gradient is not zero: FOSC is 0 where there is nothing to follow, which is not
    convergence. NaN where there are none, or where the attack does not gauge itself.
    """

    fosc_median: float
    fosc_p90: float
    relative_fosc_median: float
    relative_fosc_p90: float
    zero_gradient: float


@dataclass(frozen=True)
class Convergence:
    """How far an attack got on all examples, in the terms of `Summary`, and what it cost.

    Attributes:
        survivors: the summary of those that are classified correctly under this attack.
        gradients: gradients an example, on average.
        forwards: forward passes without a gradient an example, on average.
        overturned: examples the attack reported as fallen that are correct once projected, quantised and scored.
        seconds: time spent in the attack.
    """

    fosc_median: float
    fosc_p90: float
    relative_fosc_median: float
    relative_fosc_p90: float
    zero_gradient: float
    survivors: Summary
    gradients: float
    forwards: float
    overturned: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model's answers to a test set, clean and under each attack; everything else is computed from these rows.

    `audit` says whether they can be believed; None where it was not asked for, or nothing was attacked.
    """

    settings: Settings
    label: Column
    clean_prediction: Column
    rows: dict[str, AttackRows]
    seconds: dict[str, float]
    audit: Audit | None = None

    @cached_property
    def accuracy(self) -> dict[str, Accuracy]:
        """The accuracy on "clean", then under each attack in order, whatever the clean image gave."""
        return {name: self._accuracy(name) for name in ("clean", *self.rows)}

    @cached_property
    def worst_case(self) -> Accuracy:
        """The share of examples that are correct on the clean image and under every attack."""
        return self._accuracy("worst_case")

    @cached_property
    def convergence(self) -> dict[str, Convergence]:
        """How far each attack got."""
        return {name: _convergence(rows, self.seconds[name]) for name, rows in self.rows.items()}

    @cached_property
    def examples(self) -> "pandas.DataFrame":
        """One row an example: index, label, clean_prediction, clean_correct, seed, and of each attack <attack>_success,
        which is the opposite of <attack>_correct, and <attack>_<column of AttackRows>.
        """
        import pandas

        return pandas.DataFrame(self.columns())

    def columns(self) -> dict[str, Column]:
        """The columns of `examples` by name."""
        count = len(self.label)
        table = {
            "index": np.arange(count),
            "label": self.label,
            "clean_prediction": self.clean_prediction,
            "clean_correct": self.correct("clean"),
            "seed": np.full(count, np.uint64(self.settings.seed % 2**64).astype(np.int64)),
        }
        for name, rows in self.rows.items():
            table[f"{name}_success"] = ~rows.correct
            table |= {f"{name}_{key}": column for key, column in vars(rows).items()}
        return table

    def correct(self, name: str) -> Column:
        """(N,) bool, who is right on "clean", under an attack, or in the "worst_case". ValueError for other names."""
        clean: Column = self.clean_prediction == self.label
        if name == "clean":
            return clean
        if name == "worst_case":
            return cast(Column, np.logical_and.reduce([clean, *(rows.correct for rows in self.rows.values())]))
        if name not in self.rows:
            raise unknown("attack", name, ("clean", *self.rows, "worst_case"))
        return self.rows[name].correct

    def difference(self, other: "Evaluation", name: str) -> Interval:
        """This accuracy minus the other's, as a fraction, with its paired 95 % interval (Agresti & Min 2005).

        name: "clean", an attack both have, or "worst_case". Raises ValueError where the examples are not the same.
        """
        if not np.array_equal(self.label, other.label):
            raise ValueError(
                f"other must be an evaluation of the same examples: its {len(other.label)} labels differ from these "
                f"{len(self.label)}"
            )
        mine, theirs = self.correct(name), other.correct(name)
        return paired_difference(int((mine & ~theirs).sum()), int((theirs & ~mine).sum()), len(mine))

    def summary(self) -> dict[str, Any]:
        """Settings, accuracies, worst case, convergence and audit as plain values; NaN and infinities are None."""
        document = {
            "settings": asdict(self.settings),
            "accuracy": {name: asdict(value) for name, value in self.accuracy.items()},
            "worst_case": asdict(self.worst_case),
            "convergence": {name: asdict(value) for name, value in self.convergence.items()},
            "audit": None if self.audit is None else self.audit.to_dict(),
        }
        return cast(dict[str, Any], _without_nan(document))

    def to_json(self, path: str | Path | None = None) -> str:
        """The evaluation as JSON, written to path where told; NaN and infinities become null."""
        examples = {
            "label": self.label.tolist(),
            "clean_prediction": self.clean_prediction.tolist(),
            "attacks": {
                name: {key: column.tolist() for key, column in vars(rows).items()} for name, rows in self.rows.items()
            },
        }
        document = self.summary() | {"examples": _without_nan(examples)}
        text = json.dumps(document, allow_nan=False, ensure_ascii=False)
        if path is not None:
            write_bytes(Path(path), f"{text}\n".encode())
        return text

    @classmethod
    def from_json(cls, text: str) -> "Evaluation":
        """What `to_json` wrote. Raises ValueError where the text is something else."""
        try:
            document = parsed_json(text)
            examples, attacks = document["examples"], document["examples"]["attacks"]
            settings = value_as(Settings, document["settings"], "settings")
            if {CLEAN, "worst_case"} & attacks.keys():
                raise ValueError(f"no attack is called {CLEAN} or worst_case")
            return cls(
                settings=settings,
                label=_column(examples["label"], "label", settings.count),
                clean_prediction=_column(examples["clean_prediction"], "prediction", settings.count),
                rows={
                    name: AttackRows(**{key: _column(values, key, settings.count) for key, values in rows.items()})
                    for name, rows in attacks.items()
                },
                seconds={
                    name: value_as(float, document["convergence"][name]["seconds"], "seconds") for name in attacks
                },
                audit=None if document.get("audit") is None else Audit.from_dict(document["audit"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(f"text must be an evaluation's JSON: {told}") from error

    def _accuracy(self, name: str) -> Accuracy:
        correct = self.correct(name)
        return accuracy(int(correct.sum()), len(correct))


def evaluate(
    model: nn.Module,
    test_set: Any,
    attacks: Mapping[str, Attack],
    *,
    batch_size: int = 250,
    seed: int = 0,
    quantize: int | None = None,
    precision: Precision = "float32",
    device: torch.device | str | None = None,
    devices: int = 1,
    rows_dir: str | Path | None = None,
    progress: Progress | None = None,
    audit: bool = True,
    surrogates: Mapping[str, nn.Module] | None = None,
) -> Evaluation:
    """Accuracy on clean images, under each attack and under all of them, and how far each attack's search got.

    What an attack returns is projected onto X(x), quantised where told, and scored in float32 by the model itself. An
    example is known by its position in test_set, so neither its random starts nor, up to rounding, its result depend on
    batch_size, unless the model itself draws random numbers.

    Args:
        model: any nn.Module with logits, in any mode; left exactly as found.
        test_set: (images, labels) tensors or whatever `as_image_set` takes: uint8 images, or floats in [0, 1].
        attacks: attacks by name; "clean" and "worst_case" are taken. Without any, clean accuracy alone is measured.
        batch_size: ≥ 1.
        seed: any integer; with the example's position it decides all random starts.
        quantize: 1…16: only images of this many bits a value count; clean images must have no more.
        precision: what attacks search in, on the compiled model: "float32", "bf16" or "auto". Scores are float32, the
            model's own.
        device: where to compute; where the model is unless told. On another device a copy of the model is evaluated.
        devices: processes that share the batches, each with as many threads as this one; on GPUs one a GPU, the first
            so many. They start anew, so a script needs its `if __name__ == "__main__"`, and model and attacks must
            pickle. Where so many are there already, started by torchrun, SLURM or a training, and all make the same
            call, these share the batches, and all return the same. The rows are the same, to the bit.
        rows_dir: folder that keeps each batch's rows as soon as they are there, and rows.parquet, the table of
            `Evaluation.examples`, in the end. The same call goes on from what the folder holds, to the same table.
        progress: called as progress(name, examples done, examples in all) after each batch, "clean" first; now and
            then, from another thread, where there are several devices.
        audit: whether stronger searches on a sample of the survivors check the result, for at most a tenth of what
            AutoAttack costs.
        surrogates: other models by name, left exactly as found: the audit also shows the model images made on them, for
            20 of their gradients a survivor of the sample each.

    Raises:
        ValueError, TypeError: an argument is outside what is said above; labels are not among the model's classes, the
            model returns NaN, an image lies outside an attack's bounds, a surrogate has other classes, or rows_dir
            belongs to another evaluation. With rows_dir, notes of any exception say where finished rows are kept.
    """
    check_arguments(attacks, batch_size, seed, quantize, precision)
    if surrogates is not None:
        check_models("surrogates", surrogates)
        if not (audit and attacks):
            raise ValueError("surrogates are what the audit tries: they need audit=True and at least one attack")
    images = as_image_set(test_set)
    model, device = on_device(model, images, device)
    check_count(devices, "devices")
    ranks = members(devices, device)
    if ranks.count == 1:
        check_devices(devices, device)
    model, device = on_device(model, images, ranks.device)
    bench = Bench(images, device, batch_size, seed, quantize, progress if ranks.first else None)
    exact = Oracle(model)
    folder = None if rows_dir is None else Path(rows_dir)
    parts = Parts((CLEAN, *attacks), len(images), batch_size, folder)
    with bench.in_float32(exact), ranks.named(), ranks.heard():
        oracle = bench.attack_oracle(model, exact, precision) if attacks else exact
        others = _surrogate_oracles(bench, exact, surrogates or {})
        settings = ranks.same(bench.settings(attacks, precision, oracle.plan))
        if folder is not None:
            configuration = _configuration(bench, model, exact, attacks, settings)
            ranks.first_alone(lambda: open_rows(folder, configuration))
            parts.read()
            ranks.gathered(None)  # nobody writes before all have read
        with kept_rows(folder), warnings.catch_warnings():
            with _exchanged(parts, ranks):
                _clean(bench, exact, attacks, parts, ranks.rank, ranks.count)
            for sentence in misgivings(model, exact, images, device, batch_size):
                warnings.warn(sentence, stacklevel=2)
            if parts.joined(CLEAN).columns["probable"].all():
                message = f"{_PROBABLE}; attacks and gauges need logits (leave the softmax out)"
                warnings.warn(message, stacklevel=2)
                warnings.filterwarnings("ignore", message=_PROBABLE)  # each attack would say so on each batch
            if devices == ranks.count:
                with _exchanged(parts, ranks):
                    _attacked(bench, attacks, oracle, exact, parts, ranks.rank, ranks.count)
            else:
                _attacked_together(_Task(bench, model, attacks, precision, parts), devices)
            found = {name: parts.joined(name) for name in attacks}
            evaluation = Evaluation(
                settings=settings,
                label=images.labels.cpu().numpy().copy(),
                clean_prediction=parts.joined(CLEAN).columns["prediction"],
                rows={name: AttackRows(**part.columns) for name, part in found.items()},
                seconds={name: part.seconds for name, part in found.items()},
            )
            if folder is not None:
                ranks.first_alone(lambda: write_table(folder, evaluation.columns()))
            if audit and attacks:
                evaluation = replace(evaluation, audit=_audit(bench, model, exact, oracle, others, attacks, evaluation))
    return evaluation


def _surrogate_oracles(bench: Bench, exact: Oracle, surrogates: Mapping[str, nn.Module]) -> dict[str, Oracle]:
    """The compiled oracles of models that take the same images and have the same classes. ValueError for others."""
    found = {}
    for name, model in surrogates.items():
        with about("surrogate", name):
            own, _ = on_device(model, bench.images, bench.device)
            found[name] = bench.attack_oracle(own, Oracle(own), "float32")
            theirs, ours = (oracle.logits(bench.example()).shape[1] for oracle in (found[name], exact))
            if theirs != ours:
                raise ValueError(f"it has {theirs} classes, the model {ours}")
    return found


@contextmanager
def _exchanged(parts: Parts, ranks: Ranks) -> Iterator[None]:
    """Inside, each process adds its share of the parts; afterwards all have them all."""
    before = {name: set(held) for name, held in parts.held.items()}
    with ranks.together(ValueError, TypeError, ArithmeticError, OSError):
        yield
    if ranks.count == 1:
        return
    own = {name: [start for start in held if start not in before[name]] for name, held in parts.held.items()}
    for told in ranks.gathered({name: [(start, parts.part(name, start)) for start in own[name]] for name in own}):
        for name, found in told.items():
            for start, part in found:
                parts.keep(name, start, part)


def _clean(
    bench: Bench, exact: Oracle, attacks: Mapping[str, Attack], parts: Parts, rank: int = 0, processes: int = 1
) -> None:
    """Adds the clean images' missing parts, or one's share of them.

    Labels, bounds and grid are known to fit before the first long search.
    """
    for index, x, y in bench.batches(CLEAN, parts.missing(CLEAN)[rank::processes]):
        check_images(x, attacks, bench.quantize)
        began = time.perf_counter()
        logits = scoring_logits(exact, x, y)
        probable = torch.full(y.shape, looks_like_probabilities(logits))
        rows = CleanRows(logits.argmax(1).cpu().numpy(), probable.numpy())
        parts.add(CLEAN, int(index[0]), Part(vars(rows), time.perf_counter() - began))


def _attacked(
    bench: Bench,
    attacks: Mapping[str, Attack],
    oracle: Oracle,
    exact: Oracle,
    parts: Parts,
    rank: int = 0,
    processes: int = 1,
) -> None:
    """Adds the attacks' missing parts, or of several processes one's share of them."""
    for name, attack in attacks.items():
        for batch in bench.attacked(name, attack, oracle, parts.missing(name)[rank::processes]):
            rows = _rows(batch.result, scoring_logits(exact, batch.image, batch.label), batch.label)
            parts.add(name, batch.start, Part(vars(rows), batch.seconds))


@dataclass(frozen=True, eq=False)
class _Task:
    """What a process needs for its share of the missing parts."""

    bench: Bench
    model: nn.Module
    attacks: Mapping[str, Attack]
    precision: Precision
    parts: Parts


def _attacked_together(task: _Task, processes: int) -> None:
    """Adds the attacks' missing parts, computed by processes that meet in a folder."""
    bench, parts = task.bench, task.parts
    if not any(parts.missing(name) for name in task.attacks):
        return
    with TemporaryDirectory(prefix="innermax-") if parts.folder is None else nullcontext(parts.folder) as place:
        folder, told = Path(place), dict.fromkeys(task.attacks, 0)

        def watch() -> None:
            for name in told if bench.progress is not None else ():
                done = parts.written(folder, name)
                if done > told[name]:
                    told[name] = done
                    cast(Progress, bench.progress)(name, done, len(bench.images))

        there = replace(
            task,
            bench=replace(bench, progress=None, images=bench.images.to("cpu")),
            model=task.model if bench.device.type == "cpu" else copy.deepcopy(task.model).cpu(),
            parts=replace(parts, folder=folder),
        )
        shared(_attack_share, there, processes, bench.device.type, watch)
        there.parts.read()  # into the same memory


def _attack_share(task: _Task, rank: int, processes: int, device: torch.device) -> None:
    """What one of the processes does."""
    bench, model = replace(task.bench, device=device), task.model.to(device)
    exact = Oracle(model)
    with bench.in_float32(exact), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_PROBABLE)
        oracle = bench.attack_oracle(model, exact, task.precision)
        _attacked(bench, task.attacks, oracle, exact, task.parts, rank, processes)


def _configuration(
    bench: Bench, model: nn.Module, exact: Oracle, attacks: Mapping[str, Attack], settings: Settings
) -> dict[str, Any]:
    """What identifies an evaluation, as plain YAML: the rows of a folder are one configuration's alone.

    A model's code may change while its weights do not, so its answers to the first examples are told, too.
    """
    from innermax import __version__

    _, x, y = next(bench.batches(CLEAN))
    with exact.private_randomness(bench.seed):
        answer = exact.gradient(x[:8], y[:8], cross_entropy)
    tensors = {"images": bench.images.images, "labels": bench.images.labels}
    return {
        "model": type(model).__qualname__,
        "weights": fingerprint((*model.named_parameters(), *model.named_buffers())),
        "answers": [*answer.loss.tolist(), *answer.gradient.flatten(1).norm(dim=1).tolist()],
        "test_set": fingerprint(tensors.items()),
        **describe(asdict(settings)),
        "attacks": describe(attacks),
        "device": bench.device.type,
        "innermax": __version__,
    }


def _audit(
    bench: Bench,
    model: nn.Module,
    exact: Oracle,
    oracle: Oracle,
    surrogates: Mapping[str, Oracle],
    attacks: Mapping[str, Attack],
    evaluation: Evaluation,
) -> Audit:
    """Whether an evaluation can be believed."""
    subject = Subject(
        model=model,
        exact=exact,
        oracle=oracle.precise,
        images=bench.images,
        attacks=attacks,
        rows=evaluation.rows,
        survived=evaluation.correct("worst_case"),
        surrogates=surrogates,
        admit=partial(bench.admitted, "audit"),
        seed=bench.seed,
        batch_size=bench.batch_size,
        device=bench.device,
    )
    return audited(subject)


def _rows(result: AttackResult, logits: Float[Tensor, "b classes"], y: Int[Tensor, " b"]) -> AttackRows:
    """One batch's rows: the attack's own report, and the verdict on the scored image."""
    prediction = logits.argmax(1)
    correct = prediction == y
    untold = torch.full(y.shape, math.nan)
    told = torch.zeros_like(correct) if result.misclassified is None else result.misclassified.to(correct)
    columns = {
        "correct": correct,
        "prediction": prediction,
        "loss": cross_entropy(logits, y),
        "fosc": untold if result.fosc is None else result.fosc,
        "relative_fosc": untold if result.relative_fosc is None else result.relative_fosc,
        "zero_gradient": untold if result.zero_gradient is None else result.zero_gradient,
        "steps": result.steps,
        "gradient_calls": result.gradient_calls,
        "forward_calls": result.forward_calls,
        "overturned": told & correct,
    }
    return AttackRows(
        **{
            key: (value.double() if value.is_floating_point() else value).detach().cpu().numpy()
            for key, value in columns.items()
        }
    )


def _convergence(rows: AttackRows, seconds: float) -> Convergence:
    return Convergence(
        **vars(_summary(rows, np.ones_like(rows.correct))),
        survivors=_summary(rows, rows.correct),
        gradients=float(rows.gradient_calls.mean()),
        forwards=float(rows.forward_calls.mean()),
        overturned=int(rows.overturned.sum()),
        seconds=seconds,
    )


def _summary(rows: AttackRows, chosen: Column) -> Summary:
    """The summary of the chosen examples."""
    zero = rows.zero_gradient[chosen]
    moving = chosen & (rows.zero_gradient != 1)  # NaN, not told, is no zero
    return Summary(
        *_quantiles(rows.fosc[moving]),
        *_quantiles(rows.relative_fosc[moving]),
        zero_gradient=float(zero.mean()) if len(zero) else math.nan,
    )


def _quantiles(values: Column) -> tuple[float, float]:
    """Median and 90th percentile of what is known."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan
    median, ninth = np.quantile(values, (0.5, 0.9))
    return float(median), float(ninth)


def _column(values: Sequence[Any], name: str, count: int) -> Column:
    """A column of JSON; null is NaN. Raises ValueError where it is not what such a column holds."""
    column = np.array([math.nan if value is None else value for value in values])
    check_column(column, name, count)
    return column


def _without_nan(value: Any) -> Any:
    """The same document with null for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
