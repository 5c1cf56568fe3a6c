"""The figures of a report: the numbers of its entries on charts."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup

from innermax.attacks.named import display_name
from innermax.evaluation.audit import UNCONVERGED
from innermax.evaluation.curve import Curve, list_minimal
from innermax.evaluation.result import Evaluation
from innermax.reporting.contents import Entry
from innermax.reporting.gallery import Picture
from innermax.reporting.svg import (
    Axis,
    Series,
    draw_chart,
    draw_heat,
    draw_legend,
    draw_mirrored,
    draw_vertical,
    format_number,
    linear_axis,
    log_axis,
    percent_axis,
)
from innermax.threat import NORMS, format_eps

_LOWEST = 1e-4  # relative FOSC; smaller values are shown as this
_BINS = 20
_ROWS = 24  # of the heat map
_COLUMNS = 60
_GAUGES = {"exact": "fosc", "ball": "ball_fosc", "relative": "relative_fosc"}
_MEASURES = {"exact": "FOSC", "ball": "FOSC (ball)", "relative": "relative FOSC"}


@dataclass(frozen=True)
class Figure:
    """A chart with a title, a sentence, and a legend where there are several series."""

    title: str
    text: str
    chart: Markup
    legend: str = ""


def draw_comparison(entries: Sequence[Entry]) -> list[Figure]:
    """Robust against clean accuracy, against ε, and against the gradients spent in training."""
    scored = [(number, entry) for number, entry in enumerate(entries) if entry.evaluation is not None]
    figures = []
    if len(scored) > 1:
        clean = partial(percent_axis, "clean accuracy (%)")
        figures.append(_draw_against(scored, _clean_accuracy, clean, "Robust against clean accuracy"))
    swept = [(number, entry) for number, entry in scored if entry.gallery and entry.gallery.sweep]
    if swept:
        figures.append(_draw_by_eps(swept))
    figures += _draw_curves(scored)
    costly = [(number, entry) for number, entry in scored if any("gradients" in row for row in entry.history)]
    if len(costly) > 1:
        spent = partial(linear_axis, "gradients per example, whole training", low=0.0)
        figures.append(_draw_against(costly, sum_gradients, spent, "Robustness against the cost of training"))
    return figures


def draw_training(entries: Sequence[Entry]) -> list[Figure]:
    """Loss, accuracies, gradients and time by epoch, all runs on one chart each; then the FOSC of each run."""
    trained = [(number, entry) for number, entry in enumerate(entries) if entry.history]
    if not trained:
        return []
    figures = [
        _draw_by_epoch(
            trained, {"loss": "loss"}, "Training loss", "Mean over the epoch's examples of what is minimised."
        ),
        _draw_by_epoch(
            trained,
            {"validation_clean": "clean", "validation_robust": "robust"},
            "Accuracy on the validation split",
            "Clean, and under the validation attack.",
            percent=True,
        ),
        _draw_by_epoch(
            trained, {"gradients": "gradients"}, "Gradients per example", "Cost of the training attack in each epoch."
        ),
        _draw_by_epoch(trained, {"seconds": "seconds"}, "Seconds per epoch", "Attack, update and validation together."),
        *(_draw_distribution(entry, len(trained) > 1) for _, entry in trained),
    ]
    return [figure for figure in figures if figure is not None]


def draw_convergence(entry: Entry) -> list[Figure]:
    """FOSC at the end of each attack's searches, survivors against fallen; then FOSC and loss by step."""
    if entry.evaluation is None:
        return []
    ends = [_draw_ends(entry.evaluation, name) for name in entry.evaluation.rows]
    pictures = entry.gallery.pictures if entry.gallery else ()
    losses = [_draw_loss_by_step(pictures, name) for name in entry.evaluation.rows]
    return [figure for figure in (*ends, _draw_fosc_by_step(pictures), *losses) if figure is not None]


def sum_gradients(entry: Entry) -> float:
    """Gradients per example of the whole training."""
    return math.fsum(float(row.get("gradients") or 0.0) for row in entry.history)


def _clean_accuracy(entry: Entry) -> float:
    return math.nan if entry.evaluation is None else 100 * entry.evaluation.accuracy["clean"].value


