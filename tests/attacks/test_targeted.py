"""Attacks that head for a label, which a rule chooses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import nn

import innermax as im
from innermax.attacks.named import aim_attacks, display_name, parse_attacks
from innermax.attacks.targeted import choose_targets
from innermax.losses import KLDivergence
from innermax.reporting.tables import format_table
from innermax.utils import randomness
from innermax.utils.serialization import describe
from tests.helpers.evaluation import examples, network
from tests.helpers.networks import Logged

EPS = 0.15
THREAT = im.Linf(EPS)
ATTACKS = {
    "fgsm": im.FGSM(THREAT),
    "pgd": im.PGD(THREAT, steps=3, restarts=2),
    "cw": im.CW(THREAT, steps=3, confidence=0.5),
    "apgd": im.APGD(THREAT, steps=5, loss="dlr"),
}
KEY = randomness.hash_keys(0, torch.arange(4000))


def beyond(logits, label):
    return (label + 2) % logits.shape[1]


def problem(count=40, classes=4):
    """A linear model of several classes."""
    torch.manual_seed(5)
    model, x = nn.Linear(6, classes), torch.rand(count, 6)
    return model, x, model(x).argmax(1)


def test_rules_choose_another_label():
    logits, label = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)), torch.arange(4000) % 5
    assert choose_targets("next", logits, label, KEY).tolist() == [(y + 1) % 5 for y in label.tolist()]
    least = [
        min((v, c) for c, v in enumerate(row) if c != y)[1]
        for row, y in zip(logits.tolist(), label.tolist(), strict=True)
    ]
    assert choose_targets("least-likely", logits, label, KEY).tolist() == least
    drawn = choose_targets("random", logits, label, KEY)
    assert bool(((drawn >= 0) & (drawn < 5) & (drawn != label)).all())
    for own in range(5):
        counts = torch.bincount(drawn[label == own], minlength=5)
        assert counts[own] == 0
        others = counts[torch.arange(5) != own].double()
        assert float(((others - 200).square() / 200).sum()) < 16.3  # chi-squared, 3 degrees, p = 0.001
    assert torch.equal(choose_targets("random", logits[:7], label[:7], KEY[:7]), drawn[:7])
    two = choose_targets("random", logits[:, :2], label % 2, KEY)
    assert torch.equal(two, 1 - label % 2)


@pytest.mark.parametrize("rule", ["random", "next", "least-likely", beyond])
@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_the_attack_with_targets(rule, name):
    model, x, y = problem()
    index = torch.arange(7, 47)
    found = im.Targeted(ATTACKS[name], rule)(model, x, y, seed=3, index=index)
    key = randomness.hash_keys(3, index, 0x7A26E7)
    assert torch.equal(found.target, choose_targets(rule, model(x), y, key))
    plain = ATTACKS[name](model, x, y, target=found.target, seed=3, index=index)
    for field, value in vars(plain).items():
        expected = value + 1 if field == "forward_calls" else value
        torch.testing.assert_close(getattr(found, field), expected, rtol=0, atol=0, equal_nan=True, msg=field)


def test_targets_are_reached_where_a_linear_programme_reaches_them():
    model, x, y = problem()
    attack = im.Targeted(im.PGD(THREAT, steps=300, step_size="annealed", loss="margin"), "random")
    found = attack(model, x, y)
    weight, bias = model.weight.detach().double().numpy(), model.bias.detach().double().numpy()
    slack = []
    for point, target in zip(x.double().numpy(), found.target.tolist(), strict=True):
        others = [c for c in range(4) if c != target]
        # maximise s with s <= z_t - z_c for every other class c, over the box
        rows = np.array([[*(weight[c] - weight[target]), 1.0] for c in others])
        limits = [bias[target] - bias[c] for c in others]
        box = [(max(0, p - EPS), min(1, p + EPS)) for p in point]
        slack.append(-optimize.linprog([0] * 6 + [-1], A_ub=rows, b_ub=limits, bounds=[*box, (None, None)]).fun)
    slack = np.array(slack)
    reached = (found.logits.argmax(1) == found.target).numpy()
    assert 3 < reached.sum() < 37
    sure = np.abs(slack) > 0.01
    assert sure.sum() > 30
    np.testing.assert_array_equal(reached[sure], slack[sure] > 0)


def test_an_evaluation_says_how_often_targets_are_reached(tmp_path):
    model, (images, labels) = network().eval(), examples()
    wide = {name: replace(ATTACKS[name], threat=im.Linf(0.9)) for name in ("pgd", "apgd")}
    attacks = aim_attacks(wide, "least-likely")
    attacks["pgd"] = ATTACKS["pgd"]
    options = {"batch_size": 16, "rows_dir": tmp_path / "rows", "quantize": 8}
    found = im.evaluate(model, (images, labels), attacks, keep_images=True, **options)
    assert list(found.reached) == ["pgd to least-likely", "apgd to least-likely"]
    logits = model(images / 255)
    least = logits.detach().scatter(1, labels[:, None], torch.inf).argmin(1)
    for name, share in found.reached.items():
        assert found.rows[name].target.tolist() == least.tolist()
        prediction = model(torch.from_numpy(found.images[name])).argmax(1)
        assert share.correct == int((prediction == least).sum()) > 0
        assert found.accuracy[name].correct == int((prediction == labels).sum())
        assert share.total == len(labels)
        assert f"{100 * share.value:.2f} % (" in format_table(found).caption
    assert f"{name}_target" in found.columns()
    again = im.Evaluation.from_json(found.to_json())
    assert again.reached == found.reached
    assert found.summary()["reached"].keys() == found.reached.keys()
    resumed = im.evaluate(model, (images, labels), attacks, **options)
    assert resumed.reached == found.reached
    plain = im.evaluate(model, (images, labels), {"pgd": ATTACKS["pgd"]})
    assert plain.reached == {}
    assert "reached" not in plain.summary()
    sized = im.evaluate_each_eps(model, (images, labels), attacks, [0.0, EPS], batch_size=16)
    assert sized[0.0].reached["pgd to least-likely"].correct == int((logits.argmax(1) == least).sum())


def test_the_clean_inputs_are_asked_once_and_counted():
    model, x, y = problem(6)
    logged = Logged(model)
    found = im.Targeted(ATTACKS["fgsm"], "next")(logged, x, y, final="none")
    assert sum(len(part) for part in logged.log.inputs) == 12
    assert (found.gradient_calls + found.forward_calls).tolist() == [2] * 6


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: im.Square(THREAT), TypeError, "must be PGD, FGSM, CW or APGD, which can head for a label, got Square"),
        (lambda: im.FMN(THREAT), TypeError, "got FMN"),
        (lambda: im.AutoAttack(THREAT), TypeError, "got AutoAttack"),
        (lambda: im.GuidedPGD(THREAT), TypeError, "got GuidedPGD"),
        (lambda: im.APGD(THREAT, targets=3), ValueError, "needs targets=None, got its own choice, 3"),
        (lambda: im.PGD(THREAT, loss=KLDivergence()), ValueError, "reaches no label"),
    ],
)
def test_attacks_that_cannot_say_so_at_once(build, error, message):
    with pytest.raises(error, match=message):
        im.Targeted(build())


@pytest.mark.usefixtures("untyped")
def test_rules_that_are_none():
    with pytest.raises(ValueError, match="unknown targets 'nxt'; did you mean 'next'"):
        im.Targeted(ATTACKS["pgd"], "nxt")
    model, x, y = problem()
    for rule, message in {
        (lambda logits, label: label): "targets must differ from the true labels, got 40 that do not",
        (lambda logits, label: label + 9): "targets must be in 0…3",
        (lambda logits, label: label[:3]): r"targets must have shape \(40,\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            im.Targeted(ATTACKS["pgd"], rule)(model, x, y)
    with pytest.raises(ValueError, match="y must be in 0…3"):
        im.Targeted(ATTACKS["pgd"])(model, x, y + 4)


def test_names_and_values():
    aimed = aim_attacks(parse_attacks("fgsm,pgd-20,cw-30", THREAT), "next")
    assert list(aimed) == ["fgsm to next", "pgd-20 to next", "cw-30 to next"]
    assert [display_name(name) for name in aimed] == ["FGSM to next", "PGD-20 to next", "C&W∞ to next"]
    with pytest.raises(ValueError, match="square-9 takes no targets: attack of Targeted must be PGD"):
        aim_attacks(parse_attacks("fgsm,square-9", THREAT), "next")
    one = im.Targeted(ATTACKS["pgd"], "next")
    assert one == im.Targeted(replace(ATTACKS["pgd"]), "next") != im.Targeted(ATTACKS["pgd"], "random")
    assert describe(one)["targets"] == "next"
    assert describe(one)["attack"]["name"] == "PGD"
    assert one.cost > ATTACKS["pgd"].cost
