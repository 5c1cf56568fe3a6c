"""The result of an evaluation: accuracies with intervals, convergence, a table of examples."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import nn

from innermax.evaluation.audit import Audit
from innermax.evaluation.curve import Curve, draw_curve, find_distances, list_minimal
from innermax.evaluation.saved_images import write_images
from innermax.evaluation.scoring import Settings
from innermax.evaluation.store import CLEAN, AttackRows, Column, TargetedRows, build_rows, check_column
from innermax.models.files import hash_weights
from innermax.models.wrappers import unwrap
from innermax.utils.files import write_text
from innermax.utils.intervals import Accuracy, Interval, accuracy, paired_difference
from innermax.utils.optional import extra
from innermax.utils.serialization import convert, parse_json
from innermax.utils.validation import unknown

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Summary:
    """How far the searches for some examples got: quantiles of FOSC, and the share of zero gradients.

    Quantiles leave out examples whose gradient is zero: their FOSC is 0, but nothing has converged. NaN where no
    example is left, or where the attack does not measure its convergence.
    """

    fosc_median: float
    fosc_p90: float
    relative_fosc_median: float
    relative_fosc_p90: float
    zero_gradient: float


@dataclass(frozen=True)
class Convergence:
    """How far an attack got on all examples, as in `Summary`, and what it cost.

    Attributes:
        survivors: the summary of the examples that are still correct under this attack.
        gradients: gradients per example, on average.
        forwards: forward passes without a gradient per example, on average.
        overturned: examples reported by the attack as misclassified, but correct once projected, quantised and scored.
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

    Attributes:
        audit: whether the result can be believed; None where it was not asked for, or nothing was attacked.
        weights: fingerprint of the weights that were measured (`innermax.models.files.hash_weights`); None where it is
            not recorded.
        index: (N,) the examples' numbers in the set that they are a sample of; None: 0…N − 1.
        images: (N, *features) float32 images of each attack that were scored, as far as they were asked for
            (`keep_images`); `to_json` leaves them out.
    """

    settings: Settings
    label: Column
    clean_prediction: Column
    rows: dict[str, AttackRows]
    seconds: dict[str, float]
    audit: Audit | None = None
    weights: str | None = None
    index: Column | None = None
    images: dict[str, Column] | None = None

    @cached_property
    def accuracy(self) -> dict[str, Accuracy]:
        """The accuracy on "clean", then under each attack in order; each counts all examples."""
        return {name: self._count_correct(name) for name in ("clean", *self.rows)}

    @cached_property
    def reached(self) -> dict[str, Accuracy]:
        """Of each targeted attack the share of all examples that the model takes for the target."""
        found = {name: rows for name, rows in self.rows.items() if isinstance(rows, TargetedRows)}
        counts = {name: int((rows.prediction == rows.target).sum()) for name, rows in found.items()}
        return {name: accuracy(count, len(self.label)) for name, count in counts.items()}

    @cached_property
    def worst_case(self) -> Accuracy:
        """The share of examples that are correct on the clean image and under every attack."""
        return self._count_correct("worst_case")

    @cached_property
    def convergence(self) -> dict[str, Convergence]:
        """How far each attack got."""
        return {name: _measure_convergence(rows, self.seconds[name]) for name, rows in self.rows.items()}

    @cached_property
    def examples(self) -> "pandas.DataFrame":
        """One row per example: index, label, clean_prediction, clean_correct, seed, and for each attack its columns.

        They are `ATTACK_success`, the opposite of `ATTACK_correct`, and `ATTACK_COLUMN` for those of `AttackRows`.
        """
        with extra("data"):
            import pandas

        return pandas.DataFrame(self.columns())

    def columns(self) -> dict[str, Column]:
        """The columns of `examples` by name."""
        count = len(self.label)
        table = {
            "index": self._numbers,
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
        """(N,) bool: which examples are correct on "clean", under an attack, or in the "worst_case".

        Raises ValueError for other names.
        """
        clean: Column = self.clean_prediction == self.label
        if name == "clean":
            return clean
        if name == "worst_case":
            return cast(Column, np.logical_and.reduce([clean, *(rows.correct for rows in self.rows.values())]))
        if name not in self.rows:
            raise unknown("attack", name, ("clean", *self.rows, "worst_case"))
        return self.rows[name].correct

    def is_of(self, model: nn.Module) -> bool | None:
        """Whether it measured a model with these weights; None where the weights are not recorded."""
        return None if self.weights is None else self.weights == hash_weights(unwrap(model).state_dict())

    def difference(self, other: "Evaluation", name: str) -> Interval:
        """This accuracy minus the other's, as a fraction, with its paired 95 % interval (Agresti & Min 2005).

        name: "clean", an attack both have, or "worst_case". Raises ValueError where the examples are not the same.
        """
        if not (np.array_equal(self.label, other.label) and _same(self.index, other.index)):
            raise ValueError(
                f"other must be an evaluation of the same examples: its {len(other.label)} labels or their numbers "
                f"differ from these {len(self.label)}"
            )
        mine, theirs = self.correct(name), other.correct(name)
        return paired_difference(int((mine & ~theirs).sum()), int((theirs & ~mine).sum()), len(mine))

    def distances(self, attack: str | None = None) -> Column:
        """(N,) size of the smallest perturbation found for each example, by any attack of the same norm and bounds.

        It is 0 where the clean image is misclassified, infinite where no attack succeeded.

        Args:
            attack: one that looks for the smallest perturbation, such as FMN, by name; None: the first.

        Raises ValueError where there is no such attack.
        """
        name = self._choose_minimal(attack)
        return find_distances(name, self.settings.attacks, self.rows, self.correct("clean"))

    def curve(self, eps: Sequence[float] | None = None, *, attack: str | None = None) -> Curve:
        """Robust accuracy with its interval against ε: the share of examples whose distance is larger.

        Args:
            eps: sizes ≥ 0; None: 101 from 0 on that cover nearly all distances.
            attack: as for `distances`.

        Raises ValueError where there is no such attack, or a size is negative.
        """
        name = self._choose_minimal(attack)
        return draw_curve(name, self.settings.attacks[name], self.distances(name), eps)

    def save_images(self, folder: str | Path) -> None:
        """Writes the images of every attack into a new folder, whole or not at all.

        `ATTACK.npz` holds images (N, *features), labels, predictions and index, the examples' numbers: what
        `innermax verify --images` and `HandedImages.read` take. Images are float32, after quantisation to 8 bits uint8.
        Where they are grey or RGB images (C, H, W) in [0, 1], the folder `ATTACK` has a PNG of each that is
        misclassified, such as 00042-label3-predicted5.png. PNGs have 8 bits per value: unless images were evaluated
        with quantize=8, rounding can undo what an attack achieved.

        Raises:
            ValueError: there are no images, or the folder exists and is not empty.
            OSError: it cannot be written.
        """
        if not self.images:
            raise ValueError("there are no images to save: evaluate at least one attack with keep_images=True")
        write_images(Path(folder), self.image_arrays())

    def image_arrays(self) -> dict[str, dict[str, Column]]:
        """What `save_images` writes of each attack: images, labels, predictions and index."""
        return {
            name: {
                "images": np.rint(images * 255).astype(np.uint8) if self.settings.quantize == 8 else images,
                "labels": self.label,
                "predictions": self.rows[name].prediction,
                "index": self._numbers,
            }
            for name, images in (self.images or {}).items()
        }

    @property
    def _numbers(self) -> Column:
        """(N,) the examples' numbers."""
        return np.arange(len(self.label)) if self.index is None else self.index

    def _choose_minimal(self, attack: str | None) -> str:
        found = list_minimal(self.rows)
        if not found:
            raise ValueError("the evaluation has no smallest perturbations: evaluate with FMN or DDN, such as fmn-200")
        if attack is not None and attack not in found:
            raise unknown("attack with distances", attack, found)
        return found[0] if attack is None else attack

    def summary(self) -> dict[str, Any]:
        """The result as plain values, without the examples; None for NaN and infinity."""
        document = {
            "settings": asdict(self.settings),
            "weights": self.weights,
            "accuracy": {name: asdict(value) for name, value in self.accuracy.items()},
            "worst_case": asdict(self.worst_case),
            **({"reached": {name: asdict(value) for name, value in self.reached.items()}} if self.reached else {}),
            "convergence": {name: asdict(value) for name, value in self.convergence.items()},
            "audit": None if self.audit is None else self.audit.to_dict(),
        }
        return cast(dict[str, Any], _replace_nan(document))

    def to_json(self, path: str | Path | None = None) -> str:
        """The evaluation as JSON, written to path if one is given; null for NaN and infinity."""
        examples = ({} if self.index is None else {"index": self.index.tolist()}) | {
            "label": self.label.tolist(),
            "clean_prediction": self.clean_prediction.tolist(),
            "attacks": {
                name: {key: column.tolist() for key, column in vars(rows).items()} for name, rows in self.rows.items()
            },
        }
        document = self.summary() | {"examples": _replace_nan(examples)}
        text = json.dumps(document, allow_nan=False, ensure_ascii=False)
        if path is not None:
            write_text(Path(path), f"{text}\n")
        return text

    @classmethod
    def from_json(cls, text: str) -> "Evaluation":
        """The evaluation in a text that `to_json` wrote. Raises ValueError for any other text."""
        try:
            document = parse_json(text)
            examples, attacks = document["examples"], document["examples"]["attacks"]
            settings = convert(Settings, document["settings"], "settings")
            if {CLEAN, "worst_case"} & attacks.keys():
                raise ValueError(f"no attack is called {CLEAN} or worst_case")
            return cls(
                settings=settings,
                label=_read_column(examples["label"], "label", settings.count),
                clean_prediction=_read_column(examples["clean_prediction"], "prediction", settings.count),
                rows={
                    name: build_rows({key: _read_column(values, key, settings.count) for key, values in rows.items()})
                    for name, rows in attacks.items()
                },
                seconds={name: convert(float, document["convergence"][name]["seconds"], "seconds") for name in attacks},
                audit=None if document.get("audit") is None else Audit.from_dict(document["audit"]),
                weights=convert(str | None, document.get("weights"), "weights"),
                index=_read_column(examples["index"], "index", settings.count) if "index" in examples else None,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(f"text must be an evaluation's JSON: {told}") from error

    def _count_correct(self, name: str) -> Accuracy:
        correct = self.correct(name)
        return accuracy(int(correct.sum()), len(correct))


def _same(one: Column | None, other: Column | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def _measure_convergence(rows: AttackRows, seconds: float) -> Convergence:
    return Convergence(
        **vars(_summarize(rows, np.ones_like(rows.correct))),
        survivors=_summarize(rows, rows.correct),
        gradients=float(rows.gradient_calls.mean()),
        forwards=float(rows.forward_calls.mean()),
        overturned=int(rows.overturned.sum()),
        seconds=seconds,
    )


def _summarize(rows: AttackRows, chosen: Column) -> Summary:
    """The summary of the chosen examples."""
    zero = rows.zero_gradient[chosen]
    moving = chosen & (rows.zero_gradient != 1)  # NaN, where it is not reported, is no zero
    return Summary(
        *_compute_quantiles(rows.fosc[moving]),
        *_compute_quantiles(rows.relative_fosc[moving]),
        zero_gradient=float(zero.mean()) if len(zero) else math.nan,
    )


def _compute_quantiles(values: Column) -> tuple[float, float]:
    """Median and 90th percentile of the values that are not NaN."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan
    median, ninth = np.quantile(values, (0.5, 0.9))
    return float(median), float(ninth)


def _read_column(values: Sequence[Any], name: str, count: int) -> Column:
    """A column from JSON, where null is NaN, or an infinite distance.

    Raises ValueError where it does not fit its name.
    """
    unknown = math.inf if name == "distance" else math.nan
    column = np.array([unknown if value is None else value for value in values])
    check_column(column, name, count)
    return column


def _replace_nan(value: Any) -> Any:
    """The same document with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _replace_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_replace_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
