"""The time left of trainings and evaluations: simulated and recorded timings, and what a terminal shows."""

import os
import pty
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import innermax as im
from innermax.attacks.cost import search_cost
from innermax.cli.progress import EvaluationClock, audit_cost, show_evaluation
from innermax.training import loop, train
from innermax.training.progress import TrainingDisplay, clock_time
from innermax.training.time_left import TrainingClock, expected_gradients

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


def worst(told):
    """The largest factor between estimate and truth, when between 10 and 95 per cent of the time have passed."""
    return max(max(ratio, 1 / ratio) for share, ratio in told if 0.1 <= share <= 0.95)


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


class Time:
    """A clock that only moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize("name", ["standard", "curriculum", "dynamic"])
def test_a_whole_training_on_a_fake_clock(name, monkeypatch, capsys):
    """Every gradient takes half a second an example, every update one, every validation and saving twenty."""
    time = Time()
    for module in (train, loop):
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


def evaluated(costs, truth, batches, rows_kept=0):
    """(share of the time, estimate / truth) after each batch of an evaluation of parts that cost what truth says."""
    clock, now, told = EvaluationClock(dict(costs)), 0.0, []
    clock.begin(now)
    for part, seconds in truth.items():
        for batch in range(1, batches + 1):
            now += 0.0 if part == next(iter(truth)) and batch <= rows_kept else seconds / batches
            clock.batch(part, batch / batches, now)
            told.append((now, clock.left()))
    return [(at / now, left / (now - at)) for at, left in told[:-1] if left is not None]


THREAT = im.Linf(0.1)
ATTACKS = {"fgsm": im.FGSM(THREAT), "pgd-20": im.PGD(THREAT, steps=20), "autoattack": im.AutoAttack(THREAT)}


@pytest.mark.parametrize("surviving", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("batches", [10, 40])
def test_attacks_that_differ_by_orders_of_magnitude(surviving, batches):
    costs = {"clean": 0.45} | {name: search_cost(attack) for name, attack in ATTACKS.items()}
    assert costs["autoattack"] > 50 * costs["pgd-20"] > 500 * costs["fgsm"] / 3
    truth = {name: 0.01 * cost for name, cost in costs.items()}
    truth["autoattack"] *= surviving / 0.5
    told = evaluated(costs, truth, batches)
    if surviving < 0.3:  # nobody knows before the first batch of AutoAttack that it has little to do
        told = told[1 - batches :]
    assert worst(told) < 1.5


class Own:
    """An attack that tells nothing of its cost."""

    threat = THREAT

    def __call__(self, model, x, y, *, seed=0, index=None, final="gradient"):
        raise NotImplementedError


def test_equal_attacks_and_an_attack_of_unknown_cost():
    costs = {"clean": 0.45, "pgd": 21.0, "own": search_cost(Own())}
    assert worst(evaluated(costs, {"clean": 0.1, "pgd": 4.0, "own": 5.0}, 20)) < 1.5


def test_kept_rows_tell_no_time():
    costs = {"pgd": 20.0, "cw": 20.0}
    assert worst(evaluated(costs, {"pgd": 10.0, "cw": 10.0}, 20, rows_kept=15)) < 1.05


@pytest.fixture(scope="module")
def half_robust():
    """A model, and examples of which half fall to PGD: attacks of survivors have work with the others."""
    data = im.load_data("digits")
    torch.manual_seed(0)
    model = im.build_model("digits-cnn", input_shape=data.train.shape)
    im.train(model, data.train[:300], im.Unsecured(), epochs=4, lr=0.05, batch_size=32, progress=False)
    x, y = data.test.batch(torch.arange(200))
    fell = im.PGD(THREAT, steps=20, restarts=2)(model, x, y).misclassified
    rows = torch.cat([fell.nonzero()[:20, 0], (~fell).nonzero()[:20, 0]])
    assert len(rows) == 40
    return model, x[rows], y[rows]


COSTLY = [
    im.APGD(THREAT, steps=20),
    im.APGD(THREAT, steps=10, targets=5, loss="dlr"),
    im.FAB(THREAT, steps=10, targets=5),
    im.Square(THREAT, queries=200),
    im.GuidedPGD(THREAT, budget=100),
]


@pytest.mark.parametrize("attack", COSTLY, ids=lambda attack: type(attack).__name__)
def test_costs_are_about_the_calls_that_attacks_report(half_robust, attack):
    result = attack(*half_robust, final="none")
    taken = float((result.gradient_calls + 0.45 * result.forward_calls).mean())
    assert 0.4 < search_cost(attack) / taken < 1.25


def test_the_cost_of_pgd_is_exact(half_robust):
    result = im.PGD(THREAT, steps=7, restarts=2)(*half_robust)
    assert search_cost(im.PGD(THREAT, steps=7, restarts=2)) == pytest.approx(
        float(result.gradient_calls.float().mean()), abs=1.5
    )


def test_the_cost_of_an_audit():
    """Of its sample: a quarter of a few examples, 100 of thousands, one in fifty of very many."""
    assert audit_cost(100_000) == pytest.approx(audit_cost(2_000) * 100_000 / 50 / 100 / (100_000 / 2_000))
    assert audit_cost(300) == audit_cost(200)
    assert audit_cost(4_000) == pytest.approx(audit_cost(400) * 0.1)


def test_an_evaluation_says_little_where_nothing_is_live(monkeypatch, capsys):
    time = Time()
    monkeypatch.setattr("innermax.cli.progress.time", time)
    with show_evaluation(ATTACKS, audit=True) as show:
        for name, seconds in {"clean": 0.1, "fgsm": 0.1, "pgd-20": 2.0, "autoattack": 300.0}.items():
            for batch in range(1, 5):
                time.now += seconds / 4
                show(name, 250 * batch, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  left")[0] for line in lines] == [
        f"autoattack  {count}/1,000" for count in ("250", "500", "750", "1,000")
    ]
    assert lines[0].endswith(lines[0][-7:])
    assert "left 0:0" in lines[0]
    with show_evaluation(ATTACKS, speak=False) as show:
        time.now += 100
        show("clean", 1, 1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (-3, "0:00:00"), (155.4, "0:02:35"), (90_000, "1 day, 1:00:00")]
)
def test_clock_time(seconds, text):
    assert clock_time(seconds) == text


PROGRAM = """
from innermax.cli.progress import show_evaluation
from innermax.training.progress import show_progress
import innermax as im
with show_progress(2, True) as show:
    show.start(0, 2, 0.1)
    show.batch(1, {"loss": 2.0, "examples": 2.0}, 0.5, 100.0)
with show_evaluation({"fgsm": im.FGSM(im.Linf(0.1))}, audit=True) as show:
    show("clean", 10, 10)
    show("fgsm", 10, 10)
"""


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_on_a_terminal(environment):
    """A live line with the time left; no colour where NO_COLOR is set, nothing live on a dumb terminal."""
    own, its = pty.openpty()
    told = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    told |= {"TERM": "xterm-256color", "COLUMNS": "120"} | environment
    done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=its, stderr=its, env=told, check=False)
    os.close(its)
    text = b""
    with os.fdopen(own, "rb", 0) as terminal:
        try:
            while part := terminal.read(4096):
                text += part
        except OSError:  # how Linux says that the other end is closed
            pass
    assert done.returncode == 0, text
    shown = text.decode()
    if environment.get("TERM") == "dumb":
        assert shown == ""
        return
    assert "epoch 1/2  batch 1/2  loss 1.000  c_t 0.100  FOSC 0.500" in shown
    assert "left 0:01:4" in shown
    assert "audit" in shown
    coloured = "\x1b[38;" in shown or "\x1b[3" in shown.replace("\x1b[?25", "")
    assert coloured == ("NO_COLOR" not in environment)
