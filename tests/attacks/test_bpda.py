"""Straight-through gradients."""

import numpy as np
import pytest
import torch
from torch import nn

import innermax as im
from innermax.losses import margin
from innermax.oracle.oracle import Oracle


@pytest.mark.parametrize(
    "name", ["round", "floor", "sign", "detach", "numpy", "no_grad", "greater", "clamp", "softmax"]
)
def test_nothing_stops_a_straight_through_gradient(name):
    def stopped(x):
        with torch.no_grad():
            return x * 2

    ways = {
        "round": lambda x: (8 * x).round() / 8,
        "floor": lambda x: torch.div(4 * x, 1.0, rounding_mode="floor") / 4,
        "sign": lambda x: torch.sign(x - 0.5),
        "detach": lambda x: x.detach(),
        "numpy": lambda x: torch.from_numpy(np.round(x.detach().numpy(), 1)),
        "no_grad": stopped,
        "greater": lambda x: (x > 0.5).float(),
        "clamp": lambda x: x.clamp(0.499, 0.501),
        "softmax": lambda x: (1000 * x).softmax(1),
    }

    class Way(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 3)

        def forward(self, x):
            return self.last(ways[name](x))

    torch.manual_seed(1)
    model, x, y = Way(), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
    passed = set()
    through = Oracle(im.StraightThrough(model, passed.add)).gradient(x, y, margin)
    plain = Oracle(model)
    assert torch.equal(through.logits, plain.logits(x))
    assert (through.gradient != 0).any(1).all()
    assert passed
    if name not in ("no_grad", "clamp", "softmax"):
        assert not plain.gradient(x, y, margin).gradient.any()


class Rounded(nn.Module):
    """Images in eight levels; no gradient passes."""

    def forward(self, x):
        return (x * 7).round() / 7


def test_a_compiled_network_keeps_the_gradient_that_is_passed_straight_through():
    torch.manual_seed(1)
    x, y = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    model = nn.Sequential(Rounded(), im.build_model("digits-cnn", input_shape=(1, 8, 8)))
    through = Oracle.fast(im.StraightThrough(model), x, "float32").gradient(x, y, margin)
    truth = Oracle(im.StraightThrough(model)).gradient(x, y, margin).gradient
    assert torch.allclose(through.gradient, truth, atol=1e-5)
    assert through.gradient.flatten(1).any(1).all()
    with pytest.raises(TypeError, match="cannot be traced"):  # else only what checks types while testing would stop it
        torch.fx.symbolic_trace(im.StraightThrough(model))
