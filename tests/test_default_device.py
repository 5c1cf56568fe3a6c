"""Users set torch's default device, to a GPU for instance: innermax's own tensors stay where they belong."""

import re

import pytest
import torch
from torch import nn

import innermax as im

X, Y = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
L2, LINF = im.L2(0.5), im.Linf(0.1)
ATTACKS = {
    "pgd": im.PGD(LINF, steps=2, restarts=2),
    "apgd": im.APGD(L2, steps=10),
    "fab": im.FAB(LINF, steps=5),
    "square": im.Square(L2, queries=30),
    "guided": im.GuidedPGD(LINF, budget=20),
    "fmn": im.FMN(L2, steps=5),
    "ddn": im.DDN(L2, steps=5),
    "box": im.PGD(im.LinfBox.of(torch.linspace(0.01, 0.2, 64).reshape(1, 8, 8)), steps=2),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def evaluated(model):
    return re.sub(r'"seconds": [^,}]+', "", im.evaluate(model, (X, Y), ATTACKS, progress=False).to_json())


def trained(model):
    strategy = im.WarmStart(im.PGD(LINF, steps=2))
    im.train(model, (X, Y), strategy, validation_set=(X, Y), epochs=2, batch_size=8, shift=1, flip=True, progress=False)
    return [value.tolist() for value in model.state_dict().values()]


@pytest.mark.parametrize("use", [evaluated, trained])
def test_a_default_device_changes_nothing(use):
    expected, model = use(network()), network()
    with torch.device("meta"):  # holds no values: whatever is made there fails where it is read
        assert use(model) == expected
