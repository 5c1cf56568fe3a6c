"""Small networks of the kinds that users bring: images (B, 3, 16, 16) in [0, 1] → logits (B, 5)."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

SHAPE, CLASSES = (3, 16, 16), 5


class BatchNormAct(nn.BatchNorm2d):
    """BatchNorm and the activation after it in one module, which calls the function itself."""

    def __init__(self, channels, activation=nn.SiLU):
        super().__init__(channels)
        self.activation = activation()

    def forward(self, x):
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        z = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.activation(z)


def conv(inputs, outputs, size=3, norm=nn.BatchNorm2d, activation=nn.ReLU, **options):
    """Convolution, BatchNorm and activation."""
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options)
    return nn.Sequential(layer, norm(outputs), activation())


class Sum(nn.Module):
    """x + body(x), or shortcut(x) + body(x)."""

    def __init__(self, body, shortcut=None):
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x):
        return self.shortcut(x) + self.body(x)


class Joined(nn.Module):
    """x and body(x), one after the other in the channels."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return torch.cat([x, self.body(x)], 1)


class Gate(nn.Module):
    """Each channel times a number in (0, 1) that all of them decide."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, channels, 1), nn.Hardsigmoid())

    def forward(self, x):
        return x * self.scale(x.mean((2, 3), keepdim=True))


class Pooled(nn.Module):
    """The mean of tokens (B, N, D), after a LayerNorm, to logits."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, tokens):
        return self.head(self.norm(tokens).mean(1))


class Patches(nn.Module):
    """Images to tokens (B, N, D), one for each patch of size × size pixels."""

    def __init__(self, size, width):
        super().__init__()
        self.projection = nn.Conv2d(3, width, size, stride=size)

    def forward(self, x):
        return self.projection(x).flatten(2).transpose(1, 2)


def attend(layer, tokens, heads, bias=None):
    """Self-attention over tokens (…, N, D); layer: a module with qkv and projection."""
    *shape, width = tokens.shape
    qkv = layer.qkv(tokens).reshape(*shape, 3, heads, width // heads).movedim(-3, 0).transpose(-3, -2)
    weights = qkv[0] @ qkv[1].transpose(-2, -1) / math.sqrt(width // heads)
    mixed = (weights if bias is None else weights + bias).softmax(-1) @ qkv[2]
    return layer.projection(mixed.transpose(-3, -2).reshape(*shape, width))


class Attention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens):
        return attend(self, self.norm(tokens), self.heads)


class CachedBias(Attention):
    """A learned bias for each distance of two tokens, laid out once in evaluation mode and kept until it learns."""

    def __init__(self, width, tokens, heads=2):
        super().__init__(width, heads)
        places = torch.arange(tokens)
        self.biases = nn.Parameter(torch.randn(heads, tokens))
        self.register_buffer("distances", (places[:, None] - places).abs(), persistent=False)
        self.kept = {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def bias(self, device):
        if self.training:
            return self.biases[:, self.distances]
        if str(device) not in self.kept:
            self.kept[str(device)] = self.biases[:, self.distances]
        return self.kept[str(device)]

    def forward(self, tokens):
        return attend(self, self.norm(tokens), self.heads, self.bias(tokens.device))


class ShiftedWindows(Attention):
    """Attention within windows of 2 × 2 tokens, half a window off; a 5-D buffer keeps apart what is no neighbour."""

    def __init__(self, width, side, heads=2):
        super().__init__(width, heads)
        self.side = side
        region = torch.zeros(1, side, side, 1)
        region[:, -1:], region[:, :, -1:] = 1, region[:, :, -1:] + 2
        parts = self.windows(region).squeeze(-1)
        apart = parts[..., None, :] != parts[..., None]
        self.register_buffer("mask", torch.where(apart, -100.0, 0.0)[:, :, None])

    def windows(self, grid):
        """(B, side, side, D) → (B, windows, 4, D)."""
        half = self.side // 2
        cut = grid.reshape(grid.shape[0], half, 2, half, 2, -1).transpose(2, 3)
        return cut.reshape(grid.shape[0], half * half, 4, -1)

    def forward(self, tokens):
        count, half = tokens.shape[0], self.side // 2
        grid = self.norm(tokens).reshape(count, self.side, self.side, -1).roll((-1, -1), (1, 2))
        mixed = attend(self, self.windows(grid), self.heads, self.mask)
        grid = mixed.reshape(count, half, half, 2, 2, -1).transpose(2, 3).reshape(count, self.side, self.side, -1)
        return grid.roll((1, 1), (1, 2)).flatten(1, 2)


def perceptron(width):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class AcrossTokens(nn.Module):
    """A perceptron over the tokens of each channel."""

    def __init__(self, width, tokens):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))

    def forward(self, tokens):
        return self.mix(self.norm(tokens).transpose(1, 2)).transpose(1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Scaled(nn.Module):
    """body(x), each channel times a learned number that begins small."""

    def __init__(self, body, channels):
        super().__init__()
        self.body, self.scale = body, nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, x):
        return self.scale * self.body(x)


