"""What is measured of an epoch: gradients, gauges, validation."""

import json
from dataclasses import replace

import pytest

import innermax as im
from innermax.oracle.oracle import Oracle
from innermax.strategies import awaits_halfway_gauge
from innermax.training import loop
from innermax.training.metrics import EpochMetrics, warn_of_fosc
from tests.helpers.networks import same
from tests.helpers.training import ATTACK, LINF, VALIDATION, examples, mlp, train, weights


def counted(monkeypatch):
    """How many gradients the oracles are asked for, an example each."""
    asked, gradient = [0], Oracle.gradient

    def counting(self, x, *given):
        asked[0] += len(x)
        return gradient(self, x, *given)

    monkeypatch.setattr(Oracle, "gradient", counting)
    return asked


@pytest.mark.parametrize(
    ("strategy", "gradients"),
    [
        (im.Unsecured(), 0),
        (im.Standard(ATTACK), 4),
        (im.Standard(im.FGSM(LINF)), 1),
        (im.Standard(replace(ATTACK, steps=3, restarts=2)), 6),
        (im.Dynamic(ATTACK, 1e6), 2),  # one step, and the gradient that finds it good enough
        (im.Dynamic(replace(ATTACK, gauge="relative"), 0.2), None),
        (im.Standard(replace(ATTACK, stop_on_success=True, restarts=2)), None),
    ],
)
def test_gradients_are_counted_honestly(monkeypatch, strategy, gradients):
    monkeypatch.setattr(loop, "_GAUGED_BATCHES", 1)
    asked = counted(monkeypatch)
    run = train(strategy=strategy, epochs=1)
    row = run.history[0]
    # One of the three batches was gauged besides: a gradient an example more.
    assert row["gradients"] * 24 == asked[0] - 8 * (strategy != im.Unsecured())
    if gradients is None:
        assert 0 < row["gradients"] < 8
        assert row["gradients"] % 1 != 0
    else:
        assert row["gradients"] == gradients
    assert ("fosc" in row) == (strategy != im.Unsecured())


def test_a_gauge_that_cannot_be_measured_is_null(tmp_path):
    # An example that has fallen has no gradient under C&W; here all of them have.
    fallen = (VALIDATION[0], (mlp().eval()(VALIDATION[0] / 255).argmax(1) + 1) % 3)
    options = {"lr": 1e-9, "validation_set": fallen, "validation_attack": im.CW(LINF, steps=2)}
    run = train(epochs=1, run_dir=tmp_path / "run", **options)
    assert run.history[0]["validation_fosc"] is None
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["validation_fosc"] is None


def test_validation_only_watches():
    runs_ = [train(strategy=im.Standard(ATTACK), epochs=2, validation_set=s) for s in (None, VALIDATION, examples(9))]
    finals = [weights(run.model) for run in runs_]
    assert same(finals[0], finals[1])
    assert same(finals[0], finals[2])
    scored = [run.history[-1] for run in runs_]
    assert "validation_accuracy" not in scored[0]
    assert scored[1]["validation_clean"] == pytest.approx(
        float((runs_[1].model(VALIDATION[0] / 255).argmax(1) == VALIDATION[1]).float().mean())
    )


@pytest.mark.parametrize(("strategy", "robust"), [(im.Unsecured(), False), (im.Curriculum(ATTACK), True)])
def test_the_validation_attack_is_the_strategys_own_in_full(strategy, robust):
    run = train(strategy=strategy, epochs=1, validation_set=VALIDATION)
    row = run.history[0]
    assert ("validation_robust" in row) == robust
    accuracy = im.evaluate(run.model, VALIDATION, {"attack": ATTACK}).accuracy["attack" if robust else "clean"].value
    assert row["validation_accuracy"] == accuracy


def test_an_exploding_fosc_is_warned_of():
    quiet = {"epoch": 0, "loss": 1.0, "fosc": 0.2}
    with pytest.warns(UserWarning, match=r"FOSC is 20.1 on average in epoch 2, more than 10 times the loss"):
        warn_of_fosc({"epoch": 1, "loss": 2.0, "fosc": 20.1}, [quiet])
    for row in (
        {"epoch": 1, "loss": 2.1, "fosc": 20.1},
        {"epoch": 1, "loss": 0.1, "fosc": 1.9},
        {"epoch": 1, "loss": 1},
    ):
        warn_of_fosc(row, [quiet])
    warn_of_fosc({"epoch": 0, "loss": 1.0, "fosc": 100.0}, [])


@pytest.mark.parametrize("strategy", [im.Unsecured(), im.Standard(ATTACK)])
def test_a_learning_rate_that_diverges(strategy):
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) in epoch 1, batch [23]; lower lr"):
        train(strategy=strategy, lr=1e30, epochs=2)


def test_an_epochs_row_by_hand():
    metrics = EpochMetrics()
    metrics.add({"gradients": 12.0, "examples": 4.0, "loss": 6.0, "correct": 1.0})
    metrics.add({"gradients": 8.0, "examples": 4.0, "loss": 2.0, "correct": 3.0})
    metrics.add({"gradients": 4.0, "skipped": 1.0})
    assert metrics.fosc is None
    row = {"epoch": 2, "lr": 0.1, "loss": 1.0, "accuracy": 0.5, "attack_steps": 4, "threshold": 0.2}
    row |= {"gradients": 2.0, "attack_network": "float32", "skipped_batches": 1}
    told = metrics.row(2, 0.1, replace(ATTACK, stop_at=0.2), "float32", 12)
    assert (told, list(told)) == (row, list(row))
    own = {"fosc": [0.0, 1.0], "relative_fosc": [0.5, 0.5], "ball_fosc": [1.0, 3.0], "zero_gradient": [1.0, 0.0]}
    metrics.add_gauges([own, {"fosc": [2.0], "relative_fosc": [0.5], "ball_fosc": [5.0], "zero_gradient": [0.0]}])
    told = metrics.row(2, 0.1, None, "float32", 12)
    assert (told["attack_steps"], told["threshold"]) == (0, None)
    assert (told["fosc"], told["zero_gradients"]) == (1.0, pytest.approx(1 / 3))
    assert told["fosc_percentiles"] == pytest.approx([share / 50 for share in range(101)])
    assert told["ball_fosc_percentiles"][::50] == [1.0, 3.0, 5.0]
    assert told["relative_fosc_percentiles"] == [0.5] * 101


@pytest.mark.parametrize("epochs_before", [0, 1])
def test_only_a_strategy_that_asks_is_told_the_halfway_gauge_and_only_once(epochs_before):
    history = [{"halfway_gauge": 0.1}] * epochs_before
    assert awaits_halfway_gauge(im.Dynamic(ATTACK, "auto"), history) == (epochs_before == 0)
    assert not awaits_halfway_gauge(im.Dynamic(ATTACK, 0.5), history)
