"""The global random generators of torch, NumPy and Python, from which a user's model may draw."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

# ruff: noqa: NPY002  models draw from NumPy's global generator, so that one is meant


@contextmanager
def restore_randomness(devices: Iterable[int] = ()) -> Iterator[None]:
    """Context manager: afterwards the generators continue as if nothing had been drawn.

    devices: the GPUs whose generators are included.
    """
    numpy, python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            np.random.set_state(numpy)
            random.setstate(python)


@contextmanager
def private_randomness(seed: int, devices: Iterable[int] = ()) -> Iterator[None]:
    """Context manager: the generators draw from a seed; afterwards they continue as if nothing had been drawn.

    devices: the GPUs whose generators are included.
    """
    known = sorted(set(devices))
    with restore_randomness(known):
        # torch.manual_seed would also seed GPUs whose generators are not restored.
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in known)):
            generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
        _seed_numpy_and_python(seed)
        yield


def seed_randomness(seed: int) -> None:
    """Seeds the generators, those of all GPUs included; seed: in [0, 2⁶³)."""
    torch.manual_seed(seed)
    _seed_numpy_and_python(seed)


@dataclass(frozen=True)
class Randomness:
    """The state of the generators on the processor: it stays equal as long as nothing is drawn."""

    torch: bytes
    numpy: tuple[Any, ...]
    python: tuple[Any, ...]


def read_randomness() -> Randomness:
    """The state of the generators on the processor."""
    kind, key, *position = np.random.get_state()
    return Randomness(
        torch.get_rng_state().numpy().tobytes(), (kind, np.asarray(key).tobytes(), *position), random.getstate()
    )


def cuda_devices(*models: nn.Module) -> set[int]:
    """The GPUs on which the parameters of models are."""
    return {p.device.index for model in models for p in model.parameters() if p.device.type == "cuda"}


def _seed_numpy_and_python(seed: int) -> None:
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
    random.seed(seed)
