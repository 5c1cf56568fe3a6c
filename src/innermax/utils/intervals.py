"""Intervals for accuracies, for the difference of two on the same examples, and for means over runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev


@dataclass(frozen=True)
class Accuracy:
    """A share of correct examples, `value` in [0, 1], with its 95 % Wilson interval [low, high]."""

    correct: int
    total: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval [low, high] that holds the truth with probability `confidence`."""

    estimate: float
    low: float
    high: float
    confidence: float


def accuracy(correct: int, total: int) -> Accuracy:
    """The accuracy of correct out of total. Raises ValueError unless 0 ≤ correct ≤ total and total ≥ 1."""
    return Accuracy(correct, total, correct / max(total, 1), *wilson(correct, total))


def wilson(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval (low, high) of a share, both in [0, 1] (Wilson 1927).

    Raises ValueError unless 0 ≤ correct ≤ total, total ≥ 1 and 0 < confidence < 1.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"wilson needs 0 ≤ correct ≤ total and total ≥ 1, got {correct} of {total}")
    z = _normal_quantile(confidence)
    share, spread = correct / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    # At none and at all the interval ends exactly at 0 and 1; the formula gets there but for rounding.
    return (0.0 if correct == 0 else middle - half, 1.0 if correct == total else middle + half)


def paired_difference(only_first: int, only_second: int, total: int, confidence: float = 0.95) -> Interval:
    """The accuracy of a first classifier minus a second's on the same examples, in [−1, 1] (Agresti & Min 2005).

    only_first, only_second: how many of total examples only the first, only the second has right.
    Raises ValueError for negative counts, more of them than total, total < 1, and confidence outside (0, 1).
    """
    if min(only_first, only_second) < 0 or only_first + only_second > total or total < 1:
        raise ValueError(f"counts must be ≥ 0 and add up to at most total, got {only_first}, {only_second} of {total}")
    # Wald's interval after 1/2 is added to each of the four cells, Agresti & Min's recommendation: unlike Wald's own it
    # holds its level where few examples differ; Newcombe's (1998) method 10 does too, at twice the formulas.
    cells, discordant = total + 2, only_first + only_second + 1
    middle = (only_first - only_second) / cells
    half = _normal_quantile(confidence) * math.sqrt(discordant / cells - middle**2) / math.sqrt(cells)
    estimate = (only_first - only_second) / total
    return Interval(estimate, max(middle - half, -1.0), min(middle + half, 1.0), confidence)


def student(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of independent values and Student's interval of it.

    Raises ValueError for fewer than two values and for a confidence outside (0, 1).
    """
    if len(values) < 2:
        raise ValueError(f"an interval over values needs at least two of them, got {len(values)}")
    half = _student_quantile(confidence, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values), fmean(values) - half, fmean(values) + half, confidence)


def _student_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| ≤ t) = confidence, by bisection over the angle of `_student_share`."""
    _check_confidence(confidence)
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _student_share(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(middle)


def _student_share(angle: float, degrees: int) -> float:
    """P(|T| ≤ √degrees tan angle) of Student's T (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    sine, cosine, odd = math.sin(angle), math.cos(angle), degrees % 2
    term = cosine if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for power in range(2 + odd, degrees - 1, 2):
        term *= (power - 1) / power * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _normal_quantile(confidence: float) -> float:
    _check_confidence(confidence)
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence!r}")
