"""Which of two ways to compute a gradient takes longer."""

import math
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

_FEWEST, _MOST = 5, 60  # turns
_SPENT = 0.6  # seconds in which quick ones take more turns than the fewest
_CLEAR = 1.02  # ratio of two times from which on one is longer
_SIGMAS = 2.0  # by which the turns that say so must exceed half of them: as many tosses of a coin hardly ever agree
_ROWS = 256  # as many as a batch in use may have: what is faster for few may be slower for many
_LONG, _SHORT = 0.5, 0.2  # seconds of a turn


def times_as_long(one: Callable[[Tensor], object], other: Callable[[Tensor], object], x: Tensor) -> float:
    """How many times as long `one` takes as `other` for a batch, below 1 where it is faster; 1 where that is not clear.

    x: (B, *features) inputs that a batch is made of: more of them where both are quick, fewer where they are slow.
    """
    _seconds(one, x), _seconds(other, x)  # kernels are chosen, memory is fetched
    together = min(_seconds(one, x) + _seconds(other, x) for _ in range(2))
    rows = min(_ROWS, int(len(x) * _SHORT / together))
    if rows > len(x):
        x = x.repeat(-(-rows // len(x)), *[1] * (x.ndim - 1))[:rows]
        together = _seconds(one, x) + _seconds(other, x)
    elif together > _LONG:
        x = x[: -(-len(x) // 2)]
    count = max(_FEWEST, min(_MOST, int(_SPENT / together)))
    turns = [(_seconds(one, x), _seconds(other, x)) for _ in range(count)]
    # In most turns: which of two about equal ones is taken must not change from run to run.
    most = min(count, (count + _SIGMAS * math.sqrt(count)) / 2)
    ratio = median(mine / theirs for mine, theirs in turns)
    slower, faster = (sum(sign * (mine - theirs) > 0 for mine, theirs in turns) >= most for sign in (1, -1))
    return ratio if (slower and ratio > _CLEAR) or (faster and ratio < 1 / _CLEAR) else 1.0


def _seconds(compute: Callable[[Tensor], object], x: Tensor) -> float:
    # A single thread's own time: the time that other programs have the processor for does not count.
    clock = time.perf_counter if x.is_cuda or torch.get_num_threads() > 1 else time.thread_time
    began = clock()
    compute(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return max(clock() - began, 1e-9)  # some clocks tick slowly
