"""Residual networks with the CIFAR stem (a 3×3 convolution of stride 1, no max-pool); any image size."""

from collections.abc import Sequence
from typing import no_type_check

from torch import nn


def preact_resnet18(num_classes: int, input_shape: Sequence[int]) -> nn.Sequential:
    """PreActResNet-18: four stages of two blocks, 64 to 512 channels. Source: He et al., ECCV 2016."""
    return _preact(num_classes, input_shape[0], stem=64, stages=(64, 128, 256, 512), blocks=2)


def wideresnet(num_classes: int, input_shape: Sequence[int], *, depth: int = 34, width: int = 10) -> nn.Sequential:
    """WideResNet-depth-width without dropout. Source: Zagoruyko & Komodakis, BMVC 2016.

    depth: 6n + 4 with 1 ≤ n ≤ 166; width: ≥ 1; anything else raises ValueError.
    """
    if not 10 <= depth <= 1000 or depth % 6 != 4:
        raise ValueError(f"depth must be 6n + 4 with n ≥ 1 (10, 16, 22, 28, 34, …, 1000), got {depth!r}")
    if width < 1:
        raise ValueError(f"width must be ≥ 1, got {width!r}")
    stages = (16 * width, 32 * width, 64 * width)
    return _preact(num_classes, input_shape[0], stem=16, stages=stages, blocks=(depth - 4) // 6)


def resnet50(num_classes: int, input_shape: Sequence[int]) -> nn.Sequential:
    """ResNet-50 of bottleneck blocks, the stride in the 3×3 convolution. Source: He et al., CVPR 2016."""
    layers: list[nn.Module] = [_conv(input_shape[0], 64, 3), nn.BatchNorm2d(64), nn.ReLU()]
    channels = 64
    for stage, (width, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, stride=2 if stage and not block else 1))
            channels = 4 * width
    return _initialise(nn.Sequential(*layers, *_head(channels, num_classes)))


class PreActBlock(nn.Module):
    """Two 3×3 convolutions, each after BatchNorm and ReLU; the shortcut's convolution follows the first ReLU."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(before), nn.ReLU(), _conv(before, after, 3, stride)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(after), nn.ReLU(), _conv(after, after, 3)
        self.shortcut = None if before == after and stride == 1 else _conv(before, after, 1, stride)

    @no_type_check  # torch.fx calls it with a proxy, which a runtime type checker would refuse
    def forward(self, x):
        activated = self.relu1(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return self.conv2(self.relu2(self.norm2(self.conv1(activated)))) + shortcut


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions, each followed by BatchNorm; 4·width channels out."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.conv1, self.norm1, self.relu1 = _conv(before, width, 1), nn.BatchNorm2d(width), nn.ReLU()
        self.conv2, self.norm2, self.relu2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU()
        self.conv3, self.norm3, self.relu3 = _conv(width, after, 1), nn.BatchNorm2d(after), nn.ReLU()
        same = before == after and stride == 1
        self.shortcut = None if same else nn.Sequential(_conv(before, after, 1, stride), nn.BatchNorm2d(after))

    @no_type_check  # as above
    def forward(self, x):
        shortcut = x if self.shortcut is None else self.shortcut(x)
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.relu2(self.norm2(self.conv2(y)))
        return self.relu3(self.norm3(self.conv3(y)) + shortcut)


def _preact(num_classes: int, channels: int, *, stem: int, stages: Sequence[int], blocks: int) -> nn.Sequential:
    """Stem, stages of pre-activation blocks (all but the first stage halve the image), BatchNorm, ReLU and head."""
    layers: list[nn.Module] = [_conv(channels, stem, 3)]
    before = stem
    for stage, after in enumerate(stages):
        for block in range(blocks):
            layers.append(PreActBlock(before, after, stride=2 if stage and not block else 1))
            before = after
    return _initialise(nn.Sequential(*layers, nn.BatchNorm2d(before), nn.ReLU(), *_head(before, num_classes)))


def _conv(before: int, after: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2, bias=False)


def _head(channels: int, num_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]


def _initialise(model: nn.Sequential) -> nn.Sequential:
    """The model, with He's fan-out initialisation in every convolution, except on the meta device, where it is slow."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
