"""innermax-best: the paper's networks and data, trained as the other experiments suggest."""

from collections.abc import Mapping
from dataclasses import replace
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
)
from innermax.reproduce.scales import Scale, Setting, Training
from innermax.reproduce.tables import TITLES, paper_accuracy
from innermax.strategies import Standard, WarmStart

_CHANGES: Mapping[str, Mapping[str, Any]] = {  # of the paper's training, by data set
    "mnist": {"lr_schedule": "cosine", "lr": 0.05},
    "cifar": {},
}
# At scale "full" on CIFAR-10; with fewer images held out, as they are attacked after every epoch.
_SHORT: Mapping[str, Any] = {"epochs": 10, "lr_schedule": "cosine", "lr": 0.1, "weight_decay": 5e-4, "validation": 1000}
_LONGER = 25  # epochs
_TRIALS: Mapping[str, Mapping[str, Any]] = {
    "WarmStart, trained as the paper trains": {},
    "weights averaged, decay 0.995": {"ema": 0.995},
    "weight decay 5e-4": {"weight_decay": 5e-4},
    "cosine schedule": {"lr_schedule": "cosine"},
    "learning rate doubled": {"lr": 0.02},
    "batches of 64": {"batch_size": 64},
    "cosine schedule, learning rate doubled": {"lr_schedule": "cosine", "lr": 0.02},
    "cosine schedule, learning rate 0.05": {"lr_schedule": "cosine", "lr": 0.05},
    "cosine schedule, learning rate 0.1": {"lr_schedule": "cosine", "lr": 0.1},
}
_TRIED_ON_STANDARD = ("cosine schedule, learning rate doubled", "cosine schedule, learning rate 0.05")
_ATTACKS = ("pgd-20", "cw-30")


def _warm_start(setting: Setting, changes: Mapping[str, Any], seed: int = 0) -> Training:
    changed = replace(setting, **changes)
    return Training(changed, WarmStart(changed.pgd()), seed)


def _trials(scale: Scale) -> list[TableRow]:
    """One change at a time, then two, with fewer epochs, measured on the validation split: changes are chosen by it."""
    if scale.name == "full":  # they are chosen at a smaller scale
        return []
    setting = replace(scale.mnist, epochs=max(1, round(0.6 * scale.mnist.epochs)))
    trainings = {name: _warm_start(setting, changes) for name, changes in _TRIALS.items()}
    for name in _TRIED_ON_STANDARD:
        trainings[f"Standard, {name}"] = replace(trainings[name], strategy=Standard(setting.pgd()))
    attacks = [(build_attacks(setting.eps, _ATTACKS), None)]
    return [
        TableRow(name, [training], attacks, options={"split": "validation"}) for name, training in trainings.items()
    ]


def _schedules(scale: Scale, data: str) -> Mapping[str, Mapping[str, Any]]:
    """The changes of the paper's training, by the row's name."""
    if data == "cifar" and scale.name == "full":
        return {"innermax-best": _SHORT, f"innermax-best, {_LONGER} epochs": {**_SHORT, "epochs": _LONGER}}
    return {"innermax-best": _CHANGES[data]}


def _best(scale: Scale) -> dict[str, list[TableRow]]:
    """The rows of each data set, with the accuracies that the paper prints for its best defence."""
    rows: dict[str, list[TableRow]] = {data: [] for data in _CHANGES}
    for data, of_data in rows.items():
        for name, changes in _schedules(scale, data).items():
            trainings = [_warm_start(getattr(scale, data), changes, seed) for seed in range(scale.seeds[data])]
            of_data.append(TableRow(name, trainings, list_attacks(scale, data), paper_accuracy(data, "dynamic")))
    return rows


def _experiments(scale: Scale) -> list[Experiment]:
    rows = [*_trials(scale), *(row for of_data in _best(scale).values() for row in of_data)]
    return [experiment for row in rows for experiment in row.experiments()]


def _numbers(scale: Scale, find: Find) -> dict[str, Any]:
    best = {data: [row.numbers(find) for row in rows] for data, rows in _best(scale).items()}
    return {"best": best, "trials": [row.numbers(find) for row in _trials(scale)], "scale": scale.name}


def _describe_short() -> str:
    return (
        f"on CIFAR-10, {_SHORT['epochs']} or {_LONGER} epochs with a learning rate of {_SHORT['lr']} along a cosine, "
        f"a weight decay of {_SHORT['weight_decay']} and {_SHORT['validation']:,} images held out"
    )


def _text(numbers: Numbers) -> str:
    parts = [
        "`WarmStart` with two steps and, on MNIST, a learning rate of 0.05 with a cosine schedule"
        + (f"; {_describe_short()}" if numbers.get("scale") == "full" else "")
        + "; the rest is the paper's training. Accuracy in %; *paper*: its best defence, Dynamic. The guided attack, "
        f"a cheaper stand-in for AutoAttack, is run on the first {FEW_IMAGES:,} images.",
    ]
    for data, rows in numbers["best"].items():
        parts += [f"## {TITLES[data]}", markdown_table(rows, ("clean", *TABLE_ATTACKS, STRONGEST))]
    if numbers["trials"]:
        parts += [
            "## Trials",
            "MNIST, accuracy in % on the validation split, one seed, 0.6 of the epochs; `WarmStart` unless told "
            "otherwise.",
            markdown_table(numbers["trials"], ("clean", *_ATTACKS)),
        ]
    return "\n\n".join(parts)


ARTIFACTS = (Artifact("best", "innermax-best", _experiments, _numbers, _text),)
