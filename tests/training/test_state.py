"""What a training changes: optimisers, and averages of the weights."""

import threading

import pytest
import torch
import torch.nn.functional as F

import innermax as im
from innermax.data.streaming import ORDER
from innermax.utils import randomness
from tests.helpers.networks import same
from tests.helpers.training import DATA, VALIDATION, cnn, distance, mlp, steps_taken, train, weights


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
