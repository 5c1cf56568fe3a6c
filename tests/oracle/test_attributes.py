"""Numbers and tensors that a network keeps as plain attributes reach the attack network, too."""

import numpy as np
import pytest
import torch
from torch import nn

import innermax as im
from innermax.losses import margin
from innermax.oracle.oracle import Oracle
from tests.helpers.oracles import Net, batch, close, learn, plain


def _keep_tensor(net, z):
    net.kept = 0.5 * net.kept + 0.5 * z.detach().mean()


def _keep_in_place(net, z):
    net.kept.lerp_(z.detach().mean(), 0.5)


def _keep_number(net, z):
    net.kept += float(z.detach().mean())


def _keep_array(net, z):
    net.kept = net.kept + z.detach().numpy().mean()


def _count(net, z):
    net.calls, net.last = net.calls + 1, z.detach()


KINDS = {
    "tensor": (_keep_tensor, lambda: torch.zeros(())),
    "in place": (_keep_in_place, lambda: torch.zeros(())),
    "number": (_keep_number, lambda: 0.0),
    "array": (_keep_array, lambda: np.zeros(())),
}


def keeping(keep, kept=0.0, trace=True):
    """A network that keeps something of each training pass."""

    def forward(net, x):
        z = net.body(x)
        if net.training:
            keep(net, z)
        if not trace:
            assert float(z.detach().sum()) < 1e9
        return net.head(torch.relu(z - torch.as_tensor(net.kept, dtype=z.dtype)).flatten(1))

    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    model = Net(forward, body=body, head=nn.Linear(96, 4))
    model.kept, model.calls, model.last = kept, 0, None
    return model


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make", [Oracle, lambda model: Oracle.fast(model, batch()[0], "float32")], ids=["plain", "fast"]
)
def test_what_it_keeps_arrives_at_every_refresh(kind, make, trace):
    keep, zero = KINDS[kind]
    model, (x, y) = keeping(keep, zero(), trace), batch()
    oracle = make(model)
    for _ in range(3):
        learn(model, x, y)
        oracle.refresh()
        assert close(oracle.logits(x), plain(model, x), 1e-4), oracle.plan
        assert close(oracle.gradient(x, y, margin).gradient, Oracle(model).gradient(x, y, margin).gradient, 1e-4)
    assert oracle.recheck() is oracle


def test_in_bf16_too():
    keep, zero = KINDS["number"]
    model, (x, y) = keeping(keep, zero()), batch()
    oracle = Oracle.fast(model, x, "bf16")
    assert oracle.lowered
    for _ in range(2):
        learn(model, x, y)
        oracle.refresh()
        assert close(oracle.logits(x), plain(model, x), 1e-4), "copied, so in float32"
    assert oracle.plan.startswith("copied anew after each update (a number that is neither parameter nor buffer")


def test_tensors_are_changed_in_their_place():
    """From which recorded CUDA graphs read them."""
    keep, zero = KINDS["tensor"]
    model, (x, y) = keeping(keep, zero(), trace=False), batch()
    oracle = Oracle(model)
    before = oracle._compiled.network.kept
    learn(model, x, y)
    oracle.refresh()
    assert oracle._compiled.network.kept is before
    assert float(before) == float(model.kept) != 0


def test_a_recording_that_keeps_a_number_is_left():
    model, (x, y) = keeping(lambda net, z: setattr(net, "kept", net.kept + 0.01), trace=False), batch()
    oracle = Oracle.fast(model, x, "float32")
    oracle._replayed = lambda *asked: Oracle._gradient(oracle, *asked)
    learn(model, x, y)
    oracle.refresh()
    assert oracle._replayed is None
    assert oracle.plan.startswith("copied anew after each update")


def test_what_changes_no_answer_costs_nothing():
    """A counter, or the last pass's activations."""
    model, (x, y) = keeping(_count), batch()
    oracle = Oracle.fast(model, x, "float32")
    for _ in range(3):
        learn(model, x, y)
        oracle.refresh()
        assert close(oracle.logits(x), plain(model, x), 1e-4)
    assert model.calls >= 3
    assert oracle.plan.startswith("1 BatchNorm folded, ")


def test_in_training():
    keep, zero = KINDS["tensor"]
    model, (x, y) = keeping(keep, zero()), batch(16)
    run = im.train(model, (x, y), im.Standard(im.PGD(im.Linf(0.1), steps=2)), epochs=2, batch_size=8, progress=False)
    assert run.history[-1]["attack_network"] == "copied anew after each update"
