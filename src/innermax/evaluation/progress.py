"""The progress of an evaluation: what is called after each batch, and a display with the time left.

Colours are rich's, which leaves them out where NO_COLOR is set.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from innermax.attacks.base import Attack
from innermax.attacks.cost import FORWARD, SURVIVING, UNKNOWN, search_cost
from innermax.utils.console import PlainConsole, TimeLeft, clock_time, is_live
from innermax.utils.validation import shorten

ProgressCallback = Callable[[str, int, int], None]  # (name, examples done, examples in all)
_AUDITED = 350.0  # gradients per example of an audit's sample
_KEPT = 1e-3  # seconds; a batch that took less was read from a folder
_SPARSE = 30.0  # seconds between two lines, at least; a shorter evaluation prints none
_AUDIT = "audit"


def check_progress(progress: object) -> None:
    """Raises TypeError unless progress is a bool, None or a function."""
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress must be True, False or a function (name, done, in all), got {shorten(progress)}")


def audit_cost(examples: int) -> float:
    """About how many gradients per example an audit of so many examples takes."""
    return _AUDITED * min(SURVIVING / 2, max(100 / examples, 1 / 50))  # the sample of `run_audit`


@dataclass
class EvaluationClock:
    """The time that an evaluation has spent on each of its parts, and an estimate of what is left.

    Args:
        costs: part → about how many gradients per example it takes, in order.
    """

    costs: dict[str, float]
    _told: float = 0.0  # time of the last batch
    _share: dict[str, float] = field(default_factory=dict)  # of each part, done
    _timed: dict[str, float] = field(default_factory=dict)  # share of it whose time is known
    _seconds: dict[str, float] = field(default_factory=dict)  # that this share took

    def begin(self, now: float) -> None:
        """Starts the clock, at a time in seconds."""
        self._told = now

    def batch(self, part: str, share: float, now: float) -> None:
        """Notes the share of a part that is done, at a time in seconds; a batch read from a folder is not timed."""
        took, grown = now - self._told, share - self._share.get(part, 0.0)
        self._told, self._share[part] = now, share
        if took >= _KEPT:
            self._timed[part] = self._timed.get(part, 0.0) + grown
            self._seconds[part] = self._seconds.get(part, 0.0) + took

    def left(self) -> float | None:
        """Seconds left after the last batch; None where nothing has been timed."""
        timed = {part: share for part, share in self._timed.items() if share > 0}
        work = sum(self.costs.get(part, UNKNOWN) * share for part, share in timed.items())
        if work == 0:
            return None
        rate = sum(self._seconds[part] for part in timed) / work
        left = 0.0
        for part, cost in self.costs.items():
            whole = self._seconds[part] / timed[part] if part in timed else rate * cost
            left += whole * (1 - self._share.get(part, 0.0))
        return left


class _Count(MofNCompleteColumn):
    """How many examples are done; empty for an audit, which has no count."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else super().render(task)


class EvaluationDisplay:
    """What `evaluate` calls after each batch, and before it with `begin_batch`."""

    def __init__(self, attacks: Mapping[str, Attack], audit: bool, console: Console, bar: Bar | None) -> None:
        self._audit = audit and bool(attacks)
        costs = {"clean": FORWARD} | {name: search_cost(attack) for name, attack in attacks.items()}
        self._last = list(costs)[-1]
        self._clock = EvaluationClock(costs)
        self._console, self._bar = console, bar
        self._tasks: dict[str, TaskID] = {}
        self._said = time.perf_counter()
        self._clock.begin(self._said)

    def begin_batch(self) -> None:
        """Leaves out of the clock what came before: compiling the network and checking the model are no batch."""
        self._clock.begin(time.perf_counter())

    def __call__(self, name: str, done: int, total: int) -> None:
        """Notes that so many of an attack's examples are done, and shows it."""
        if self._audit and _AUDIT not in self._clock.costs:
            self._clock.costs[_AUDIT] = audit_cost(total)
        now = time.perf_counter()
        self._clock.batch(name, done / total, now)
        left = self._clock.left()
        self._show(name, done, total, left, now)
        if self._audit and name == self._last and done == total:
            self._show(_AUDIT, None, None, left, now)

    def _show(self, name: str, done: int | None, total: int | None, left: float | None, now: float) -> None:
        if self._bar is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task(name, total=total, left=None, at=now)
            self._bar.update(self._tasks[name], completed=done, left=left, at=now)
        elif now - self._said >= _SPARSE:
            self._said = now
            count = "" if done is None else f"  {done:,}/{total:,}"
            told = "" if left is None else f"  left {clock_time(left)}"
            self._console.print(f"{name}{count}{told}", highlight=False, soft_wrap=True)


@contextmanager
def show_evaluation(
    progress: bool | ProgressCallback | None, attacks: Mapping[str, Attack], audit: bool = False
) -> Iterator[ProgressCallback | None]:
    """Context manager: yields the function that an evaluation calls after each batch; None where it is to be silent.

    Args:
        progress: True for a display on standard error, live bars on a terminal, else now and then a line; or the user's
            own function.
        attacks: by the names that are shown.
        audit: whether the evaluation ends with an audit.
    """
    check_progress(progress)
    if progress is None or progress is False or callable(progress):
        yield progress or None
        return
    console = PlainConsole(stderr=True)
    if not is_live(console):
        yield EvaluationDisplay(attacks, audit, console, None)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), _Count(), TimeLeft())
    with Bar(*columns, console=console, transient=True) as bar:
        yield EvaluationDisplay(attacks, audit, console, bar)
