"""Writes results/alarm.md: which signal foretells catastrophic overfitting, chosen on some trainings, tested on others.

python bench/overfitting_rule.py runs.jsonl --write results/alarm.md     # runs.jsonl: of bench/overfitting_alarm.py

A rule is a signal, a level and a rise: the alarm is raised at the end of a quarter of an epoch whose mean signal is at
least the level, and at least `rise` times its least mean so far. Level and rise of each signal are chosen on the groups
of CHOOSING, and the signal, too; the other groups, with other networks, only test.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from scipy.stats import beta

ROBUST, LOST, NEAR = 0.2, 0.5, 4  # a collapse loses half of an accuracy that was above 20 %; an epoch has four quarters
CHOOSING = ("plain", "dense")  # kinds of networks
Run = dict[str, Any]
Signal = Callable[[dict[str, Any]], float]
SIGNALS: dict[str, Signal] = {
    "relative FOSC": lambda q: q["relative"],
    "relative FOSC, 90th percentile": lambda q: q["relative_90"],
    "FOSC over the loss": lambda q: q["fosc"] / max(q["loss"], 1e-9),
    "FOSC": lambda q: q["fosc"],
    "FOSC, 90th percentile": lambda q: q["fosc_90"],
    "loss below the clean one (AAER, from x)": lambda q: q["fell"],
    "loss below that at the start (AAER)": lambda q: q["fell_start"],
    "1 − Frank–Wolfe distortion": lambda q: 1 - q["distortion"],
    "1 − cosine of the gradients at x and x'": lambda q: 1 - q["cosine"],
    "1 − gained over predicted loss": lambda q: 1 - (q["loss"] - q["loss_clean"]) / max(q["predicted"], 1e-9),
    "accuracy under the own attack": lambda q: q["own_accuracy"],
}
RISES = (1.0, 1.25, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Rule:
    """Raises the alarm at a value ≥ level and ≥ rise times the least so far."""

    signal: str
    level: float
    rise: float

    def first(self, run: Run) -> int | None:
        """The first quarter, from 0, at whose end it is raised."""
        least = float("inf")
        for number, quarter in enumerate(run["quarters"]):
            value = SIGNALS[self.signal](quarter)
            least = min(least, value)
            if value >= max(self.level, self.rise * least):
                return number
        return None


@dataclass(frozen=True)
class Probe:
    """Raises it where fewer of some images withstand PGD-10 than `share` of the most so far, once those were enough."""

    images: int
    share: float

    def first(self, run: Run) -> int | None:
        most = 0.0
        for number, quarter in enumerate(run["quarters"]):
            value = quarter["probe"][: self.images].count("1") / self.images
            if most > ROBUST and value < self.share * most:
                return number
            most = max(most, value)
        return None


def collapse(run: Run) -> int | None:
    """The first quarter whose accuracy under PGD-50 is below half of the best so far, once that was above 20 %."""
    best = 0.0
    for number, quarter in enumerate(run["quarters"]):
        if best > ROBUST and quarter["pgd"] < LOST * best:
            return number
        best = max(best, quarter["pgd"])
    return None


def verdict(run: Run, first: int | None) -> str:
    """What a first alarm is: hit, early (false), late (missed) or missed; false or quiet where nothing collapses."""
    at = collapse(run)
    if at is None:
        return "quiet" if first is None else "false"
    if first is None:
        return "missed"
    return "early" if first < at - NEAR else "late" if first > at + NEAR else "hit"


def count(rule: Rule | Probe, runs: Sequence[Run]) -> dict[str, int]:
    told = [verdict(run, rule.first(run)) for run in runs]
    return {name: told.count(name) for name in ("hit", "early", "late", "missed", "false", "quiet")}


def errors(found: dict[str, int]) -> int:
    return found["early"] + found["late"] + found["missed"] + found["false"]


def choose(signal: str, runs: Sequence[Run]) -> Rule:
    """The rule with the fewest errors on these runs; of equal ones the middle, by level, of the widest range."""
    values = sorted({SIGNALS[signal](q) for run in runs for q in run["quarters"]})
    levels = [values[index * (len(values) - 1) // 60] for index in range(61)]
    found = {(rise, level): errors(count(Rule(signal, level, rise), runs)) for rise, level in product(RISES, levels)}
    fewest = min(found.values())
    ranges = [[level for level in levels if found[rise, level] == fewest] for rise in RISES]
    rise, best = max(zip(RISES, ranges, strict=True), key=lambda pair: len(pair[1]))
    return Rule(signal, float(f"{best[len(best) // 2]:.3g}"), rise)


def choose_probe(images: int, runs: Sequence[Run]) -> Probe:
    shares = [share / 20 for share in range(4, 20)]
    found = [errors(count(Probe(images, share), runs)) for share in shares]
    best = [share for share, wrong in zip(shares, found, strict=True) if wrong == min(found)]
    return Probe(images, best[len(best) // 2])


def exact(hits: int, of: int) -> str:
    """A share with its exact 95 % interval (Clopper & Pearson 1934), in %."""
    if of == 0:
        return "–"
    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, of - hits + 1))
    high = 1.0 if hits == of else float(beta.ppf(0.975, hits + 1, of - hits))
    return f"{hits} of {of}: {100 * hits / of:.0f} % <sub>{100 * low:.0f}–{100 * high:.0f}</sub>"


def group(run: Run) -> str:
    return f"{run['data']}, {run['network']}, ε = {run['eps']:.3g}, {run['method']}"


def kind(run: Run) -> str:
    if collapse(run) is not None:
        return "collapsed"
    return "healthy" if max(q["pgd"] for q in run["quarters"]) > ROBUST else "never above 20 %"


def split(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs that choose, and those that test."""
    chooses = [run["network"].startswith(CHOOSING) for run in runs]
    return [r for r, c in zip(runs, chooses, strict=True) if c], [
        r for r, c in zip(runs, chooses, strict=True) if not c
    ]


def cells(rule: Rule | Probe, runs: Sequence[Run]) -> list[str]:
    found = count(rule, runs)
    collapses = sum(found[name] for name in ("hit", "early", "late", "missed"))
    wrong = found["false"] + found["early"]
    return [exact(found["hit"], collapses), exact(wrong, len(runs))]


def table(runs: Sequence[Run]) -> Iterator[str]:
    """A row per signal and probe: its rule, then hits and false alarms where it was chosen and where it is tested."""
    choosing, testing = split(runs)
    yield "| signal | rule | chosen: hits | false | tested: hits | false |"
    yield f"|{' --- |' * 6}"
    rules = sorted((choose(name, choosing) for name in SIGNALS), key=lambda rule: errors(count(rule, choosing)))
    for rule in rules:
        told = f"≥ {rule.level:g}" + (f" and ≥ {rule.rise:g} × the least" if rule.rise > 1 else "")
        yield f"| {' | '.join([rule.signal, told, *cells(rule, choosing), *cells(rule, testing)])} |"
    for images in (16, 32, 64):
        probe = choose_probe(images, choosing)
        told = f"< {probe.share:g} × the most"
        name = f"probe: PGD-10 on {images} images"
        yield f"| {' | '.join([name, told, *cells(probe, choosing), *cells(probe, testing)])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--write", type=Path)
    told = parser.parse_args()
    runs = [json.loads(line) for line in told.runs.read_text().splitlines()]
    for name, some in zip(("choosing", "testing"), split(runs), strict=True):
        print(
            name, len(some), {k: sum(kind(r) == k for r in some) for k in ("collapsed", "healthy", "never above 20 %")}
        )
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
