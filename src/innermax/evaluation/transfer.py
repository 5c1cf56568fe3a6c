"""Black-box evaluation by transfer: images made on one model, scored on others.

Images are made once on each surrogate, batch by batch, and scored on every target before the next batch is made.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from innermax.attacks.base import Attack, looks_like_probabilities
from innermax.data.readers import as_image_set
from innermax.evaluation.arguments import check_arguments, check_models, find_ranks, name_errors, place_model
from innermax.evaluation.measure import Measurement, Search, describe_measurement, identify
from innermax.evaluation.progress import ProgressCallback, show_evaluation
from innermax.evaluation.scoring import PROBABLE, AttackedBatch, Bench, Settings, scoring_logits
from innermax.evaluation.store import CLEAN, Column, Parts, check_column, note_kept_rows
from innermax.models.wrappers import unwrap
from innermax.oracle.oracle import Oracle, Precision
from innermax.utils.files import write_text
from innermax.utils.generators import restore_randomness
from innermax.utils.intervals import Accuracy, Interval, accuracy, paired_difference
from innermax.utils.serialization import convert, parse_json
from innermax.utils.validation import unknown

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, eq=False)
class Transfer:
    """Which examples each target still classifies correctly; all else is computed from these columns, (N,) bool each.

    Attributes:
        settings: what was evaluated and how; `attack_network` holds the plan of each surrogate's oracle.
        clean_correct: target → correct on the clean images.
        transferred_correct: surrogate → target → attack → correct on the images made on the surrogate.
        white_box: the pairs (surrogate, target) that are one model, which is attacked directly.
        index: (N,) the examples' numbers in the set that they are a sample of; None: 0…N − 1.
    """

    settings: Settings
    clean_correct: dict[str, Column]
    transferred_correct: dict[str, dict[str, dict[str, Column]]]
    white_box: tuple[tuple[str, str], ...]
    index: Column | None = None

    @cached_property
    def clean_accuracy(self) -> dict[str, Accuracy]:
        """The accuracy of each target on the clean images."""
        return {target: _count_correct(column) for target, column in self.clean_correct.items()}

    @cached_property
    def accuracy(self) -> dict[str, dict[str, dict[str, Accuracy]]]:
        """The accuracy by surrogate, target and attack."""
        return _map_cells(_count_correct, self.transferred_correct)

    def correct(self, surrogate: str, target: str, attack: str) -> Column:
        """(N,) bool: which examples the target classifies correctly under an attack on the surrogate.

        Raises ValueError for unknown names.
        """
        found: Any = self.transferred_correct
        for what, name in {"surrogate": surrogate, "target": target, "attack": attack}.items():
            if name not in found:
                raise unknown(what, name, found)
            found = found[name]
        column: Column = found
        return column

    def difference(self, one: tuple[str, str, str], other: tuple[str, str, str]) -> Interval:
        """One accuracy minus another, as a fraction, with its paired 95 % interval (Agresti & Min 2005).

        one, other: (surrogate, target, attack) each. Raises ValueError for unknown names.
        """
        first, second = self.correct(*one), self.correct(*other)
        return paired_difference(int((first & ~second).sum()), int((second & ~first).sum()), len(first))

    def columns(self) -> dict[str, Column]:
        """A table by column, a row for each surrogate, target, attack and example: surrogate, target, attack, index,
        clean_correct and correct.
        """
        cells = [
            (surrogate, target, attack, self.clean_correct[target], column)
            for surrogate, targets in self.transferred_correct.items()
            for target, columns in targets.items()
            for attack, column in columns.items()
        ]
        surrogates, targets, attacks, clean, correct = zip(*cells, strict=True)
        count = self.settings.count
        names = {"surrogate": surrogates, "target": targets, "attack": attacks}
        return {key: np.repeat(np.array(values), count) for key, values in names.items()} | {
            "index": np.tile(np.arange(count) if self.index is None else self.index, len(cells)),
            "clean_correct": np.concatenate(clean),
            "correct": np.concatenate(correct),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The transfer as JSON, written to path if one is given."""
        document = {
            "settings": asdict(self.settings),
            "white_box": self.white_box,
            "clean_accuracy": {target: asdict(value) for target, value in self.clean_accuracy.items()},
            "accuracy": _map_cells(asdict, self.accuracy),
            "examples": ({} if self.index is None else {"index": self.index.tolist()})
            | {
                "clean_correct": {target: column.tolist() for target, column in self.clean_correct.items()},
                "transferred_correct": _map_cells(np.ndarray.tolist, self.transferred_correct),
            },
        }
        text = json.dumps(document, allow_nan=False, ensure_ascii=False)
        if path is not None:
            write_text(Path(path), f"{text}\n")
        return text

    @classmethod
    def from_json(cls, text: str) -> "Transfer":
        """The transfer in a text that `to_json` wrote. Raises ValueError for any other text."""
        try:
            document = parse_json(text)
            examples = document["examples"]
            settings = convert(Settings, document["settings"], "settings")

            def correct(values: Any, name: str = "correct") -> Column:
                column = np.array(values)
                check_column(column, name, settings.count)
                return column

            clean = {target: correct(column) for target, column in examples["clean_correct"].items()}
            found = _map_cells(correct, examples["transferred_correct"])
            for targets in found.values():
                if targets.keys() != clean.keys() or any(c.keys() != settings.attacks.keys() for c in targets.values()):
                    raise ValueError("a surrogate does not have every target and attack")
            white_box = tuple((surrogate, target) for surrogate, target in document["white_box"])
            if not all(surrogate in found and target in clean for surrogate, target in white_box):
                raise ValueError("white_box names models that are not there")
            index = correct(examples["index"], "index") if "index" in examples else None
            return cls(settings, clean, found, white_box, index)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(f"text must be a transfer's JSON: {told}") from error


