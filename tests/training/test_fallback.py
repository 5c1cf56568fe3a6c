"""Updates that are repeated in plainer arithmetic, and what must not be repeated."""

import contextlib

import pytest
import torch
from torch import nn

import innermax as im
from innermax.training.arithmetic import Arithmetic
from innermax.training.fallback import Buffers
from tests.helpers.oracles import batch

ATTACK = im.PGD(im.Linf(0.1), steps=2)


class TrainingOnly(nn.Module):
    """Runs code in training mode alone, in every so many updates."""

    def __init__(self, extra, every=1):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1), nn.Dropout(0.2))
        self.head, self.aux = nn.Linear(128, 4), nn.Linear(128, 4)
        self.extra, self.every = extra, every
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x):
        z = self.body(x)
        logits = self.head(z.flatten(1))
        if not self.training:
            return logits
        self.count += 1
        return self.extra(self, z, logits) if self.count % self.every == 0 else logits


def _view(net, z, logits):
    return logits + 0.3 * net.aux(z.view(len(z), -1))


def _average(net, z, logits):
    with torch.no_grad():
        net.average = net.average.lerp(z.mean((2, 3)).mean(0), 0.1)
    return logits


def _both(net, z, logits):
    return _view(net, z, _average(net, z, logits))


NEEDS = {
    "order": (_view, Arithmetic(bf16=True, image_layers=("body.0",))),
    "precision": (_average, Arithmetic(channels_last=True)),
    "both": (_both, Arithmetic()),
}


@pytest.mark.parametrize("objective", ["cross_entropy", im.AWP("cross_entropy", 0.01)], ids=["plain", "awp"])
@pytest.mark.parametrize(("extra", "suits"), NEEDS.values(), ids=NEEDS)
def test_code_of_training_mode_alone_is_computed_plainer(extra, suits, objective, caplog, monkeypatch):
    """The same weights, buffers and random numbers as where that arithmetic was chosen at once."""
    (x, y), found = batch(24), []
    options = {"epochs": 2, "batch_size": 8, "precision": "bf16", "objective": objective, "progress": False}
    for at_once in (False, True):
        torch.manual_seed(0)
        model = TrainingOnly(extra)
        if at_once:
            caplog.clear()
            monkeypatch.setattr("innermax.training.train.choose_arithmetic", lambda *_: suits)
        im.train(model, (x, y), im.Standard(ATTACK), **options)
        assert (f"updates compute in {suits} (" in caplog.text) != at_once
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimiser_goes_on_in_the_other_order(optimizer, caplog, monkeypatch):
    """Fused steps combine a weight and its momentum in the order of memory."""
    (x, y), found = batch(32), []
    for at_once in (False, True):
        torch.manual_seed(0)
        model = TrainingOnly(_view, every=3)
        model.body[3].p = 0.0  # it draws in the order of memory
        if at_once:
            monkeypatch.setattr("innermax.training.train.choose_arithmetic", lambda *_: Arithmetic())
        options = {"batch_size": 8, "optimizer": optimizer, "precision": "float32", "progress": False}
        im.train(model, (x, y), im.Unsecured(), epochs=2, lr=0.01, **options)
        found.append((model.body[0].weight, model.body[2].weight))
    assert "updates compute in float32 and channels-first order" in caplog.text
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("extra", [_view, _average], ids=["order", "precision"])
def test_a_run_that_went_on_plainer_is_resumed_bit_for_bit(extra, optimizer, tmp_path):
    (x, y), found = batch(32), []
    options = {"epochs": 2, "batch_size": 8, "precision": "bf16", "optimizer": optimizer, "checkpoint_every": 1}
    for stops in ((), (2, 2, 3)):  # of eight updates the third is the first to fail
        torch.manual_seed(0)
        folder = tmp_path / str(len(stops))
        for stop in (*stops, None):
            model, done = TrainingOnly(extra, every=3), []

            def interrupt(_name, _now, _count, stop=stop, done=done):
                done.append(1)
                if len(done) == stop:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
                im.train(model, (x, y), im.Standard(ATTACK), run_dir=folder, progress=interrupt, **options)
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_what_fails_in_any_arithmetic_ends_the_training_in_its_own_words(caplog):
    def fail(_net, z, _logits):
        raise RuntimeError(f"no {z.dtype}")

    model = TrainingOnly(fail)
    with pytest.raises(RuntimeError, match=r"^no torch\.float32\n") as caught:
        im.train(model, batch(8), im.Standard(im.FGSM(im.Linf(0.1))), epochs=1, precision="bf16", progress=False)
    assert caught.value.__notes__ == ["It failed in faster arithmetic, too: RuntimeError: no torch.bfloat16"]
    assert "updates compute" not in caplog.text


