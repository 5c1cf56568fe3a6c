"""Black-box evaluation by transfer: images made on one model, scored on others.

Images are made once on each surrogate, batch by batch, and scored on every target before the next batch is made.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from innermax.attacks.base import Attack, looks_like_probabilities
from innermax.data.readers import as_image_set
from innermax.evaluation.scoring import (
    Bench,
    Progress,
    Settings,
    about,
    check_arguments,
    check_images,
    check_models,
    on_device,
    scoring_logits,
)
from innermax.evaluation.store import Column, check_column
from innermax.models.wrappers import unwrapped
from innermax.oracle.oracle import Oracle, Precision
from innermax.utils.files import write_bytes
from innermax.utils.intervals import Accuracy, Interval, accuracy, paired_difference
from innermax.utils.serialization import convert, parse_json
from innermax.utils.validation import unknown

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, eq=False)
class Transfer:
    """Who is right on images made on others; everything else is computed from these columns, (N,) bool each.

    Attributes:
        settings: what was evaluated, and how; `attack_network` holds the plan of each surrogate's oracle.
        clean_correct: target → who is right on the clean images.
        transferred_correct: surrogate → target → attack → who is right on the images made on the surrogate.
        white_box: the pairs (surrogate, target) that are one model, which is then attacked directly.
    """

    settings: Settings
    clean_correct: dict[str, Column]
    transferred_correct: dict[str, dict[str, dict[str, Column]]]
    white_box: tuple[tuple[str, str], ...]

    @cached_property
    def clean_accuracy(self) -> dict[str, Accuracy]:
        """The accuracy of each target on the clean images."""
        return {target: _accuracy(column) for target, column in self.clean_correct.items()}

    @cached_property
    def accuracy(self) -> dict[str, dict[str, dict[str, Accuracy]]]:
        """The accuracy by surrogate, target and attack."""
        return _each(_accuracy, self.transferred_correct)

    def correct(self, surrogate: str, target: str, attack: str) -> Column:
        """(N,) bool, who is right on the target under an attack on the surrogate. ValueError for unknown names."""
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

    def to_json(self, path: str | Path | None = None) -> str:
        """The evaluation as JSON, written to path where told, whole or not at all."""
        document = {
            "settings": asdict(self.settings),
            "white_box": self.white_box,
            "clean_accuracy": {target: asdict(value) for target, value in self.clean_accuracy.items()},
            "accuracy": _each(asdict, self.accuracy),
            "examples": {
                "clean_correct": {target: column.tolist() for target, column in self.clean_correct.items()},
                "transferred_correct": _each(np.ndarray.tolist, self.transferred_correct),
            },
        }
        text = json.dumps(document, allow_nan=False, ensure_ascii=False)
        if path is not None:
            write_bytes(Path(path), f"{text}\n".encode())
        return text

    @classmethod
    def from_json(cls, text: str) -> "Transfer":
        """What `to_json` wrote. Raises ValueError where the text is something else."""
        try:
            document = parse_json(text)
            examples = document["examples"]
            settings = convert(Settings, document["settings"], "settings")

            def correct(values: Any) -> Column:
                column = np.array(values)
                check_column(column, "correct", settings.count)
                return column

            clean = {target: correct(column) for target, column in examples["clean_correct"].items()}
            found = _each(correct, examples["transferred_correct"])
            for targets in found.values():
                if targets.keys() != clean.keys() or any(c.keys() != settings.attacks.keys() for c in targets.values()):
                    raise ValueError("a surrogate does not have every target and attack")
            white_box = tuple((surrogate, target) for surrogate, target in document["white_box"])
            if not all(surrogate in found and target in clean for surrogate, target in white_box):
                raise ValueError("white_box names models that are not there")
            return cls(settings, clean, found, white_box)
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
    progress: Progress | None = None,
) -> Transfer:
    """Accuracy of each target on images that attacks make on each surrogate (Wang et al. 2019, §5.1: black-box).

    Images are made, admitted and scored as `evaluate` does it: on a surrogate that is also a target they are
    `evaluate`'s own, and their accuracy is the target's white-box accuracy.

    Args:
        surrogates: models by name, or a single one, which is then called "surrogate"; left exactly as found.
        targets: models by name; a name stands for the same model on both sides.
        test_set: (images, labels) tensors or whatever `as_image_set` takes: uint8 images, or floats in [0, 1].
        attacks: attacks by name; "clean" and "worst_case" are taken.
        batch_size: ≥ 1; never more adversarial images are held, and it changes no result but for rounding.
        seed: any integer; with the example's position it decides all random starts.
        quantize: 1…16: only images of this many bits a value count; clean images must have no more.
        precision: what attacks search in, on the compiled model: "float32", "bf16" or "auto". Scores are float32, the
            model's own.
        device: where to compute; where the first surrogate is unless told. Models elsewhere are copied there.
        progress: called as progress(name, examples done, examples in all) after each batch, "clean" first, then
            "<surrogate>: <attack>".

    Raises:
        ValueError, TypeError: an argument is outside what is said above; there is no surrogate, target or attack;
            models differ in their number of classes, do not take the images or return NaN; labels are not among the
            classes, or an image lies outside an attack's bounds.
    """
    check_arguments(attacks, batch_size, seed, quantize, precision)
    surrogates = {"surrogate": surrogates} if isinstance(surrogates, nn.Module) else surrogates
    for argument, models in {"surrogates": surrogates, "targets": targets}.items():
        check_models(argument, models)
    if not attacks:
        raise ValueError("attacks must hold at least one attack, got none")
    white_box = _white_box(surrogates, targets)
    images = as_image_set(test_set)
    _, place = on_device(next(iter(surrogates.values())), images, device)
    sources, scored = (
        {name: on_device(model, images, place)[0] for name, model in models.items()} for models in (surrogates, targets)
    )
    exact_sources, exact = _oracles("surrogate", sources), _oracles("target", scored)
    bench = Bench(images, place, batch_size, seed, quantize, progress)
    plans, correct = {}, {}
    with bench.in_float32(next(iter(exact_sources.values()))), warnings.catch_warnings():
        _check_answers(bench.example(), exact_sources, exact)
        clean = score_clean(bench, attacks, exact)
        for name, model in sources.items():
            with about("surrogate", name):
                oracle = bench.attack_oracle(model, exact_sources[name], precision)
                correct[name] = _transferred(_titled(bench, name), oracle, attacks, exact)
            plans[name] = oracle.plan
    return Transfer(
        settings=bench.settings(attacks, precision, "; ".join(f"{name}: {plan}" for name, plan in plans.items())),
        clean_correct=clean,
        transferred_correct=correct,
        white_box=white_box,
    )


def score_clean(bench: Bench, attacks: Mapping[str, Attack], exact: Mapping[str, Oracle]) -> dict[str, Column]:
    """Target → who is right on the clean images; labels, bounds and grid are known to fit before the first search."""

    def parts() -> Iterator[dict[str, Column]]:
        for _, x, y in bench.batches("clean"):
            check_images(x, attacks, bench.quantize)
            yield _verdicts(exact, x, y)

    return _joined(parts(), len(bench.images))


def _transferred(
    bench: Bench, oracle: Oracle, attacks: Mapping[str, Attack], exact: Mapping[str, Oracle]
) -> dict[str, dict[str, Column]]:
    """Target → attack → who is right on the images made on one surrogate."""
    by_attack = {
        name: _joined(
            (_verdicts(exact, batch.image, batch.label) for batch in bench.attacked(name, attack, oracle)),
            len(bench.images),
        )
        for name, attack in attacks.items()
    }
    return {target: {attack: columns[target] for attack, columns in by_attack.items()} for target in exact}


def _verdicts(exact: Mapping[str, Oracle], image: Tensor, label: Tensor) -> dict[str, Column]:
    """Target → who is right on a batch."""
    found = {}
    for name, oracle in exact.items():
        # A target that draws random numbers draws the same ones whatever other targets there are.
        with about("target", name), torch.random.fork_rng(devices=[image.device] if image.is_cuda else []):
            found[name] = (scoring_logits(oracle, image, label).argmax(1) == label).cpu().numpy()
    return found


def _joined(parts: Iterable[Mapping[str, Column]], count: int) -> dict[str, Column]:
    """The parts as one, of so many examples; none is kept, which would leave memory in pieces."""
    whole: dict[str, Column] = {}
    start = 0
    for part in parts:
        whole = whole or {name: np.empty(count, column.dtype) for name, column in part.items()}
        for name, column in part.items():
            whole[name][start : start + len(column)] = column
        start += len(column)
    return whole


def _titled(bench: Bench, surrogate: str) -> Bench:
    """A bench whose progress is told with the surrogate's name."""
    tell = bench.progress
    if tell is None:
        return bench
    return replace(bench, progress=lambda name, done, total: tell(f"{surrogate}: {name}", done, total))


