"""innermax-best: the paper's networks and data, trained as the evidence supports; apart from the paper's own rows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from innermax.reproduce.artifact import Known, Numbers, Piece
from innermax.reproduce.cache import Question
from innermax.reproduce.comparison import FEW, STRONGEST, TABLE, Row, asked_of, attacks_of, table
from innermax.reproduce.scales import Scale, Setting, Training
from innermax.reproduce.tables import TITLES, printed
from innermax.strategies import Standard, WarmStart

_CHANGES: Mapping[str, Mapping[str, Any]] = {  # of the paper's training, by data set
    "mnist": {"lr_schedule": "cosine", "lr": 0.05},
    "cifar": {},
}
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
_JUDGES = ("pgd-20", "cw-30")


def _trained(setting: Setting, changes: Mapping[str, Any], seed: int = 0) -> Training:
    changed = replace(setting, **changes)
    return Training(changed, WarmStart(changed.pgd()), seed)


def _trials(scale: Scale) -> list[Row]:
    """One change at a time, then two together, for fewer epochs; judged on the validation split: choices follow."""
    if scale.name == "full":  # choices are made at a smaller one
        return []
    setting = replace(scale.mnist, epochs=max(1, round(0.6 * scale.mnist.epochs)))
    trainings = {name: _trained(setting, changes) for name, changes in _TRIALS.items()}
    for name in _TRIED_ON_STANDARD:
        trainings[f"Standard, {name}"] = replace(trainings[name], strategy=Standard(setting.pgd()))
    asked = [(attacks_of(setting.eps, _JUDGES), None)]
    return [Row(name, [training], asked, options={"split": "validation"}) for name, training in trainings.items()]


def _best(scale: Scale) -> dict[str, Row]:
    """The row by data set, the paper's best defence beside it."""
    rows = {}
    for data, changes in _CHANGES.items():
        trainings = [_trained(getattr(scale, data), changes, seed) for seed in range(scale.seeds[data])]
        rows[data] = Row("innermax-best", trainings, asked_of(scale, data), printed(data, "dynamic"))
    return rows


def _questions(scale: Scale) -> list[Question]:
    return [question for row in (*_trials(scale), *_best(scale).values()) for question in row.questions()]


def _numbers(scale: Scale, known: Known) -> dict[str, Any]:
    best = {data: row.numbers(known) for data, row in _best(scale).items()}
    return {"best": best, "trials": [row.numbers(known) for row in _trials(scale)]}


def _text(numbers: Numbers) -> str:
    parts = [
        "`WarmStart` with two steps and, on MNIST, a learning rate of 0.05 that falls along a cosine; nothing else of "
        "the paper's training is changed. Accuracy in %, *paper*: its best defence, Dynamic. The guided attack, "
        f"about as strong as AutoAttack, is on the first {FEW:,} images.",
    ]
    for data, row in numbers["best"].items():
        parts += [f"## {TITLES[data]}", table([row], ("clean", *TABLE, STRONGEST))]
    if numbers["trials"]:
        parts += [
            "## Trials",
            "MNIST, accuracy in % on the validation split, one seed, 0.6 of the epochs; `WarmStart` unless it says.",
            table(numbers["trials"], ("clean", *_JUDGES)),
        ]
    return "\n\n".join(parts)


PIECES = (Piece("best", "innermax-best", _questions, _numbers, _text),)
