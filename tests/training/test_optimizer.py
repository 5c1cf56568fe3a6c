"""The outer step: clipping, averages, learning rates, optimisers."""

import itertools
import math
import threading

import pytest
import torch
import torch.nn.functional as F

import innermax as im
from innermax.data.streaming import ORDER
from innermax.objectives import cross_entropy
from innermax.training.optimizer import learning_rate
from innermax.training.options import TrainingOptions
from innermax.utils import randomness
from tests.helpers.networks import same
from tests.helpers.training import DATA, VALIDATION, cnn, distance, mlp, train, weights


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


def test_ema_is_what_is_evaluated_and_saved(tmp_path):
    options = {"epochs": 2, "lr": 0.2, "validation_set": VALIDATION}
    _, seen = steps_taken(**options)
    run, averaged_seen = steps_taken(**options, ema=0.7, run_dir=tmp_path / "run")
    assert not run.model.training
    assert all(same(one, other) for one, other in zip(seen, averaged_seen, strict=True))  # the learner does not notice
    average = {name: value.double() for name, value in seen[1].items()}
    for after in seen[2:]:
        average = {name: 0.7 * average[name] + 0.3 * after[name].double() for name in average}
    found = weights(run.model)
    for name, value in average.items():
        if value.shape:  # but for the count of batches
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)
    assert distance(found, seen[-1]) > 1e-3
    saved = cnn(9)
    im.load_model(tmp_path / "run", saved)
    assert same(weights(saved), found)
    clean = im.evaluate(run.model, VALIDATION, {}).accuracy["clean"].value
    assert run.history[-1]["validation_clean"] == clean
    learner = cnn()
    assert train(learner, epochs=1, ema=0.7).model is not learner
    assert not learner.training


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


def test_the_papers_learning_rates():
    options = TrainingOptions(im.Unsecured(), lr_drops=(20 / 50, 40 / 50))
    rates = [learning_rate(epoch / 50, options) for epoch in range(50)]
    assert rates == pytest.approx([0.01] * 20 + [0.001] * 20 + [0.0001] * 10)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizers(name):
    options = {"lr": 0.02, "weight_decay": 0.1, "lr_schedule": "constant", "epochs": 2}
    run = train(optimizer=name, **options)
    model = mlp()
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
        if name == "adamw"
        else torch.optim.SGD(model.parameters(), lr=0.02, weight_decay=0.1, momentum=0.9)
    )
    for epoch in range(2):
        for index in randomness.permutation(0, 24, ORDER, epoch).split(8):
            optimizer.zero_grad()
            F.cross_entropy(model(DATA[0][index] / 255), DATA[1][index]).backward()
            optimizer.step()
    assert distance(weights(run.model), weights(model)) < 1e-6


def test_ema_of_a_network_with_a_lock():
    """Which `copy.deepcopy` does not copy."""
    learner, plain = cnn(), cnn()
    learner.lock = threading.Lock()
    averaged = train(learner, epochs=1, ema=0.7).model
    assert averaged is not learner
    assert distance(weights(averaged), weights(train(plain, epochs=1, ema=0.7).model)) == 0
