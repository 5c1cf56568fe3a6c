"""Checks that all public functions share, and the wording of their errors."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for an unknown name, which suggests the nearest known one."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {what} {name!r}{hint} (known: {', '.join(names)})")


def summarize_error(failure: Exception) -> str:
    """An exception's type and first sentence."""
    lines = str(failure).strip().splitlines()
    return ": ".join([type(failure).__name__, *(line.partition(". ")[0] for line in lines[:1])])


def check_logits(value: object, count: int, what: str = "the model") -> Tensor:
    """A model's answer to `count` inputs; raises ValueError unless it is (count, classes ≥ 2) logits."""
    if isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == count and value.shape[1] >= 2:
        return value
    found = str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"{what} must return logits of shape ({count}, classes ≥ 2), got {found}{_hint(value)}")


def _hint(value: object) -> str:
    """How to get at the logits in what a model returns, where that can be said."""
    if isinstance(value, Tensor):
        one = value.ndim == 1 or (value.ndim == 2 and value.shape[1] == 1)
        return "; one logit for two classes: innermax.LogitsOnly(model, output=None, binary=True)" if one else ""
    if isinstance(getattr(value, "logits", None), Tensor):
        place: object = "logits"
    elif isinstance(value, Mapping) and any(isinstance(one, Tensor) for one in value.values()):
        tensors = [key for key, one in value.items() if isinstance(one, Tensor)]
        place = next((key for key in tensors if key == "logits"), tensors[0])
    elif isinstance(value, list | tuple) and len(value) > 0:
        place = 0
    else:
        return ""
    return f"; take innermax.LogitsOnly(model, output={place!r})"


def shorten(value: object) -> str:
    """A value as an error shows it, however long it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]} … {text[-38:]}"


def check_integer(value: object, name: str, least: int | None = None) -> None:
    """Raises unless value is an integer, and at least `least` where that is given."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_count(value: object, name: str) -> None:
    """Raises unless value is an integer ≥ 1."""
    check_integer(value, name, 1)


def is_number(value: object) -> bool:
    """Whether value is a real number, Python's or NumPy's, and no bool."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def check_number(value: Any, name: str, requirement: str, allowed: Callable[[float], bool]) -> None:
    """Raises unless value is a number that is allowed; requirement: which ones are, in words."""
    if not is_number(value):
        raise TypeError(f"{name} must be {requirement}, got {value!r}")
    try:
        fits = allowed(float(value))
    except OverflowError:  # an integer beyond all floats
        fits = False
    if not fits:
        raise ValueError(f"{name} must be {requirement}, got {shorten(value)}")


def check_flag(value: object, name: str) -> None:
    """Raises unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(value: object, name: str, known: Sequence[str]) -> None:
    """Raises unless value is one of the known names."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if value not in known:
        raise unknown(name, value, known)


def check_inputs(x: Tensor, name: str = "x") -> None:
    """Raises unless x is a non-empty finite float tensor (B, *features)."""
    check_input_shape(x, name)
    if not bool(are_finite(x)):
        raise ValueError(f"{name} holds NaN or infinite values")


def check_input_shape(x: Tensor, name: str = "x") -> None:
    """Raises unless x is a non-empty float tensor (B, *features), whatever its values: no device is waited for."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_meta:
        raise TypeError(f"{name} must be a dense tensor that holds values, got {x.layout} on {x.device}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {x.dtype}; scale uint8 images to [0, 1] first")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"{name} must have shape (B, *features) with B ≥ 1, got {tuple(x.shape)}")


def are_finite(x: Tensor) -> Tensor:
    """Whether all values are finite numbers: one bool, on x's device."""
    low, high = x.detach().aminmax()  # NaN where one is; and no mask as large as x, which may be larger than memory
    return torch.isfinite(low) & torch.isfinite(high)


def check_labels(labels: Tensor, batch: int, classes: int | None = None, name: str = "y") -> None:
    """Raises unless labels are int64 (B,) in 0…classes − 1."""
    check_label_shape(labels, batch, name)
    if not bool(are_classes(labels, classes)):
        allowed = "≥ 0" if classes is None else f"in 0…{classes - 1}"
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"{name} must be {allowed}, got values from {low} to {high}")


def check_label_shape(labels: Tensor, batch: int, name: str = "y") -> None:
    """Raises unless labels are int64 (B,), whatever their values: no device is waited for."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {labels.dtype}")
    if labels.shape != (batch,):
        raise ValueError(f"{name} must have shape ({batch},), got {tuple(labels.shape)}")


def are_classes(labels: Tensor, classes: int | None = None) -> Tensor:
    """Whether all labels are in 0…classes − 1: one bool, on the labels' device."""
    low, high = labels.aminmax()
    return low >= 0 if classes is None else (low >= 0) & (high < classes)
