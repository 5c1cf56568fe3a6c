"""An update again, in plainer arithmetic, where the network fails in the one that was chosen."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from innermax.oracle.oracle import is_out_of_memory
from innermax.training.state import State
from innermax.utils.validation import summarize_error

_log = logging.getLogger(__name__)


def copy_buffers(network: nn.Module) -> dict[str, Tensor]:
    """What a forward pass may change, such as BatchNorm's statistics."""
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


@torch.no_grad()
def restore_buffers(network: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Gives the network's buffers back what they held; a network may have put other tensors into their places."""
    for name, buffer in network.named_buffers():
        if name in before:
            buffer.copy_(before[name])


def try_plainer(
    attempt: Callable[[], dict[str, Tensor]], state: State, x_adv: Tensor, before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the attempt to pass gradients back returns; where it fails, in plainer arithmetic from then on.

    The network was tried before the training, but in evaluation mode: what it counts or collects in training mode is
    about the batches that it learns from.

    before: the network's buffers. Raises what the attempt raises in the plainest arithmetic.
    """
    left, why = state.arithmetic.plainer(), ""
    while True:
        try:
            counts = attempt()
            break
        except Exception as failure:  # anything: it may be other people's code
            if not left or isinstance(failure, FloatingPointError) or is_out_of_memory(failure):
                if why:
                    failure.add_note(f"It failed in faster arithmetic, too: {why}")
                raise
            why = why or summarize_error(failure)
        state.optimizer.zero_grad()
        x_adv.grad = None
        restore_buffers(state.wrapped, before)
        state.compute_in(left.pop(0))
    if why:
        _log.warning("updates compute in %s (%s)", state.arithmetic, why)
    return counts
