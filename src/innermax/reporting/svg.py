"""Charts as inline SVG in the page's colours; series also differ in dashes and marks."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup

WIDTH, HEIGHT = 380, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 40
_STYLES = 7  # colours, dashes and marks
_DASHES = ("", "7 4", "2 3", "9 3 2 3", "5 2", "1 2", "12 4")
_LEVELS = 8  # shades of a heat map
_ALIKE = 4.0  # points of accuracy that an axis spans at least


@dataclass(frozen=True)
class Axis:
    """A scale from low to high, with its ticks and its label."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """The place of a value, 0 at the low end and 1 at the high end; values beyond are placed at the end."""
        if self.logarithmic:
            value = max(value, self.low)
            way = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            way = (value - self.low) / (self.high - self.low)
        return min(max(way, 0.0), 1.0)


@dataclass(frozen=True)
class Series:
    """A line through points, a band around it, or marks with intervals.

    Attributes:
        name: in the legend.
        x, y: the points; a line breaks where y is NaN.
        style: number of its colour, dashes and mark.
        low, high: ends of a band, or with `kind` "marks" of an interval at each point.
        kind: "line", "marked" (a line with marks), "marks" or "steps" (a line that stays until the next point).
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    kind: Literal["line", "marked", "marks", "steps"] = "line"


def linear_axis(label: str, values: Iterable[float], *, low: float | None = None, high: float | None = None) -> Axis:
    """A linear axis around the finite values, or between low and high where given, with about five round ticks."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    bottom, top = (min(finite) if low is None else low), (max(finite) if high is None else high)
    if top <= bottom:
        top = bottom + (abs(bottom) or 1.0)
    step = _round_step((top - bottom) / 4)
    first = math.ceil(bottom / step - 1e-9) if low is not None else math.floor(bottom / step + 1e-9)
    last = math.floor(top / step + 1e-9) if high is not None else math.ceil(top / step - 1e-9)
    ticks = tuple((number * step, format_number(number * step)) for number in range(first, last + 1))
    return Axis(label, bottom if low is not None else first * step, top if high is not None else last * step, ticks)


def percent_axis(label: str, values: Iterable[float]) -> Axis:
    """A linear axis around percentages, within 0 and 100; it spans some points where they are alike."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 100.0]
    low, high = min(finite), max(finite)
    if high - low < _ALIKE:
        low = min(max((low + high - _ALIKE) / 2, 0.0), 100.0 - _ALIKE)
        high = low + _ALIKE
    return linear_axis(label, [low, high])


