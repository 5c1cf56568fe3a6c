"""Adversarial weight perturbation: where the weights go, and that they come back to the bit."""

import math

import pytest
import torch
from torch import nn

import innermax as im
from innermax.objectives import cross_entropy, find_objective
from innermax.training.weight_perturbation import perturbed_weights
from tests.helpers.training import ATTACK, DATA, cnn, distance, mlp, saved, train, weights


def sloped(model):
    """The model after a backward pass."""
    loss, _ = cross_entropy(model, DATA[0] / 255, DATA[1], DATA[0] / 255, 0)
    loss.backward()
    return model


@pytest.mark.parametrize("gamma", [1e-3, 0.1, 1e4])
def test_weights_move_by_their_share_along_their_gradients_and_come_back(gamma):
    model = sloped(cnn())
    before, slopes = weights(model), {name: p.grad.clone() for name, p in model.named_parameters()}
    with perturbed_weights(model, gamma):
        assert all(p.grad is None for p in model.parameters())
        for name, value in model.state_dict().items():
            moved = value - before[name]
            if value.ndim < 2:
                assert not moved.any(), name
                continue
            assert float(moved.norm()) == pytest.approx(gamma * float(before[name].norm()), rel=1e-3)
            along = nn.functional.cosine_similarity(moved.flatten(), slopes[name].flatten(), dim=0)
            assert float(along) == pytest.approx(1, abs=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_come_back_after_an_error():
    model = sloped(mlp())
    before = weights(model)

    def fail():
        assert distance(weights(model), before) > 0.1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), perturbed_weights(model, 0.5):
        fail()
    assert distance(weights(model), before) == 0


def test_what_has_no_gradient_stays():
    model = sloped(mlp())
    model[1].weight.grad.zero_()
    model[3].weight.grad = None
    before = weights(model)
    with perturbed_weights(model, 0.5):
        assert distance(weights(model), before) == 0


def test_strides_stay():
    """A copy in another order would make the optimiser or the attack network slower."""
    model = cnn().to(memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    with perturbed_weights(sloped(model), 0.1):
        assert [p.stride() for p in model.parameters()] == strides
    assert [p.stride() for p in model.parameters()] == strides


STRATEGY = im.Standard(ATTACK)


def test_the_log_tells_loss_and_accuracy_of_the_weights_themselves():
    """In the first epoch of one batch they are those of a training without perturbation."""
    options = {"epochs": 1, "batch_size": 24, "strategy": STRATEGY}
    one, other = (train(cnn(), objective=objective, **options) for objective in ("cross_entropy", im.AWP(gamma=0.5)))
    for name in ("loss", "accuracy", "fosc"):
        assert one.history[0][name] == pytest.approx(other.history[0][name], abs=1e-6)
    assert distance(weights(one.model), weights(other.model)) > 1e-4


def test_the_average_is_over_the_weights_themselves():
    """With a learning rate of almost nothing it stays where the weights are."""
    before = weights(mlp())
    options = {"lr": 1e-12, "weight_decay": 0.0, "ema": 0.5, "epochs": 1}
    run = train(mlp(), strategy=STRATEGY, objective=im.AWP("trades", 0.5), **options)
    assert distance(weights(run.model), before) < 1e-6


@pytest.mark.parametrize("objective", ["trades", "mart", im.AWP("trades", 0.02), im.AWP(gamma=0.02)], ids=str)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, objective):
    options = {"strategy": im.WarmStart(ATTACK), "epochs": 3, "ema": 0.8, "shift": 1, "objective": objective}
    whole = train(cnn(dropout=0.3), **options)
    calls, limit = [0], 9

    class Stopping:
        """The objective, described as it is."""

        def __init__(self, inner):
            self.inner = inner
            for name in ("search_loss", "weight_perturbation"):
                setattr(self, name, getattr(inner, name, None))

        def __call__(self, *arguments):
            calls[0] += 1
            if calls[0] == limit:
                raise KeyboardInterrupt
            return self.inner(*arguments)

    again = options | {
        "run_dir": tmp_path / "run",
        "checkpoint_every": 1,
        "objective": Stopping(find_objective(objective)),
    }
    with pytest.raises(KeyboardInterrupt):
        train(cnn(dropout=0.3), **again)
    _, position = saved(tmp_path / "run")
    assert position["epoch"] + position["batch"] > 0
    resumed = train(cnn(dropout=0.3), **again)
    assert distance(weights(resumed.model), weights(whole.model)) == 0


@pytest.mark.parametrize("at", [3, 4], ids=["at the weights", "at the perturbed weights"])
def test_a_batch_that_is_left_out_leaves_no_trace(at):
    """The second batch: weights and BatchNorm's statistics are those before it."""
    calls, seen = [0], []

    class Broken:
        weight_perturbation = 0.1

        def __call__(self, model, x, y, x_adv, epoch):
            calls[0] += 1
            if calls[0] in (3, 5):  # the first of two calls of the second batch, and of the third
                seen.append(weights(model))
            return cross_entropy(model, x, y, x_adv * math.nan if calls[0] == at else x_adv, epoch)

    run = train(cnn(), strategy=im.Unsecured(), objective=Broken(), on_nan="skip", epochs=1)
    assert run.history[0]["skipped_batches"] == 1
    before, after = seen
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in weights(run.model).values())
    assert int(weights(run.model)["1.num_batches_tracked"]) == 2
