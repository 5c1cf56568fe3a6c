"""The report's figures: which numbers of which exhibit go onto which chart."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from innermax.evaluation.audit import UNCONVERGED
from innermax.evaluation.result import Evaluation
from innermax.reporting.contents import Story
from innermax.reporting.gallery import Picture
from innermax.reporting.svg import (
    Axis,
    Series,
    chart,
    heat,
    legend,
    linear,
    logarithmic,
    mirrored,
    number_text,
    upright,
)
from innermax.reporting.tables import shown_name

_LOWEST = 1e-4  # relative FOSC; what is below is as converged as any
_BINS = 20
_ROWS = 24  # of the heat map
_COLUMNS = 60
_GAUGES = {"exact": "fosc", "ball": "ball_fosc", "relative": "relative_fosc"}
_MEASURES = {"exact": "FOSC", "ball": "FOSC (ball)", "relative": "relative FOSC"}


@dataclass(frozen=True)
class Figure:
    """A chart with a title, what it says, and a legend where there is something to tell apart."""

    title: str
    text: str
    chart: Markup
    legend: str = ""


def comparison(stories: Sequence[Story]) -> list[Figure]:
    """Robust against clean accuracy, robustness against ε, robustness against what training cost."""
    scored = [(number, story) for number, story in enumerate(stories) if story.evaluation is not None]
    figures = []
    if len(scored) > 1:
        figures.append(_against(scored, _clean, "clean accuracy (%)", "Robust against clean accuracy"))
    swept = [(number, story) for number, story in scored if story.gallery and story.gallery.sweep]
    if swept:
        figures.append(_by_eps(swept))
    costly = [(number, story) for number, story in scored if any("gradients" in row for row in story.history)]
    if len(costly) > 1:
        label = "gradients an example, whole training"
        figures.append(_against(costly, spent, label, "What robustness cost in training", low=0.0))
    return figures


def training(stories: Sequence[Story]) -> list[Figure]:
    """Loss, accuracies, gradients and time by epoch, all runs on one chart, then each one's FOSC."""
    told = [(number, story) for number, story in enumerate(stories) if story.history]
    if not told:
        return []
    figures = [
        _by_epoch(told, {"loss": "loss"}, "Training loss", "Mean over the epoch's examples, of what is minimised."),
        _by_epoch(
            told,
            {"validation_clean": "clean", "validation_robust": "robust"},
            "Accuracy on the validation split",
            "Clean, and under the validation attack.",
            percent=True,
        ),
        _by_epoch(
            told, {"gradients": "gradients"}, "Gradients an example", "What the training attack cost each epoch."
        ),
        _by_epoch(told, {"seconds": "seconds"}, "Seconds an epoch", "Attack, update and validation together."),
        *(_distribution(story, len(told) > 1) for _, story in told),
    ]
    return [figure for figure in figures if figure is not None]


def convergence(story: Story) -> list[Figure]:
    """Where each attack's searches ended, survivors against fallen; then how they got there."""
    if story.evaluation is None:
        return []
    ends = [_ends(story.evaluation, name) for name in story.evaluation.rows]
    pictures = story.gallery.pictures if story.gallery else ()
    losses = [_loss_by_step(pictures, name) for name in story.evaluation.rows]
    return [figure for figure in (*ends, _fosc_by_step(pictures), *losses) if figure is not None]


def spent(story: Story) -> float:
    """Gradients an example that the whole training took."""
    return math.fsum(float(row.get("gradients") or 0.0) for row in story.history)


def _clean(story: Story) -> float:
    return math.nan if story.evaluation is None else 100 * story.evaluation.accuracy["clean"].value


def _against(
    told: Sequence[tuple[int, Story]],
    value: Callable[[Story], float],
    label: str,
    title: str,
    low: float | None = None,
) -> Figure:
    """Worst-case accuracy with its interval against something else."""
    series = []
    for number, story in told:
        if story.evaluation is not None:
            worst = story.evaluation.worst_case
            points = ([value(story)], [100 * worst.value], number, [100 * worst.low], [100 * worst.high])
            series.append(Series(story.name, *points, kind="marks"))
    x = linear(label, [one.x[0] for one in series], low=low)
    y = linear("worst-case accuracy (%)", [end for one in series for end in (*one.low, *one.high)])
    text = "Up is more robust. Bars are 95 % intervals."
    return Figure(title, text, chart(series, x, y, f"{title}: {_points(series)}"), legend(series))


