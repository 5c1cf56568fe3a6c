"""What a person sees while a network trains: a live line on a terminal, a plain line an epoch elsewhere."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Shows where a training stands; silent where it was not asked to speak."""

    def __init__(self, epochs: int, console: Console | None, bar: Bar | None) -> None:
        self._epochs, self._console, self._bar = epochs, console, bar
        self._task: TaskID | None = None
        self._head, self._robust = "", ""
        self._epoch = self._batches = 0
        self._begun = time.perf_counter()
        self._threshold: float | None = None

    def start(self, epoch: int, batches: int, threshold: float | None) -> None:
        """An epoch begins."""
        self._head = f"epoch {epoch + 1}/{self._epochs}"
        self._epoch, self._batches, self._threshold = epoch, batches, threshold
        self._begun = time.perf_counter()
        if self._bar is not None and self._task is None:
            self._task = self._bar.add_task("", total=self._epochs * batches, completed=epoch * batches)

    def batch(self, done: int, totals: Mapping[str, float], fosc: float | None) -> None:
        """A batch is done; totals are sums over the epoch's examples so far, fosc their mean gauge."""
        if self._bar is None or self._task is None:
            return
        seconds = time.perf_counter() - self._begun
        parts = [
            self._head,
            f"batch {done}/{self._batches}",
            f"loss {totals.get('loss', math.nan) / totals.get('examples', 1):.3f}",
            *([] if self._threshold is None else [f"c_t {self._threshold:.3f}"]),
            *([] if fosc is None else [f"FOSC {fosc:.3f}"]),
            *([self._robust] if self._robust else []),
            f"{totals.get('examples', 0) / seconds:,.0f} img/s",
        ]
        completed = self._epoch * self._batches + done
        self._bar.update(self._task, description="  ".join(parts), completed=completed)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch has been measured."""
        if row.get("validation_robust") is not None:
            self._robust = f"robust {100 * row['validation_robust']:.1f}%"
        self.say(self._line(row))

    def say(self, message: str) -> None:
        """A line of its own."""
        if self._console is not None:
            self._console.print(message, highlight=False, soft_wrap=True)

    def _line(self, row: Mapping[str, Any]) -> str:
        shown = [f"{self._head}", f"loss {row['loss']:.3f}"]
        if row["threshold"] is not None:
            shown.append(f"c_t {row['threshold']:.3f}")
        if row.get("fosc") is not None:
            shown.append(f"FOSC {row['fosc']:.3f}")
        shown.append(f"{row['gradients']:.1f} gradients")
        if row.get("validation_clean") is not None:
            shown.append(f"clean {100 * row['validation_clean']:.1f}%")
        if row.get("validation_robust") is not None:
            shown.append(f"robust {100 * row['validation_robust']:.1f}%")
        return "  ".join([*shown, f"{row['images_per_second']:,.0f} img/s"])


@contextmanager
def show_progress(epochs: int, speak: bool) -> Iterator[Progress]:
    """A live display on a terminal, plain lines elsewhere, nothing where not asked to speak."""
    if not speak:
        yield Progress(epochs, None, None)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Progress(epochs, console, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("left"), TimeRemainingColumn())
    with Bar(*columns, console=console) as bar:
        yield Progress(epochs, console, bar)


@contextmanager
def show_evaluation() -> Iterator[Callable[[str, int, int], None]]:
    """What `evaluate` calls after each batch: a bar an attack while it runs, on a terminal only."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)

        yield show


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the yielded question answer True, so that a batch ends whole."""
    asked = False

    def hold(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
