"""Which of two ways to compute a gradient takes longer."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

_TURNS = 5
_SLOWER = 1.05
_ROWS = 128  # as many as a batch in use may have
_LONG, _SHORT, _TINY = 0.5, 0.05, 0.004  # seconds


def times_as_long(one: Callable[[Tensor], object], other: Callable[[Tensor], object], x: Tensor) -> float | None:
    """How many times as long `one` takes as `other` for a batch; None where it is not clearly longer.

    x: (B, *features) inputs that a batch is made of: more of them where both are quick, fewer where they are slow.
    """
    _seconds(one, x), _seconds(other, x)  # kernels are chosen, memory is fetched
    together = min(_seconds(one, x) + _seconds(other, x) for _ in range(2))
    if together < _TINY:
        return None  # what costs so little need not be cheaper, but the same in every run
    if together < _SHORT:
        x = x.repeat(-(-_ROWS // len(x)), *[1] * (x.ndim - 1))
    elif together > _LONG:
        x = x[: -(-len(x) // 2)]
    turns = [(_seconds(one, x), _seconds(other, x)) for _ in range(_TURNS)]
    # In every turn: which of two about equal ones is taken must not change from run to run.
    slower = all(mine > theirs for mine, theirs in turns)
    ratio = min(mine for mine, _ in turns) / min(theirs for _, theirs in turns)  # what else runs only adds to a time
    return ratio if slower and ratio > _SLOWER else None


def _seconds(compute: Callable[[Tensor], object], x: Tensor) -> float:
    began = time.perf_counter()
    compute(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - began
