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
from statistics import median
from typing import Any

from scipy.stats import beta

from innermax.training.alarm import LEVEL, RISE

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
ENOUGH = 10  # collapses, from which on rules are chosen
KINDS = ("collapsed", "healthy", "never above 20 %")
HEAD = """# The alarm for catastrophic overfitting

`python bench/overfitting_alarm.py` and `bench/overfitting_rule.py` on an Intel Xeon with AMX, one thread. Small
networks were trained against a single step (FGSM; FGSM-RS with steps of 1.25 or 2 ε, `rs@2`; N-FGSM) on MNIST and the
digits. The truth is PGD-50 on 500 images held out, every quarter of an epoch: a *collapse* is an accuracy below half of
the best so far, once that was above 20 %. A *hit* is a first alarm from one epoch before a collapse to one after it;
any other is false.

**{runs} trainings so far: {collapsed} collapsed, {healthy} stayed healthy, {never_above_20_percent} were never above
20 %.** Level and rise of `--on-overfit` (relative FOSC ≥ {level:g} and ≥ {rise:g} times its least) were set by looking
at the first {seen} of these trainings, one collapse among them. The others test it: **hits {hits}, false alarms {wrong}
of all trainings** (exact 95 % intervals). An alarm worth having would find nine of ten collapses and be false in one
training of twenty at most; this one is off unless it is asked for. The first two trainings of MNIST were recorded one
at a time, by the same definitions.
"""
SEEN = 29  # trainings by which level and rise of the library's alarm were set
SAME = ("data", "network", "images", "batch", "epochs", "eps", "method", "lr", "seed")
STRENGTHENED = """Each training that collapsed, once more with `--on-overfit strengthen`: accuracy under PGD-50 in %, at
best and at the end, and the gradients of a step at the end. It is *rescued* where the end is within 3 points of the
best, and the best no worse by more than 3 points than without: {rescued}."""
LISTED = "Accuracy under PGD-50 in %, at best and at the end; collapse and first alarm in epochs."
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


RULE = Rule("relative FOSC", LEVEL, RISE)


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


def setting(run: Run) -> tuple[Any, ...]:
    """What tells a training from others, but for its random numbers."""
    return tuple(run[name] for name in SAME)


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


def course(runs: Sequence[Run]) -> Iterator[str]:
    """A row per signal: where it lies in trainings that stay healthy, and its values around each collapse."""
    heads = (
        "healthy, from the second epoch on: median, 5 % to 95 %",
        "an epoch before a collapse: median, least to most",
        "half an epoch before",
    )
    yield f"| {' | '.join(['signal', *heads, 'at it', 'an epoch after'])} |"
    yield f"|{' --- |' * 6}"
    healthy = [run for run in runs if kind(run) == "healthy"]
    collapsed = [(run, at) for run in runs if (at := collapse(run)) is not None]
    for name, signal in SIGNALS.items():
        calm = sorted(signal(quarter) for run in healthy for quarter in run["quarters"][NEAR:])
        spread = [calm[int(share * (len(calm) - 1))] for share in (0.5, 0.05, 0.95)] if calm else []
        told = [f"{spread[0]:.3g}, {spread[1]:.3g} to {spread[2]:.3g}" if calm else "–"]
        for away in (-NEAR, -NEAR // 2, 0, NEAR):
            there = [(run["quarters"], at + away) for run, at in collapsed]
            found = sorted(signal(q[k]) for q, k in there if 0 <= k < len(q))
            told.append(f"{median(found):.3g}, {found[0]:.3g} to {found[-1]:.3g}" if found else "–")
        yield f"| {' | '.join([name, *told])} |"


def listing(runs: Sequence[Run]) -> Iterator[str]:
    """A row per training: its group, PGD-50 at best and at the end, its collapse, and the library's alarm."""
    yield "| training | learning rate | best | end | collapse | alarm | |"
    yield f"|{' --- |' * 7}"
    for run in runs:
        accuracies, at, first = [q["pgd"] for q in run["quarters"]], collapse(run), RULE.first(run)
        when = ["–" if quarter is None else f"{(quarter + 1) / NEAR:g}" for quarter in (at, first)]
        numbers = [f"{run['lr']:g}", f"{100 * max(accuracies):.0f}", f"{100 * accuracies[-1]:.0f}", *when]
        yield f"| {' | '.join([group(run), *numbers, verdict(run, first)])} |"


def rescues(runs: Sequence[Run], again: Sequence[Run]) -> Iterator[str]:
    """What became of the trainings that collapsed, with more steps from the alarm on."""
    before, after = ({setting(run): [q["pgd"] for q in run["quarters"]] for run in some} for some in (runs, again))
    rows, rescued = [], 0
    for run in {setting(run): run for run in again}.values():
        old, new = before[setting(run)], after[setting(run)]
        well = new[-1] >= max(new) - 0.03 and max(new) >= max(old) - 0.03
        rescued += well
        shown = [f"{100 * value:.0f}" for value in (max(old), old[-1], max(new), new[-1])]
        steps = f"{run['quarters'][-1]['steps']:g}"
        rows.append(f"| {' | '.join([group(run), *shown, steps, 'rescued' if well else 'not'])} |")
    yield STRENGTHENED.format(rescued=exact(rescued, len(rows)))
    yield ""
    yield "| training | best without | end without | best | end | gradients | |"
    yield f"|{' --- |' * 7}"
    yield from rows


def page(runs: Sequence[Run]) -> str:
    """The whole page."""
    plain = [run for run in runs if not run["strengthen"]]
    kinds = [kind(run) for run in plain]
    numbers = {name.replace(" ", "_").replace("%", "percent"): kinds.count(name) for name in sorted(set(KINDS))}
    seen = {setting(run) for run in plain[:SEEN]}
    hits, wrong = cells(RULE, [run for run in plain if setting(run) not in seen])
    lines = [
        HEAD.format(runs=len(plain), level=RULE.level, rise=RULE.rise, seen=SEEN, hits=hits, wrong=wrong, **numbers)
    ]
    lines += ["## What the signals do", "", *course(plain), ""]
    if kinds.count("collapsed") >= ENOUGH:
        lines += ["## Rules, chosen on some networks and tested on others", "", *table(plain), ""]
    if again := [run for run in runs if run["strengthen"]]:
        lines += ["## Strengthened", "", *rescues(plain, again), ""]
    lines += ["## All trainings", "", LISTED, "", *listing(plain)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--write", type=Path)
    told = parser.parse_args()
    runs = [json.loads(line) for line in told.runs.read_text(encoding="utf-8").splitlines()]
    text = page(runs)
    print(text)
    if told.write is not None:
        told.write.write_text(text, encoding="utf-8")
        lines = ",\n".join(json.dumps(run) for run in runs)
        told.write.with_suffix(".json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
