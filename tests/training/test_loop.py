"""The outer step: learning rates, clipping, losses and gradients that are no numbers, batches that are left out."""

import itertools
import json
import math

import pytest
import torch

from innermax.objectives import cross_entropy
from tests.helpers.networks import same
from tests.helpers.training import DATA, cnn, mlp, saved, steps_taken, train, weights


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number(tmp_path, value):
    calls = itertools.count(1)

    def objective(model, x, y, x_adv, epoch):
        loss, logits = cross_entropy(model, x, y, x_adv, epoch)
        return loss * (value if next(calls) == 5 else 1), logits

    with pytest.raises(FloatingPointError, match=f"the loss is {value} in epoch 2, batch 2; lower lr"):
        train(epochs=3, objective=objective, run_dir=tmp_path / "run")
    tensors, state = saved(tmp_path / "run")
    assert (state["epoch"], state["batch"]) == (1, 0)
    whole = train(epochs=3, objective=objective, run_dir=tmp_path / "run")
    assert [row["epoch"] for row in whole.history] == [0, 1, 2]
    assert all(torch.isfinite(value).all() for value in tensors.values())


class Broken:
    """Cross-entropy on the attacked batch, spoilt in one of its calls."""

    def __init__(self, at, spoil):
        self.left, self.spoil, self.seen = at, spoil, []

    def __call__(self, model, x, y, x_adv, epoch):
        self.left -= 1
        self.seen.append(x)
        return cross_entropy(model, x, y, self.spoil(x_adv) if self.left == 0 else x_adv, epoch)


def nan_pixels(x):
    return x * math.nan


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_batch_that_is_left_out(tmp_path, clip):
    """The weights and BatchNorm's statistics are those of a training without that batch."""
    options = {"epochs": 2, "clip": clip, "lr": 0.1, "momentum": 0.0, "lr_schedule": "constant", "weight_decay": 0.0}
    broken = Broken(2, nan_pixels)
    run = train(cnn(), objective=broken, on_nan="skip", run_dir=tmp_path / "run", **options)
    assert [row.get("skipped_batches") for row in run.history] == [1, None]
    (told,) = map(json.loads, (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines())
    assert (told["epoch"], told["batch"]) == (0, 1)
    assert told["error"] == "the loss is nan in epoch 1, batch 2; lower lr"
    assert torch.equal(DATA[0][told["examples"]] / 255, broken.seen[1])
    known = weights(run.model)
    assert all(torch.isfinite(value).all() for value in known.values())
    other = cnn()
    learned = Broken(0, None)
    train(other, objective=learned, epochs=1, **{k: v for k, v in options.items() if k != "epochs"})
    batches = int(known["1.num_batches_tracked"])
    assert batches == 5, "six batches, one of them left out"
    assert int(weights(other)["1.num_batches_tracked"]) == 3


def test_a_stopped_run_names_the_examples(tmp_path):
    broken = Broken(2, nan_pixels)
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1, batch 2") as caught:
        train(cnn(), objective=broken, run_dir=tmp_path / "run")
    (told,) = map(json.loads, (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines())
    holds, lists = caught.value.__notes__
    assert holds == f"The batch holds examples {', '.join(map(str, told['examples']))}."
    assert str(tmp_path / "run" / "nonfinite.jsonl") in lists


def test_a_gradient_that_is_no_number_ends_the_run_without_clipping_too():
    def objective(model, x, y, x_adv, epoch):
        logits = model(x_adv)
        return (logits - logits.detach()).abs().sum().sqrt(), logits

    with pytest.raises(FloatingPointError, match="the gradient's norm is nan in epoch 1, batch 1"):
        train(objective=objective, epochs=1)


def test_where_every_batch_is_left_out_the_run_ends():
    def objective(model, x, y, x_adv, epoch):
        loss, logits = cross_entropy(model, x, y, x_adv, epoch)
        return loss * math.nan, logits

    with pytest.raises(FloatingPointError, match="all 3 batches of epoch 1 were skipped"):
        train(objective=objective, epochs=2, on_nan="skip")


def test_a_gradient_that_is_no_number():
    def objective(model, x, y, x_adv, epoch):
        logits = model(x_adv)
        return (logits - logits.detach()).abs().sum().sqrt(), logits  # 0, with an infinite slope

    with pytest.raises(FloatingPointError, match="the gradient's norm is nan in epoch 1, batch 1"):
        train(objective=objective, epochs=1, clip=1.0)


def length(before, after, names):
    return math.sqrt(sum(float((after[name] - before[name]).double().square().sum()) for name in names))


def test_clip():
    names = [name for name, _ in cnn().named_parameters()]
    bare = {"momentum": 0.0, "weight_decay": 0.0, "lr_schedule": "constant", "epochs": 1, "lr": 0.5}
    _, free = steps_taken(**bare)
    _, clipped = steps_taken(**bare, clip=0.01)
    assert length(free[0], free[1], names) > 0.5 * 0.02
    for before, after in itertools.pairwise(clipped):
        assert length(before, after, names) == pytest.approx(0.5 * 0.01, rel=1e-3)
    _, loose = steps_taken(**bare, clip=1e6)
    assert all(same(one, other) for one, other in zip(free, loose, strict=True))
    # The same direction, only shorter.
    ratio = length(free[0], free[1], names) / 0.005
    for name in names:
        torch.testing.assert_close(
            (clipped[1][name] - free[0][name]) * ratio, free[1][name] - free[0][name], rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, lambda t: 1 if t < 0.4 else 0.1 if t < 0.8 else 0.01),
        ({"lr_drops": (0.3, 0.5, 0.6)}, lambda t: 0.1 ** sum(t >= drop for drop in (0.3, 0.5, 0.6))),
        ({"lr_drops": ()}, lambda t: 1),
        ({"lr_schedule": "cyclic"}, lambda t: 2 * t if t < 0.5 else 2 - 2 * t),
        ({"lr_schedule": "cosine"}, lambda t: (1 + math.cos(math.pi * t)) / 2),
        ({"lr_schedule": "constant"}, lambda t: 1),
    ],
)
def test_learning_rates_at_every_update(options, share):
    model, seen = mlp(), []

    def objective(wrapped, x, y, x_adv, epoch):
        seen.append(model[3].bias.detach().double().clone())
        return wrapped(x)[:, 0].mean(), torch.zeros(len(x), 3)  # its slope in the first bias is 1

    plain = {"momentum": 0.0, "weight_decay": 0.0, "lr": 0.5, "epochs": 10}
    run = train(model, objective=objective, **plain | options)
    seen.append(model[3].bias.detach().double())
    rates = [float(before[0] - after[0]) for before, after in itertools.pairwise(seen)]
    expected = [0.5 * share((update / 3) / 10 + 1e-12) for update in range(30)]
    assert rates == pytest.approx(expected, abs=2e-6)
    assert [row["lr"] for row in run.history] == pytest.approx(expected[::3])
