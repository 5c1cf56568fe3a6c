"""Examples that many tests use."""

import torch

BYTES = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
LABELS = torch.zeros(2, dtype=torch.int64)


def images(count=6, shape=(2, 5, 5), dtype=torch.float32, seed=0):
    """Clean images, a fifth of whose pixels are at a bound, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(count, *shape, generator=generator, dtype=dtype) * 1.5 - 0.25).clamp(0, 1)
    return x, torch.arange(count) % 3
