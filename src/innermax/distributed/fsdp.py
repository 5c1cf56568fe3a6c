"""Networks of which each process holds a part of every layer (FSDP2), attacked and saved as if they were whole.

Every pass through such a network is one of all processes together. Their searches end at different steps, so before
each pass they tell each other who still asks; who does not sends an example along that nobody looks at.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """The model with its parameters in parts, one a process; what is gathered at a time is one element of a container.

    mesh: torch's, of Fabric's making.
    """
    from torch.distributed.fsdp import fully_shard

    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    elements = [child for module in model.modules() if isinstance(module, containers) for child in module.children()]
    for element in dict.fromkeys(reversed(elements)):
        if next(element.parameters(), None) is not None and not isinstance(element, nn.ModuleList | nn.ModuleDict):
            fully_shard(element, mesh=mesh["data_parallel"], reshard_after_forward=True)
    fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=True)
    return model


class Whole:
    """A network or an optimiser in parts, as what saves and loads whole ones takes it; all processes do so at once."""

    def __init__(self, parted: Any, model: nn.Module) -> None:
        self.parted, self.model, self.config = parted, model, getattr(parted, "config", None)
        self._state: dict[str, Any] | None = None

    def gathered(self) -> "Whole":
        """Itself, once it holds the whole state, on the processor."""
        self._state = _mapped(self.parted.state_dict(), _gathered)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The whole state where it was gathered, else this process's part."""
        state: dict[str, Any] = self.parted.state_dict() if self._state is None else self._state
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over each process's part of a whole state."""
        parameters = list(self.model.parameters())
        if isinstance(self.parted, nn.Module):
            names = dict(self.model.named_parameters())
            self.parted.load_state_dict({k: _scattered(v, names.get(k)) for k, v in state.items()})
            return
        own = {n: {k: _scattered(v, parameters[n]) for k, v in of.items()} for n, of in state["state"].items()}
        self.parted.load_state_dict({**state, "state": own})


def whole_state(model: nn.Module) -> dict[str, Any]:
    """A network's state; of one in parts all of it, on the processor: all processes ask at once."""
    return Whole(model, model).gathered().state_dict()


def number(value: Any) -> float:
    """A number that may be a tensor in parts."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def _gathered(value: T) -> T | Tensor:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _scattered(value: Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    return change(value)
