"""Networks of which each process holds a part of every layer (FSDP2), split and saved."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Splits the model's parameters over the processes; a forward pass gathers one element of a container at a time.

    mesh: the device mesh that Fabric makes.
    """
    from torch.distributed.fsdp import fully_shard

    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    elements = [child for module in model.modules() if isinstance(module, containers) for child in module.children()]
    for element in dict.fromkeys(reversed(elements)):
        if next(element.parameters(), None) is not None and not isinstance(element, nn.ModuleList | nn.ModuleDict):
            fully_shard(element, mesh=mesh["data_parallel"], reshard_after_forward=True)
    fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=True)
    return model


class WholeState:
    """The whole state of a sharded network or optimiser, to be saved and loaded like any other's.

    All processes call each method together.
    """

    def __init__(self, sharded: Any, model: nn.Module) -> None:
        self.sharded, self.model, self.config = sharded, model, getattr(sharded, "config", None)
        self._state: dict[str, Any] | None = None

    def gather(self) -> "WholeState":
        """Gathers the whole state on the CPU; returns itself."""
        self._state = _apply(self.sharded.state_dict(), _gather)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The whole state once it was gathered, this process's part before."""
        state: dict[str, Any] = self.sharded.state_dict() if self._state is None else self._state
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads this process's part of a whole state."""
        parameters = list(self.model.parameters())
        if isinstance(self.sharded, nn.Module):
            names = dict(self.model.named_parameters())
            self.sharded.load_state_dict({k: _scatter(v, names.get(k)) for k, v in state.items()})
            return
        own = {n: {k: _scatter(v, parameters[n]) for k, v in of.items()} for n, of in state["state"].items()}
        self.sharded.load_state_dict({**state, "state": own})


def is_sharded(value: object) -> "TypeGuard[DTensor]":
    """Whether this process holds only a part of a tensor; the class is not asked for, as its import takes a second."""
    return hasattr(value, "full_tensor")


def gather_state(model: nn.Module) -> dict[str, Any]:
    """A network's state, a sharded one's gathered on the CPU; all processes call this together."""
    return WholeState(model, model).gather().state_dict()


def as_whole(value: Tensor) -> Tensor:
    """A tensor, whole where it is sharded."""
    return value.full_tensor() if is_sharded(value) else value


def _gather(value: T) -> T | Tensor:
    return value.full_tensor().cpu() if is_sharded(value) else value


def _scatter(value: Tensor, like: Tensor | None) -> Tensor:
    if not is_sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _apply(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _apply(part, change) for key, part in value.items()}
    return change(value)
