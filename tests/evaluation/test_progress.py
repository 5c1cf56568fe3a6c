"""The time left of evaluations, and what a terminal shows."""

import os
import pty
import subprocess
import sys

import pytest

import innermax as im
from innermax.attacks.cost import search_cost
from innermax.evaluation.progress import EvaluationClock, audit_cost, show_evaluation
from tests.helpers.clocks import Time, worst


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


def test_the_cost_of_an_audit():
    """Of its sample: a quarter of a few examples, 100 of thousands, one in fifty of very many."""
    assert audit_cost(100_000) == pytest.approx(audit_cost(2_000) * 100_000 / 50 / 100 / (100_000 / 2_000))
    assert audit_cost(300) == audit_cost(200)
    assert audit_cost(4_000) == pytest.approx(audit_cost(400) * 0.1)


def test_an_evaluation_says_little_where_nothing_is_live(monkeypatch, capsys):
    time = Time()
    monkeypatch.setattr("innermax.evaluation.progress.time", time)
    with show_evaluation(True, ATTACKS, audit=True) as show:
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
    for silent in (False, None):
        with show_evaluation(silent, ATTACKS) as show:
            assert show is None
    with show_evaluation(print, ATTACKS) as show:
        assert show is print
    assert capsys.readouterr().err == ""


def test_what_comes_before_the_batches_is_no_part_of_them(monkeypatch, capsys):
    """A minute of compiling, seven images, a second of clean ones: not an hour is left."""
    time = Time()
    monkeypatch.setattr("innermax.evaluation.progress.time", time)
    with show_evaluation(True, {"fgsm": ATTACKS["fgsm"], "pgd-20": ATTACKS["pgd-20"]}, audit=True) as show:
        for name, before, seconds in (("clean", 60.0, 0.045), ("fgsm", 30.0, 0.245), ("pgd-20", 0.0, 2.145)):
            time.now += before
            show.begin_batch()
            time.now += seconds
            show(name, 7, 7)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["clean  7/7  left 0:00:11", "fgsm  7/7  left 0:00:11"]


PROGRAM = """
from innermax.evaluation.progress import show_evaluation
from innermax.training.progress import show_progress
import innermax as im
with show_progress(2, True) as show:
    show.start(0, 2, 0.1)
    show.batch(1, {"loss": 2.0, "examples": 2.0}, 0.5, 100.0)
with show_evaluation(True, {"fgsm": im.FGSM(im.Linf(0.1))}, audit=True) as show:
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
