"""What evaluations are tried on: networks that tell what they see, attacks that return what they are told."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from innermax.attacks.search import AttackResult


def network(seed=0, classes=4):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, classes)
    )


def examples(count=40, seed=1, classes=4):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 6, 6), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, classes, (count,), generator=generator)


@dataclass(frozen=True)
class Scripted:
    """An attack that returns what it is told, and whatever else it likes to claim."""

    threat: object
    point: object
    claims: object = None

    def __call__(self, model, x, y, *, seed=0, index=None, final="gradient"):
        nothing = torch.zeros_like(y)
        result = AttackResult(self.point(x, y, index), None, None, None, None, None, None, nothing, nothing, nothing)
        return result if self.claims is None else replace(result, **self.claims(x, y))


class Watched(nn.Module):
    """Two classes, split by the mean of the pixels; tells `seen` (a function: copies share it) what it is shown."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen(x.clone())
        score = 20 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-score, score], 1)


def linear_problem(count=200):
    """A linear model of two classes with weights of both signs, and inputs no attack of 0.1 takes to their bounds."""
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(12, generator=generator), 0.2 + 0.6 * torch.rand(count, 12, generator=generator)
    y = torch.randint(0, 2, (count,), generator=generator)
    model = nn.Linear(12, 2)
    with torch.no_grad():
        model.weight.copy_(torch.stack([-weight, weight]) / 2)
        model.bias.copy_(torch.tensor([0.5, -0.5]) * (x @ weight).mean())
    margin = (x @ weight - (x @ weight).mean()) * (2 * y - 1)
    return model, x, y, margin, weight


class Noise(nn.Module):
    """Logits with noise, in evaluation too."""

    def __init__(self, scale=0.1):
        super().__init__()
        self.scale = scale

    def forward(self, logits):
        return logits + self.scale * torch.randn_like(logits)