def _draw_against(
    numbered: Sequence[tuple[int, Entry]],
    value: Callable[[Entry], float],
    axis: Callable[[Iterable[float]], Axis],
    title: str,
) -> Figure:
    """Worst-case accuracy with its interval against another value, whose axis is made for the values."""
    series = []
    for number, entry in numbered:
        if entry.evaluation is not None:
            worst = entry.evaluation.worst_case
            points = ([value(entry)], [100 * worst.value], number, [100 * worst.low], [100 * worst.high])
            series.append(Series(entry.name, *points, kind="marks"))
    x = axis([one.x[0] for one in series])
    y = percent_axis("worst-case accuracy (%)", [end for one in series for end in (*one.low, *one.high)])
    text = "Higher is more robust. Bars are 95 % intervals."
    return Figure(title, text, draw_chart(series, x, y, f"{title}: {_points_text(series)}"), draw_legend(series))


def _draw_by_eps(swept: Sequence[tuple[int, Entry]]) -> Figure:
    series, images = [], set()
    for number, entry in swept:
        if entry.gallery is not None and entry.gallery.sweep is not None:
            sweep = entry.gallery.sweep
            images.add(sweep.images)
            columns = ([100 * getattr(one, end) for one in sweep.accuracy] for end in ("value", "low", "high"))
            y, low, high = columns
            series.append(Series(entry.name, sweep.eps, y, number, low, high, kind="marked"))
    x = linear_axis("ε", [end for one in series for end in one.x], low=0.0)
    y_axis = linear_axis("accuracy (%)", [], low=0.0, high=100.0)
    many = " or ".join(map(str, sorted(images)))
    text = f"PGD-10 with a shrinking step on the first {many} test images; bands are 95 % intervals."
    alt = f"Accuracy by size of the perturbation: {_points_text(series)}"
    return Figure("Robustness against ε", text, draw_chart(series, x, y_axis, alt), draw_legend(series))


def _draw_curves(scored: Sequence[tuple[int, Entry]]) -> list[Figure]:
    """Robust accuracy against ε by the smallest perturbations, a figure for each norm, all curves of one as far."""
    evaluations = [(number, entry.name, entry.evaluation) for number, entry in scored if entry.evaluation is not None]
    first = [
        (number, name, evaluation, evaluation.curve(attack=attack))
        for number, name, evaluation in evaluations
        for attack in list_minimal(evaluation.rows)
    ]
    figures = []
    for norm in dict.fromkeys(curve.norm for *_, curve in first):
        chosen = [one for one in first if one[-1].norm == norm]
        eps = max((curve.eps for *_, curve in chosen), key=lambda sizes: sizes[-1])
        curves = [(number, name, whole.curve(eps, attack=curve.attack)) for number, name, whole, curve in chosen]
        figures.append(_draw_curves_of_norm(norm, curves))
    return figures


def _draw_curves_of_norm(norm: str, curves: Sequence[tuple[int, str, Curve]]) -> Figure:
    """Curves of one norm, each with the number and the name of its model."""
    attacks = list(dict.fromkeys(curve.attack for _, _, curve in curves))
    series = []
    for number, name, curve in curves:
        y, low, high = ([100 * getattr(one, end) for one in curve.accuracy] for end in ("value", "low", "high"))
        called = f"{name}, {curve.attack}" if len(attacks) > 1 else name
        series.append(Series(called, curve.eps, y, number * len(attacks) + attacks.index(curve.attack), low, high))
    symbol = NORMS[norm.lower()].symbol if norm.lower() in NORMS else norm
    x = linear_axis(f"ε ({symbol})", [], low=0.0, high=max(one.x[-1] for one in series))
    y_axis = linear_axis("robust accuracy (%)", [], low=0.0, high=100.0)
    own = dict.fromkeys(curve.own_eps for _, _, curve in curves)
    lines = Markup("").join(draw_vertical(x, eps, f"ε = {format_eps(eps)}") for eps in own)
    text = (
        f"Share of images for which neither {' nor '.join(attacks)} nor another attack of this norm found an "
        "adversarial image within ε. Bands are 95 % intervals."
    )
    title = f"Smallest {symbol} perturbations"
    ends = "; ".join(f"{one.name} ends at {format_number(one.y[-1])} % at ε = {one.x[-1]:.3g}" for one in series)
    drawn = draw_chart(series, x, y_axis, f"{title}: {ends}", lines)
    return Figure(title, text, drawn, draw_legend(series) if len(series) > 1 else "")


