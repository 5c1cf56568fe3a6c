"""Plain convolutional networks: the paper's two and a small one for 8×8 digits.

Each is one flat `nn.Sequential` of convolution → BatchNorm (→ max-pool) → ReLU, so that BatchNorm can be folded. ReLU
and max-pool commute; this way round ReLU has a quarter of the work.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mnist_cnn(num_classes: int, input_shape: Sequence[int]) -> nn.Sequential:
    """The paper's 4-layer CNN: convolutions of 32 and 64 channels, dense 128 and classes.

    input_shape: (C, H, W) with H, W ≥ 4, else ValueError.
    Source: Wang et al., ICML 2019, with the layers of the authors' code.
    """
    return _cnn(num_classes, input_shape, blocks=((32,), (64,)), dense=128)


def cifar_cnn(num_classes: int, input_shape: Sequence[int]) -> nn.Sequential:
    """The paper's 8-layer CNN: three blocks of two convolutions (64, 128, 196 channels), dense 256 and classes.

    input_shape: (C, H, W) with H, W ≥ 8, else ValueError.
    Source: Wang et al., ICML 2019, with the layers of the authors' code.
    """
    blocks = ((64, 64), (128, 128), (196, 196))
    return _cnn(num_classes, input_shape, blocks=blocks, dense=256, dense_norm=True)


def digits_cnn(num_classes: int, input_shape: Sequence[int]) -> nn.Sequential:
    """A small CNN for 8×8 digits: convolutions of 16, 32 and 64 channels, dense 64 and classes; trains in seconds.

    input_shape: (C, H, W) with H, W ≥ 4, else ValueError.
    """
    return _cnn(num_classes, input_shape, blocks=((16, 32), (64,)), dense=64)


def _cnn(
    num_classes: int,
    input_shape: Sequence[int],
    *,
    blocks: Sequence[Sequence[int]],
    dense: int,
    dense_norm: bool = False,
) -> nn.Sequential:
    """Blocks of 3×3 convolutions of the given channels, each block ending in a 2×2 max-pool; two dense layers."""
    channels, *sizes = input_shape
    shrink = 2 ** len(blocks)  # each max-pool halves, rounding down
    if min(sizes) < shrink:
        raise ValueError(f"input_shape must be at least {shrink}×{shrink} pixels, got {tuple(input_shape)}")
    layers: list[nn.Module] = []
    for block in blocks:
        for before, after in pairwise((channels, *block)):
            # BatchNorm's shift takes the place of the convolution's bias
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers.insert(-1, nn.MaxPool2d(2))
        channels = block[-1]
    features = channels * math.prod(size // shrink for size in sizes)
    layers += [nn.Flatten(), nn.Linear(features, dense, bias=not dense_norm)]
    layers += [nn.BatchNorm1d(dense)] if dense_norm else []
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(dense, num_classes))