def transfer(
    surrogates: Mapping[str, nn.Module] | nn.Module,
    targets: Mapping[str, nn.Module],
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
    progress: bool | ProgressCallback | None = None,
) -> Transfer:
    """The accuracy of each target on images that attacks make on each surrogate (Wang et al. 2019, §5.1: black-box).

    Images are made, projected and scored as `evaluate` does. On a surrogate that is also a target they are those of
    `evaluate`, and their accuracy is the target's white-box accuracy.

    Args:
        surrogates: models by name, or a single one, which is then called "surrogate"; left exactly as found.
        targets: models by name; a name stands for the same model on both sides.
        test_set: (images, labels) tensors or whatever `as_image_set` takes: uint8 images, or floats in [0, 1].
        attacks: attacks by name; "clean" and "worst_case" are reserved.
        batch_size: ≥ 1; it changes results only by rounding.
        seed: any integer; with the example's position it decides all random starts.
        quantize: 1…16: adversarial images are rounded to this many bits per value; clean images must have no more.
        precision: of the attacks' oracles: "float32", "bf16" or "auto". Scores are always the models' own, in float32.
        device: where to compute; None: where the first surrogate is. Models elsewhere are copied there.
        devices: processes that share the batches, as for `evaluate`.
        rows_dir: folder for the verdicts on each batch, written as soon as they are known, and at the end for
            rows.parquet, a row for each example, surrogate, target and attack. The same call resumes from them.
        progress: True shows a display on stderr. A function is called as progress(name, examples done, examples in all)
            after each batch, "clean" first, then "<surrogate>: <attack>".

    Raises:
        ValueError, TypeError: an argument is none of the above; there is no surrogate, target or attack;
            models differ in their number of classes, do not take the images or return NaN; labels are not among the
            classes, an image lies outside an attack's bounds, or rows_dir belongs to another transfer.
    """
    check_arguments(attacks, batch_size, seed, quantize, precision)
    surrogates = {"surrogate": surrogates} if isinstance(surrogates, nn.Module) else surrogates
    for argument, models in {"surrogates": surrogates, "targets": targets}.items():
        check_models(argument, models)
    if not attacks:
        raise ValueError("attacks must hold at least one attack, got none")
    white_box = _find_white_box(surrogates, targets)
    titles = _list_titles(surrogates, attacks)
    images = as_image_set(test_set)
    _, place = place_model(next(iter(surrogates.values())), images, device)
    ranks = find_ranks(devices, place)
    named = {("surrogate", name): model for name, model in surrogates.items()}
    named |= {("target", name): model for name, model in targets.items()}
    models = {f"{role} {name}": place_model(model, images, ranks.device)[0] for (role, name), model in named.items()}
    kinds = dict.fromkeys((CLEAN, *titles), dict.fromkeys(map(_name_column, targets), "b"))
    parts = Parts(kinds, len(images), batch_size, None if rows_dir is None else Path(rows_dir))
    with show_evaluation(ranks.first and progress, titles) as tell:
        bench = Bench(images, ranks.device, batch_size, seed, quantize, tell)
        build = partial(
            _Scorer.build,
            surrogates=tuple(surrogates),
            targets=tuple(targets),
            attacks=attacks,
            precision=precision,
        )
        measurement = Measurement(bench, models, build, attacks, parts, ranks, devices)
        with bench.isolate(*models.values()), ranks.explain_lost_connection(), ranks.mute_others():
            return _measure(measurement, precision, white_box)


