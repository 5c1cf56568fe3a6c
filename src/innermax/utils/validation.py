"""Checks that all public functions share, and the wording of their errors."""

import difflib
from collections.abc import Iterable

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


def shorten(value: object) -> str:
    """A value as an error shows it, however long it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]} … {text[-38:]}"


def check_count(value: object, name: str) -> None:
    """Raises unless value is an integer ≥ 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_inputs(x: Tensor, name: str = "x") -> None:
    """Raises unless x is a non-empty finite float tensor (B, *features)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {x.dtype}; scale uint8 images to [0, 1] first")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"{name} must have shape (B, *features) with B ≥ 1, got {tuple(x.shape)}")
    low, high = x.detach().aminmax()  # NaN where one is; and no mask as large as x, which may be larger than memory
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError(f"{name} holds NaN or infinite values")


def check_labels(labels: Tensor, batch: int, classes: int | None = None, name: str = "y") -> None:
    """Raises unless labels are int64 (B,) in 0…classes − 1."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {labels.dtype}")
    if labels.shape != (batch,):
        raise ValueError(f"{name} must have shape ({batch},), got {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        allowed = "≥ 0" if classes is None else f"in 0…{classes - 1}"
        raise ValueError(f"{name} must be {allowed}, got values from {low} to {high}")
