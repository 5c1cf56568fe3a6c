"""The questions the paper leaves open: does Dynamic win, what its constants do, overfitting, and what gradients buy."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from innermax.reproduce import plots
from innermax.reproduce.artifact import Known, Numbers, Piece
from innermax.reproduce.cache import Question
from innermax.reproduce.comparison import (
    STRONGEST,
    TABLE,
    Row,
    accuracy_over_seeds,
    asked_of,
    attacks_of,
    by_seed,
    difference,
    differences,
    differences_table,
    points,
    strongest,
    table,
)
from innermax.reproduce.experiments import Trained
from innermax.reproduce.scales import Scale, Training
from innermax.reproduce.tables import TITLES
from innermax.strategies import Dynamic, Strategy

# Does Dynamic win, and why?

_DATA = ("mnist", "cifar")
_CHOSEN = 0.15  # c_max on the exact gauge, the best of `constants`
_SHOWN = ("clean", "pgd-20", "cw-30", STRONGEST)


def _variants(scale: Scale, data: str) -> list[Row]:
    """What the paper's text mixes, taken apart."""
    setting, share = getattr(scale, data), scale.matched[data]
    fewer = replace(setting, epochs=max(1, round(share * setting.epochs)))
    published, standard = setting.strategy("dynamic"), setting.strategy("standard")
    exact = Dynamic(setting.pgd(), "auto", setting.zero_at)
    variants = {
        "Standard": (setting, standard, "cross_entropy"),
        f"Standard, {share:g} of the epochs: about as many gradients as Dynamic": (fewer, standard, "cross_entropy"),
        "Standard, weighted by the loss (released code)": (setting, standard, "loss_weighted"),
        "Dynamic as published: FOSC over the ball, c_max 0.5": (setting, published, "cross_entropy"),
        "Dynamic, exact FOSC, measured c_max": (setting, exact, "cross_entropy"),
        "Dynamic, weighted by the loss (released code)": (setting, published, "loss_weighted"),
        f"Dynamic, exact FOSC, c_max {_CHOSEN}, chosen": (setting, replace(exact, c_max=_CHOSEN), "cross_entropy"),
    }
    return [
        Row(name, [Training(on, strategy, seed, objective) for seed in range(scale.seeds[data])], asked_of(scale, data))
        for name, (on, strategy, objective) in variants.items()
    ]


def _dynamic_questions(scale: Scale) -> list[Question]:
    return by_seed([row.questions() for data in _DATA for row in _variants(scale, data)])


def _dynamic_numbers(scale: Scale, known: Known) -> dict[str, Any]:
    found = {}
    for data in _DATA:
        rows = _variants(scale, data)
        found[data] = {
            "rows": [row.numbers(known) for row in rows],
            "differences": differences(known, rows, rows[0], _SHOWN),
        }
    return found


def _dynamic_text(numbers: Numbers) -> str:
    parts = [
        "Accuracy in %. *Gradients* are input gradients a training image over the whole training. *Chosen*: on MNIST's "
        "validation split, by `constants`."
    ]
    for data, found in numbers.items():
        parts += [
            f"## {TITLES[data]}",
            table(found["rows"], ("clean", *TABLE, STRONGEST)),
            *differences_table(found["differences"], "Standard", _SHOWN),
        ]
    return "\n\n".join(parts)


# What Dynamic's constants do


_PUBLISHED = "c_max 0.5, T' 0.8, linear (published)"
_JUDGED = ("clean", "pgd-20", STRONGEST)


def _constants(scale: Scale) -> list[Row]:
    """One constant changed at a time, for fewer epochs; judged on the validation split, since choices follow."""
    setting = replace(scale.mnist, epochs=max(1, round(0.6 * scale.mnist.epochs)))
    ball, exact = setting.pgd(gauge="ball"), setting.pgd()
    published = Dynamic(ball, 0.5, setting.zero_at)
    changes: dict[str, Strategy] = {
        "Standard": setting.strategy("standard"),
        _PUBLISHED: published,
        "c_max 0.25": replace(published, c_max=0.25),
        "c_max 1": replace(published, c_max=1.0),
        "T' 0.5": replace(published, zero_at=0.5),
        "T' 1": replace(published, zero_at=1.0),
        "cosine": replace(published, shape="cosine"),
        "constant": replace(published, shape="constant"),
        "c_max auto on the ball": replace(published, c_max="auto"),
        "c_max auto, exact FOSC": replace(published, attack=exact, c_max="auto"),
    }
    for value in (_CHOSEN, 0.08, 0.3):
        changes[f"c_max {value}, exact FOSC"] = replace(published, attack=exact, c_max=value)
    asked = [((*attacks_of(setting.eps, ("pgd-20",)), *strongest(scale, setting.eps)), None)]
    seeds = range(scale.seeds["mnist"])
    return [
        Row(name, [Training(setting, strategy, seed) for seed in seeds], asked, options={"split": "validation"})
        for name, strategy in changes.items()
    ]


