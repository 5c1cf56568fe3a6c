"""A model with the same answers, whose gradient passes through functions that stop or hide it.

BPDA (Athalye et al. 2018), without knowledge of the defence: in every call that a network makes, rounding, detaching,
comparing, clamping and saturating functions keep their values, and their derivative is replaced by 1.
"""

from collections.abc import Callable
from typing import Any, no_type_check

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

_STEPS = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside", "fake_quantize_per_tensor_affine"}
_DETACHED = {"detach", "clone", "contiguous"}
_SATURATING = {"clamp", "clip", "hardtanh", "relu6", "softmax", "sigmoid", "tanh", "hardsigmoid", "softsign"}
_REPLACED = _STEPS | _DETACHED | _SATURATING
_COMPARED = {"gt": 1.0, "ge": 1.0, "lt": -1.0, "le": -1.0, "__gt__": 1.0, "__ge__": 1.0, "__lt__": -1.0, "__le__": -1.0}
_AS_NUMBERS = {"float", "double", "to", "type", "type_as"}
_LEAVING = {"numpy", "__array__", "tolist", "item", "cpu"}
_LAYERS = {"conv1d", "conv2d", "conv3d", "linear", "flatten", "__sub__", "sub", "batch_norm"}


class StraightThrough(nn.Module):
    """`model` with the same answers and a gradient that nothing in it stops.

    Args:
        model: any nn.Module.
        note: called with the name of each function whose derivative is replaced, when a gradient is asked for.
    """

    def __init__(self, model: nn.Module, note: Callable[[str], object] = lambda name: None) -> None:
        super().__init__()
        self.model, self.note = model, note

    @no_type_check  # torch.fx calls it with a proxy, which a runtime type checker would refuse
    def forward(self, x):
        """The model's answer to x: (B, *features)."""
        if isinstance(x, fx.Proxy):  # a trace would hold the model's own derivatives
            raise TypeError("a straight-through gradient cannot be traced")
        with _Passing(x, self.note):
            return self.model(x)


class _Passing(TorchFunctionMode):
    """Context manager: calls on tensors that depend on x get the derivative 1 where theirs is 0 or vanishes."""

    def __init__(self, x: Tensor, note: Callable[[str], object]) -> None:
        super().__init__()
        self.x, self.note = x, note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "_set_grad_enabled" and self.x.requires_grad and not args[0]:
            self.note("no_grad")
            return None
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is None or not self.x.requires_grad:
            return func(*args, **kwargs)
        if name in _LEAVING and first.requires_grad:
            return func(first.detach(), *args[1:], **kwargs)
        if name in _LAYERS and self._is_cut_off(first):
            self.note("what autograd does not see")
            return func(_with_gradient_of(first, self.x), *args[1:], **kwargs)
        return self._pass_through(name, func, first, args, kwargs)

    def _pass_through(self, name: str, func: Any, first: Tensor, args: Any, kwargs: Any) -> Any:
        """The result of a call, with the derivative 1 if the function is one whose own stops or dampens gradients."""
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        if name in _COMPARED and first.requires_grad:
            result.distance = _COMPARED[name] * (first - args[1])  # type: ignore[attr-defined]
        elif name in _AS_NUMBERS and hasattr(first, "distance") and result.is_floating_point():
            self.note("comparison")
            return _with_gradient_of(result, first.distance)
        elif first.requires_grad and result.shape == first.shape and result.is_floating_point():
            rounded = name in ("div", "divide") and kwargs.get("rounding_mode")
            data = name == "__get__" and not result.requires_grad
            if rounded or name in ("__floordiv__", "floor_divide"):
                self.note("floor division")
                return _with_gradient_of(result, first / args[1])
            if (name in _REPLACED and (name not in _DETACHED or not result.requires_grad)) or data:
                self.note("detach" if data else name)
                return _with_gradient_of(result, first)
        return result

    def _is_cut_off(self, value: Tensor) -> bool:
        """Whether a value seems to be x, changed in ways that autograd did not see."""
        return value.is_floating_point() and not value.requires_grad and value.shape == self.x.shape


def _with_gradient_of(value: Tensor, proxy: Tensor) -> Tensor:
    """The value, with the proxy's gradient."""
    return value.detach() + (proxy - proxy.detach())
