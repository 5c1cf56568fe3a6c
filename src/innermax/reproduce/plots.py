"""Pictures: each function draws an artifact's numbers on an empty figure."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008): distinct without colour vision; lines also differ in their dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKS = ("o", "s", "^", "D", "v", "P", "X")
_POINTS = 300
Values = npt.NDArray[np.floating[Any]]


def draw_figure_1(numbers: Mapping[str, Any], figure: "Figure") -> None:
    """Accuracy and loss by FOSC; FOSC and loss by step."""
    figure.set_size_inches(10, 4)
    left, right = figure.subplots(1, 2)
    if numbers["bins"]:
        middles = [(row["low"] + row["high"]) / 2 for row in numbers["bins"]]
        _two_scales(
            left,
            middles,
            [[100 * row["accuracy"] for row in numbers["bins"]]],
            [[row["loss"] for row in numbers["bins"]]],
            weights=[row["examples"] for row in numbers["bins"]],
        )
        left.set(xlabel="FOSC", title="(a) by FOSC; area: number of examples")
        left.set_ylabel("accuracy (%)", color=COLOURS[0])
    if numbers["steps"]:
        fosc, loss = np.array(numbers["steps"]["fosc"]).T, np.array(numbers["steps"]["loss"]).T
        _two_scales(right, range(fosc.shape[1]), fosc, loss)
        right.set(xlabel="step", title=f"(b) {len(fosc)} examples, step by step")
        right.set_ylabel("FOSC", color=COLOURS[0])
        right.xaxis.get_major_locator().set_params(integer=True)


def draw_figure_2(numbers: Mapping[str, Any], figure: "Figure") -> None:
    """Cross-tests, FOSC and loss: by step size on the left, by number of steps on the right."""
    figure.set_size_inches(10, 10)
    axes = figure.subplots(3, 2)
    letters = iter("abcdef")
    for column, (group, rows) in enumerate(numbers.items()):
        known = {name: row for name, row in rows.items() if row is not None}
        for number, attack in enumerate(rows):
            values = [100 * row["accuracy"][attack] for row in known.values()]
            _line(axes[0, column], range(len(known)), values, f"attacked with {attack}", number, marks=True)
        axes[0, column].set_xticks(range(len(known)), list(known))
        axes[0, column].set(xlabel=f"trained with ({group})", ylabel="accuracy (%)")
        _span_five_points(axes[0, column])
        for row, quantity in enumerate(("fosc", "loss"), 1):
            draw_densities(axes[row, column], {name: values[quantity] for name, values in known.items()})
            axes[row, column].set_xlabel({"fosc": "FOSC", "loss": "loss"}[quantity])
    for axis in axes.flat:
        axis.set_title(f"({next(letters)})", loc="left")
        _finish_axis(axis)


def draw_figure_3(numbers: Mapping[str, Any], figure: "Figure") -> None:
    """FOSC by epoch of two training attacks; robustness of PGD and FGSM-PGD; FOSC by epoch of FGSM-PGD."""
    figure.set_size_inches(12, 4)
    first, second, third = figure.subplots(1, 3)
    known = {name: row for name, row in numbers.items() if row is not None}
    plain = {n: row for n, row in known.items() if n != "FGSM-PGD"}
    by_epoch = {f"{name}, {epoch}": v for name, row in plain.items() for epoch, v in row["fosc"].items()}
    draw_densities(first, _drop_extremes(by_epoch))
    draw_densities(third, _drop_extremes(known.get("FGSM-PGD", {}).get("fosc", {})))
    attacks = next(iter(known.values()))["accuracy"] if known else {}
    width = 0.8 / max(len(known), 1)
    for number, (name, row) in enumerate(known.items()):
        places = np.arange(len(attacks)) + (number - (len(known) - 1) / 2) * width
        heights = [100 * value for value in row["accuracy"].values()]
        second.bar(
            places, heights, width, label=name, color=COLOURS[number], hatch=("", "//", "..")[number], edgecolor="w"
        )
    second.set_xticks(
        range(len(attacks)), [{"clean": "Clean", "cw-30": "C&W∞"}.get(name, name.upper()) for name in attacks]
    )
    second.margins(y=0.3)  # room for the legend
    second.set(ylabel="accuracy (%)", title="(b) robustness")
    first.set(xlabel="FOSC (ball)", title="(a) PGD-ε/4 and PGD-ε/8")
    third.set(xlabel="FOSC (ball)", title="(c) FGSM first, then PGD")
    for axis in (first, second, third):
        _finish_axis(axis)


def draw_figure_4(numbers: Mapping[str, Any], figure: "Figure") -> None:
    """Accuracy under PGD-10 against the ε of testing, and of training and testing."""
    figure.set_size_inches(10, 4)
    for axis, moment, said in zip(figure.subplots(1, 2), ("test", "train"), ("testing", "training"), strict=True):
        for number, (name, row) in enumerate(numbers.items()):
            own = {float(key.split()[1]): v for key, v in row.items() if key.startswith(moment) and v is not None}
            if own:
                sizes, values = [255 * size for size in own], [100 * value for value in own.values()]
                _line(axis, sizes, values, name, number, marks=True)
        axis.set(xlabel=f"{said} ε · 255", ylabel="accuracy (%)", title=f"({'ab'[said == 'training']}) {said} ε")
        _span_five_points(axis)
        _finish_axis(axis)


def draw_figure_5(numbers: Mapping[str, Any], figure: "Figure") -> None:
    """FOSC in three epochs of each strategy."""
    figure.set_size_inches(12, 4)
    for letter, axis, (name, epochs) in zip("abc", figure.subplots(1, 3), numbers.items(), strict=True):
        draw_densities(axis, _drop_extremes(epochs or {}))
        axis.set(xlabel="FOSC (ball)", title=f"({letter}) {name}")
        _finish_axis(axis)


def draw_frontier(found: Sequence[tuple[int, str, float, tuple[float, float, float]]], figure: "Figure") -> None:
    """Robust accuracy against gradients spent.

    found: of each (number of its colour and mark, name, gradients, (mean, low, high)).
    """
    figure.set_size_inches(8, 5)
    axis = figure.subplots()
    for number, name, spent, (mean, low, high) in found:
        look: dict[str, Any] = {
            "color": COLOURS[number % 7],
            "marker": MARKS[number % 7],
            "capsize": 4,
            "markersize": 8,
        }
        axis.errorbar([spent], [mean], [[mean - low], [high - mean]], linestyle="", label=name, **look)
    axis.set(xlabel="input gradients per training image, whole training", ylabel="robust accuracy, guided attack (%)")
    axis.set_xlim(left=0)
    _finish_axis(axis)


def draw_methods(found: Mapping[str, Mapping[str, tuple[float, tuple[float, float, float]]]], figure: "Figure") -> None:
    """Robust accuracy against gradients spent, of each data set.

    found: by the data's title and the method's name, (gradients, (mean, low, high)).
    """
    figure.set_size_inches(6 * len(found), 5.5)
    names = list(dict.fromkeys(name for points in found.values() for name in points))
    for axis, (title, points) in zip(np.atleast_1d(figure.subplots(1, len(found))), found.items(), strict=True):
        for name, (spent, (mean, low, high)) in points.items():
            number = names.index(name)
            look: dict[str, Any] = {"color": COLOURS[number % 7], "marker": MARKS[number // 7 % 7]}
            axis.errorbar([spent], [mean], [[mean - low], [high - mean]], linestyle="", capsize=3, label=name, **look)
        axis.set(title=title, xlabel="input gradients per training image, whole training")
        axis.set_ylabel("robust accuracy, AutoAttack (%)")
        axis.set_xscale("symlog", linthresh=10)  # Free has none beside its updates' own
        ticks = (0, 5, 10, 20, 50, 100, 200)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlim(-1, 250)
        _finish_axis(axis)


def draw_by_epoch(runs: Mapping[str, Mapping[str, Any]], figure: "Figure") -> None:
    """Accuracy on the validation split and the 90th percentile of FOSC after each epoch, one line per seed."""
    figure.set_size_inches(10, 4)
    left, right = figure.subplots(1, 2)
    for number, (name, run) in enumerate(runs.items()):
        for axis, quantity, unit in ((left, "validation", 100), (right, "fosc", 1)):
            for seed, history in enumerate(run[quantity]):
                values = [np.nan if value is None else unit * value for value in history]
                _line(axis, range(1, len(history) + 1), values, name if seed == 0 else "", number)
    left.set_ylabel("validation accuracy, training attack (%)")
    right.set_ylabel("FOSC of training images, 90th percentile")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.set_xlabel("epoch")
        axis.locator_params(axis="x", integer=True)
        _finish_axis(axis)


def _drop_extremes(percentiles: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Percentiles without the first and the last, which are single examples and not a hundredth of all."""
    return {name: values[1:-1] for name, values in percentiles.items()}