def _by_eps(swept: Sequence[tuple[int, Story]]) -> Figure:
    series, images = [], set()
    for number, story in swept:
        if story.gallery is not None and story.gallery.sweep is not None:
            sweep = story.gallery.sweep
            images.add(sweep.images)
            columns = ([100 * getattr(one, end) for one in sweep.accuracy] for end in ("value", "low", "high"))
            y, low, high = columns
            series.append(Series(story.name, sweep.eps, y, number, low, high, kind="marked"))
    x = linear("ε", [end for one in series for end in one.x], low=0.0)
    y_axis = linear("accuracy (%)", [], low=0.0, high=100.0)
    many = " or ".join(map(str, sorted(images)))
    text = f"PGD-10 with a shrinking step on the first {many} test images; bands are 95 % intervals."
    said = f"Accuracy by size of the perturbation: {_points(series)}"
    return Figure("Robustness against ε", text, chart(series, x, y_axis, said), legend(series))


def _by_epoch(
    told: Sequence[tuple[int, Story]], measures: Mapping[str, str], title: str, text: str, percent: bool = False
) -> Figure | None:
    """Measures of several runs by epoch; where one run has several, each has a style of its own."""
    series = []
    for number, story in told:
        for place, (key, called) in enumerate(measures.items()):
            values = [
                math.nan if row.get(key) is None else float(row[key]) * (100 if percent else 1) for row in story.history
            ]
            if any(map(math.isfinite, values)):
                style = number * len(measures) + place
                name = called if len(told) == 1 else f"{story.name}, {called}" if len(measures) > 1 else story.name
                epochs = [row.get("epoch", place) + 1 for place, row in enumerate(story.history)]
                series.append(Series(name, epochs, values, style, kind="line"))
    if not series:
        return None
    x = _epochs(max(one.x[-1] for one in series))
    label = "accuracy (%)" if percent else next(iter(measures.values()))
    y = linear(label, [value for one in series for value in one.y], low=None if percent else 0.0)
    last = "; ".join(f"{one.name} ends at {number_text(one.y[-1])}" for one in series)
    many = legend(series) if len(series) > 1 else Markup("")
    return Figure(title, text, chart(series, x, y, f"{title} by epoch: {last}"), many)


def _epochs(last: float) -> Axis:
    axis = linear("epoch", [1.0, max(last, 2.0)], low=0.5, high=max(last, 2.0) + 0.5)
    ticks = tuple(tick for tick in axis.ticks if tick[0] >= 1 and tick[0] == int(tick[0]))
    return Axis(axis.label, axis.low, axis.high, ticks or ((1.0, "1"),))


