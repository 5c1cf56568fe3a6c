"""Where Python waits for a device, found without one: calls that look at a tensor's values, or copy values to it."""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import innermax

_PACKAGE = Path(innermax.__file__).parent
# Operators that look at values: for a number, or for the shape of what they return.
_LOOKS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "unique_consecutive",
    "_unique2",
    "bincount",
    "repeat_interleave",
}
_TAKES = {"index", "index_put", "index_put_"}  # look where an index is a mask
_COPIES = {"tolist", "numpy", "cpu", "tensor", "as_tensor", "from_numpy"}


@contextmanager
def spy_on_waits():
    """Context manager: counts where Python would wait for a GPU, as "file: function" of innermax → times.

    A copy of a number that Python holds counts, too: torch copies it from memory that is not pinned, and waits.
    """
    places = Counter()
    with ExitStack() as stack:
        stack.enter_context(_Operators(places))
        stack.enter_context(_Functions(places))
        yield places


class _Operators(TorchDispatchMode):
    def __init__(self, places):
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)] if name in _TAKES else []
        if name in _LOOKS or masks:
            self.places[_place()] += 1
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, places):
        super().__init__()
        self.places = places

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        copied = name in _COPIES and not (args and name in ("tensor", "as_tensor") and isinstance(args[0], Tensor))
        place = kwargs.get("device", args[1] if len(args) > 1 else None)
        moved = name == "to" and isinstance(place, str | torch.device) and _is_ours(sys._getframe(1))
        # torch makes a tensor of the number, on the processor, and moves it.
        filled = name == "where" and any(isinstance(value, int | float) for value in args[1:])
        if copied or moved or filled:
            self.places[_place()] += 1
        return func(*args, **kwargs)


def _is_ours(frame):
    return Path(frame.f_code.co_filename).is_relative_to(_PACKAGE)


def _place():
    """The innermost line of innermax's own that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        if _is_ours(frame):
            return f"{Path(frame.f_code.co_filename).relative_to(_PACKAGE)}: {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