@dataclass(frozen=True, eq=False)
class _Scorer:
    """Scores the targets: attacks search with the surrogates' oracles, `fast`; the targets', `exact`, decide."""

    fast: Mapping[str, Oracle]
    exact: Mapping[str, Oracle]
    attacks: Mapping[str, Attack]

    @classmethod
    def build(
        cls,
        bench: Bench,
        models: Mapping[str, nn.Module],
        surrogates: Sequence[str],
        targets: Sequence[str],
        attacks: Mapping[str, Attack],
        precision: Precision,
    ) -> "_Scorer":
        fast, exact = {}, {}
        for name in surrogates:
            with name_errors("surrogate", name):
                fast[name] = bench.attack_oracle(models[f"surrogate {name}"], precision)
        for name in targets:
            with name_errors("target", name):
                exact[name] = Oracle(models[f"target {name}"])
        return cls(fast, exact, attacks)

    @property
    def plan(self) -> str:
        """How each surrogate's oracle is compiled."""
        return "; ".join(f"{name}: {oracle.scheme}" for name, oracle in self.fast.items())

    def recompile(self, plan: str) -> "_Scorer":
        """The same with oracles compiled to a plan, whatever the clock says here; as they are for other surrogates."""
        told = re.fullmatch("; ".join(f"{re.escape(name)}: (.*)" for name in self.fast), plan)
        schemes = [oracle.scheme for oracle in self.fast.values()] if told is None else told.groups()
        fast = {name: self.fast[name].recompile(scheme) for name, scheme in zip(self.fast, schemes, strict=True)}
        return replace(self, fast=fast)

    def clean_rows(self, x: Tensor, y: Tensor) -> dict[str, Column]:
        return self._judge(x, y)

    def searches(self) -> list[Search]:
        found = []
        for surrogate, oracle in self.fast.items():
            explain = partial(name_errors, "surrogate", surrogate)
            for name, attack in self.attacks.items():
                found.append(Search(_make_title(surrogate, name), name, attack, oracle, self._attack_rows, explain))
        return found

    def _attack_rows(self, batch: AttackedBatch) -> dict[str, Column]:
        return self._judge(batch.image, batch.label)

    def _judge(self, image: Tensor, label: Tensor) -> dict[str, Column]:
        found = {}
        for name, oracle in self.exact.items():
            # A target that draws random numbers must draw the same ones whatever other targets there are.
            with name_errors("target", name), restore_randomness([image.device.index] if image.is_cuda else []):
                found[_name_column(name)] = (scoring_logits(oracle, image, label).argmax(1) == label).cpu().numpy()
        return found


