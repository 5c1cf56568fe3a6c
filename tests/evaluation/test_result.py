"""An evaluation's table, its JSON, and differences between two."""

import json
from dataclasses import fields

import pytest

import innermax as im
from innermax.evaluation.result import Evaluation
from innermax.evaluation.store import AttackRows
from innermax.utils.intervals import paired_difference
from tests.helpers.evaluation import Scripted, examples, network

PGD = im.PGD(im.Linf(0.1), steps=5)


def test_the_table_of_examples():
    evaluation = im.evaluate(network(), examples(), {"pgd": PGD})
    table = evaluation.examples
    assert len(table) == 40
    columns = [field.name for field in fields(AttackRows)]
    told = {"correct", "loss", "fosc", "relative_fosc", "zero_gradient", "steps", "gradient_calls"}
    assert told <= set(columns)
    assert list(table)[4:] == ["seed", *(f"pgd_{column}" for column in ["success", *columns])]
    assert (table.pgd_success != table.pgd_correct).all()
    assert (table.seed == 0).all()
    assert int(table.pgd_correct.sum()) == evaluation.accuracy["pgd"].correct
    assert (table.clean_correct == (table.clean_prediction == table.label)).all()


def test_json_round_trip(tmp_path):
    dumb = Scripted(im.L2(0.1), lambda x, y, index: x)  # without gauges: NaN
    evaluation = im.evaluate(network(), examples(), {"pgd": PGD, "dumb": dumb}, seed=3, quantize=8)
    text = evaluation.to_json(tmp_path / "evaluation.json")
    assert (tmp_path / "evaluation.json").read_text(encoding="utf-8").rstrip() == text
    document = json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))
    assert document["settings"]["seed"] == 3
    assert document["accuracy"]["pgd"]["correct"] == evaluation.accuracy["pgd"].correct
    assert document["convergence"]["dumb"]["fosc_median"] is None
    again = Evaluation.from_json(text)
    assert again.to_json() == text
    assert again.weights == document["weights"] == evaluation.weights != None  # noqa: E711
    assert again.settings == evaluation.settings
    assert again.examples.equals(evaluation.examples)
    assert again.difference(evaluation, "pgd").estimate == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"examples": {"attacks": 3}}', "null"])
def test_other_texts_are_no_evaluation(text):
    with pytest.raises(ValueError, match="text must be an evaluation's JSON"):
        Evaluation.from_json(text)


def test_differences_are_paired():
    one, two = (im.evaluate(network(seed), examples(), {"pgd": PGD}) for seed in (0, 1))
    for name in ("clean", "pgd", "worst_case"):
        mine, theirs = one.correct(name), two.correct(name)
        found = one.difference(two, name)
        assert found.estimate == pytest.approx(mine.mean() - theirs.mean())
        assert found == paired_difference(int((mine & ~theirs).sum()), int((~mine & theirs).sum()), 40)
        back = two.difference(one, name)
        assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    with pytest.raises(ValueError, match="unknown attack 'pdg'; did you mean 'pgd'"):
        one.difference(two, "pdg")
    with pytest.raises(ValueError, match="same examples: its 40 labels or their numbers differ from these 40"):
        one.difference(im.evaluate(network(), examples(seed=9), {"pgd": PGD}), "pgd")
    with pytest.raises(ValueError, match="same examples: its 39 labels"):
        one.difference(im.evaluate(network(), examples(39), {"pgd": PGD}), "pgd")