def _distribution(story: Story, several: bool) -> Figure | None:
    """How converged training examples were, by epoch, beside the threshold c_t that ended their searches."""
    gauge = _gauge(story.configuration)
    key = f"{_GAUGES[gauge]}_percentiles"
    known = [row.get(key) for row in story.history]
    values = np.array([value for column in known if column for value in column], dtype=float)
    if not len(values) or not (values > 0).any():
        return None
    top = float(np.quantile(values, 0.98))
    thresholds = [math.nan if row.get("threshold") is None else float(row["threshold"]) for row in story.history]
    top = max([top, *(value for value in thresholds if math.isfinite(value))])
    every = -(-len(known) // _COLUMNS)
    x = _epochs(len(known))
    if every > 1:  # the last column may stand for fewer epochs
        x = Axis(x.label, 0.5, 0.5 + every * -(-len(known) // every), x.ticks)
    y = linear(_MEASURES[gauge], [0.0, top], low=0.0)
    edges = np.linspace(0.0, y.high, _ROWS + 1)
    columns = [_column(known[start : start + every], edges) for start in range(0, len(known), every)]
    cells = heat(columns, Axis(x.label, 0, len(columns), ()), y)
    epochs = [place + 1 for place in range(len(known))]
    medians = [math.nan if not column else float(column[len(column) // 2]) for column in known]
    series = [Series("median", epochs, medians, 6)]
    if any(map(math.isfinite, thresholds)):
        series.append(Series("c_t, where searches end", epochs, thresholds, 1, kind="steps"))
    title = "FOSC of training examples" + (f": {story.name}" if several else "")
    said = f"{title} by epoch: the median goes from {_ends_of(medians)}"
    text = "How far training's attacks were from a stationary point: darker, more examples; 0 is converged."
    return Figure(title, text, chart(series, x, y, said, cells), legend(series))


def _column(percentiles: Sequence[Any], edges: Any) -> list[float]:
    """The share of examples in each bin, from the percentiles of some epochs."""
    shares = np.zeros(len(edges) - 1)
    for values in percentiles:
        if values:
            below = np.interp(
                edges, np.maximum.accumulate(np.array(values, dtype=float)), np.linspace(0, 1, len(values))
            )
            below[0] = 0.0
            shares += np.diff(below)
    return [float(share) for share in shares / max(shares.sum(), 1e-12)]


def _gauge(configuration: Mapping[str, Any]) -> str:
    """The gauge that c_t is measured in."""
    told: Any = configuration
    for name in ("training", "strategy", "attack", "gauge"):
        told = told.get(name) if isinstance(told, Mapping) else None
    return told if isinstance(told, str) and told in _GAUGES else "exact"


def _ends(evaluation: Evaluation, name: str) -> Figure | None:
    """Where one attack's searches ended."""
    rows = evaluation.rows[name]
    known = np.isfinite(rows.relative_fosc) & (rows.zero_gradient != 1)
    if not known.any():
        return None
    x = logarithmic("relative FOSC at the end of the search", _LOWEST, 1.0, below=True)
    edges = np.logspace(math.log10(_LOWEST), 0, _BINS + 1)
    shares, names = [], []
    for chosen, said in ((rows.correct, "survived"), (~rows.correct, "fell")):
        values = np.clip(rows.relative_fosc[known & chosen], _LOWEST, 1.0)
        shares.append([float(count) for count in np.histogram(values, edges)[0]])
        still = int((chosen & (rows.zero_gradient == 1)).sum())
        names.append(f"{said}: {int(chosen.sum()):,}" + (f", {still:,} with zero gradient" if still else ""))
    line = upright(x, UNCONVERGED, f"{UNCONVERGED:g}")
    loose = int((known & rows.correct & (rows.relative_fosc > UNCONVERGED)).sum())
    survivors = int(rows.correct.sum())
    text = f"{loose:,} of {survivors:,} survivors' searches had not converged (right of {UNCONVERGED:g})."
    said = f"{shown_name(name)}: {text}"
    drawn = mirrored(shares[0], shares[1], x, (names[0], names[1]), said, line)
    return Figure(shown_name(name), text, drawn)


def _fosc_by_step(pictures: Sequence[Picture]) -> Figure | None:
    """Median relative FOSC after each step, a line an attack and outcome."""
    names = list(dict.fromkeys(picture.attack for picture in pictures if len(picture.fosc) > 2))
    series = [one for number, name in enumerate(names) for one in _lines(pictures, name, "fosc", 2 * number)]
    if not series:
        return None
    finite = [value for one in series for value in one.y if math.isfinite(value) and value > 0]
    y = logarithmic("relative FOSC", max(min(finite, default=_LOWEST), _LOWEST), 1.0)
    drawn = chart(series, _steps(series), y, f"Relative FOSC by step: {_last(series)}", level=UNCONVERGED)
    text = "Medians of the gallery's images; low is converged."
    return Figure("Relative FOSC against step", text, drawn, legend(series))


def _loss_by_step(pictures: Sequence[Picture], name: str) -> Figure | None:
    """The median of an attack's own loss after each step, survivors and fallen."""
    series = _lines(pictures, name, "loss", 0)
    if not series or len(series[0].x) < 3:
        return None
    finite = [value for one in series for value in one.y if math.isfinite(value)]
    y = linear("loss", finite)
    if 0 < 30 * min(finite) < max(finite):  # a cross-entropy, of which survivors' are far below those of the fallen
        y = logarithmic("loss", max(min(finite), 1e-5 * max(finite)), max(finite))
    drawn = chart(series, _steps(series), y, f"Loss of {shown_name(name)} by step: {_last(series)}")
    text = "Medians of the gallery's images: a search that still climbs has not converged."
    return Figure(f"Loss against step: {shown_name(name)}", text, drawn, legend(series))


def _lines(pictures: Sequence[Picture], name: str, quantity: str, style: int) -> list[Series]:
    """An attack's medians by step, of those that survived it and of those that fell."""
    series = []
    for place, outcome in enumerate(("survived", "fallen")):
        lines = [getattr(p, quantity) for p in pictures if p.attack == name and p.outcome == outcome and p.loss]
        if lines:
            median = _medians(np.array(lines, dtype=float))
            called = outcome if quantity == "loss" else f"{shown_name(name)}, {outcome}"
            series.append(Series(called, range(len(median)), median, style + place))
    return series


def _steps(series: Sequence[Series]) -> Axis:
    return linear("step", [end for one in series for end in (one.x[0], one.x[-1])], low=0.0)


def _medians(lines: Any) -> list[float]:
    """The median of each column's known values; NaN where none is."""
    columns = [column[np.isfinite(column)] for column in lines.T]
    return [float(np.median(column)) if len(column) else math.nan for column in columns]


def _ends_of(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)] or [math.nan]
    return f"{number_text(known[0])} to {number_text(known[-1])}"


def _points(series: Sequence[Series]) -> str:
    return "; ".join(
        f"{one.name} " + ", ".join(f"({number_text(x)}, {number_text(y)})" for x, y in zip(one.x, one.y, strict=True))
        for one in series
    )


def _last(series: Sequence[Series]) -> str:
    return "; ".join(f"{one.name} ends at {number_text(one.y[-1])}" for one in series)
