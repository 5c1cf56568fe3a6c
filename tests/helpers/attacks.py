"""What attacks are tried on: norms, images, a linear problem whose optimum is known."""

import copy
import math

import numpy as np
import torch
from torch import nn

from innermax.attacks.apgd import APGD
from innermax.attacks.autoattack import AutoAttack
from innermax.attacks.fab import FAB
from innermax.attacks.guided_pgd import GuidedPGD
from innermax.attacks.pgd import CW, FGSM, PGD
from innermax.attacks.square import Square
from innermax.losses import cross_entropy
from innermax.threat import L1, L2, Linf
from tests.helpers.data import images
from tests.helpers.networks import Logged

NORMS = {"linf": (Linf, 0.1), "l2": (L2, 0.5), "l1": (L1, 2.0)}


UNBOUNDED = Linf(0.1, bounds=None)


def logits_of(model, x):
    return (copy.deepcopy(model).eval() if model.training else model)(x)


def gradient_of(model, x, y, loss=cross_entropy):
    point = x.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(logits_of(model, point), y).sum(), point)[0]


SLOPES = np.array(
    [1.0, 0.2, -1.0]
)  # logits = slopes · z + offsets: leaving label 0 is to lower z, leaving 2 to raise it


OFFSETS = np.array([0.1, 0.0, -0.2])


class Linear:
    """A problem whose optimum is known: a model linear in z = x·w, inputs, labels 0 and 2."""

    def __init__(self, batch, shape, bounds, seed=0):
        generator = np.random.default_rng(seed)
        size = math.prod(shape)
        self.w = generator.normal(size=size)
        self.x = generator.uniform(size=(batch, size)).astype(np.float32)
        self.x[:, ::5] = generator.integers(0, 2, size=self.x[:, ::5].shape)
        self.y = generator.choice([0, 2], size=batch)
        self.bounds = bounds
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(size, 3))
        self.model[1].weight.data = torch.tensor(np.outer(SLOPES, self.w), dtype=torch.float32)
        self.model[1].bias.data = torch.tensor(OFFSETS, dtype=torch.float32)
        self.inputs = torch.tensor(self.x).reshape(batch, *shape), torch.tensor(self.y)

    def room(self):
        """How far each coordinate of x may move, down and up."""
        if self.bounds is None:
            return np.full(self.x.shape, -np.inf), np.full(self.x.shape, np.inf)
        return self.bounds[0] - self.x.astype(np.float64), self.bounds[1] - self.x.astype(np.float64)

    def optimum(self, norm, eps, direction):
        """The largest direction·(w·δ) of each example over ‖δ‖ ≤ ε and the bounds."""
        down, up = self.room()
        return [
            {"linf": best_linf, "l2": best_l2, "l1": best_l1}[norm](sign * self.w, eps, lo, hi)
            for sign, lo, hi in zip(direction, down, up, strict=True)
        ]

    def loss(self, loss, moved, label=None):
        """The loss where z has moved by `moved`."""
        z = self.x.astype(np.float64) @ self.w + moved
        logits = z[:, None] * SLOPES + OFFSETS
        label = self.y if label is None else label
        own = logits[np.arange(len(z)), label]
        if loss == "cross_entropy":
            return np.log(np.exp(logits - own[:, None]).sum(1))
        others = np.where(np.arange(3) == label[:, None], -np.inf, logits)
        return others.max(1) - own

    def moved(self, x_adv):
        return (x_adv.double().flatten(1).numpy() - self.x.astype(np.float64)) @ self.w


def best_linf(g, eps, lo, hi):
    return sum(gi * (min(eps, h) if gi > 0 else max(-eps, l)) for gi, l, h in zip(g, lo, hi, strict=True))


def best_l1(g, eps, lo, hi):
    """The largest slopes first, each to its bound."""
    total = 0.0
    for i in sorted(range(len(g)), key=lambda i: -abs(g[i])):
        taken = min(eps, hi[i] if g[i] > 0 else -lo[i])
        total, eps = total + abs(g[i]) * taken, eps - taken
    return total


def best_l2(g, eps, lo, hi):
    """Along clip(s·g), whose length grows with s, by bisection."""
    least, most = 0.0, 1e6
    for _ in range(200):
        s = (least + most) / 2
        least, most = (s, most) if np.linalg.norm(np.clip(s * g, lo, hi)) < eps else (least, s)
    return float(g @ np.clip(least * g, lo, hi))


def starts(attack, model, x, y, **options):
    logged = Logged(model)
    attack(logged, x, y, **options)
    return logged.log.inputs


# Attacks of few steps, by name.
SMALL = {
    "apgd": lambda threat: APGD(threat, steps=9, restarts=2),
    "apgd-t": lambda threat: APGD(threat, steps=9, loss="dlr", targets=2),
    "fab": lambda threat: FAB(threat, steps=6, targets=2, restarts=2),
    "square": lambda threat: Square(threat, queries=12, restarts=2),
}
ALL = {**SMALL, "autoattack": AutoAttack}
# Attacks that support any threat model, of as many steps as they need on `Linear`.
FOR_ANY_THREAT = {
    "fgsm": FGSM,
    "cw": lambda threat: CW(threat, steps=60, confidence=100.0),
    "pgd": lambda threat: PGD(threat, 40, "annealed"),
    "guided": lambda threat: GuidedPGD(threat, budget=120),
    "apgd": lambda threat: APGD(threat, steps=60),
    "apgd-t": lambda threat: APGD(threat, steps=60, loss="margin", targets=2),
}
RADII = {"linf": Linf(0.03), "l2": L2(0.15), "l1": L1(0.6)}  # with which some of `crowd` fall


def crowd(count=10, dtype=torch.float64):
    """A model of four classes, images near its boundaries, and its own labels, but for one that it gets wrong."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    with torch.no_grad():
        model[1].bias -= model[1](torch.full((1, 50), 0.5, dtype=dtype))[0]
        model[3].bias.zero_()
    x, _ = images(count, dtype=dtype)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 4
    return model, x, y