def _draw_by_epoch(
    numbered: Sequence[tuple[int, Entry]], measures: Mapping[str, str], title: str, text: str, percent: bool = False
) -> Figure | None:
    """Measures of several runs by epoch; each measure of each run has its own style."""
    series = []
    for number, entry in numbered:
        for place, (key, called) in enumerate(measures.items()):
            values = [
                math.nan if row.get(key) is None else float(row[key]) * (100 if percent else 1) for row in entry.history
            ]
            if any(map(math.isfinite, values)):
                style = number * len(measures) + place
                name = called if len(numbered) == 1 else f"{entry.name}, {called}" if len(measures) > 1 else entry.name
                epochs = [row.get("epoch", place) + 1 for place, row in enumerate(entry.history)]
                series.append(Series(name, epochs, values, style, kind="line"))
    if not series:
        return None
    x = _epoch_axis(max(one.x[-1] for one in series))
    label = "accuracy (%)" if percent else next(iter(measures.values()))
    values = [value for one in series for value in one.y]
    y = percent_axis(label, values) if percent else linear_axis(label, values, low=0.0)
    last = "; ".join(f"{one.name} ends at {format_number(one.y[-1])}" for one in series)
    many = draw_legend(series) if len(series) > 1 else Markup("")
    return Figure(title, text, draw_chart(series, x, y, f"{title} by epoch: {last}"), many)


def _epoch_axis(last: float) -> Axis:
    axis = linear_axis("epoch", [1.0, max(last, 2.0)], low=0.5, high=max(last, 2.0) + 0.5)
    ticks = tuple(tick for tick in axis.ticks if tick[0] >= 1 and tick[0] == int(tick[0]))
    return Axis(axis.label, axis.low, axis.high, ticks or ((1.0, "1"),))


