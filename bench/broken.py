"""Defences that only seem to work: each breaks the search, not the attack's chance. For bench/audit.py."""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from innermax.losses import cross_entropy


class Changed(nn.Module):
    """A model with something before it, after it, or both."""

    def __init__(self, model: nn.Module, before: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.before, self.model, self.after = before or nn.Identity(), model, after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(self.before(x)))


class Times(nn.Module):
    """Logits times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, z: Tensor) -> Tensor:
        return self.factor * z


class Quantised(nn.Module):
    """Images rounded to so many levels; no gradient passes."""

    def __init__(self, levels: int, floor: bool = False) -> None:
        super().__init__()
        self.levels, self.floor = levels, floor

    def forward(self, x: Tensor) -> Tensor:
        return (torch.floor if self.floor else torch.round)(x * self.levels) / self.levels


class Resized(nn.Module):
    """Images shrunk or shifted at random, and noise."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        size = int(torch.randint(x.shape[-1] - 1, x.shape[-1] + 3, ()))
        resized = functional.interpolate(x, size=size, mode="bilinear")
        resized = functional.interpolate(resized, size=x.shape[-1], mode="bilinear")
        return resized + self.noise * torch.randn_like(x)


class WinnersTakeAll(nn.Module):
    """k-winners-take-all (Xiao et al. 2020): of each example's activations only the largest share passes."""

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.share = share

    def forward(self, z: Tensor) -> Tensor:
        flat = z.flatten(1)
        smallest = flat.topk(max(int(self.share * flat.shape[1]), 1), dim=1).values[:, -1:]
        return (flat * (flat >= smallest)).reshape(z.shape)


class Detached(nn.Module):
    """Cuts the graph."""

    def forward(self, z: Tensor) -> Tensor:
        return z.detach()


class Cosines(nn.Module):
    """Images whose 8×8 blocks' cosine coefficients are rounded, as JPEG does."""

    def __init__(self, step: float) -> None:
        super().__init__()
        n = torch.arange(8.0)
        basis = torch.cos(torch.pi / 8 * (n[None] + 0.5) * n[:, None]) * (2 / 8) ** 0.5
        basis[0] /= 2**0.5
        self.step = step
        self.register_buffer("basis", basis)

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unfold(2, 8, 8).unfold(3, 8, 8)
        rounded = torch.round(self.basis @ blocks @ self.basis.T / self.step) * self.step
        back = self.basis.T @ rounded @ self.basis
        return back.permute(0, 1, 2, 4, 3, 5).reshape(x.shape)


class Thermometer(nn.Module):
    """Each pixel as channels that say which thresholds it exceeds (Buckman et al. 2018)."""

    def __init__(self, levels: int = 8) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        thresholds = (torch.arange(self.levels, device=x.device) + 0.5) / self.levels
        return (x > thresholds[None, :, None, None]).float()


class Pruned(nn.Module):
    """Activations dropped at random, in evaluation too (Dhillon et al. 2018)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, z: Tensor) -> Tensor:
        return functional.dropout(z, self.share, training=True)


class Waves(nn.Module):
    """A high frequency is added to the image: gradients are the wave's."""

    def __init__(self, height: float, frequency: float) -> None:
        super().__init__()
        self.height, self.frequency = height, frequency

    def forward(self, x: Tensor) -> Tensor:
        return x + self.height * torch.sin(self.frequency * x)


class Signs(nn.Module):
    """Activations are −1 or 1; straight-through while training, without gradient in evaluation."""

    def forward(self, z: Tensor) -> Tensor:
        signs = torch.sign(z)
        return signs.detach() + functional.hardtanh(z) - functional.hardtanh(z).detach() if self.training else signs


class Capped(nn.Module):
    """Logits within ±limit."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, z: Tensor) -> Tensor:
        return (z - z.mean(1, keepdim=True)).clamp(-self.limit, self.limit)


class LogProbabilities(nn.Module):
    """The logarithm of probabilities at a low temperature, with the usual small number against log 0."""

    def forward(self, z: Tensor) -> Tensor:
        return ((100 * z).softmax(1) + 1e-12).log()


class Median(nn.Module):
    """A median over 3×3 pixels, then 16 levels, computed where autograd does not see it."""

    def forward(self, x: Tensor) -> Tensor:
        array = np.pad(x.detach().cpu().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(array, (3, 3), axis=(2, 3))
        own = x.detach().cpu().numpy()
        return torch.from_numpy(np.round((np.median(windows, axis=(-1, -2)) + 3 * own) / 4 * 15) / 15).to(x)


class Noisy(nn.Module):
    """Logits with noise."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, z: Tensor) -> Tensor:
        return z + self.size * torch.randn_like(z)


def with_activation(model: nn.Module, activation: nn.Module) -> nn.Module:
    """A copy with another activation in place of every ReLU."""
    changed = copy.deepcopy(model)
    for name, module in list(changed.named_modules()):
        if isinstance(module, nn.ReLU):
            changed.set_submodule(name, copy.deepcopy(activation))
    return changed


def cut(model: nn.Sequential, layer: int) -> nn.Module:
    """A copy whose graph is cut before a layer."""
    layers = list(copy.deepcopy(model))
    return nn.Sequential(*layers[:layer], Detached(), *layers[layer:])


def wrong_way(logits: Tensor, label: Tensor) -> Tensor:
    """The cross-entropy with the sign of a loss that is minimised."""
    return -cross_entropy(logits, label)
