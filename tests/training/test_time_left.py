"""The time left of trainings: simulated and recorded timings."""

from dataclasses import replace

import pytest
import torch

import innermax as im
from innermax.training import loop, time_left, train
from innermax.training.progress import TrainingDisplay
from innermax.training.time_left import TrainingClock, expected_gradients, mark, seconds_between
from tests.helpers.clocks import Time, worst

ATTACK = im.PGD(im.Linf(0.1), steps=10)


# Gradients and c_t of runs as they were measured (MNIST, CIFAR-10 and digits, L∞, seven steps).
MNIST = [(1.0, None), (2.2, 2.51), (2.2, 1.882), (2.5, 1.255), (3.1, 0.627), (7.0, 0.0)]


CIFAR = [(1.0, None), (4.9, 0.051), (5.5, 0.039), (6.0, 0.026), (6.7, 0.013), (7.0, 0.0)]


DIGITS = [(1.0, None), (6.3, 0.036), (6.5, 0.034), (5.6, 0.031), (5.4, 0.029), (5.2, 0.027), (5.3, 0.024), (5.2, 0.022)]


DIGITS += [
    (5.0, 0.02),
    (4.9, 0.018),
    (4.9, 0.015),
    (4.9, 0.013),
    (4.9, 0.011),
    (4.9, 0.008),
    (5.0, 0.006),
    (5.5, 0.004),
]


DIGITS += [(5.9, 0.002), (7.0, 0.0), (7.0, 0.0), (7.0, 0.0)]


def simulated(strategy, gradients, *, update, gradient, between, validation, history=(), batches=20, first=1.0):
    """(share of the time that has passed, estimate / truth) after each batch of a training whose costs are given."""
    examples, size = 1000, 1000 // batches
    clock = TrainingClock(strategy, len(gradients), examples, validation)
    told, passed = [], 0.0
    for epoch, taken in enumerate(gradients):
        clock.start(epoch, history[:epoch])
        begun = passed
        for batch in range(1, batches + 1):
            slow = first if (epoch, batch) == (0, 1) else 1.0
            attacking, updating = slow * gradient * taken / batches, slow * update / batches
            clock.batch(size, taken * size, attacking, updating)
            passed += attacking + updating
            told.append((passed, clock.left(batch * size, taken)))
        passed += between
        clock.end(passed - begun)
        told.append((passed, clock.left(examples, taken)))
    return [(at / passed, left / (passed - at)) for at, left in told if at < passed - 1e-9]


COSTS = [(1.0, 0.5, 0.5), (1.0, 0.5, 0.0), (1.0, 2.0, 1.0), (1.0, 0.2, 2.0)]


@pytest.mark.parametrize(("update", "gradient", "between"), COSTS)
@pytest.mark.parametrize("epochs", [5, 50])
def test_standard(epochs, update, gradient, between):
    told = simulated(
        im.Standard(ATTACK),
        [10.0] * epochs,
        update=update,
        gradient=gradient,
        between=between,
        validation=1000 * between / gradient,
    )
    assert worst(told) < 1.05


@pytest.mark.parametrize(("update", "gradient", "between"), COSTS)
@pytest.mark.parametrize("epochs", [20, 50])
def test_curriculum(epochs, update, gradient, between):
    strategy = im.Curriculum(ATTACK)
    steps = [getattr(strategy.attack_at(epoch / epochs), "steps", 0) for epoch in range(epochs)]
    assert (steps[0], steps[-1]) == (0, 10)
    told = simulated(strategy, steps, update=update, gradient=gradient, between=between, validation=100)
    assert worst(told) < 1.5


@pytest.mark.parametrize("recorded", [MNIST, CIFAR, DIGITS], ids=["mnist", "cifar10", "digits"])
@pytest.mark.parametrize(("update", "gradient", "between"), [(1.0, 0.5, 0.3), (1.0, 0.9, 0.5), (1.0, 0.6, 0.0)])
def test_dynamic_as_recorded(recorded, update, gradient, between):
    strategy = im.Dynamic(replace(ATTACK, steps=7), "auto")
    c_max = recorded[1][1] / (1 - 1 / len(recorded) / strategy.zero_at)
    history = [{"halfway_gauge": c_max}] * len(recorded)
    thresholds = [getattr(strategy.attack_at(e / len(recorded), history[:e]), "stop_at", None) for e in range(2, 4)]
    assert thresholds == [pytest.approx(recorded[e][1], rel=0.05) for e in range(2, 4)]
    told = simulated(
        strategy,
        [taken for taken, _ in recorded],
        update=update,
        gradient=gradient,
        between=between,
        validation=1000 * between / gradient,
        history=history,
    )
    assert worst(told) < 1.5