def estimate_density(values: Values, places: Values) -> Values:
    """The Gaussian kernel density estimate of a sample (N,) at places (M,), (M,) (Parzen 1962).

    N ≥ 2, not all values equal. The bandwidth is Scott's (1992): N^(−1/5) standard deviations.
    """
    width = len(values) ** -0.2 * values.std(ddof=1)
    distances = (places[:, None] - values) / width
    density: Values = np.exp(-(distances**2) / 2).mean(1) / (width * math.sqrt(2 * math.pi))
    return density


def draw_densities(axis: "Axes", groups: Mapping[str, Sequence[float]]) -> None:
    """Draws kernel density estimates of several samples ≥ 0 on one axis."""
    samples = {name: np.array([v for v in values if v is not None], dtype=float) for name, values in groups.items()}
    spread = {name: values for name, values in samples.items() if len(values) > 1 and values.std() > 0}
    if spread:
        largest = max(float(np.quantile(values, 0.98)) for values in spread.values())
        for number, (name, values) in enumerate(spread.items()):
            places = np.linspace(0, 1.1 * largest, _POINTS)
            _line(axis, places, estimate_density(values, places), name, number)
    axis.set_ylabel("density")
    axis.locator_params(axis="x", nbins=5)
    axis.set_ylim(bottom=0)


