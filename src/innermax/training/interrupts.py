"""Interrupts that wait until an update has ended."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def defer_interrupts() -> Iterator[Callable[[], bool]]:
    """Context manager: the first Ctrl-C raises nothing, so that a batch ends whole; the second one does.

    Yields a function that tells whether a Ctrl-C came; always False outside the main thread.
    """
    interrupted = False

    def note(signal_number: int, frame: object) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, before)
