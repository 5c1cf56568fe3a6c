"""Threads that share a batch: each computes its part alone, instead of all threads sharing every operation."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_here = threading.local()


def in_worker() -> bool:
    """Whether this thread is one of `Workers`."""
    return getattr(_here, "working", False)


class Workers:
    """Threads each of which computes alone.

    An operation on many cores waits for the slowest of them; a small one also costs more to hand out than to do. A part
    of the batch for each core meets the others once, at the end.
    """

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="innermax")
        threads, together = torch.get_num_threads(), threading.Barrier(count)

        def settle() -> None:
            torch.get_num_threads()  # a thread takes over the process's number when it first looks, and not again
            torch.set_num_threads(1)
            _here.working = True
            together.wait()

        wait([self._pool.submit(settle) for _ in range(count)])
        torch.set_num_threads(threads)  # the process's number, for threads to come

    def map(self, work: Callable[[Tensor], T], parts: Sequence[Tensor]) -> list[T]:
        """`work` of each part; all have ended when this returns or raises what the first failing one raised."""
        if in_worker():  # were one of them to wait for the others, all might
            return [work(part) for part in parts]

        def without_gradients(part: Tensor) -> T:
            with torch.no_grad():
                return work(part)

        running = [self._pool.submit(without_gradients, part) for part in parts]
        wait(running)
        return [one.result() for one in running]
