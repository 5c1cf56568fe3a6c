"""The oracle of a network whose parameters are sharded over processes (FSDP)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from innermax.losses import Given, Loss
from innermax.oracle.oracle import Oracle, Response

_NOTHING, _LOGITS, _GRADIENT = range(3)  # what a process asks of a pass


class ShardedOracle(Oracle):
    """The oracle of a sharded network: the network itself, in evaluation mode while it is asked.

    Args:
        model: what `shard` made.
        example: (B, *features) inputs; the first one is sent along where a process has nothing to ask.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__(model, network=model)
        self._padding = example[:1]
        self.steps = {f"in {dist.get_world_size()} parts": "", "float32": ""}

    def refresh(self) -> None:
        """Does nothing: the network is the model itself."""

    def settle(self) -> None:
        """Takes part in the other processes' passes until none asks any more."""
        while asked := self._agree(_NOTHING):
            self._pass(self._padding, asked)

    def logits(self, x: Tensor) -> Tensor:
        """(B, classes) float32 logits."""
        return self._pass(x, self._agree(_LOGITS))

    def gradient(self, x: Tensor, label: Tensor, loss: Loss, given: Given = ()) -> Response:
        """As `Oracle.gradient`."""
        self._agree(_GRADIENT)
        return self._gradient(x, label, loss, given)

    def _pass(self, x: Tensor, asked: int) -> Tensor:
        """The logits, from a pass of the kind that the other processes make."""
        if asked == _GRADIENT:
            return self._gradient(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), _sum, ()).logits
        with torch.no_grad():
            return self._forward(x)

    def _agree(self, wish: int) -> int:
        """The most that any process wants of the next pass."""
        told = torch.tensor(wish, device=self._padding.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told)

    def _forward(self, x: Tensor) -> Tensor:
        with _evaluation_mode(self._compiled.network):
            return super()._forward(x)


def _sum(logits: Tensor, label: Tensor) -> Tensor:
    return logits.sum(1)


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Context manager: the network is in evaluation mode; afterwards each of its modules is in its own again."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
