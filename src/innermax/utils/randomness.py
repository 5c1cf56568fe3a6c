"""Counter-based random numbers: a pure function of (seed, example, stream), never of a shared generator."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Constants of SplitMix64 (Steele, Lea & Flood, 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer, elementwise; shifts are made logical by masking the sign's copies away."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _FIRST
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def hash_keys(seed: int, index: Int[Tensor, " b"], *streams: int | Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """(B,) one 64-bit key per example: the hash of seed, example number and streams (one for all, or one each)."""
    key = torch.full_like(index, _wrap(seed))
    for part in (index, *streams):
        value = torch.full_like(index, _wrap(part)) if isinstance(part, int) else part
        key = _mix(key + _mix(value + _GOLDEN))
    return key


def derive_seed(seed: int, *streams: int) -> int:
    """A derived seed in [0, 2⁶³): the hash of a seed and stream numbers."""
    return int(hash_keys(seed, torch.zeros(1, dtype=torch.int64, device="cpu"), *streams)) & 0x7FFFFFFFFFFFFFFF


def uniform(key: Int[Tensor, " b"], count: int) -> Float[Tensor, "b n"]:
    """count uniform numbers in (0, 1) per example, float32, the same on every device."""
    counter = torch.arange(1, count + 1, device=key.device)
    bits = _mix(key[:, None] + counter * _GOLDEN)
    return ((bits >> 41) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)


def normal(key: Int[Tensor, " b"], count: int) -> Float[Tensor, "b n"]:
    """count standard normal numbers per example (Box & Muller 1958)."""
    draws = uniform(key, 2 * count)
    return torch.sqrt(-2 * draws[:, :count].log()) * torch.cos(2 * math.pi * draws[:, count:])


def permutation(seed: int, count: int, *streams: int) -> Int[Tensor, " n"]:
    """A random order of 0…count − 1."""
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, *streams))
    return torch.randperm(count, generator=generator, device="cpu")


def _wrap(value: int) -> int:
    """Any Python integer as a signed 64-bit one."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
