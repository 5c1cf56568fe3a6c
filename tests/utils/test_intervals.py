"""Wilson's interval, the paired one and Student's."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, t

from innermax.utils.intervals import paired_difference, student, wilson


@pytest.mark.parametrize("total", [1, 10, 1000])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_wilson_is_scipys(total, confidence):
    for correct in {0, 1, total // 3, total - 1, total}:
        expected = binomtest(correct, total).proportion_ci(confidence, method="wilson")
        assert wilson(correct, total, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson(0, total)[0] == 0
    assert wilson(total, total)[1] == 1


def test_impossible_counts_are_refused():
    for correct, total in [(-1, 3), (4, 3), (0, 0)]:
        with pytest.raises(ValueError, match=f"got {correct} of {total}"):
            wilson(correct, total)
    for counts in [(-1, 0, 3), (2, 2, 3), (0, 0, 0)]:
        with pytest.raises(ValueError, match="counts must be"):
            paired_difference(*counts)
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\)"):
            wilson(1, 2, confidence)
        with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\)"):
            student([1.0, 2.0], confidence)


def test_the_paired_interval_by_hand():
    # Cells (20, 12, 2, 16) and 1/2 each: n = 52, difference 10/52, variance (15/52 − (10/52)²)/52.
    found = paired_difference(12, 2, 50)
    half = 1.959963984540054 * math.sqrt((15 / 52 - (10 / 52) ** 2) / 52)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.2, 10 / 52 - half, 10 / 52 + half))
    assert paired_difference(3, 0, 3).high == 1
    assert paired_difference(0, 3, 3).low == -1


@pytest.mark.parametrize(
    ("first", "second", "total"), [(0.05, 0.05, 50), (0.2, 0.1, 50), (0.02, 0.01, 1000), (0.15, 0.1, 1000)]
)
def test_the_paired_interval_covers(first, second, total):
    generator = np.random.default_rng(0)
    draws = generator.multinomial(total, (first, second, 1 - first - second), size=4000)
    intervals = [paired_difference(int(one), int(two), total) for one, two, _ in draws]
    covered = np.mean([interval.low <= first - second <= interval.high for interval in intervals])
    assert 0.94 <= covered <= 0.985


@pytest.mark.parametrize("confidence", [0.01, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 6, 29, 30, 999])
def test_students_interval_is_scipys(degrees, confidence):
    values = np.random.default_rng(degrees).normal(3.0, 2.0, degrees + 1)
    found = student(values.tolist(), confidence)
    half = t.ppf((1 + confidence) / 2, degrees) * values.std(ddof=1) / math.sqrt(degrees + 1)
    assert found.estimate == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-9, abs=1e-9)
