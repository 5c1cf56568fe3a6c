"""Questions that the paper leaves open: does Dynamic win, what do its constants do, and does the training overfit?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from innermax.reproduce import plots
from innermax.reproduce.artifact import Artifact, Find, Numbers
from innermax.reproduce.cache import Experiment
from innermax.reproduce.comparison import (
    STRONGEST,
    TABLE_ATTACKS,
    TableRow,
    build_attacks,
    build_strongest,
    compare,
    compare_all,
    format_differences,
    format_points,
    list_attacks,
    markdown_table,
    mean_accuracy,
    sort_by_seed,
)
from innermax.reproduce.experiments import Trained
from innermax.reproduce.scales import Scale, Training
from innermax.reproduce.tables import TITLES
from innermax.strategies import Dynamic, Strategy

# Does Dynamic win, and why?

_DATA = ("mnist", "cifar")
_CHOSEN = 0.15  # c_max on the exact gauge, the best of `constants`
_COMPARED = ("clean", "pgd-20", "cw-30", STRONGEST)


def _variants(scale: Scale, data: str) -> list[TableRow]:
    """Standard and Dynamic with one change each, of those that the paper or its code makes together."""
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
        TableRow(
            name,
            [Training(on, strategy, seed, objective) for seed in range(scale.seeds[data])],
            list_attacks(scale, data),
        )
        for name, (on, strategy, objective) in variants.items()
    ]


def _dynamic_experiments(scale: Scale) -> list[Experiment]:
    return sort_by_seed([row.experiments() for data in _DATA for row in _variants(scale, data)])


def _dynamic_numbers(scale: Scale, find: Find) -> dict[str, Any]:
    found = {}
    for data in _DATA:
        rows = _variants(scale, data)
        found[data] = {
            "rows": [row.numbers(find) for row in rows],
            "differences": compare_all(find, rows, rows[0], _COMPARED),
        }
    return found


def _dynamic_text(numbers: Numbers) -> str:
    parts = [
        "Accuracy in %. *Gradients* are input gradients per training image over the whole training. *Chosen*: on "
        "MNIST's validation split, in `constants`."
    ]
    for data, found in numbers.items():
        parts += [
            f"## {TITLES[data]}",
            markdown_table(found["rows"], ("clean", *TABLE_ATTACKS, STRONGEST)),
            *format_differences(found["differences"], "Standard", _COMPARED),
        ]
    return "\n\n".join(parts)


# What Dynamic's constants do


_PUBLISHED = "c_max 0.5, T' 0.8, linear (published)"
_MEASURED = ("clean", "pgd-20", STRONGEST)


def _constants(scale: Scale) -> list[TableRow]:
    """One constant changed at a time, with fewer epochs; measured on the validation split, as constants are chosen."""
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
    attacks = [((*build_attacks(setting.eps, ("pgd-20",)), *build_strongest(scale, setting.eps)), None)]
    seeds = range(scale.seeds["mnist"])
    return [
        TableRow(name, [Training(setting, strategy, seed) for seed in seeds], attacks, options={"split": "validation"})
        for name, strategy in changes.items()
    ]


def _constants_experiments(scale: Scale) -> list[Experiment]:
    return sort_by_seed([row.experiments() for row in _constants(scale)])


def _constants_numbers(scale: Scale, find: Find) -> dict[str, Any]:
    rows = _constants(scale)
    published = next(row for row in rows if row.title == _PUBLISHED)
    return {
        "rows": [row.numbers(find) for row in rows],
        "differences": compare_all(find, rows, published, _MEASURED),
    }


def _constants_text(numbers: Numbers) -> str:
    parts = [
        "MNIST, accuracy in % on the validation split, after 0.6 of the epochs. One constant is changed at a time.",
        markdown_table(numbers["rows"], _MEASURED),
        *format_differences(numbers["differences"], "published", _MEASURED),
    ]
    return "\n\n".join(parts)


# Robust overfitting


def _overfitting(scale: Scale) -> list[tuple[str, TableRow, TableRow]]:
    """(title, last epoch, best epoch on the validation split) of each strategy, measured on the test images."""
    attacks = list_attacks(scale, "mnist")[0]
    found = []
    for name in ("standard", "curriculum", "dynamic"):
        trainings = scale.trainings("mnist", name)
        last, best = (
            TableRow(name.capitalize(), trainings, [attacks], options={"best": best}) for best in (False, True)
        )
        found.append((name.capitalize(), last, best))
    return found


def _overfitting_experiments(scale: Scale) -> list[Experiment]:
    return sort_by_seed([row.experiments() for _, last, best in _overfitting(scale) for row in (last, best)])


def _overfitting_numbers(scale: Scale, find: Find) -> dict[str, Any]:
    found = {}
    for name, last, best in _overfitting(scale):
        trained = [find(Trained(training)) for training in last.trainings]
        histories = [answer["history"] for answer in trained if answer is not None]
        gained = compare(find, best, last, "pgd-20")
        found[name] = {
            "last": last.numbers(find),
            "best": best.numbers(find),
            "gained": gained,
            "best_epochs": [best_epoch(history) for history in histories],
            "validation": [[epoch["validation_accuracy"] for epoch in history] for history in histories],
            "fosc": [[_large_fosc(epoch) for epoch in history] for history in histories],
        }
    return found


def best_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """The number of the epoch with the best accuracy on the validation split, from 1."""
    return max(range(len(history)), key=lambda epoch: history[epoch]["validation_accuracy"]) + 1


def _large_fosc(epoch: Mapping[str, Any]) -> float | None:
    """The 90th percentile of FOSC, which shows masked gradients when the median does not; None without an attack."""
    percentiles = epoch.get("fosc_percentiles")
    return None if percentiles is None else percentiles[90]


def _overfitting_text(numbers: Numbers) -> str:
    lines = [
        "| strategy | best epochs | PGD-20, last epoch | PGD-20, best epoch | gained, points |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for name, row in numbers.items():
        cells = [mean_accuracy(row[which], "pgd-20") for which in ("last", "best")]
        shown = ["not run" if cell is None else f"{cell[0]:.2f}" for cell in cells]
        lines.append(
            f"| {name} | {', '.join(map(str, row['best_epochs']))} | {' | '.join(shown)} | "
            f"{format_points(row['gained'])} |"
        )
    return (
        "MNIST test accuracy in % after the last epoch and after the best one, by the accuracy on validation images "
        "under the training attack (Rice et al. 2020). There is one best epoch per seed. The picture has one line per "
        "seed: that validation accuracy, and the FOSC that a tenth of the training images exceed at the end of their "
        "search.\n\n" + "\n".join(lines)
    )


ARTIFACTS = (
    Artifact("dynamic", "Does Dynamic win, and why?", _dynamic_experiments, _dynamic_numbers, _dynamic_text),
    Artifact("constants", "What Dynamic's constants do", _constants_experiments, _constants_numbers, _constants_text),
    Artifact(
        "overfitting",
        "Robust overfitting",
        _overfitting_experiments,
        _overfitting_numbers,
        _overfitting_text,
        plots.draw_by_epoch,
    ),
)
