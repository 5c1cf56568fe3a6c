"""Small trainings: bars to tell apart, two networks, and what of a run is compared."""

import functools
import os
import signal
from dataclasses import replace

import torch
from torch import nn

import innermax as im
from innermax.objectives import cross_entropy
from innermax.training.checkpoints import find_checkpoints
from innermax.utils.files import load_tensors

LINF = im.Linf(0.2)
ATTACK = im.PGD(LINF, steps=4)
QUIET = {"batch_size": 8, "precision": "float32", "progress": False}


def examples(count=24, seed=1, classes=3):
    """Noisy bright bars, each class's in its own rows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    images = torch.randint(0, 160, (count, 1, 6, 6), generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * int(label) : 2 * int(label) + 2] += 95
    return images.to(torch.uint8), labels


DATA, VALIDATION = examples(), examples(16, seed=2)


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 3))


def cnn(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 3)
    )


def train(model=None, data=DATA, strategy=None, **options):
    return im.train(mlp() if model is None else model, data, strategy or im.Unsecured(), **QUIET | options)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def recorded(model, seen):
    """Cross-entropy that notes the weights before each update."""

    def objective(wrapped, x, y, x_adv, epoch):
        seen.append(weights(model))
        return cross_entropy(wrapped, x, y, x_adv, epoch)

    return objective


def steps_taken(**options):
    """Weights before and after each update."""
    model, seen = cnn(), []
    run = train(model, objective=recorded(model, seen), **options)
    return run, [*seen, weights(model)]


def distance(one, other):
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def timeless(history):
    """The rows without what a clock says."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in history]


def saved(folder):
    """Tensors and position of the newest state."""
    tensors, meta = load_tensors(find_checkpoints(folder)[0])
    return tensors, meta["position"]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def recipe(kind, network=cnn):
    """Everything that has a state: momentum, averages, dropout, augmentation, measured strategies."""
    options = {"epochs": 3, "lr": 0.1, "seed": 5, "validation_set": VALIDATION, "shift": 1, "flip": True}
    model = functools.partial(network, dropout=0.4)
    strategies = {"dynamic": im.Dynamic(ATTACK, "auto", zero_at=0.9), "curriculum": im.Curriculum(ATTACK, patience=1)}
    strategy = strategies.get(kind, im.Standard(replace(ATTACK, steps=2)))
    if kind in ("float32", "bf16"):
        options |= {"precision": kind, "ema": 0.8, "clip": 0.5, "lr_schedule": "cosine"}
    if kind == "dynamic":
        options |= {"optimizer": "adamw", "lr": 0.01}
    return model, {"strategy": strategy} | options


class Interrupting:
    """Cross-entropy; at its call number `at`, before or after the forward pass, `act` happens."""

    def __init__(self, at=None, act=None, after=False):
        self.at, self.act, self.after, self.calls = at, act, after, 0

    def __call__(self, model, x, y, x_adv, epoch):
        self.calls += 1
        if self.calls == self.at and not self.after:
            self.act()
        found = cross_entropy(model, x, y, x_adv, epoch)
        if self.calls == self.at and self.after:
            self.act()
        return found


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def ctrl_c_twice():
    ctrl_c()
    ctrl_c()


def stop():
    raise KeyboardInterrupt
