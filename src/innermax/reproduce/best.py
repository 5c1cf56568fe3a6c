"""innermax-best: the paper's networks and data, trained as the evidence supports; apart from the paper's own rows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from innermax.reproduce.comparison import FEW, STRONGEST, TABLE, Row, asked_of, attacks_of, table
from innermax.reproduce.piece import Known, Numbers, Piece
from innermax.reproduce.settings import Scale, Setting, Training
from innermax.reproduce.tables import TITLES, printed
from innermax.reproduce.workshop import Question
from innermax.strategies import WarmStart

_DATA = ("mnist", "cifar")
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
_JUDGES = ("pgd-20", "cw-30")


def _trained(setting: Setting, seed: int = 0, **changes: Any) -> Training:
    changed = replace(setting, **changes)
    return Training(changed, WarmStart(changed.pgd()), seed)


def _trials(scale: Scale) -> list[Row]:
    """One change at a time, for fewer epochs; judged on the validation split, since choices follow."""
    if scale.name == "full":  # choices are made at a smaller one
        return []
    setting = replace(scale.mnist, epochs=max(1, round(0.6 * scale.mnist.epochs)))
    asked = [(attacks_of(setting.eps, _JUDGES), None)]
    return [
        Row(name, [_trained(setting, **changes)], asked, options={"split": "validation"})
        for name, changes in _TRIALS.items()
    ]


def _best(scale: Scale) -> dict[str, Row]:
    """The row by data set, the paper's best defence beside it."""
    rows = {}
    for data in _DATA:
        trainings = [_trained(getattr(scale, data), seed) for seed in range(scale.seeds[data])]
        rows[data] = Row("innermax-best", trainings, asked_of(scale, data), printed(data, "dynamic"))
    return rows


def _questions(scale: Scale) -> list[Question]:
    return [question for row in (*_trials(scale), *_best(scale).values()) for question in row.questions()]


def _numbers(scale: Scale, known: Known) -> dict[str, Any]:
    best = {data: row.numbers(known) for data, row in _best(scale).items()}
    return {"best": best, "trials": [row.numbers(known) for row in _trials(scale)]}


def _text(numbers: Numbers) -> str:
    parts = [
        "`WarmStart` with two steps; nothing else of the paper's training is changed. Accuracy in %, *paper*: its best "
        f"defence, Dynamic. The guided attack, the strongest at hand, is on the first {FEW:,} images.",
    ]
    for data, row in numbers["best"].items():
        parts += [f"## {TITLES[data]}", table([row], ("clean", *TABLE, STRONGEST))]
    if numbers["trials"]:
        parts += [
            "## Trials",
            "MNIST, accuracy in % on the validation split, one seed, 0.6 of the epochs, one change at a time.",
            table(numbers["trials"], ("clean", *_JUDGES)),
        ]
    return "\n\n".join(parts)


PIECES = (Piece("best", "innermax-best", _questions, _numbers, _text),)
