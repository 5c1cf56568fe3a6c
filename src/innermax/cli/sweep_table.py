"""The table of a sweep: a row per setting, with means over seeds and Student's intervals."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

from innermax.cli.sweep_engine import is_finished, known_runs
from innermax.reporting.contents import OtherWeights, read_own_evaluation
from innermax.utils.files import write_json, write_text
from innermax.utils.intervals import student
from innermax.utils.serialization import parse_json

_SEED = "seed"


@dataclass(frozen=True)
class Measure:
    """A mean over seeds and its 95 % interval, None for one seed alone."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SweepRow:
    """A setting, whatever its seed: the options it differs in, its runs and the measures of those that are finished.

    Attributes:
        settings: option → value, of the options that vary in the sweep.
        runs: name → seed.
        finished: names of the runs that are measured.
        measures: "clean", each attack's name and "worst_case": accuracies in [0, 1]; "gradients" per image over the
            training; "seconds" of the training.
        left_out: name → why, of runs whose evaluation.json measured other weights.
    """

    settings: Mapping[str, Any]
    runs: Mapping[str, int]
    finished: Sequence[str]
    measures: Mapping[str, Measure]
    left_out: Mapping[str, str]


def sweep_rows(folder: Path) -> list[SweepRow]:
    """The rows of all runs that a sweep's folder knows; warns of an evaluation that measured other weights.

    Raises ValueError where a file of a finished run is damaged.
    """
    known = {name: _flatten(settings) for name, settings in known_runs(folder).items()}
    options = dict.fromkeys(option for settings in known.values() for option in settings)
    varied = [o for o in options if o != _SEED and len({str(settings.get(o)) for settings in known.values()}) > 1]
    groups: dict[str, dict[str, Any]] = {}
    for name, settings in known.items():
        chosen = {option: settings.get(option) for option in varied}
        groups.setdefault(str(list(chosen.values())), {"settings": chosen, "runs": {}})["runs"][name] = settings[_SEED]
    return [SweepRow(**group, **_measure_runs(folder, list(group["runs"]))) for group in groups.values()]


def _measure_runs(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """What a `SweepRow` says of its finished runs."""
    found, left_out = {}, {}
    for name in filter(lambda name: is_finished(folder / name), names):
        try:
            found[name] = run_measures(folder / name)
        except OtherWeights as error:
            warnings.warn(f"{error}; the table leaves this run out", stacklevel=3)
            left_out[name] = str(error)
    return {"finished": list(found), "measures": _average(list(found.values())), "left_out": left_out}


def run_measures(run: Path) -> dict[str, float]:
    """A finished run's measures, by the names of `SweepRow.measures`.

    Raises:
        ValueError: a file is damaged.
        OtherWeights: the evaluation is of none of the run's models.
    """
    evaluation, source = read_own_evaluation(run)
    if source is None:
        warnings.warn(f"whether {run / 'evaluation.json'} measured this run's weights is not known", stacklevel=4)
    try:
        history = [parse_json(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
        return {
            **{name: value.value for name, value in evaluation.accuracy.items()},
            "worst_case": evaluation.worst_case.value,
            "gradients": float(sum(row["gradients"] for row in history)),
            "seconds": float(sum(row["seconds"] for row in history)),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run} is damaged: {type(error).__name__}: {error}") from error


def format_sweep(rows: Sequence[SweepRow]) -> Table:
    """The rows as a rich table: accuracies in %, with the interval below each mean."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=_CAPTION, caption_justify="left")
    for heading in rows[0].settings:
        table.add_column(heading, overflow="fold")
    for heading in ("seeds", *_SHOWN):
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*_cells(row, "\n"))
    return table


def write_sweep(folder: Path, rows: Sequence[SweepRow], failed: Mapping[str, str]) -> None:
    """Writes table.json, with every attack, and table.md into a sweep's folder."""
    write_json(folder / "table.json", {"rows": [asdict(row) for row in rows], "failed": dict(failed)})
    headings = [*rows[0].settings, "seeds", *_SHOWN]
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings))]
    lines += [f"| {' | '.join(_cells(row, ' '))} |" for row in rows]
    lines += ["", _CAPTION] + [f"\nNot finished: {name}: {error}" for name, error in failed.items()]
    lines += [f"\nLeft out: {name}: {why}" for row in rows for name, why in row.left_out.items()]
    write_text(folder / "table.md", "\n".join(lines) + "\n")


_CAPTION = (
    "Clean and robust (the worst case of all attacks): accuracy on the test images in %. Gradients: per image, over "
    "the training. Below or after a mean over seeds: Student's 95 % interval."
)
_SHOWN = {"clean": "clean", "robust": "worst_case", "gradients": "gradients", "seconds": "seconds"}


def _cells(row: SweepRow, between: str) -> list[str]:
    seeds = str(len(row.runs)) if len(row.finished) == len(row.runs) else f"{len(row.finished)} of {len(row.runs)}"
    settings = [_shown(value) for value in row.settings.values()]
    return [*settings, seeds, *(_cell(row.measures.get(name), name, between) for name in _SHOWN.values())]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else str(value)


def _cell(measure: Measure | None, name: str, between: str) -> str:
    if measure is None:
        return "–"
    scale, digits = (100, 2) if name in ("clean", "worst_case") else (1, 1)
    shown = f"{scale * measure.mean:.{digits}f}"
    if measure.low is None or measure.high is None:
        return shown
    return f"{shown}{between}({scale * measure.low:.1f}–{scale * measure.high:.1f})"


def _average(found: Sequence[Mapping[str, float]]) -> dict[str, Measure]:
    """The measures that all runs have, over their seeds."""
    names = [name for name in found[0] if all(name in measures for measures in found)] if found else []
    return {name: _measure([measures[name] for measures in found], name) for name in names}


def _measure(values: Sequence[float], name: str) -> Measure:
    if len(values) == 1:
        return Measure(values[0], None, None)
    interval, highest = student(values), float("inf") if name in ("gradients", "seconds") else 1.0
    return Measure(fmean(values), max(interval.low, 0.0), min(interval.high, highest))


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their names on the command line."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