def _draw_distribution(entry: Entry, several: bool) -> Figure | None:
    """The distribution of training examples' FOSC by epoch, with the threshold c_t that ended their searches."""
    gauge = _find_gauge(entry.configuration)
    key = f"{_GAUGES[gauge]}_percentiles"
    known = [row.get(key) for row in entry.history]
    values = np.array([value for column in known if column for value in column], dtype=float)
    if not len(values) or not (values > 0).any():
        return None
    top = float(np.quantile(values, 0.98))
    thresholds = [math.nan if row.get("threshold") is None else float(row["threshold"]) for row in entry.history]
    top = max([top, *(value for value in thresholds if math.isfinite(value))])
    every = -(-len(known) // _COLUMNS)
    x = _epoch_axis(len(known))
    if every > 1:  # the last column may stand for fewer epochs
        x = Axis(x.label, 0.5, 0.5 + every * -(-len(known) // every), x.ticks)
    y = linear_axis(_MEASURES[gauge], [0.0, top], low=0.0)
    edges = np.linspace(0.0, y.high, _ROWS + 1)
    columns = [_bin_percentiles(known[start : start + every], edges) for start in range(0, len(known), every)]
    cells = draw_heat(columns, Axis(x.label, 0, len(columns), ()), y)
    epochs = [place + 1 for place in range(len(known))]
    medians = [math.nan if not column else float(column[len(column) // 2]) for column in known]
    series = [Series("median", epochs, medians, 6)]
    if any(map(math.isfinite, thresholds)):
        series.append(Series("c_t, where searches stop", epochs, thresholds, 1, kind="steps"))
    title = "FOSC of training examples" + (f": {entry.name}" if several else "")
    alt = f"{title} by epoch: the median goes from {_span_text(medians)}"
    text = "How far the training attack ended from a stationary point. Darker: more examples; 0: converged."
    return Figure(title, text, draw_chart(series, x, y, alt, cells), draw_legend(series))


def _bin_percentiles(percentiles: Sequence[Any], edges: Any) -> list[float]:
    """The share of examples in each bin, from the percentiles of several epochs."""
    shares = np.zeros(len(edges) - 1)
    for values in percentiles:
        if values:
            below = np.interp(
                edges, np.maximum.accumulate(np.array(values, dtype=float)), np.linspace(0, 1, len(values))
            )
            below[0] = 0.0
            shares += np.diff(below)
    return [float(share) for share in shares / max(shares.sum(), 1e-12)]


def _find_gauge(configuration: Mapping[str, Any]) -> str:
    """The gauge in which c_t is measured."""
    value: Any = configuration
    for name in ("training", "strategy", "attack", "gauge"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) and value in _GAUGES else "exact"


def _draw_ends(evaluation: Evaluation, name: str) -> Figure | None:
    """Relative FOSC at the end of one attack's searches."""
    rows = evaluation.rows[name]
    known = np.isfinite(rows.relative_fosc) & (rows.zero_gradient != 1)
    if not known.any():
        return None
    x = log_axis("relative FOSC at the end of the search", _LOWEST, 1.0, below=True)
    edges = np.logspace(math.log10(_LOWEST), 0, _BINS + 1)
    shares, names = [], []
    for chosen, outcome in ((rows.correct, "survived"), (~rows.correct, "fell")):
        values = np.clip(rows.relative_fosc[known & chosen], _LOWEST, 1.0)
        shares.append([float(count) for count in np.histogram(values, edges)[0]])
        still = int((chosen & (rows.zero_gradient == 1)).sum())
        names.append(f"{outcome}: {int(chosen.sum()):,}" + (f", {still:,} with zero gradient" if still else ""))
    line = draw_vertical(x, UNCONVERGED, f"{UNCONVERGED:g}")
    loose = int((known & rows.correct & (rows.relative_fosc > UNCONVERGED)).sum())
    survivors = int(rows.correct.sum())
    text = f"{loose:,} of {survivors:,} searches of survivors had not converged (right of {UNCONVERGED:g})."
    alt = f"{display_name(name)}: {text}"
    drawn = draw_mirrored(shares[0], shares[1], x, (names[0], names[1]), alt, line)
    return Figure(display_name(name), text, drawn)


def _draw_fosc_by_step(pictures: Sequence[Picture]) -> Figure | None:
    """Median relative FOSC after each step, one line per attack and outcome."""
    names = list(dict.fromkeys(picture.attack for picture in pictures if len(picture.fosc) > 2))
    series = [one for number, name in enumerate(names) for one in _median_lines(pictures, name, "fosc", 2 * number)]
    if not series:
        return None
    finite = [value for one in series for value in one.y if math.isfinite(value) and value > 0]
    y = log_axis("relative FOSC", max(min(finite, default=_LOWEST), _LOWEST), 1.0)
    drawn = draw_chart(series, _step_axis(series), y, f"Relative FOSC by step: {_last_text(series)}", level=UNCONVERGED)
    text = "Medians of the gallery's images. Low values are converged."
    return Figure("Relative FOSC against step", text, drawn, draw_legend(series))


def _draw_loss_by_step(pictures: Sequence[Picture], name: str) -> Figure | None:
    """The median of an attack's own loss after each step, for survivors and for fallen images."""
    series = _median_lines(pictures, name, "loss", 0)
    if not series or len(series[0].x) < 3:
        return None
    finite = [value for one in series for value in one.y if math.isfinite(value)]
    y = linear_axis("loss", finite)
    if 0 < 30 * min(finite) < max(finite):  # a cross-entropy: much smaller for survivors than for fallen images
        y = log_axis("loss", max(min(finite), 1e-5 * max(finite)), max(finite))
    drawn = draw_chart(series, _step_axis(series), y, f"Loss of {display_name(name)} by step: {_last_text(series)}")
    text = "Medians of the gallery's images. A search whose loss still rises has not converged."
    return Figure(f"Loss against step: {display_name(name)}", text, drawn, draw_legend(series))


def _median_lines(pictures: Sequence[Picture], name: str, quantity: str, style: int) -> list[Series]:
    """The medians of an attack by step, over the images that survived it and those that fell."""
    series = []
    for place, outcome in enumerate(("survived", "fallen")):
        lines = [getattr(p, quantity) for p in pictures if p.attack == name and p.outcome == outcome and p.loss]
        if lines:
            median = _medians(np.array(lines, dtype=float))
            called = outcome if quantity == "loss" else f"{display_name(name)}, {outcome}"
            series.append(Series(called, range(len(median)), median, style + place))
    return series


def _step_axis(series: Sequence[Series]) -> Axis:
    return linear_axis("step", [end for one in series for end in (one.x[0], one.x[-1])], low=0.0)


def _medians(lines: Any) -> list[float]:
    """The median of each column's finite values; NaN where there is none."""
    columns = [column[np.isfinite(column)] for column in lines.T]
    return [float(np.median(column)) if len(column) else math.nan for column in columns]


def _span_text(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)] or [math.nan]
    return f"{format_number(known[0])} to {format_number(known[-1])}"


def _points_text(series: Sequence[Series]) -> str:
    return "; ".join(
        f"{one.name} "
        + ", ".join(f"({format_number(x)}, {format_number(y)})" for x, y in zip(one.x, one.y, strict=True))
        for one in series
    )


def _last_text(series: Sequence[Series]) -> str:
    return "; ".join(f"{one.name} ends at {format_number(one.y[-1])}" for one in series)
