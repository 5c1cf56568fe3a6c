"""Axes and charts."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from innermax.reporting import svg


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_a_linear_axis_holds_its_values(values):
    axis = svg.linear_axis("x", values)
    rounding = 1e-6 * (axis.high - axis.low)
    assert axis.low <= min(values) + rounding
    assert axis.high >= max(values) - rounding
    assert 2 <= len(axis.ticks) <= 9
    shares = [axis.share(value) for value in sorted(values)]
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=4))
@example([100.0, 100.0])
@example([0.0])
@example([97.2])
def test_an_axis_of_percentages_holds_its_values_and_no_more_than_there_are(values):
    axis = svg.percent_axis("x", values)
    assert 0 <= axis.low < axis.high <= 100 + 1e-9
    assert axis.low <= min(values) + 1e-9
    assert axis.high >= max(values) - 1e-9
    assert 2 <= len(axis.ticks) <= 9


def test_axes_by_hand():
    assert [tick for tick, _ in svg.linear_axis("x", [], low=0, high=100).ticks] == [0, 25, 50, 75, 100]
    axis = svg.log_axis("x", 2e-4, 0.5, below=True)
    assert (axis.low, axis.high) == (pytest.approx(1e-4), 1.0)
    assert [text for _, text in axis.ticks] == ["≤10⁻⁴", "0.001", "0.01", "0.1", "1"]
    assert axis.share(0.0) == 0
    assert axis.share(0.01) == pytest.approx(0.5)


def test_the_numbers_of_an_axis_stand_beside_it():
    """Of the vertical one to its left, each at the height of its line; of the horizontal one below."""
    x, y = svg.linear_axis("x", [0, 1]), svg.linear_axis("y", [-2, 7])
    drawn = svg.draw_chart([svg.Series("a", [0, 1], [-2, 7], 0)], x, y, "")
    lines = re.findall(r'class="grid" x1="([\d.]+)" x2="[\d.]+" y1="([\d.]+)"', drawn)
    numbers = re.findall(r'class="tick" x="([\d.]+)" y="([\d.]+)" text-anchor="end">([^<]+)', drawn)
    assert [text for *_, text in numbers] == [text for _, text in y.ticks] == ["−2.5", "0", "2.5", "5", "7.5"]
    for (left, height), (right, base, _) in zip(lines, numbers, strict=True):
        assert 2 <= float(left) - float(right) <= 10
        assert 2 <= float(base) - float(height) <= 6, "half of a digit's height below the line"
    floor = max(float(height) for _, height in lines)
    assert all(float(low) > floor for low in re.findall(r'y="([\d.]+)" text-anchor="middle">', drawn))
    left, right = map(float, re.search(r'class="axis" x1="([\d.]+)" x2="([\d.]+)"', drawn).groups())
    assert float(re.search(r'class="label" x="([\d.]+)"', drawn)[1]) == (left + right) / 2


def test_series_differ_without_colour():
    """Seven of them, each with dashes and a mark of its own."""
    series = [svg.Series(str(n), [0, 1], [n, n], n, kind="marked") for n in range(svg._STYLES)]
    x, y = svg.linear_axis("x", [0, 1]), svg.linear_axis("y", [0, 7])
    drawn = [svg.draw_chart([one], x, y, "") for one in series]
    assert len({re.search(r'stroke-dasharray="([^"]*)"', one)[1] for one in drawn}) == svg._STYLES
    assert len({re.search(r'class="mark s\d" d="M[\d.]+ [\d.]+([^"]*)"', one)[1] for one in drawn}) == svg._STYLES
