"""A network that computes a model's logits for attacks, and the copies of it that threads work on."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from innermax.oracle.attributes import take_over_attributes
from innermax.oracle.folding import Folded
from innermax.oracle.frozen import frozen_copy
from innermax.oracle.recurrent import pass_gradients, uses_cudnn
from innermax.oracle.threads import in_worker
from innermax.utils.copying import copy_model, write_into


@dataclass(frozen=True)
class Compiled:
    """A frozen network that computes a model's logits.

    Attributes:
        network: answers for the model.
        dtype: what images are converted to; None: nothing.
        memory_format: of images (B, C, H, W).
        folded: how the network was rewritten; None: it has the model's own modules.
        kept: whether the network can take over what the model learns; if not, the model is copied anew each time.
    """

    network: nn.Module
    dtype: torch.dtype | None
    memory_format: torch.memory_format = torch.preserve_format
    folded: Folded | None = None
    kept: bool = True
    _replicas: "_Replicas" = field(default_factory=lambda: _Replicas())

    def __call__(self, x: Tensor) -> Any:
        """What the network returns for a copy of x, which it may change in place."""
        with pass_gradients(self.recurrent):
            return self._replicas.own(self.network)(self.place(x))

    @cached_property
    def recurrent(self) -> bool:
        """Whether it has recurrent layers through which cuDNN passes gradients back only in training mode."""
        return uses_cudnn(self.network)

    def place(self, x: Tensor) -> Tensor:
        """A copy of x as the network takes it."""
        memory_format = self.memory_format if x.ndim == 4 else torch.preserve_format
        return x.to(self.dtype or x.dtype, memory_format=memory_format, copy=True)

    def to(self, dtype: torch.dtype | None) -> "Compiled":
        """A copy in another precision; None: in its own."""
        if dtype is None:
            return self.of(copy_model(self.network))
        return replace(self, dtype=dtype).of(cast(copy_model(self.network), dtype))

    def of(self, network: nn.Module) -> "Compiled":
        """The same about another copy of the network."""
        folded = self.folded and replace(self.folded, network=network)
        return replace(self, network=network, folded=folded, _replicas=_Replicas())

    def fits(self, model: nn.Module) -> bool:
        """Whether each parameter and buffer has a place for what the model has now: some grow, or are made late."""
        if self.folded is not None:
            return self.folded.fits(model)
        return [one.shape for one in _state(self.network)] == [one.shape for one in _state(model)]

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> "Compiled":
        """The network with what the model has now, which must fit: parameters, buffers and, if not folded, numbers in
        attributes.
        """
        if not self.kept:
            return self.of(frozen_copy(model, share=False))
        if self.folded is not None:
            self.folded.refresh(model)
        else:
            for mine, theirs in zip(_state(self.network), _state(model), strict=True):
                if mine.data_ptr() != theirs.data_ptr():  # else they are shared
                    write_into(mine, theirs)
            take_over_attributes(self.network, model)
        forget_kept_values(self.network)
        self._replicas.refresh(self.network)
        return self


def share(model: nn.Module) -> Compiled:
    """The model as it is: a frozen copy on its own parameters. Raises as `frozen_copy`."""
    return Compiled(frozen_copy(model, share=True), floating_dtype(model))


def floating_dtype(model: nn.Module) -> torch.dtype | None:
    """The precision of a model's first real parameter, None where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network, its real parameters and buffers converted; complex ones stay (`Module.to` drops half of them)."""
    return _apply(network, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def put_in_order(network: nn.Module, channels_last: bool) -> nn.Module:
    """The network, what has four dimensions in channels-last or in the usual order; each tensor stays the same object.

    `Module.to` fails on five dimensions.
    """
    order = torch.channels_last if channels_last else torch.contiguous_format
    for tensor in find_filters(network).values():
        tensor.data = tensor.data.contiguous(memory_format=order)
    return network


def find_filters(network: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of four dimensions, by name."""
    return {name: one for name, one in chain(network.named_parameters(), network.named_buffers()) if one.ndim == 4}


def _apply(network: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    network._apply(change)  # type: ignore[no-untyped-call]
    return network


def forget_kept_values(network: nn.Module) -> None:
    """Lets modules drop what they keep in evaluation mode: they do so on entering training mode."""
    if any(type(module).train is not nn.Module.train for module in network.modules()):
        network.train()
        network.eval()


class _Replicas:
    """For each worker thread a network of its own on the same parameters: forward passes may keep values on modules."""

    def __init__(self) -> None:
        self._lock, self._networks = threading.Lock(), dict[int, nn.Module]()

    def own(self, network: nn.Module) -> nn.Module:
        """The network for this thread."""
        if not in_worker():
            return network
        with self._lock:
            replica = self._networks.get(threading.get_ident())
            if replica is None:
                replica = copy_model(network, {parameter: parameter for parameter in network.parameters()})
                self._networks[threading.get_ident()] = replica
            return replica

    def refresh(self, network: nn.Module) -> None:
        """Takes over the network's buffers and plain attributes."""
        for replica in self._networks.values():
            for mine, theirs in zip(replica.buffers(), network.buffers(), strict=True):
                write_into(mine, theirs)
            take_over_attributes(replica, network)
            forget_kept_values(replica)


def _state(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
