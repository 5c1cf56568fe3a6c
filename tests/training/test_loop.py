"""Losses and gradients that are no numbers, and batches that are left out."""

import itertools
import json
import math

import pytest
import torch

from innermax.objectives import cross_entropy
from tests.helpers.training import DATA, cnn, saved, train, weights


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
