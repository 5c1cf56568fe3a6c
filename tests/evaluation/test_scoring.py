"""Scores are exact: points are brought back, quantised, and looked at by the model itself."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import innermax as im
from innermax.evaluation.scoring import round_to_grid
from tests.helpers.evaluation import Scripted, Watched, examples, linear_problem, network

PGD = im.PGD(im.Linf(0.1), steps=5)
LEVELS = 255


@pytest.mark.parametrize("threat", [im.Linf(0.05), im.L2(0.3), im.L1(0.7)])
def test_points_outside_are_brought_back(threat):
    _, x, y, _, _ = linear_problem()
    seen = []
    watched = nn.Sequential(Watched(seen.append))
    attack = Scripted(threat, lambda x, y, index: x + 10 * (0.5 - y[:, None].float()))
    im.evaluate(watched, (x, y), {"far": attack}, batch_size=len(x))
    assert threat.contains(seen[-1], x).all()
    assert torch.allclose(seen[-1], threat.project(x + 10 * (0.5 - y[:, None].float()), x))
    assert not torch.equal(seen[-1], x)


def test_points_inside_are_scored_bit_for_bit():
    _, x, y, _, _ = linear_problem()
    inside, seen = x / 3, []  # x + (x / 3 − x) is not x / 3, in floats
    attack = Scripted(im.Linf(0.7), lambda x, y, index: inside)
    im.evaluate(Watched(seen.append), (x, y), {"a": attack}, batch_size=len(x))
    assert torch.equal(seen[-1], inside)


def test_verdicts_are_never_the_attacks_own():
    model, x, y, margin, _ = linear_problem()
    fallen = Scripted(
        im.Linf(0.1),
        lambda x, y, index: x,
        lambda x, y: {
            "logits": nn.functional.one_hot(1 - y, 2).float(),
            "misclassified": torch.ones_like(y, dtype=torch.bool),
            "loss": torch.full((len(y),), 99.0),
        },
    )
    standing = Scripted(
        im.Linf(0.1),
        lambda x, y, index: PGD(model, x, y).x_adv,
        lambda x, y: {"misclassified": torch.zeros_like(y, dtype=torch.bool)},
    )
    evaluation = im.evaluate(model, (x, y), {"fallen": fallen, "standing": standing, "pgd": im.FGSM(im.Linf(0.1))})
    assert evaluation.accuracy["fallen"] == evaluation.accuracy["clean"]
    assert evaluation.convergence["fallen"].overturned == int((margin > 0).sum())
    assert evaluation.rows["fallen"].loss.max() < 99
    assert evaluation.accuracy["standing"].value < evaluation.accuracy["clean"].value
    assert evaluation.convergence["standing"].overturned == 0


def test_an_attack_that_works_in_place_moves_nothing():
    model, x, y, _, _ = linear_problem()
    before = x.clone()

    def spoil(x, y, index):
        y.fill_(0)
        return x.fill_(0.5)

    evaluation = im.evaluate(model, (x, y), {"spoil": Scripted(im.Linf(1e-6), spoil), "still": PGD})
    assert torch.equal(x, before)
    assert evaluation.accuracy["spoil"] == evaluation.accuracy["clean"]


def test_an_image_that_is_no_image_is_refused():
    model, x, y, _, _ = linear_problem()
    for point, words in [(lambda x, y, i: x * math.nan, "NaN"), (lambda x, y, i: x[:, :3], "shape")]:
        with pytest.raises(ValueError, match=f"attack 'bad' must return finite x_adv .* got {words}"):
            im.evaluate(model, (x, y), {"bad": Scripted(im.Linf(0.1), point)})


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("threat", [im.Linf(8 / 255), im.Linf(0.3333), im.L2(0.5), im.L2(3.0), im.L1(1.3), im.L1(12.0)])
def test_quantised_images_are_on_the_grid_and_inside(threat, bits):
    levels = 2**bits - 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, levels + 1, (64, 36), generator=generator) / levels
    feasible = threat.around(x)
    direction = torch.randn(64, 36, generator=generator)
    for point in (threat.sample(x), threat.project(x + direction, x), threat.maximizer(direction, x), x):
        image = round_to_grid(point, feasible, bits)
        assert feasible.contains(image).all()
        assert ((image * levels).round() / levels - image).abs().max() < 1e-6
        assert (image - point).abs().max() < (1 + 1e-4) / levels
    assert torch.allclose(round_to_grid(x, feasible, bits), x)


def test_quantisation_costs_an_attack_no_more_than_it_must():
    x = torch.full((1, 2), 100 / 255)
    full = round_to_grid(x + 8 / 255 * torch.tensor([[1.0, -1.0]]), im.Linf(8 / 255).around(x), 8)
    assert torch.allclose(full * 255, torch.tensor([[108.0, 92.0]]))  # not one level short for a rounding
    cut = round_to_grid(x + torch.tensor([[7.7, 3.6]]) / 255, im.Linf(7.8 / 255).around(x), 8)
    assert torch.allclose(cut * 255, torch.tensor([[107.0, 104.0]]))  # one value without room takes no other's
    # √(3² + 4²) = 5 fits and √(4² + 4²) does not: the value nearer to its next level is the one to go.
    near = round_to_grid(x + torch.tensor([[3.6, 3.5]]) / 255, im.L2(5.1 / 255).around(x), 8)
    assert torch.allclose(near * 255 - 100, torch.tensor([[4.0, 3.0]]), atol=1e-4)


@pytest.mark.parametrize("threat", [im.Linf(0.1), im.L2(0.6), im.L1(2.0)])
def test_what_is_scored_is_quantised(threat):
    images, labels = examples(30, classes=2)
    seen = []
    attack = im.PGD(threat, steps=3, loss="margin")
    evaluation = im.evaluate(Watched(seen.append), (images, labels), {"pgd": attack}, batch_size=30, quantize=8)
    x = images.float() / 255
    assert threat.contains(seen[-1], x).all()
    assert ((seen[-1] * LEVELS).round() / LEVELS - seen[-1]).abs().max() < 1e-6
    assert not torch.equal(seen[-1], x)
    assert evaluation.settings.quantize == 8


def test_clean_images_must_have_the_grid():
    model, x, y, _, _ = linear_problem()
    with pytest.raises(ValueError, match=r"quantize=8 needs images of test_set whose values are multiples of 1/255"):
        im.evaluate(model, (x, y), {"pgd": PGD}, quantize=8)


@pytest.mark.parametrize("precision", ["float32", "auto", "bf16"])
def test_scores_are_exact_whatever_the_attack_searched_in(precision):
    x, y = examples()
    model = network().eval()
    evaluation = im.evaluate(
        model, (x, y), {"still": Scripted(im.Linf(0.1), lambda x, y, index: x)}, precision=precision
    )
    with torch.no_grad():
        logits = model(x.float() / 255)
    assert np.array_equal(evaluation.clean_prediction, logits.argmax(1).numpy())
    expected = nn.functional.cross_entropy(logits, y, reduction="none").numpy()
    assert np.allclose(evaluation.rows["still"].loss, expected, rtol=1e-5)
    assert "BatchNorm folded" in evaluation.settings.attack_network
    assert ("float32" in evaluation.settings.attack_network) or precision != "float32"
