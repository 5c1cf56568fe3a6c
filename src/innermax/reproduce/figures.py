"""Figures 1–5 of Wang et al. 2019: FOSC of an attack, and in the course of a training."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from innermax.attacks.pgd import PGD
from innermax.reproduce import plots
from innermax.reproduce.artifact import Artifact, Find, Numbers
from innermax.reproduce.cache import Experiment, Result
from innermax.reproduce.comparison import TABLE_ATTACKS, attack_title, build_attacks
from innermax.reproduce.experiments import Followed, Gauged, Scored, Trained
from innermax.reproduce.scales import Scale, Training
from innermax.strategies import FGSMThenPGD, Standard

_BINS = 20
_LINES = 20
_TRAINING_EPOCHS = 120  # the paper's, on CIFAR-10
_EPOCHS = (10, 60, 100)  # of them, counted from 1
_LATE_EPOCHS = (60, 90, 120)  # Curriculum attacks nothing at first
_STEP_SIZES = (1, 2, 4, 6, 8)  # ε over these
_STEPS = (10, 20, 30, 40)
_EPSILONS = (2 / 255, 4 / 255, 6 / 255, 8 / 255)


def _standard(scale: Scale, data: str = "cifar", **changes: Any) -> Training:
    """Standard on CIFAR-10, or with another training attack."""
    setting = getattr(scale, data)
    return Training(setting, Standard(setting.pgd(**changes)))


# Figure 1


def _figure_1_experiments(scale: Scale) -> list[Experiment]:
    training = _standard(scale)
    return [
        Gauged(training, PGD(scale.cifar.threat, 10), scale.images["cifar"] or 10_000),
        Followed(training, PGD(scale.cifar.threat, 10), _LINES),
    ]


def _figure_1_numbers(scale: Scale, find: Find) -> dict[str, Any]:
    gauged, followed = map(find, _figure_1_experiments(scale))
    return {
        "bins": None if gauged is None else bin_by_fosc(gauged["fosc"], gauged["correct"], gauged["loss"]),
        "steps": None if followed is None else {name: followed[name] for name in ("fosc", "loss")},
    }


def bin_by_fosc(fosc: Sequence[float], correct: Sequence[int], loss: Sequence[float]) -> list[dict[str, float]]:
    """Accuracy and mean loss in 20 bins of FOSC, of equal width up to its 95th percentile; without empty bins."""
    values, right, losses = (np.array(column, dtype=float) for column in (fosc, correct, loss))
    highest = float(np.quantile(values, 0.95))
    edges = np.linspace(0.0, highest, _BINS + 1)
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, _BINS - 1)
    found = []
    for number in np.unique(bins[values <= highest]):
        inside = (bins == number) & (values <= highest)
        mean = {"accuracy": float(right[inside].mean()), "loss": float(losses[inside].mean())}
        ends = {"low": float(edges[number]), "high": float(edges[number + 1])}
        found.append(ends | {"examples": int(inside.sum())} | mean)
    return found


def _figure_1_text(numbers: Numbers) -> str:
    bins = numbers["bins"]
    if not bins:
        return ""
    counts = np.array([row["examples"] for row in bins], dtype=float)
    middles = np.array([(row["low"] + row["high"]) / 2 for row in bins])
    correlations = [
        f"{name} {_correlation(middles, np.array([row[name] for row in bins]), counts):+.2f}"
        for name in ("accuracy", "loss")
    ]
    return (
        "(a) Test images attacked with PGD-10, in 20 bins of the exact FOSC over ball ∩ bounds at the last iterate; "
        f"correlation of the bins' FOSC, weighted with their examples, with: {', '.join(correlations)}. "
        f"(b) FOSC and loss of {_LINES} test images after each step."
    )


def _correlation(one: Any, other: Any, weight: Any) -> float:
    covariance = np.cov(np.stack([one, other]), aweights=weight)
    scale = float(np.sqrt(covariance[0, 0] * covariance[1, 1]))
    return float(covariance[0, 1]) / scale if scale > 0 else 0.0


# Figure 2


def _by_step_size(scale: Scale) -> dict[str, PGD]:
    eps = scale.sweep.eps
    return {f"ε/{part}" if part > 1 else "ε": scale.sweep.pgd(steps=20, step_size=eps / part) for part in _STEP_SIZES}


def _by_steps(scale: Scale) -> dict[str, PGD]:
    return {f"{steps} steps": scale.sweep.pgd(steps=steps, step_size=scale.sweep.eps / 6) for steps in _STEPS}


def _cross_test(scale: Scale, attacks: Mapping[str, PGD]) -> dict[str, tuple[Scored, Gauged]]:
    """For each training attack: its network under all of them, and the end of its own searches on that network."""
    images = scale.images["sweep"]
    experiments = {}
    for name, attack in attacks.items():
        training = Training(scale.sweep, Standard(attack))
        experiments[name] = (
            Scored(training, tuple(attacks.items()), images),
            Gauged(training, attack, images or 10_000),
        )
    return experiments


def _figure_2_experiments(scale: Scale) -> list[Experiment]:
    groups = (_cross_test(scale, _by_step_size(scale)), _cross_test(scale, _by_steps(scale)))
    return [experiment for group in groups for pair in group.values() for experiment in pair]


def _figure_2_numbers(scale: Scale, find: Find) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for group, attacks in {"step size": _by_step_size(scale), "steps": _by_steps(scale)}.items():
        found[group] = {}
        for name, (scored, gauged) in _cross_test(scale, attacks).items():
            score, gauge = find(scored), find(gauged)
            found[group][name] = None
            if score is not None and gauge is not None:
                accuracy = {attack: score[attack]["accuracy"] for attack in ("clean", *attacks)}
                found[group][name] = {"accuracy": accuracy, "fosc": gauge["fosc"], "loss": gauge["loss"]}
    return found


def _figure_2_text(numbers: Numbers) -> str:
    tables = []
    for group, rows in numbers.items():
        names = list(rows)
        lines = [f"| trained with | clean | {' | '.join(names)} |", f"| --- |{' ---: |' * (len(names) + 1)}"]
        for name, row in rows.items():
            cells = ["not run"] if row is None else [f"{100 * row['accuracy'][a]:.1f}" for a in ("clean", *names)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        tables.append(f"## By {group}: accuracy in % under PGD, columns as attacked\n\n" + "\n".join(lines))
    return "\n\n".join(
        [
            "(a, b) Accuracy under each test attack; (c, d) density of FOSC and (e, f) of the loss at the end of the "
            "training attack's searches on test images.",
            *tables,
        ]
    )


# Figures 3 and 5


def _find_epochs(history: Sequence[Mapping[str, Any]], epochs: Sequence[int]) -> dict[str, list[float]]:
    """Percentiles of FOSC over the ball, as in the paper, in the epochs that stand for these of its 120."""
    reached = [-(-epoch * len(history) // _TRAINING_EPOCHS) for epoch in epochs]  # rounded up
    found = {f"epoch {epoch}": history[epoch - 1].get("ball_fosc_percentiles") for epoch in dict.fromkeys(reached)}
    return {name: values for name, values in found.items() if values is not None}


def _figure_3(scale: Scale) -> dict[str, Training]:
    eps = scale.cifar.eps
    return {
        "PGD-ε/4": _standard(scale),
        "PGD-ε/8": _standard(scale, step_size=eps / 8),
        "FGSM-PGD": Training(scale.cifar, FGSMThenPGD(scale.cifar.pgd())),
    }


def _figure_3_experiments(scale: Scale) -> list[Experiment]:
    trainings = _figure_3(scale)
    scored = [_build_figure_3(scale, training) for training in trainings.values()]
    return [*map(Trained, trainings.values()), *scored]


def _build_figure_3(scale: Scale, training: Training) -> Scored:
    return Scored(training, build_attacks(scale.cifar.eps), scale.images["cifar"])


def _figure_3_numbers(scale: Scale, find: Find) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, training in _figure_3(scale).items():
        trained, scored = find(Trained(training)), find(_build_figure_3(scale, training))
        found[name] = None
        if trained is not None and scored is not None:
            accuracy = {attack: scored[attack]["accuracy"] for attack in ("clean", *TABLE_ATTACKS)}
            found[name] = {"fosc": _find_epochs(trained["history"], _EPOCHS), "accuracy": accuracy}
    return found


def _figure_3_text(numbers: Numbers) -> str:
    lines = [
        f"| trained with | {' | '.join(map(attack_title, ('clean', *TABLE_ATTACKS)))} |",
        f"| --- |{' ---: |' * 5}",
    ]
    for name, row in numbers.items():
        cells = (
            ["not run"]
            if row is None
            else [f"{100 * row['accuracy'][attack]:.1f}" for attack in ("clean", *TABLE_ATTACKS)]
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "(a, c) Density of the ball's FOSC over training examples; (b) accuracy in %.\n\n" + "\n".join(lines)


def _figure_5(scale: Scale) -> dict[str, tuple[Training, Sequence[int]]]:
    epochs = {"standard": _EPOCHS, "curriculum": _LATE_EPOCHS, "dynamic": _EPOCHS}
    return {name.capitalize(): (scale.trainings("cifar", name)[0], chosen) for name, chosen in epochs.items()}


def _figure_5_experiments(scale: Scale) -> list[Experiment]:
    return [Trained(training) for training, _ in _figure_5(scale).values()]


def _figure_5_numbers(scale: Scale, find: Find) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (training, epochs) in _figure_5(scale).items():
        trained = find(Trained(training))
        found[name] = None if trained is None else _find_epochs(trained["history"], epochs)
    return found


def _figure_5_text(numbers: Numbers) -> str:
    lines = ["| strategy | epoch | median | 90th percentile |", "| --- | --- | ---: | ---: |"]
    for name, epochs in numbers.items():
        if epochs is None:
            lines.append(f"| {name} | not run | | |")
            continue
        lines += [f"| {name} | {epoch.split()[1]} | {v[50]:.3f} | {v[90]:.3f} |" for epoch, v in epochs.items()]
    return "Density of the ball's FOSC over training examples, in three epochs.\n\n" + "\n".join(lines)


# Figure 4


def _figure_4(scale: Scale) -> dict[str, dict[str, Scored]]:
    """By defence: the network trained at the largest ε, attacked at each ε, and one trained and attacked at each ε."""
    found: dict[str, dict[str, Scored]] = {}
    setting, images = scale.sweep, scale.images["sweep"]
    sizes = [size * setting.eps / _EPSILONS[-1] for size in _EPSILONS]
    for name in ("standard", "curriculum", "dynamic"):
        largest = Training(setting, setting.strategy(name))
        own = {size: Training(replace(setting, eps=size), replace(setting, eps=size).strategy(name)) for size in sizes}
        tested = {f"test {size:.5g}": Scored(largest, build_attacks(size, ("pgd-10",)), images) for size in sizes}
        trained = {f"train {size:.5g}": Scored(own[size], build_attacks(size, ("pgd-10",)), images) for size in sizes}
        found[name.capitalize()] = tested | trained
    return found


def _figure_4_experiments(scale: Scale) -> list[Experiment]:
    return [experiment for group in _figure_4(scale).values() for experiment in group.values()]


def _figure_4_numbers(scale: Scale, find: Find) -> dict[str, Any]:
    def accuracy(result: Result | None) -> float | None:
        return None if result is None else result["pgd-10"]["accuracy"]

    return {
        name: {moment: accuracy(find(experiment)) for moment, experiment in group.items()}
        for name, group in _figure_4(scale).items()
    }


def _figure_4_text(numbers: Numbers) -> str:
    names = [f"{moment} {255 * float(size):.3g}" for moment, size in map(str.split, next(iter(numbers.values())))]
    lines = [f"| strategy | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for name, row in numbers.items():
        cells = ["not run" if value is None else f"{100 * value:.1f}" for value in row.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return (
        "Accuracy in % under PGD-10, by ε · 255. *test*: trained at the largest ε, attacked at this one; *train*: "
        "trained and attacked at this one.\n\n" + "\n".join(lines)
    )


ARTIFACTS = (
    Artifact(
        "figure1",
        "Figure 1: FOSC against accuracy and loss",
        _figure_1_experiments,
        _figure_1_numbers,
        _figure_1_text,
        plots.draw_figure_1,
    ),
    Artifact(
        "figure2",
        "Figure 2: robustness and FOSC by step size and number of steps",
        _figure_2_experiments,
        _figure_2_numbers,
        _figure_2_text,
        plots.draw_figure_2,
    ),
    Artifact(
        "figure3",
        "Figure 3: FOSC over the training, and FGSM before PGD",
        _figure_3_experiments,
        _figure_3_numbers,
        _figure_3_text,
        plots.draw_figure_3,
    ),
    Artifact(
        "figure4",
        "Figure 4: robustness against ε, in testing and in training",
        _figure_4_experiments,
        _figure_4_numbers,
        _figure_4_text,
        plots.draw_figure_4,
    ),
    Artifact(
        "figure5",
        "Figure 5: FOSC over the training of three strategies",
        _figure_5_experiments,
        _figure_5_numbers,
        _figure_5_text,
        plots.draw_figure_5,
    ),
)
