"""Numbers and tensors that a network keeps as plain attributes: no parameters, no buffers, in no state_dict."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from innermax.oracle.frozen import frozen_copy
from innermax.utils.generators import cuda_devices, private_randomness

Key = tuple[str, str]  # names of a module and of its attribute
_EVERY_MODULES = frozenset(vars(nn.Module()))


def plain_attributes(model: nn.Module) -> dict[Key, Any]:
    """The numbers, NumPy arrays and tensors of all modules; not what a pass has computed and can pass back through."""
    return {
        (name, attribute): value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, int | float | complex | np.ndarray | Tensor)
        and attribute not in _EVERY_MODULES
        and not (isinstance(value, Tensor) and value.requires_grad)
    }


def take_over_attributes(network: nn.Module, model: nn.Module) -> None:
    """Sets the plain attributes of a network, a model's copy, to what the model has now."""
    _set_attributes(network, plain_attributes(model))


def _set_attributes(network: nn.Module, values: Mapping[Key, Any]) -> None:
    modules = dict(network.named_modules())
    for (name, attribute), value in values.items():
        mine = vars(modules[name]).get(attribute) if name in modules else None
        if isinstance(mine, Tensor) and isinstance(value, Tensor) and _fits(mine, value):
            mine.copy_(value)  # in its place, from which recorded CUDA graphs read it
        elif name in modules:
            modules[name].__dict__[attribute] = _own(value)


def _fits(mine: Tensor, value: Tensor) -> bool:
    """Whether a tensor can take over another's values, in its own precision, and in nothing but that."""
    kinds = [(one.shape, one.device, one.is_floating_point(), one.is_complex()) for one in (mine, value)]
    return kinds[0] == kinds[1] and mine.is_contiguous() and not mine.is_inference()


def _own(value: Any) -> Any:
    """A value that does not change with the model's."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else value


@dataclass(frozen=True)
class Snapshot:
    """The plain attributes that a model had once: for each the value itself, its version, and a copy."""

    known: Mapping[Key, tuple[Any, int, Any]]

    @classmethod
    def of(cls, model: nn.Module) -> "Snapshot":
        """What the model has now."""
        found = plain_attributes(model)
        return cls({key: (value, _version(value), _own(value)) for key, value in found.items()})

    def changed(self, model: nn.Module) -> set[Key]:
        """Which attributes of the model have other values now, or are new."""
        return {key for key, value in plain_attributes(model).items() if not self._has(key, value)}

    def is_felt(self, model: nn.Module, changed: Collection[Key], x: Tensor) -> bool:
        """Whether the model would answer anything else to x in evaluation mode with the values from then."""
        now, before = frozen_copy(model, share=True), frozen_copy(model, share=True)
        modules = dict(before.named_modules())
        for name, attribute in changed:
            modules[name].__dict__.pop(attribute, None)  # a copy may lack what its class does not copy
        _set_attributes(before, {key: self.known[key][2] for key in changed if key in self.known})
        answers = []
        for network in (now, before):
            with torch.no_grad(), private_randomness(0, cuda_devices(model)):
                try:
                    answers.append(network(x.clone()))
                except Exception:  # noqa: BLE001  it lacks what it did not have then
                    return True
        return not all(isinstance(answer, Tensor) for answer in answers) or not torch.equal(*answers)

    def _has(self, key: Key, value: Any) -> bool:
        if key not in self.known:
            return False
        before, version, copied = self.known[key]
        if isinstance(value, Tensor):
            if value is before and version >= 0:
                return _version(value) == version
            same = isinstance(copied, Tensor) and (value.shape, value.dtype) == (copied.shape, copied.dtype)
            return same and torch.equal(value, copied)
        return bool(np.array_equal(value, copied))


def _version(value: Any) -> int:
    """How often a tensor was changed in place; −1 where nobody counts."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else -1