@pytest.mark.parametrize("kind", [OSError, ValueError, StopIteration])
def test_errors_that_torch_does_not_raise_come_through_at_once(kind, caplog):
    """An objective that ends the training once would else be repeated, and not end it."""
    seen = []

    def objective(model, _x, y, x_adv, _epoch):
        seen.append(1)
        if len(seen) == 2:
            raise kind("enough")
        logits = model(x_adv)
        return nn.functional.cross_entropy(logits, y), logits

    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(kind, match=r"^enough$"):
        im.train(model, batch(24), im.Standard(ATTACK), objective=objective, epochs=1, batch_size=8, progress=False)
    assert len(seen) == 2
    assert "updates compute" not in caplog.text


def test_the_second_pass_of_awp_is_repeated_too(caplog):
    def second(net, z, logits):
        return _view(net, z, logits) if net.passes.append(1) or len(net.passes) == 2 else logits

    torch.manual_seed(0)
    model = TrainingOnly(second)
    model.passes = []
    im.train(model, batch(8), im.Standard(ATTACK), objective=im.AWP(), epochs=1, precision="float32", progress=False)
    assert len(model.passes) == 4
    assert "updates compute in float32 and channels-first order (RuntimeError: view size" in caplog.text


class Remembering(nn.Module):
    """Has a buffer that training replaces by a larger one, one that it makes, and two that nobody can write into."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(72, 4)
        self.register_buffer("bank", torch.zeros(1))
        self.register_buffer("late", None)
        self.register_buffer("offset", torch.tensor([0.5]).expand(72))
        with torch.inference_mode():
            self.register_buffer("scale", torch.ones(72))

    def forward(self, x):
        x = (x.flatten(1) - self.offset) * self.scale
        if self.training:
            self.bank = torch.cat([self.bank, x.detach().mean(1)])
            self.late = x.detach().mean(0)
        return self.head(x)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("objective", ["cross_entropy", im.AWP()], ids=["plain", "awp"])
def test_buffers_that_grow_or_cannot_be_written_into(objective, precision):
    model = Remembering()
    options = {"objective": objective, "precision": precision, "epochs": 2, "batch_size": 8, "progress": False}
    im.train(model, batch(24), im.Standard(ATTACK), **options)
    assert model.bank.shape == (1 + 2 * 24,)
    assert model.late.shape == (72,)
    assert model.offset.stride() == (0,)


def test_buffers_are_put_back():
    model, (x, _) = Remembering(), batch(4)
    norm = nn.BatchNorm2d(2)
    model.add_module("norm", norm)
    before, bank = Buffers.of(model), model.bank
    model(x)
    norm(x)
    bank.add_(1)
    norm.register_buffer("new", torch.ones(1))
    before.restore()
    assert model.bank is bank
    assert bank.tolist() == [0]
    assert model.late is None
    assert not hasattr(norm, "new")
    assert norm.running_mean.tolist() == [0, 0]
    assert norm.num_batches_tracked == 0


def test_a_run_that_cannot_compute_as_before_says_so(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    def train(**options):
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4))
        strategy = im.Standard(ATTACK)
        im.train(model, batch(16), strategy, epochs=2, batch_size=8, precision="bf16", run_dir=tmp_path, **options)

    with pytest.raises(KeyboardInterrupt):
        train(progress=interrupt)
    monkeypatch.setattr("innermax.training.train.choose_arithmetic", lambda *_: Arithmetic())
    with pytest.warns(UserWarning, match="updates computed in bf16 and channels-.* when the run was interrupted"):
        train(progress=False)