def log_axis(label: str, low: float, high: float, below: bool = False) -> Axis:
    """A logarithmic axis with powers of ten; below: its low end stands for everything smaller, and zero."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = max(1, -(-(last - first) // 5))
    ticks = [(10.0**power, _power(power)) for power in range(first, last + 1, every)]
    if below:
        ticks[0] = (ticks[0][0], "≤" + ticks[0][1])
    return Axis(label, 10.0**first, 10.0**last, tuple(ticks), logarithmic=True)


def draw_chart(
    series: Sequence[Series], x: Axis, y: Axis, alt: str, under: str = "", level: float | None = None
) -> Markup:
    """Lines and marks on two axes.

    alt: its text for those who do not see it. under: drawn first. level: a value of y with a dashed line.
    """
    parts = [under]
    if level is not None:
        height = _y(y, level)
        line = '<line class="level" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="tick" x="{}" y="{}">{}</text>'
        parts.append(
            Markup(line).format(
                _LEFT, WIDTH - _RIGHT, _n(height), _n(height), _LEFT + 4, _n(height - 4), format_number(level)
            )
        )
    parts += [_draw_band(one, x, y) for one in series if one.low and one.kind != "marks"]
    parts += [_draw_series(one, x, y) for one in series]
    return _wrap_svg(alt, _frame(x, y), *parts)


def draw_heat(columns: Sequence[Sequence[float]], x: Axis, y: Axis) -> Markup:
    """A heat map for `draw_chart` to draw under lines: a column per unit of x, bottom row first; darker is more."""
    most = max((value for column in columns for value in column), default=0.0) or 1.0
    width = (WIDTH - _LEFT - _RIGHT) / (x.high - x.low)
    height = (HEIGHT - _TOP - _BOTTOM) / max(len(columns[0]) if columns else 1, 1)
    paths: dict[int, list[str]] = {}
    for place, column in enumerate(columns):
        for row, value in enumerate(column):
            shade = math.ceil(_LEVELS * math.sqrt(value / most) - 1e-9)
            if shade > 0:
                left, top = _LEFT + place * width, HEIGHT - _BOTTOM - (row + 1) * height
                paths.setdefault(shade, []).append(f"M{_n(left)} {_n(top)}h{_n(width)}v{_n(height)}h-{_n(width)}z")
    cells = [
        Markup('<path class="heat" fill-opacity="{}" d="{}"/>').format(_n(0.85 * shade / _LEVELS), "".join(drawn))
        for shade, drawn in sorted(paths.items())
    ]
    return Markup("").join(cells)


def draw_mirrored(
    up: Sequence[float], down: Sequence[float], x: Axis, names: tuple[str, str], alt: str, over: str = ""
) -> Markup:
    """Two histograms over bins of equal width on x: one upwards, the other, hollow, downwards. over: drawn last."""
    tallest = max(max(up, default=0.0), max(down, default=0.0), 1e-9)
    tops = [max(*values, 0.12 * tallest) for values in (up, down)]  # room for the name of one that is empty
    unit = (HEIGHT - _TOP - _BOTTOM - 36) / sum(tops)
    middle = _TOP + 18 + unit * tops[0]
    wide = (WIDTH - _LEFT - _RIGHT) / max(len(up), 1)
    bars = []
    for values, sign, look in ((up, -1, "up"), (down, 1, "down")):
        drawn = []
        for place, value in enumerate(values):
            if value > 0:
                tall = unit * value
                left = _LEFT + place * wide + 0.5
                drawn.append(f"M{_n(left)} {_n(middle)}v{_n(sign * tall)}h{_n(wide - 1)}v{_n(-sign * tall)}z")
        bars.append(Markup('<path class="bar {}" d="{}"/>').format(look, "".join(drawn)))
    words = Markup('<text class="name" x="{0}" y="{1}">{2}</text><text class="name" x="{0}" y="{3}">{4}</text>')
    named = words.format(_LEFT + 4, _TOP + 10, names[0], HEIGHT - _BOTTOM - 5, names[1])
    scale = Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>')
    scales = [
        scale.format(_LEFT - 6, _n(middle + sign * unit * max(values) + 4), format_number(max(values)))
        for values, sign in ((up, -1), (down, 1))
        if max(values, default=0.0) > 0
    ]
    zero = Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
        _LEFT, WIDTH - _RIGHT, _n(middle), _n(middle)
    )
    return _wrap_svg(alt, _x_frame(x), *bars, zero, named, *scales, over)


def draw_vertical(x: Axis, value: float, label: str) -> Markup:
    """A vertical dashed line at a value of x, with its label."""
    left = _n(_x(x, value))
    text = '<line class="level" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/><text class="tick" x="{3}" y="{4}">{5}</text>'
    return Markup(text).format(left, _TOP, HEIGHT - _BOTTOM, _n(_x(x, value) + 4), _TOP + 10, label)


def draw_interval(value: float, low: float, high: float, style: int) -> Markup:
    """A share with its interval on a bar from 0 to 1, for a cell of a table; style: number of its colour."""
    text = (
        '<svg class="interval s{}" viewBox="0 0 200 16" aria-hidden="true"><path class="rail" d="M5 8H195"/>'
        '<path class="rail" d="M5 4v8M100 5v6M195 4v8"/><path class="spread" d="M{} 8H{}"/>'
        '<circle class="dot" cx="{}" cy="8" r="4"/></svg>'
    )
    low, high, value = (5 + 190 * share for share in (low, high, value))
    return Markup(text).format(style % _STYLES, _n(low), _n(high), _n(value))


def draw_spark(values: Sequence[float], style: int, logarithmic: bool = False) -> Markup:
    """A line without axes, for a gallery."""
    finite = [value for value in values if math.isfinite(value)]
    if logarithmic:
        values = [math.log10(max(value, 1e-5)) if math.isfinite(value) else value for value in values]
        finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Markup("")
    low, high = min(finite), max(finite)
    span = high - low or 1.0
    across = 96 / max(len(values) - 1, 1)
    points = [(2 + across * step, 24 - 20 * (value - low) / span) for step, value in enumerate(values)]
    return Markup(
        '<svg class="spark" viewBox="0 0 100 28" preserveAspectRatio="none" aria-hidden="true">'
        '<path class="line s{}" d="{}"/></svg>'
    ).format(style % _STYLES, _path([point for point in points if math.isfinite(point[1])]))


def draw_legend(series: Sequence[Series]) -> Markup:
    """The names of series with their dashes and marks."""
    items = []
    for one in series:
        line = (
            ""
            if one.kind == "marks"
            else Markup('<path class="line s{}" stroke-dasharray="{}" d="M1 7H31"/>').format(
                one.style % _STYLES, _dashes(one)
            )
        )
        wide = 14 if one.kind == "marks" else 32
        mark = _draw_mark(wide / 2, 7, one.style) if one.kind in ("marks", "marked") else ""
        swatch = Markup('<svg viewBox="0 0 {0} 14" width="{0}" height="14" aria-hidden="true">{1}{2}</svg>')
        items.append(Markup("<li>{} {}</li>").format(swatch.format(wide, line, mark), one.name))
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def format_number(value: float) -> str:
    """A number in at most three digits, or as a whole number from 1,000 on; with a minus sign, not a hyphen."""
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "−")


def _wrap_svg(alt: str, *parts: str) -> Markup:
    text = '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    return Markup(text).format(WIDTH, HEIGHT, alt, Markup("").join(parts))


def _frame(x: Axis, y: Axis) -> Markup:
    """The grid, the ticks and the labels of both axes."""
    parts = [_x_frame(x)]
    for value, text in y.ticks:
        height = _n(_y(y, value))
        line = '<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>'
        words = '<text class="tick" x="{3}" y="{4}" text-anchor="end">{5}</text>'
        parts.append(Markup(line + words).format(_LEFT, WIDTH - _RIGHT, height, _LEFT - 6, _n(_y(y, value) + 4), text))
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    label = '<text class="label" transform="translate(12 {}) rotate(-90)" text-anchor="middle">{}</text>'
    return Markup("").join([*parts, Markup(label).format(_n(middle), y.label)])


def _x_frame(x: Axis) -> Markup:
    parts = [
        Markup('<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(
            _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM
        )
    ]
    for value, text in x.ticks:
        place = _n(_x(x, value))
        line = '<line class="axis" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>'
        words = '<text class="tick" x="{0}" y="{3}" text-anchor="middle">{4}</text>'
        foot = HEIGHT - _BOTTOM
        parts.append(Markup(line + words).format(place, foot, foot + 4, foot + 16, text))
    label = '<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>'
    return Markup("").join([*parts, Markup(label).format((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 5, x.label)])


def _draw_series(one: Series, x: Axis, y: Axis) -> Markup:
    """A series' line and marks."""
    points = [(_x(x, across), _y(y, value)) for across, value in zip(one.x, one.y, strict=True)]
    parts: list[str] = []
    if one.kind == "marks" and one.low:
        ends = zip(points, one.low, one.high, strict=True)
        lines = "".join(f"M{_n(p[0])} {_n(_y(y, low))}V{_n(_y(y, high))}" for p, low, high in ends)
        parts.append(Markup('<path class="line s{}" d="{}"/>').format(one.style % _STYLES, lines))
    if one.kind != "marks":
        for run in _split_known(points):
            path = _path(_stairs(run) if one.kind == "steps" else run)
            text = '<path class="line s{}" stroke-dasharray="{}" d="{}"/>'
            parts.append(Markup(text).format(one.style % _STYLES, _dashes(one), path))
    lone = len(points) == 1  # a line of one point would not be seen
    if one.kind in ("marks", "marked") or lone:
        parts += [_draw_mark(*point, one.style) for point in points if math.isfinite(point[1])]
    return Markup("<g><title>{}</title>{}</g>").format(one.name, Markup("").join(parts))


