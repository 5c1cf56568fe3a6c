"""Recurrent layers on a GPU: cuDNN passes gradients back through them only where they run in training mode."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

NOTE = "recurrent layers as in training, without dropout (cuDNN passes gradients back in no other mode)"
_LAYERS = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})  # what nn.LSTM and the like call
_DEVICES = frozenset({"cuda"})
_DROPOUT, _TRAINING = 2, 3  # places behind the argument has_biases, the first that is true or false


def uses_cudnn(network: nn.Module) -> bool:
    """Whether a network has recurrent layers that cuDNN may compute."""
    layers = (module for module in network.modules() if isinstance(module, nn.RNNBase))
    return any(parameter.device.type in _DEVICES for layer in layers for parameter in layer.parameters())


def pass_gradients(recurrent: bool) -> AbstractContextManager[object]:
    """Context manager: gradients can be passed back through recurrent layers in evaluation mode.

    recurrent: whether there are any that need it, see `uses_cudnn`.
    """
    return _AsInTraining() if recurrent and torch.is_grad_enabled() else nullcontext()


class _AsInTraining(TorchFunctionMode):
    """Recurrent layers in evaluation mode are computed as in training mode with a dropout of 0: the same function.

    cuDNN then keeps what the backward pass needs. Nothing else can tell the difference: the modules stay in evaluation
    mode, a layer that draws its dropout in any mode still does, and cuDNN stays on for this and every other thread.
    """

    def __torch_function__(
        self, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _LAYERS:
            values = list(args)
            first = next((place for place, value in enumerate(values) if isinstance(value, bool)), len(values))
            if len(values) > first + _TRAINING and not values[first + _TRAINING]:
                values[first + _DROPOUT], values[first + _TRAINING] = 0.0, True
            args = tuple(values)
        return func(*args, **(kwargs or {}))