def _oracles(role: str, models: Mapping[str, nn.Module]) -> dict[str, Oracle]:
    """The exact oracle of each model."""
    found = {}
    for name, model in models.items():
        with about(role, name):
            found[name] = Oracle(model)
    return found


def _white_box(surrogates: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]) -> tuple[tuple[str, str], ...]:
    """The pairs that are one model. Raises ValueError where one name stands for two."""
    pairs = [(one, other) for one in surrogates for other in targets]
    same = tuple((one, other) for one, other in pairs if unwrapped(surrogates[one]) is unwrapped(targets[other]))
    for one, other in pairs:
        if one == other and (one, other) not in same:
            raise ValueError(f"{one!r} names two models, a surrogate and a target: rename one, or pass the same object")
    return same


def _check_answers(example: Tensor, surrogates: Mapping[str, Oracle], targets: Mapping[str, Oracle]) -> None:
    """Raises where a model does not take the images or has other classes; warns of a surrogate's probabilities."""
    classes = {}
    for role, oracles in (("surrogate", surrogates), ("target", targets)):
        for name, oracle in oracles.items():
            with about(role, name):
                logits = oracle.logits(example)
            classes[f"{role} {name!r}"] = logits.shape[1]
            if role == "surrogate" and looks_like_probabilities(logits):
                reason = "seems to return probabilities; attacks need logits (leave the softmax out)"
                warnings.warn(f"surrogate {name!r} {reason}", stacklevel=3)
                warnings.filterwarnings("ignore", message="the model seems to return probabilities")
    (first, count), *others = classes.items()
    for model, other in others:
        if other != count:
            raise ValueError(f"models must have the same classes: {first} has {count}, {model} has {other}")


def _accuracy(column: Column) -> Accuracy:
    return accuracy(int(column.sum()), len(column))


def _each(
    change: Callable[[T], U], cells: Mapping[str, Mapping[str, Mapping[str, T]]]
) -> dict[str, dict[str, dict[str, U]]]:
    """What `change` makes of each surrogate's, target's and attack's value."""
    return {
        surrogate: {target: {attack: change(value) for attack, value in row.items()} for target, row in rows.items()}
        for surrogate, rows in cells.items()
    }
