"""Distances and robust accuracy against ε, from one run of an attack that looks for the smallest perturbation."""

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

import innermax as im
from innermax.evaluation.result import Evaluation
from innermax.utils.intervals import accuracy

COUNT = 60
FMN = im.FMN(im.Linf(0.1), steps=40)


def plane(count=COUNT):
    """A linear model of two classes, inputs far from their bounds, labels of which some are wrong, and distances."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(12, generator=generator)
    x = 0.4 + 0.2 * torch.rand(count, 12, generator=generator)
    model = nn.Linear(12, 2)
    model.weight.data = torch.stack([-weight, weight]) / 2
    model.bias.data = torch.tensor([0.5, -0.5]) * (x @ weight).mean()
    score = (x @ weight - (x @ weight).mean()).double()
    y = (score > 0).long()
    y[::7] = 1 - y[::7]
    own = torch.where(y == 1, score, -score).clamp(min=0)
    return model, (x, y), (own / weight.abs().sum()).numpy()


def test_distances_and_curve_of_a_linear_model():
    model, data, expected = plane()
    evaluation = im.evaluate(model, data, {"fmn": FMN})
    distance = evaluation.distances()
    assert (distance[~evaluation.correct("clean")] == 0).all()
    assert (evaluation.correct("clean") == (expected > 0)).all()
    assert (distance >= expected * (1 - 1e-4) - 1e-7).all()
    np.testing.assert_allclose(distance, expected, rtol=0.01, atol=1e-6)
    curve = evaluation.curve(eps=[0.02, 0.0, 0.05])
    assert (curve.attack, curve.norm, curve.own_eps, curve.eps) == ("fmn", "Linf", 0.1, (0.0, 0.02, 0.05))
    assert curve.accuracy == tuple(accuracy(int((distance > eps).sum()), COUNT) for eps in curve.eps)
    assert curve.accuracy[0] == evaluation.accuracy["clean"]
    assert 0 < curve.accuracy[2].correct < curve.accuracy[1].correct < curve.accuracy[0].correct
    whole = evaluation.curve()
    assert len(whole.eps) == 101
    assert whole.eps[-1] >= 0.1


def test_at_its_own_eps_the_curve_is_the_attacks_accuracy():
    model, data, expected = plane()
    eps = float(np.median(expected))
    evaluation = im.evaluate(model, data, {"fmn": im.FMN(im.Linf(eps), steps=40)})
    assert evaluation.curve([eps]).accuracy[0] == evaluation.accuracy["fmn"]
    assert 0.2 < evaluation.accuracy["fmn"].value < 0.8


def test_what_fell_to_another_attack_counts_from_its_eps_on():
    model, data, expected = plane()
    weak = im.FMN(im.Linf(0.1), steps=1)  # it finds nothing but what is wrong already
    fgsm, other = im.FGSM(im.Linf(0.04)), im.FGSM(im.L2(0.1))
    unbounded = im.FGSM(im.Linf(0.02, bounds=None))
    evaluation = im.evaluate(model, data, {"weak": weak, "fgsm": fgsm, "l2": other, "unbounded": unbounded})
    assert all(evaluation.accuracy[name].correct < evaluation.accuracy["clean"].correct for name in ("l2", "unbounded"))
    distance = evaluation.distances("weak")
    found = evaluation.rows["weak"].distance
    fell = ~evaluation.correct("fgsm") & (expected > 0)
    assert fell.any()
    assert (distance[fell] <= 0.04).all()
    assert (distance[evaluation.correct("fgsm")] == found[evaluation.correct("fgsm")]).all()
    assert evaluation.curve([0.04]).accuracy[0].correct <= evaluation.accuracy["fgsm"].correct
    with pytest.raises(ValueError, match="did you mean 'weak'"):
        evaluation.curve(attack="week")
    with pytest.raises(ValueError, match="eps must hold finite numbers"):
        evaluation.curve([-0.1])


def test_without_such_an_attack_there_is_no_curve():
    model, data, _ = plane(10)
    evaluation = im.evaluate(model, data, {"fgsm": im.FGSM(im.Linf(0.1))}, audit=False)
    assert "fgsm_distance" not in evaluation.columns()
    with pytest.raises(ValueError, match="evaluate with FMN or DDN"):
        evaluation.curve()


@dataclass(frozen=True)
class Told(im.FMN):
    """FMN whose nearest points are moved to a share of their way."""

    share: float = 1.0

    def __call__(self, *arguments, **options):
        result = super().__call__(*arguments, **options)
        x = arguments[1]
        return replace(result, nearest=x + self.share * (result.nearest - x), x_adv=x)


@pytest.mark.parametrize(("share", "factor"), [(0.985, 0.985 * 1.02), (0.2, math.inf), (1.5, 1.5)])
def test_only_images_on_which_the_model_errs_give_a_distance(share, factor):
    """The attack claims to have found them in any case."""
    model, data, expected = plane()
    evaluation = im.evaluate(model, data, {"told": Told(im.Linf(0.1), 40, share)}, audit=False)
    right = expected > 0
    distance = evaluation.distances()[right]
    if math.isinf(factor):
        assert np.isinf(distance).all()
    else:
        np.testing.assert_allclose(distance, factor * expected[right], rtol=0.01, atol=1e-6)
        assert (distance >= expected[right] * (1 - 1e-4)).all()


def test_quantised_images_are_what_is_measured():
    model, (x, y), _ = plane()
    x = (255 * x).round() / 255
    evaluation = im.evaluate(model, (x, y), {"fmn": FMN}, quantize=8, audit=False)
    levels = 255 * evaluation.distances()
    assert np.isfinite(levels).all()
    np.testing.assert_allclose(levels, levels.round(), atol=1e-3)
    exact = im.evaluate(model, (x, y), {"fmn": FMN}, audit=False)
    assert (evaluation.distances() >= exact.distances() * 0.99).all()


def test_rows_and_json_keep_distances(tmp_path):
    model, data, _ = plane()
    attacks = {"fmn": im.FMN(im.Linf(0.1), steps=2), "fgsm": im.FGSM(im.Linf(0.1))}
    first = im.evaluate(model, data, attacks, rows_dir=tmp_path / "rows", batch_size=20)
    again = im.evaluate(model, data, attacks, rows_dir=tmp_path / "rows", batch_size=20)
    text = first.to_json()
    assert "Infinity" not in text
    for other in (again, Evaluation.from_json(text)):
        assert np.array_equal(other.distances(), first.distances())
        assert other.examples.equals(first.examples)
    document = json.loads(text)
    for wrong in (-0.1, "far"):
        document["examples"]["attacks"]["fmn"]["distance"][3] = wrong
        with pytest.raises(ValueError, match="distance"):
            Evaluation.from_json(json.dumps(document))


def test_bounds_of_pixels_are_no_obstacle():
    model, data, expected = plane()
    eps = float(np.median(expected))
    threat = im.Linf(eps, bounds=(torch.zeros(12), torch.ones(12)))
    evaluation = im.evaluate(model, data, {"fmn": im.FMN(threat, steps=40)}, audit=False)
    assert evaluation.curve([eps]).accuracy[0] == evaluation.accuracy["fmn"]
    assert (evaluation.curve().norm, evaluation.curve().own_eps) == ("Linf", eps)