def _measure(measurement: Measurement, precision: Precision, white_box: tuple[tuple[str, str], ...]) -> Transfer:
    """Takes the measurement."""
    bench, attacks, parts = measurement.bench, measurement.attacks, measurement.parts
    scorer = measurement.build(bench, measurement.models)
    measurement, scorer = measurement.agree(scorer, precision)
    with warnings.catch_warnings():
        _check_answers(bench.example(), measurement.models)
        settings = measurement.ranks.broadcast(bench.settings(attacks, precision, scorer.plan))
        measurement.open_folder(partial(_identify_transfer, bench, measurement.models, attacks, settings))
        with note_kept_rows(parts):
            measurement.score_clean(scorer)
            measurement.attack(scorer)
            columns = {
                name: {target: columns[_name_column(target)] for target in scorer.exact}
                for name, columns in parts.columns.items()
            }
            transfer = Transfer(
                settings=settings,
                clean_correct=columns[CLEAN],
                transferred_correct={
                    surrogate: {t: {a: columns[_make_title(surrogate, a)][t] for a in attacks} for t in scorer.exact}
                    for surrogate in scorer.fast
                },
                white_box=white_box,
                index=None if bench.images.numbers is None else bench.images.numbers.cpu().numpy().copy(),
            )
            measurement.write_table(transfer.columns)
    return transfer


def _identify_transfer(
    bench: Bench, models: Mapping[str, nn.Module], attacks: Mapping[str, Attack], settings: Settings
) -> dict[str, Any]:
    """What identifies a transfer, as plain YAML: a folder holds the rows of one configuration only."""
    found = identify(bench, models)
    told: dict[str, Any] = {key: {name: own[key] for name, own in found.items()} for key in ("model", "weights")}
    told["answers"] = [answer for own in found.values() for answer in own["answers"]]
    return told | describe_measurement(bench, attacks, settings)


def _make_title(surrogate: str, attack: str) -> str:
    """The name of an attack's images on a surrogate."""
    return f"{surrogate}: {attack}"


def _name_column(target: str) -> str:
    """The name of a target's column; it differs from all other columns' names, whatever the target is called."""
    return f"correct on {target}"


def _list_titles(surrogates: Iterable[str], attacks: Mapping[str, Attack]) -> dict[str, Attack]:
    """All attacks on all surrogates, by title. Raises ValueError where two would have the same title."""
    titles: dict[str, Attack] = {}
    for surrogate in surrogates:
        for name, attack in attacks.items():
            title = _make_title(surrogate, name)
            if title in titles:
                raise ValueError(f"surrogates and attacks must have names that tell them apart, got {title!r} twice")
            titles[title] = attack
    return titles


def _find_white_box(
    surrogates: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]
) -> tuple[tuple[str, str], ...]:
    """The pairs that are one model. Raises ValueError where one name stands for two models."""
    pairs = [(one, other) for one in surrogates for other in targets]
    same = tuple((one, other) for one, other in pairs if unwrap(surrogates[one]) is unwrap(targets[other]))
    for one, other in pairs:
        if one == other and (one, other) not in same:
            raise ValueError(f"{one!r} names two models, a surrogate and a target: rename one, or pass the same object")
    return same


def _check_answers(example: Tensor, models: Mapping[str, nn.Module]) -> None:
    """Raises ValueError where a model does not take the images or has other classes; warns of probabilities.

    models: by "surrogate NAME" or "target NAME". Only surrogates are checked for probabilities.
    """
    classes = {}
    for title, model in models.items():
        role, _, name = title.partition(" ")
        with name_errors(role, name):
            logits = Oracle(model).logits(example)
        classes[f"{role} {name!r}"] = logits.shape[1]
        if role == "surrogate" and bool(looks_like_probabilities(logits)):
            reason = "seems to return probabilities; attacks need logits (leave the softmax out)"
            warnings.warn(f"surrogate {name!r} {reason}", stacklevel=4)
            warnings.filterwarnings("ignore", message=PROBABLE)
    (first, count), *others = classes.items()
    for model_name, other in others:
        if other != count:
            raise ValueError(f"models must have the same classes: {first} has {count}, {model_name} has {other}")


def _count_correct(column: Column) -> Accuracy:
    return accuracy(int(column.sum()), len(column))


def _map_cells(
    change: Callable[[T], U], cells: Mapping[str, Mapping[str, Mapping[str, T]]]
) -> dict[str, dict[str, dict[str, U]]]:
    """The cells with `change` applied to each value; surrogate → target → attack."""
    return {
        surrogate: {target: {attack: change(value) for attack, value in row.items()} for target, row in rows.items()}
        for surrogate, rows in cells.items()
    }
