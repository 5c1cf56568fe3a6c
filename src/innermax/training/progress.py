"""What a person sees of a training: a live line on a terminal, a plain line per epoch elsewhere.

Colours are rich's, which leaves them out where NO_COLOR is set.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from innermax.evaluation.progress import ProgressCallback
from innermax.utils.console import PlainConsole, TimeLeft, clock_time, is_live


class TrainingDisplay:
    """Shows how far a training is, or tells a function; without both it does nothing."""

    def __init__(
        self, epochs: int, console: Console | None, bar: Progress | None, tell: ProgressCallback | None = None
    ) -> None:
        self._epochs, self._console, self._bar, self._tell = epochs, console, bar, tell
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
            completed = epoch * batches
            self._task = self._bar.add_task("", total=self._epochs * batches, completed=completed, left=None, at=0.0)

    def batch(self, done: int, totals: Mapping[str, float], fosc: float | None, left: float | None) -> None:
        """A batch is done.

        totals: sums over the epoch's examples so far; fosc: their mean FOSC; left: seconds of the whole training.
        """
        if self._tell is not None:
            self._tell(self._head, done, self._batches)
        if self._bar is None or self._task is None:
            return
        now = time.perf_counter()
        parts = [
            self._head,
            f"batch {done}/{self._batches}",
            f"loss {totals.get('loss', math.nan) / totals.get('examples', 1):.3f}",
            *([] if self._threshold is None else [f"c_t {self._threshold:.3f}"]),
            *([] if fosc is None else [f"FOSC {fosc:.3f}"]),
            *([self._robust] if self._robust else []),
            f"{totals.get('examples', 0) / (now - self._begun):,.0f} img/s",
        ]
        completed = self._epoch * self._batches + done
        self._bar.update(self._task, description="  ".join(parts), completed=completed, left=left, at=now)

    def epoch(self, row: Mapping[str, Any], left: float | None) -> None:
        """An epoch is done. row: its measures; left: seconds of the whole training."""
        if row.get("validation_robust") is not None:
            self._robust = f"robust {100 * row['validation_robust']:.1f}%"
        line = self._line(row)
        if left is not None and row["epoch"] + 1 < self._epochs:
            line += f"  left {clock_time(left)}"
        self.say(line)

    def say(self, message: str) -> None:
        """Prints a line."""
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
def show_progress(epochs: int, progress: bool | ProgressCallback | None) -> Iterator[TrainingDisplay]:
    """Context manager: a training's display on standard error, live on a terminal.

    progress: False or None for none, or a function, which is called instead.
    """
    if callable(progress):
        yield TrainingDisplay(epochs, None, None, progress)
        return
    console = PlainConsole(stderr=True) if progress else None
    if console is None or not is_live(console):
        yield TrainingDisplay(epochs, console, None)
        return
    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=16), TimeLeft(), console=console
    ) as bar:
        yield TrainingDisplay(epochs, console, bar)
