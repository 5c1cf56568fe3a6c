"""CUDA graphs: a computation is recorded once for a few batch sizes, then replayed without Python's overhead."""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from innermax.losses import Loss

_BUCKETS = 8  # batch sizes that are recorded: padding costs an eighth at most, recording takes a moment each
_KEPT = 64
_log = logging.getLogger(__name__)


Compute = Callable[[Tensor, Tensor, Loss], Any]
Recorder = Callable[[Callable[[Tensor, Tensor], Any], Tensor, Tensor], Callable[[Tensor, Tensor], Any]]


def bucket(count: int, largest: int) -> int:
    """The smallest recorded batch size that holds `count` ≤ `largest` examples: a multiple of largest/8."""
    width = -(-largest // _BUCKETS)
    return min(-(-count // width) * width, largest)


class Replayed:
    """`compute(x, label, loss)`, recorded at its first call for each loss, shape and bucket, then replayed.

    A batch is filled up to its bucket with copies of its first example. Where a computation cannot be recorded, it is
    computed as it stands, and the reason is logged.
    """

    def __init__(self, compute: Compute, record: Recorder | None = None) -> None:
        self._compute, self._record = compute, record or GraphRecorder()
        self._recordings: dict[Hashable, Callable[[Tensor, Tensor], Any]] = {}
        self._largest: dict[Hashable, int] = {}
        self._refused = False

    def __call__(self, x: Tensor, label: Tensor, loss: Loss) -> Any:
        """What `compute` returns: (B, …) values that later calls leave alone."""
        if self._refused or len(x) == 0 or not _is_hashable(loss):
            return self._compute(x, label, loss)
        kind = (loss, x.shape[1:], x.dtype)
        largest = self._largest[kind] = max(self._largest.get(kind, 0), len(x))
        size = bucket(len(x), largest)
        rows = torch.arange(size, device=x.device)
        rows = rows * (rows < len(x))
        recording = self._recordings.get((kind, size))
        if recording is None:
            try:
                recording = self._record(lambda x, label: self._compute(x, label, loss), x[rows], label[rows])
            except RuntimeError as failure:
                self._refused = True
                _log.warning("attack network: not recorded (%s)", str(failure).partition("\n")[0])
                return self._compute(x, label, loss)
            if len(self._recordings) >= _KEPT:
                self._recordings.clear()
            self._recordings[kind, size] = recording
        return recording(x[rows], label[rows])[rows[: len(x)]]


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
    x: Tensor
    label: Tensor
    answer: Any

    def __call__(self, x: Tensor, label: Tensor) -> Any:
        self.x.copy_(x)
        self.label.copy_(label)
        self.graph.replay()
        return self.answer


class GraphRecorder:
    """Records CUDA graphs that share one memory pool: a replay may overwrite what the one before it returned."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(
        self, compute: Callable[[Tensor, Tensor], Any], x: Tensor, label: Tensor
    ) -> Callable[[Tensor, Tensor], Any]:
        """A CUDA graph of compute(x, label). The caller copies what a replay returns before the next one."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries choose their kernels and allocate workspaces before anything is recorded
                compute(x, label)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            answer = compute(x, label)
        return _Graph(graph, x, label, answer)
