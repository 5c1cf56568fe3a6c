"""CUDA graphs: a computation is recorded once for a few batch sizes, then replayed without Python's overhead."""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from innermax.losses import Given, Loss, select

_BUCKETS = 8  # batch sizes that are recorded: padding costs an eighth at most, recording takes a moment each
_KEPT = 64
_log = logging.getLogger(__name__)


Compute = Callable[[Tensor, Tensor, Loss, Given], Any]
Recorder = Callable[..., Callable[..., Any]]  # (compute, *inputs) → what computes them anew


def bucket(count: int, largest: int) -> int:
    """The smallest recorded batch size that holds `count` ≤ `largest` examples: a multiple of largest/8."""
    width = -(-largest // _BUCKETS)
    return min(-(-count // width) * width, largest)


class Replayed:
    """`compute(x, label, loss, given)`, recorded at its first call for each loss, bucket, shapes and types of x and of
    what the loss is given, then replayed.

    A batch is filled up to its bucket with copies of its first example. Where a computation cannot be recorded, it is
    computed as it stands, and the reason is logged.
    """

    def __init__(self, compute: Compute, record: Recorder | None = None) -> None:
        self._compute, self._record = compute, record or GraphRecorder()
        self._recordings: dict[Hashable, Callable[..., Any]] = {}
        self._largest: dict[Hashable, int] = {}
        self._refused = False

    def __call__(self, x: Tensor, label: Tensor, loss: Loss, given: Given = ()) -> Any:
        """What `compute` returns: (B, …) values that later calls leave alone."""
        if self._refused or len(x) == 0 or not _is_hashable(loss):
            return self._compute(x, label, loss, given)
        inputs = (x, label, *given)
        kind = (loss, *((value.shape[1:], value.dtype) for value in inputs))
        largest = self._largest[kind] = max(self._largest.get(kind, 0), len(x))
        size = bucket(len(x), largest)
        rows = torch.arange(size, device=x.device)
        rows = rows * (rows < len(x))
        recording = self._recordings.get((kind, size))
        if recording is None:
            try:
                recording = self._record(
                    lambda x, label, *given: self._compute(x, label, loss, given), *select(inputs, rows)
                )
            except RuntimeError as failure:
                self._refused = True
                _log.warning("attack network: not recorded (%s)", str(failure).partition("\n")[0])
                return self._compute(x, label, loss, given)
            if len(self._recordings) >= _KEPT:
                self._recordings.clear()
            self._recordings[kind, size] = recording
        return recording(*select(inputs, rows))[rows[: len(x)]]


def _is_hashable(loss: Loss) -> bool:
    """Whether a loss can be a key: a value that holds another, unhashable loss cannot."""
    try:
        hash(loss)
    except TypeError:
        return False
    return True


@dataclass(frozen=True)
class _Graph:
    graph: "torch.cuda.CUDAGraph"
    inputs: tuple[Tensor, ...]
    answer: Any

    def __call__(self, *inputs: Tensor) -> Any:
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value)
        self.graph.replay()
        return self.answer


class GraphRecorder:
    """Records CUDA graphs that share one memory pool: a replay may overwrite what the one before it returned."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, compute: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
        """A CUDA graph of compute(*inputs). The caller copies what a replay returns before the next one."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries choose their kernels and allocate workspaces before anything is recorded
                compute(*inputs)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            answer = compute(*inputs)
        return _Graph(graph, inputs, answer)
