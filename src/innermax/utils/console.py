"""What every display on a terminal needs: where it is printed, the time left, and whether lines can be redrawn."""

import errno
import os
import time
from datetime import timedelta
from typing import NoReturn

from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.text import Text


class PlainConsole(Console):
    """Standard output, or standard error, without markup: brackets are brackets."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False)

    def on_broken_pipe(self) -> NoReturn:
        """Raises what `print` raises where nobody reads any more; rich would end the program, with status 1."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class TimeLeft(ProgressColumn):
    """The time left, as last estimated, minus the time since then."""

    def render(self, task: Task) -> Text:
        left = task.fields["left"]
        passed = time.perf_counter() - task.fields["at"]
        return Text("" if left is None else f"left {clock_time(left - passed)}")


def clock_time(seconds: float) -> str:
    """A time in seconds as hours, minutes and seconds: 0:02:35."""
    return str(timedelta(seconds=round(max(seconds, 0.0))))


def is_live(console: Console) -> bool:
    """Whether a line can be redrawn."""
    return console.is_terminal and not console.is_dumb_terminal
