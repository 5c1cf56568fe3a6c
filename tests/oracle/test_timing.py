"""A compiled network that is slower than the model itself is left, and the plan says so."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

from innermax.losses import margin
from innermax.oracle.compiled import Compiled
from innermax.oracle.oracle import Oracle
from innermax.oracle.timing import times_as_long
from tests.helpers.oracles import batch, close, learn, plain, small_vgg


class Clock:
    """Time that passes as told: this thread's own, and on the wall."""

    def __init__(self):
        self.own = self.wall = 0.0

    def spend(self, seconds):
        self.own += seconds
        self.wall += seconds

    def wait(self, seconds):
        self.wall += seconds

    def thread_time(self):
        return self.own

    def perf_counter(self):
        return self.wall


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("innermax.oracle.timing.time", clock)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return clock


def told(clock, one, other, rows=8):
    """times_as_long of two ways that take these seconds, each one number or one for each turn."""
    seconds = [iter(way) if isinstance(way, list) else itertools.repeat(way) for way in (one, other)]
    return times_as_long(*(lambda x, way=way: clock.spend(next(way)) for way in seconds), torch.rand(rows, 3))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.02, 0.2])
def test_what_is_clearly_longer(clock, scale):
    assert told(clock, 2 * scale, scale) == pytest.approx(2)
    assert told(clock, 1.03 * scale, scale) == pytest.approx(1.03)
    assert told(clock, 1.01 * scale, scale) == 1
    assert told(clock, scale, scale) == 1
    assert told(clock, scale, 2 * scale) == pytest.approx(0.5)
    assert told(clock, scale, 1.01 * scale) == 1


def test_what_takes_longer_in_about_half_of_the_turns_is_not_told_apart(clock):
    """One turn's lucky measurement says nothing, in either direction."""
    lucky = [0.002] * 9 + [0.0005] + [0.002] * 100
    assert told(clock, 0.002, lucky) == 1
    assert told(clock, lucky, 0.002) == 1
    # Of 60 turns 38 must say so: half of them, and two standard deviations of as many tosses of a coin.
    for turns, clear in ((37, False), (38, True)):
        other = [0.002] * 4 + [0.001] * turns + [0.003] * 100
        assert (told(clock, 0.002, other) > 1) == clear


def test_quick_ones_are_asked_for_more_rows_and_slow_ones_for_fewer(clock):
    seen = []

    def compute(x, seconds):
        seen.append(len(x))
        clock.spend(seconds)

    for seconds, rows in ((1e-3, 256), (0.04, 40), (0.3, 8), (0.2, 16)):
        times_as_long(*[partial(compute, seconds=seconds)] * 2, torch.rand(16, 3))
        assert seen[-1] == rows


@pytest.mark.parametrize("threads", [1, 2])
def test_what_other_programs_take_counts_only_where_threads_share_the_work(clock, monkeypatch, threads):
    """A thread that waits leaves the processor to others, or for other threads to end."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = times_as_long(
        lambda x: clock.spend(1e-3) or clock.wait(0.01), lambda x: clock.spend(1e-3), torch.rand(8, 3)
    )
    assert (found == 1) == (threads == 1)


class Sluggish(nn.Conv2d):
    """A convolution that takes its time in channels-last order."""

    clock, longer = None, 1.0

    def forward(self, x):
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        self.clock.spend(0.02 * (self.longer if last else 1))
        return super().forward(x)


@pytest.mark.timing
@pytest.mark.parametrize("longer", [1.03, 15])
def test_the_faster_order_is_taken(clock, monkeypatch, longer):
    monkeypatch.setattr(Sluggish, "clock", clock)
    monkeypatch.setattr(Sluggish, "longer", longer)
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
def test_the_model_itself_is_taken_where_it_is_faster(clock, monkeypatch):
    def slowed(compiled, x):
        clock.spend(0.02 if compiled.folded is None else 0.3)
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


@pytest.mark.parametrize("slow", ["bf16", "compiled"])
def test_what_the_clock_has_decided_stays(monkeypatch, slow):
    """In a resumed run, too, whatever the clock says then."""

    def times(one, _other, _x):
        return 2.0 if slow == "compiled" or one.args[0].lowered else 0.5

    torch.manual_seed(0)
    x, y = batch()
    model = small_vgg()
    monkeypatch.setattr("innermax.oracle.oracle.times_as_long", times)
    oracle = Oracle.fast(model, x, "bf16")
    assert not oracle.lowered
    monkeypatch.setattr("innermax.oracle.oracle.times_as_long", lambda *_: 0.5)
    resumed = Oracle.fast(model, x, "bf16").recompile(oracle.scheme)
    assert resumed.scheme == oracle.scheme
    learn(model, x, y)
    for one in (oracle, resumed):
        one.refresh()
        assert one.recheck() is one


def test_what_is_clearly_faster_than_the_model_is_timed_once(monkeypatch):
    timed = []
    monkeypatch.setattr("innermax.oracle.oracle.times_as_long", lambda *_: timed.append(1) or 0.5)
    assert "channels last" in Oracle.fast(small_vgg(), batch()[0], "float32").plan
    assert len(timed) == 1


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