def _constants_questions(scale: Scale) -> list[Question]:
    return by_seed([row.questions() for row in _constants(scale)])


def _constants_numbers(scale: Scale, known: Known) -> dict[str, Any]:
    rows = _constants(scale)
    published = next(row for row in rows if row.title == _PUBLISHED)
    return {
        "rows": [row.numbers(known) for row in rows],
        "differences": differences(known, rows, published, _JUDGED),
    }


def _constants_text(numbers: Numbers) -> str:
    parts = [
        "MNIST, accuracy in % on the validation split, 0.6 of the epochs; one constant changed at a time.",
        table(numbers["rows"], _JUDGED),
        *differences_table(numbers["differences"], "published", _JUDGED),
    ]
    return "\n\n".join(parts)


# Robust overfitting


def _overfitting(scale: Scale) -> list[tuple[str, Row, Row]]:
    """Of each strategy the last epoch and the best on the validation split, on the test images."""
    asked = asked_of(scale, "mnist")[0]
    found = []
    for name in ("standard", "curriculum", "dynamic"):
        trainings = scale.trainings("mnist", name)
        last, best = (Row(name.capitalize(), trainings, [asked], options={"best": best}) for best in (False, True))
        found.append((name.capitalize(), last, best))
    return found


def _overfitting_questions(scale: Scale) -> list[Question]:
    return by_seed([row.questions() for _, last, best in _overfitting(scale) for row in (last, best)])


def _overfitting_numbers(scale: Scale, known: Known) -> dict[str, Any]:
    found = {}
    for name, last, best in _overfitting(scale):
        trained = [known(Trained(training)) for training in last.trainings]
        histories = [answer["history"] for answer in trained if answer is not None]
        gained = difference(known, best, last, "pgd-20")
        found[name] = {
            "last": last.numbers(known),
            "best": best.numbers(known),
            "gained": gained,
            "best_epochs": [best_epoch(history) for history in histories],
            "validation": [[epoch["validation_accuracy"] for epoch in history] for history in histories],
            "fosc": [[_large_fosc(epoch) for epoch in history] for history in histories],
        }
    return found


def best_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """The number, from 1, of the epoch with the best accuracy on the validation split."""
    return max(range(len(history)), key=lambda epoch: history[epoch]["validation_accuracy"]) + 1


def _large_fosc(epoch: Mapping[str, Any]) -> float | None:
    """The 90th percentile, where masked gradients show that the median does not; None where nothing was attacked."""
    percentiles = epoch.get("fosc_percentiles")
    return None if percentiles is None else percentiles[90]


def _overfitting_text(numbers: Numbers) -> str:
    lines = [
        "| strategy | best epochs | PGD-20, last epoch | PGD-20, best epoch | gained, points |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for name, row in numbers.items():
        cells = [accuracy_over_seeds(row[which], "pgd-20") for which in ("last", "best")]
        shown = ["not run" if cell is None else f"{cell[0]:.2f}" for cell in cells]
        lines.append(
            f"| {name} | {', '.join(map(str, row['best_epochs']))} | {' | '.join(shown)} | {points(row['gained'])} |"
        )
    return (
        "MNIST test accuracy in % of the last epoch and of the best on validation images attacked with the training "
        "attack (Rice et al. 2020). Best epochs are one a seed, as are the lines of the picture: that accuracy, and "
        "the FOSC that a tenth of the training images exceed where their search ends.\n\n" + "\n".join(lines)
    )


PIECES = (
    Piece("dynamic", "Does Dynamic win, and why?", _dynamic_questions, _dynamic_numbers, _dynamic_text),
    Piece("constants", "What Dynamic's constants do", _constants_questions, _constants_numbers, _constants_text),
    Piece(
        "overfitting",
        "Robust overfitting",
        _overfitting_questions,
        _overfitting_numbers,
        _overfitting_text,
        plots.by_epoch,
    ),
)