class Rounding(torch.autograd.Function):
    """To multiples of 1/8; gradients pass as if nothing had been done."""

    @staticmethod
    def forward(context, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(context, gradient):
        return gradient


class Quantized(nn.Module):
    def forward(self, x):
        return Rounding.apply(x)


class Spike(torch.autograd.Function):
    """1 where a potential has passed 1; gradients are those of a smooth step."""

    @staticmethod
    def forward(context, potential):
        context.save_for_backward(potential)
        return (potential > 1).to(potential.dtype)

    @staticmethod
    def backward(context, gradient):
        (potential,) = context.saved_tensors
        return gradient / (1 + 4 * (potential - 1).abs()) ** 2


class Spiking(nn.Module):
    """Leaky neurons over four steps of time, whose potential is kept on the module from step to step."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 12, 3, stride=2), nn.Linear(12 * 49, CLASSES)
        self.potential = None

    def forward(self, x):
        current, rates = 3 * self.layer(x), 0
        self.potential = torch.zeros_like(current)
        for _ in range(4):
            self.potential = 0.8 * self.potential + current
            spikes = Spike.apply(self.potential)
            self.potential = self.potential * (1 - spikes)
            rates = rates + spikes
        return self.head(rates.flatten(1) / 4)


class OverRows(nn.Module):
    """A recurrent network that reads an image row by row."""

    def __init__(self, kind):
        super().__init__()
        self.cells, self.head = kind(48, 24, batch_first=True, bidirectional=True), nn.Linear(48, CLASSES)

    def forward(self, x):
        answers, _ = self.cells(x.transpose(1, 2).flatten(2))
        return self.head(answers[:, -1])


class Spectral(nn.Module):
    """Frequencies of an image times complex numbers that it learns."""

    def __init__(self, channels=6):
        super().__init__()
        self.before = conv(3, channels)
        self.filters = nn.Parameter(torch.randn(channels, 16, 9, dtype=torch.complex64))
        self.head = nn.Linear(channels * 16, CLASSES)

    def forward(self, x):
        filtered = torch.fft.irfft2(torch.fft.rfft2(self.before(x)) * self.filters, s=(16, 16))
        return self.head(F.avg_pool2d(filtered.relu(), 4).flatten(1))


class AsVolume(nn.Module):
    """Colours as the depth of a volume with one channel."""

    def forward(self, x):
        return x[:, None]


class StandardizedConv(nn.Conv2d):
    """A convolution whose weights are standardised each time it is asked."""

    def forward(self, x):
        mean, deviation = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (deviation + 1e-3) / 4, self.bias)


def head(inputs):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def residual(width=8, norm=nn.BatchNorm2d):
    down = Sum(
        nn.Sequential(conv(width, 16, stride=2, norm=norm), nn.Conv2d(16, 16, 3, padding=1, bias=False), norm(16)),
        nn.Sequential(nn.Conv2d(width, 16, 1, stride=2, bias=False), norm(16)),
    )
    return nn.Sequential(conv(3, width, norm=norm), Sum(conv(width, width, norm=norm)), down, nn.ReLU(), head(16))


def plain():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(108, CLASSES)),
    )


def dense():
    grown = [
        Joined(nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 6, 3, padding=1, bias=False)))
        for width in (8, 14, 20)
    ]
    shrunk = nn.Sequential(nn.BatchNorm2d(26), nn.ReLU(), nn.Conv2d(26, 12, 1), nn.AvgPool2d(2))
    return nn.Sequential(conv(3, 8), *grown, shrunk, head(12))


def depthwise():
    def inverted(width, inner):
        depth = conv(inner, inner, groups=inner, activation=nn.Hardswish)
        last = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))
        return Sum(nn.Sequential(conv(width, inner, 1, activation=nn.ReLU6), depth, Gate(inner), last))

    return nn.Sequential(conv(3, 8, stride=2, activation=nn.Hardswish), inverted(8, 24), inverted(8, 24), head(8))


def norm_and_activation():
    silent = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False), BatchNormAct(12, nn.Identity))
    first, second = (
        nn.Sequential(nn.Conv2d(inputs, 12, 3, bias=False), BatchNormAct(12, activation))
        for inputs, activation in ((3, nn.SiLU), (12, nn.ReLU))
    )
    return nn.Sequential(first, second, Sum(silent), nn.SiLU(), head(12))


def tokens(block, width=24, size=4, count=2):
    """A network over patches; block: makes what mixes the tokens."""
    blocks = [layer for _ in range(count) for layer in (Sum(block(width)), Sum(perceptron(width)))]
    return nn.Sequential(Patches(size, width), *blocks, Pooled(width))


def convnext():
    def block():
        channels = nn.Sequential(nn.Conv2d(12, 48, 1), nn.GELU(), nn.Conv2d(48, 12, 1))
        return Sum(Scaled(nn.Sequential(nn.Conv2d(12, 12, 7, padding=3, groups=12), ChannelNorm(12), channels), 12))

    return nn.Sequential(nn.Conv2d(3, 12, 2, stride=2), ChannelNorm(12), block(), block(), head(12))


def quantized():
    rounded = conv(3, 8), Quantized(), conv(8, 8), Quantized()
    return nn.Sequential(*rounded, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(128, CLASSES))


def normalized_weights():
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False), nn.Linear(128, CLASSES)
    first, second = parametrizations.weight_norm(layers[0]), parametrizations.spectral_norm(layers[1])
    middle = nn.Sequential(nn.ReLU(), second, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return nn.Sequential(first, *middle, parametrizations.weight_norm(layers[2]))


def normalized_by_hooks():
    """As the function of torch.nn.utils that has become deprecated does it: a hook sets the weight before each pass."""
    layers = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3)
    for layer in layers:
        torch.nn.utils.spectral_norm(layer)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.BatchNorm2d(8), nn.ReLU(), head(8))


def volume():
    layers = nn.Conv3d(1, 6, 3, padding=1, bias=False), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d((1, 2, 2))
    after = nn.Conv3d(6, 8, (3, 3, 3), bias=False), nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten()
    return nn.Sequential(AsVolume(), *layers, *after, nn.Linear(64, CLASSES))


def standardized():
    first, second = StandardizedConv(3, 12, 3, stride=2), StandardizedConv(12, 12, 3, padding=1)
    return nn.Sequential(first, nn.GroupNorm(3, 12), nn.SiLU(), Sum(second), nn.SiLU(), head(12))


KINDS = {
    "plain CNN": plain,
    "ResNet": residual,
    "DenseNet": dense,
    "depthwise (MobileNet)": depthwise,
    "BatchNorm with its activation": norm_and_activation,
    "shifted windows (Swin)": lambda: tokens(lambda width: ShiftedWindows(width, 4)),
    "ViT": lambda: tokens(Attention),
    "ConvNeXt": convnext,
    "MLP-Mixer": lambda: tokens(lambda width: AcrossTokens(width, 16)),
    "cached attention biases (LeViT)": lambda: tokens(lambda width: CachedBias(width, 16)),
    "quantised, straight-through": quantized,
    "spiking": Spiking,
    "weight and spectral norm": normalized_weights,
    "spectral norm by a hook": normalized_by_hooks,
    "LSTM over rows": lambda: OverRows(nn.LSTM),
    "GRU over rows": lambda: OverRows(nn.GRU),
    "complex, over frequencies": Spectral,
    "3-D convolution": volume,
    "standardised weights (NFNet)": standardized,
    "float64": lambda: residual(6).double(),
}


def build(kind, seed=0):
    """A network of a kind, in training mode, whose BatchNorm has seen images and whose answers are of all classes."""
    torch.manual_seed(seed)
    model = KINDS[kind]().train()
    images = torch.rand(16, *SHAPE, dtype=next(p.dtype for p in model.parameters() if p.is_floating_point()))
    with torch.no_grad():
        for _ in range(3):
            model(images)
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.bias -= model.eval()(images).mean(0)
    return model.train()