def test_a_moving_window_over_batches_would_not_do():
    """What the display estimated before: batches left times the mean of the latest batches, on Dynamic's profile."""
    told, passed = [], 0.0
    total = sum(1.0 + 0.5 * taken + 0.3 for taken, _ in MNIST)
    for epoch, (taken, _) in enumerate(MNIST):
        for batch in range(1, 21):
            passed += (1.0 + 0.5 * taken) / 20
            told.append((passed / total, (120 - 20 * epoch - batch) * (1.0 + 0.5 * taken) / 20 / (total - passed)))
        passed += 0.3
    assert worst(told) > 1.5


def test_the_first_batch_prepares_and_is_no_measure():
    options = {"update": 1.0, "gradient": 0.5, "between": 0.1, "validation": 100}
    told = simulated(im.Standard(ATTACK), [10.0] * 10, first=15.0, **options)
    assert worst(told) < 1.05


def test_expected_gradients():
    now = replace(ATTACK, stop_at=0.4)
    assert expected_gradients(None, now, 5.0) == 0
    assert expected_gradients(ATTACK, now, 5.0) == 10
    assert expected_gradients(replace(ATTACK, restarts=3), None, 5.0) == 30
    assert expected_gradients(replace(ATTACK, stop_at=0.4), now, 4.0) == pytest.approx(4)
    assert expected_gradients(replace(ATTACK, stop_at=0.2), now, 4.0) == pytest.approx(7)
    assert expected_gradients(replace(ATTACK, stop_at=0.0), now, 4.0) == pytest.approx(10)
    assert expected_gradients(replace(ATTACK, stop_at=0.9), now, 4.0) == pytest.approx(4)
    assert expected_gradients(replace(ATTACK, stop_at=0.0), replace(ATTACK, stop_at=0.0), 8.0) == pytest.approx(8)
    assert 1 < expected_gradients(replace(ATTACK, stop_at=0.0), ATTACK, 1.0) < 10


def test_no_batch_yet_no_estimate():
    clock = TrainingClock(im.Unsecured(), 3, 100)
    clock.start(0, ())
    assert clock.left(0, 0.0) is None


def test_marks_on_a_gpu_are_events(monkeypatch):
    """A stand-in for them: they lie in the GPU's own time, in milliseconds, and recording them waits for nothing."""

    class Event:
        def __init__(self, enable_timing):
            self.timed = enable_timing

        def record(self, stream):
            self.at = next(stream)

        def elapsed_time(self, other):
            assert self.timed
            assert other.timed
            return other.at - self.at

    stream = iter([1000.0, 4500.0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    assert seconds_between(mark(torch.device("cuda")), mark(torch.device("cuda"))) == 3.5


def test_marks_on_a_processor_are_its_clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr(time_left, "time", clock)
    before = mark(torch.device("cpu"))
    clock.now += 2.5
    assert seconds_between(before, mark(torch.device("cpu"))) == 2.5


@pytest.mark.parametrize("name", ["standard", "curriculum", "dynamic"])
def test_a_whole_training_on_a_fake_clock(name, monkeypatch, capsys):
    """Every gradient takes half a second an example, every update one, every validation and saving twenty."""
    time = Time()
    for module in (train, loop, time_left):
        monkeypatch.setattr(module, "time", time)
    called = im.PGD.__call__
    told = []

    def attack(self, *arguments, **options):
        found = called(self, *arguments, **options)
        time.now += 0.5 * float(found.gradient_calls.sum())
        return found

    def objective(model, x, y, x_adv, epoch):
        time.now += len(y)
        logits = model(x_adv)
        return torch.nn.functional.cross_entropy(logits, y), logits

    def validated(*_):
        time.now += 20
        return {"validation_clean": 0.5, "validation_robust": 0.5, "validation_accuracy": 0.5}

    class Shown(TrainingDisplay):
        def batch(self, done, totals, fosc, left):
            told.append((time.now, left))

    monkeypatch.setattr(im.PGD, "__call__", attack)
    monkeypatch.setattr(train, "_validate", validated)
    monkeypatch.setattr("innermax.training.progress.TrainingDisplay", Shown)
    data = im.load_data("digits").train[:96]
    pgd = im.PGD(im.Linf(0.15), steps=5)
    strategies = {"standard": im.Standard(pgd), "curriculum": im.Curriculum(pgd), "dynamic": im.Dynamic(pgd)}
    model = im.build_model("digits-cnn", input_shape=data.shape)
    options = {"epochs": 12, "batch_size": 16, "lr": 0.05, "precision": "float32", "objective": objective}
    im.train(model, data, strategies[name], validation_set=data[:8], **options)
    ratios = [(at / time.now, left / (time.now - at)) for at, left in told[:-1]]
    assert len(told) == 72
    assert worst(ratios) < 1.5
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"epoch {number}/12") for number, line in enumerate(lines[-12:], 1)] == [True] * 12
    assert "  left 0:" in lines[-2]
    assert "left" not in lines[-1]
