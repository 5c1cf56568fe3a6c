"""The verdict of an audit, and what becomes of it in JSON."""

import json
import math

import pytest

import innermax as im
from innermax.evaluation.audit import certain_gain, judge
from innermax.evaluation.result import Evaluation
from tests.helpers.audits import evidence, search

LINF = im.Linf(0.15)
PGD = im.PGD(LINF, steps=10)


@pytest.mark.parametrize(
    ("changed", "verdict", "cause"),
    [
        ({}, "no failure found", None),
        ({"total_gain": 0.005}, "no failure found", None),
        ({"zero_gradient": 1.0, "foretold": 0.0}, "no failure found", None),  # a gauge alone proves nothing
        ({"total_gain": 0.0051}, "not converged", "too weak a search"),
        ({"repeat_difference": 1e-6}, "no failure found", None),
        ({"repeat_difference": 0.1}, "randomised", "differ by 0.1"),
        ({"repeat_difference": 0.1, "averaged": True}, "no failure found", None),
        ({"repeat_difference": 0.1, "averaged": True, "total_gain": 0.1}, "randomised", "differ"),
        ({"total_gain": 0.1, "probabilities": True, "zero_gradient": 1.0}, "gradients masked", "probabilities"),
        ({"total_gain": 0.1, "zero_margin_gradient": 1.0, "zero_gradient": 1.0}, "gradients masked", "no gradient"),
        ({"total_gain": 0.1, "zero_gradient": 0.9}, "gradients masked", "saturate"),
        ({"total_gain": 0.1, "foretold": 0.2}, "gradients masked", "shattered"),
        ({"total_gain": 0.1, "hidden_gain": 0.1}, "gradients masked", "do not follow"),
        (
            {"total_gain": 0.1, "hidden_gain": 0.1, "fallen": {"margin": 1, "score-based": 0, "surrogate my net": 3}},
            "gradients masked",
            "gain more (surrogate my net)",
        ),
        ({"total_gain": 0.1, "search": search(steps=2)}, "not converged", "too few steps: pgd takes 2"),
        ({"total_gain": 0.1, "search": search(reach=0.4)}, "not converged", "step size is too small"),
        ({"total_gain": 0.1, "search": search(loss_gain=-1.0)}, "not converged", "easier"),
        ({"total_gain": 0.1, "gain": {"more steps": 0.1}}, "not converged", "four times"),
        ({"total_gain": 0.1, "gain": {"restarts": 0.1}}, "not converged", "one start"),
    ],
)
def test_verdicts(changed, verdict, cause):
    audit = judge(evidence(**changed))
    assert audit.verdict == verdict
    assert (cause is None and audit.causes == ()) or cause in audit.causes[0]
    assert bool(audit.advice) == (verdict != "no failure found")


def test_what_falls_make_certain():
    assert certain_gain(3, 0, 25, 100, 400) == 3 / 400
    assert certain_gain(0, 1, 1, 1, 10) >= 1 / 10
    assert certain_gain(0, 0, 0, 0, 10) == 0
    assert 0.1 < certain_gain(0, 20, 40, 400, 1000) < 0.2  # half of the 400, less what chance may have given


def test_an_audit_survives_json_and_can_be_left_out(trained, images):
    evaluation = im.evaluate(trained, images, {"pgd": PGD, "square": im.Square(LINF, 20)})
    text = evaluation.to_json()
    again = Evaluation.from_json(text)
    assert again.to_json() == text
    assert again.audit.verdict == evaluation.audit.verdict
    assert again.audit.evidence.fallen == evaluation.audit.evidence.fallen
    assert json.loads(text)["audit"]["evidence"]["searches"]["square"]["steps"] is None
    assert math.isnan(again.audit.evidence.searches["square"].steps)
    assert im.evaluate(trained, images, {"pgd": PGD}, audit=False).audit is None
    assert im.evaluate(trained, images, {}).audit is None
    assert Evaluation.from_json(im.evaluate(trained, images, {}).to_json()).audit is None


def test_an_audit_of_before_is_read(trained, images):
    document = json.loads(im.evaluate(trained, images[:20], {"pgd": PGD}).to_json())
    assert document["audit"]["evidence"].pop("untried") == {}
    again = Evaluation.from_json(json.dumps(document)).audit
    assert again.evidence.untried == {}
    assert "Not tried" not in again.sentence
