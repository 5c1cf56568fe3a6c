"""Tables 1–3 of Wang et al. 2019: four defences against white-box and black-box attacks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from innermax.reproduce.artifact import Artifact, Find, Numbers
from innermax.reproduce.cache import Experiment
from innermax.reproduce.comparison import (
    FEW_IMAGES,
    STRONGEST,
    TABLE_ATTACKS,
    TableRow,
    build_attacks,
    list_attacks,
    markdown_table,
    sort_by_seed,
)
from innermax.reproduce.scales import Scale, Training

TITLES = {"mnist": "MNIST", "cifar": "CIFAR-10", "wide": "CIFAR-10, WideResNet"}
_DEFENCES = {
    "unsecured": "Unsecured",
    "standard": "Standard",
    "curriculum": "Curriculum",
    "dynamic": "Dynamic",
}
# Per cent, as the paper prints them.
_TABLE_1 = {
    ("mnist", "unsecured"): (99.20, 14.04, 0.0, 0.0, 0.0),
    ("mnist", "standard"): (97.61, 94.71, 91.21, 90.62, 91.03),
    ("mnist", "curriculum"): (98.62, 95.51, 91.24, 90.65, 91.12),
    ("mnist", "dynamic"): (97.96, 95.34, 91.63, 91.27, 91.47),
    ("cifar", "unsecured"): (89.39, 2.2, 0.0, 0.0, 0.0),
    ("cifar", "standard"): (66.31, 48.65, 44.39, 40.02, 36.33),
    ("cifar", "curriculum"): (72.40, 50.47, 45.54, 40.12, 35.77),
    ("cifar", "dynamic"): (72.17, 52.81, 48.06, 42.40, 37.26),
}
_TABLE_2 = {
    ("mnist", "standard"): (96.12, 95.73, 95.73, 97.20),
    ("mnist", "curriculum"): (96.59, 95.87, 96.09, 97.52),
    ("mnist", "dynamic"): (97.60, 97.01, 96.97, 98.36),
    ("cifar", "standard"): (65.65, 65.80, 65.60, 66.12),
    ("cifar", "curriculum"): (71.25, 71.44, 71.13, 71.94),
    ("cifar", "dynamic"): (71.95, 72.15, 72.02, 72.85),
}
_TABLE_3 = {
    ("wide", "standard"): (87.3, 56.1, 45.8, 46.8),
    ("wide", "curriculum"): (77.43, 57.17, 46.06, 42.28),
    ("wide", "dynamic"): (85.03, 63.53, 48.70, 47.27),
}
_SURROGATE_SEED = 1000  # far from the seeds of the defences it attacks

Rows = dict[str, list[TableRow]]


def paper_accuracy(data: str, defence: str) -> dict[str, float]:
    """A row of the paper's Table 1: accuracy in per cent by attack."""
    return dict(zip(("clean", *TABLE_ATTACKS), _TABLE_1[data, defence], strict=True))


def _white_box(scale: Scale, paper: Mapping[tuple[str, str], Sequence[float]], attacks: Sequence[str]) -> Rows:
    """The rows by data set, attacked with the table's attacks and, on fewer images, the guided one."""
    rows: Rows = {}
    for (data, defence), numbers in paper.items():
        trainings, tests = scale.trainings(data, defence), list_attacks(scale, data, attacks)
        printed = dict(zip(("clean", *attacks), numbers, strict=True))
        rows.setdefault(data, []).append(TableRow(_DEFENCES[defence], trainings, tests, printed))
    return rows


def _table_1(scale: Scale) -> Rows:
    return _white_box(scale, _TABLE_1, TABLE_ATTACKS)


def _table_3(scale: Scale) -> Rows:
    return _white_box(scale, _TABLE_3, ("fgsm", "pgd-20", "cw-30"))


def _table_2(scale: Scale) -> Rows:
    """The rows by data set, tested with images made on a network trained with Standard."""
    rows: Rows = {}
    for (data, defence), numbers in _TABLE_2.items():
        setting = scale.mnist if data == "mnist" else scale.surrogate
        surrogate = Training(setting, setting.strategy("standard"), _SURROGATE_SEED)
        attacks = (build_attacks(setting.eps), scale.images[data])
        printed = dict(zip(TABLE_ATTACKS, numbers, strict=True))
        trainings = scale.trainings(data, defence)
        rows.setdefault(data, []).append(
            TableRow(_DEFENCES[defence], trainings, [attacks], printed, {"made_on": surrogate})
        )
    return rows


def _table_artifact(name: str, title: str, list_rows: Any, attacks: Sequence[str], note: str) -> Artifact:
    """The artifact of a table."""

    def experiments(scale: Scale) -> list[Experiment]:
        return sort_by_seed([row.experiments() for row in _flatten(list_rows(scale))])

    def numbers(scale: Scale, find: Find) -> dict[str, Any]:
        return {data: [row.numbers(find) for row in rows] for data, rows in list_rows(scale).items()}

    def markdown(found: Numbers) -> str:
        parts = [f"## {TITLES[data]}\n\n{markdown_table(rows, attacks)}" for data, rows in found.items()]
        return "\n\n".join([note, *parts])

    return Artifact(name, title, experiments, numbers, markdown)


def _flatten(rows: Rows) -> Iterable[TableRow]:
    return (row for group in rows.values() for row in group)


_READING = (
    "Accuracy in %: in bold as measured here, with its 95 % interval (over seeds if there are three, else over "
    "images); in italics as the paper prints it. *Gradients* are input gradients per training image over the whole "
    "training."
)
ARTIFACTS = (
    _table_artifact(
        "table1",
        "Table 1: white-box robustness",
        _table_1,
        ("clean", *TABLE_ATTACKS, STRONGEST),
        f"{_READING} *Guided* is a cheaper stand-in for AutoAttack, on the first {FEW_IMAGES:,} images; it is not in "
        "the paper.",
    ),
    _table_artifact(
        "table2",
        "Table 2: black-box robustness",
        _table_2,
        TABLE_ATTACKS,
        f"{_READING} Images are made on another network.",
    ),
    _table_artifact(
        "table3",
        "Table 3: white-box robustness of a wide residual network",
        _table_3,
        ("clean", "fgsm", "pgd-20", "cw-30", STRONGEST),
        _READING,
    ),
)
