"""An update again, in plainer arithmetic, where the network fails in the one that was chosen."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from innermax.distributed.process_group import Ranks
from innermax.oracle.oracle import is_out_of_memory
from innermax.training.state import State
from innermax.utils.copying import write_into
from innermax.utils.validation import summarize_error

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Buffers:
    """The buffers of a network's modules, which a forward pass may change, replace or add to; each with a copy."""

    kept: dict[nn.Module, dict[str, tuple[Tensor | None, Tensor | None]]] = field(default_factory=dict)

    @classmethod
    def of(cls, network: nn.Module) -> "Buffers":
        """The network's buffers as they are now."""
        return cls(
            {
                module: {name: (buffer, _copy(buffer)) for name, buffer in module._buffers.items()}
                for module in network.modules()
                if module._buffers
            }
        )

    def restore(self) -> None:
        """Gives each module the buffers back that it had, with what they held."""
        for module, buffers in self.kept.items():
            for name in set(module._buffers) - set(buffers):
                del module._buffers[name]
            for name, (buffer, held) in buffers.items():
                module._buffers[name] = buffer
                if buffer is not None and held is not None:
                    write_into(buffer, held)


def _copy(buffer: Tensor | None) -> Tensor | None:
    """None where there is nothing to restore: nobody can write into a tensor that was made in inference mode."""
    return None if buffer is None or buffer.is_inference() else buffer.detach().clone()


def try_plainer(
    attempt: Callable[[], dict[str, Tensor]], undo: Callable[[], None], state: State, ranks: Ranks
) -> dict[str, Tensor]:
    """What the attempt to pass gradients back returns; where torch fails in it, in plainer arithmetic from then on.

    The network was tried before the training, but in evaluation mode: what it counts or collects in training mode is
    about the batches that it learns from.

    undo: takes back what an attempt has done. Raises what the attempt raises in the plainest arithmetic, and errors of
    other kinds than torch raises at once.
    """
    left, first = state.arithmetic.plainer(), ""
    while True:
        try:
            counts = attempt()
            break
        except (RuntimeError, TypeError) as failure:
            told = summarize_error(failure)
            if not left or is_out_of_memory(failure):
                if first not in ("", told):
                    failure.add_note(f"It failed in faster arithmetic, too: {first}")
                raise
            first = first or told
        undo()
        state.compute_in(left.pop(0), ranks)
    if first:
        _log.warning("updates compute in %s (%s)", state.arithmetic, first)
    return counts
