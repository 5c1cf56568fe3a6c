"""A compiled network that is slower than the model itself is left, and the plan says so."""

import time

import pytest
import torch
from torch import nn

from innermax.losses import margin
from innermax.oracle.compiled import Compiled
from innermax.oracle.oracle import Oracle
from innermax.oracle.timing import times_as_long
from tests.helpers.oracles import batch, close, learn, plain, small_vgg


def slow(seconds):
    return lambda x: time.sleep(seconds)


def test_what_is_clearly_longer():
    x = torch.rand(8, 3)
    assert times_as_long(slow(0.2), slow(0.02), x) > 2
    assert times_as_long(slow(0.02), slow(0.2), x) is None


def test_what_takes_next_to_no_time_is_not_told_apart():
    assert times_as_long(slow(0.001), slow(0.0002), torch.rand(8, 3)) is None


def test_quick_ones_are_asked_for_more_rows_and_slow_ones_for_fewer():
    seen = []

    def asked(seconds):
        def compute(x):
            seen.append(len(x))
            time.sleep(seconds)

        return compute

    times_as_long(asked(0.015), asked(0.015), torch.rand(16, 3))
    assert seen[-1] == 128
    times_as_long(asked(0.3), asked(0.3), torch.rand(16, 3))
    assert seen[-1] == 8


class Sluggish(nn.Conv2d):
    """A convolution that takes its time in channels-last order."""

    def forward(self, x):
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            time.sleep(0.3)
        else:
            time.sleep(0.02)
        return super().forward(x)


@pytest.mark.timing
def test_the_faster_order_is_taken():
    torch.manual_seed(0)
    x, y = batch()
    model = nn.Sequential(Sluggish(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(24, 4))
    oracle = Oracle.fast(model, x, "float32")
    assert oracle.scheme == "unfolded, channels first, float32"
    assert "channels first (in the other order a gradient takes " in oracle.plan
    assert oracle.recompile(oracle.scheme) is oracle
    learn(model, x, y)
    oracle.refresh()
    assert close(oracle.logits(x), plain(model, x), 1e-4)
    again = Oracle.fast(model, x, "float32").recompile("unfolded, channels last, float32")
    assert again.recompile(oracle.scheme).scheme == oracle.scheme


@pytest.mark.timing
def test_the_model_itself_is_taken_where_it_is_faster(monkeypatch):
    def slowed(compiled, x):
        time.sleep(0.02 if compiled.folded is None else 0.3)
        return place(compiled, x)

    torch.manual_seed(0)
    x, y = batch()
    place = Compiled.place
    monkeypatch.setattr(Compiled, "place", slowed)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(24, 4))
    oracle = Oracle.fast(model, x, "float32")
    assert oracle.scheme == "as the model is"
    assert "compiled, a gradient takes " in oracle.plan
    learn(model, x, y)
    oracle.refresh()
    assert close(oracle.logits(x), plain(model, x), 1e-6)
    assert oracle.recheck() is oracle
    assert oracle.recompile("as the model is") is oracle


def test_a_scheme_is_compiled_again():
    torch.manual_seed(0)
    x, y = batch()
    model = small_vgg()
    oracle = Oracle.fast(model, x, "float32")
    as_is = oracle.recompile("as the model is")
    assert as_is.scheme == "as the model is"
    assert as_is.recompile(oracle.scheme).scheme == oracle.scheme
    learn(model, x, y)
    as_is.refresh()
    assert close(as_is.gradient(x, y, margin).gradient, Oracle(model).gradient(x, y, margin).gradient, 1e-5)