def _line(axis: "Axes", x: Any, y: Any, label: str, number: int, marks: bool = False) -> None:
    style: dict[str, Any] = {"color": COLOURS[number % 7], "linestyle": DASHES[number % 7], "linewidth": 1.8}
    axis.plot(list(x), list(y), label=label, marker=MARKS[number % 7] if marks else None, markersize=5, **style)


def _span_five_points(axis: "Axes") -> None:
    """Makes an accuracy's axis span at least five points: smaller differences are chance on a thousand images."""
    low, high = axis.get_ylim()
    missing = max(0.0, 5.0 - (high - low)) / 2
    axis.set_ylim(low - missing, high + missing)


def _finish_axis(axis: "Axes") -> None:
    """Adds a light grid and a legend, and removes the box above and right; writes "not run" where there is no data."""
    axis.spines[["top", "right"]].set_visible(False)
    if not axis.has_data():
        axis.text(0.5, 0.5, "not run", transform=axis.transAxes, horizontalalignment="center", color="0.4")
        axis.set(xticks=[], yticks=[])
        return
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)


def _two_scales(axis: "Axes", x: Any, left: Any, right: Any, weights: Sequence[float] | None = None) -> None:
    """Draws lines on the left scale, and dashed ones on the right scale, the loss.

    weights: of each place, shown as the area of a mark.
    """
    other = axis.twinx()
    for scale, lines, color, dash in ((axis, left, COLOURS[0], "-"), (other, right, COLOURS[1], "--")):
        for values in lines:
            scale.plot(list(x), list(values), color=color, linewidth=1.2, linestyle=dash, alpha=0.55)
            if weights is not None:
                areas = [150 * weight / max(weights) for weight in weights]
                scale.scatter(list(x), list(values), areas, color=color, alpha=0.8)
    other.set_ylabel("loss (dashed)", color=COLOURS[1])
    axis.spines["top"].set_visible(False)
    other.spines["top"].set_visible(False)