def _draw_band(one: Series, x: Axis, y: Axis) -> Markup:
    places = [_x(x, across) for across in one.x]
    top = [(place, _y(y, value)) for place, value in zip(places, one.high, strict=True)]
    bottom = [(place, _y(y, value)) for place, value in zip(places, one.low, strict=True)]
    whole = [point for point in [*top, *reversed(bottom)] if math.isfinite(point[1])]
    return Markup('<path class="band s{}" d="{}z"/>').format(one.style % _STYLES, _path(whole))


def _draw_mark(left: float, top: float, style: int) -> Markup:
    """A filled mark: circle, square, triangle, diamond, triangle upside down, plus or cross."""
    shapes = (
        "m-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0",
        "m-4-4h8v8h-8z",
        "m0-5.5l5 9h-10z",
        "m0-5.5l5.5 5.5l-5.5 5.5l-5.5-5.5z",
        "m0 5.5l5-9h-10z",
        "m-1.7-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
        "m0-2.4l2.6-2.6l2.4 2.4l-2.6 2.6l2.6 2.6l-2.4 2.4l-2.6-2.6l-2.6 2.6l-2.4-2.4l2.6-2.6l-2.6-2.6l2.4-2.4z",
    )
    number = style % _STYLES
    return Markup('<path class="mark s{}" d="M{} {}{}"/>').format(number, _n(left), _n(top), shapes[number])


def _dashes(one: Series) -> str:
    return _DASHES[one.style % _STYLES]


def _split_known(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The points in groups, split where y is not finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of a step function: each height lasts until the next point."""
    stairs = [points[0]]
    for before, after in pairwise(points):
        stairs += [(after[0], before[1]), after]
    return stairs


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_n(left)} {_n(top)}" for left, top in points)


def _x(axis: Axis, value: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * axis.share(value)


def _y(axis: Axis, value: float) -> float:
    if not math.isfinite(value):
        return math.nan
    return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * axis.share(value)


def _n(value: float) -> str:
    """A coordinate with one decimal."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"


def _round_step(rough: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    scale = 10.0 ** math.floor(math.log10(rough))
    return next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= rough * 0.999)


def _power(power: int) -> str:
    if -3 <= power <= 3:
        return f"{10.0**power:g}"
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
