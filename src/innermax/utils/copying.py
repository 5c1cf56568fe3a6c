"""Copies of networks, whatever users have put into them."""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from types import GeneratorType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def copy_model(model: nn.Module, instead: Mapping[Tensor, Tensor] | None = None) -> nn.Module:
    """A copy of a model in the same modes, with the same hooks, on tensors of its own.

    Tensors that were computed from parameters (by weight_norm's hook, for instance) are copied without their graph.
    What cannot be copied and is neither tensor nor module, such as a lock or an open file, is shared with the copy.

    Args:
        instead: what the copy is to hold in the place of a tensor, other than a copy of it.

    Raises:
        TypeError: a module, a tensor or an iterator in the model cannot be copied, or a module is TorchScript.
    """
    refuse_torchscript(model)
    memo: dict[int, Any] = {id(own): other for own, other in (instead or {}).items()}
    with torch.inference_mode(False), _WithoutGraph():
        try:
            return copy.deepcopy(model, dict(memo))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # noqa: BLE001  anything: it may be other people's code
            tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        try:
            shared = {id(value): value for value in _uncopyable(model, tensors, {})}
            return copy.deepcopy(model, memo | shared)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise TypeError(f"model cannot be copied: {type(error).__name__}: {error}") from error


def refuse_torchscript(model: nn.Module) -> None:
    """Raises TypeError where a module is TorchScript, whose copies can neither share parameters nor be rewritten."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"model layer {name!r}" if name else "model"
            raise TypeError(
                f"{where} must be a module in Python, got TorchScript: build the network in Python and load the "
                "weights, network.load_state_dict(scripted.state_dict())"
            )


class _WithoutGraph(TorchFunctionMode):
    """Context manager: a tensor that was computed from others, which torch refuses to copy, is copied without them."""

    def __torch_function__(
        self, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _uncopyable(value: object, tensors: Mapping[int, Tensor], seen: dict[int, object]) -> Iterator[object]:
    """The smallest parts of a value that cannot be copied and may be shared. Raises where one may not be.

    tensors: by id, those that are known to be copyable; seen: what was looked at already.
    """
    if id(value) in seen:
        return
    seen[id(value)] = value
    try:
        copy.deepcopy(value, dict(tensors))
        return
    except Exception:
        found = [inner for part in _parts(value) for inner in _uncopyable(part, tensors, seen)]
        # An iterator that both share would move on in the model when the copy asks for the next value.
        if not found and isinstance(value, Tensor | nn.Module | GeneratorType):
            raise
    yield from found or [value]


def _parts(value: object) -> Iterable[object]:
    match value:
        case Mapping():
            return [*value.keys(), *value.values()]
        case list() | tuple() | set() | frozenset():
            return value
        case MethodType():
            return [value.__self__]
        case partial():
            return [value.func, *value.args, *value.keywords.values()]
    return list(getattr(value, "__dict__", {}).values())


@torch.no_grad()
def write_into(place: Tensor, value: Tensor) -> None:
    """Copies a value into a tensor of the same shape, also where entries of that one share their memory (`expand`)."""
    alone = tuple(slice(0, 1) if step == 0 else slice(None) for step in place.stride())
    place[alone].copy_(value[alone])
