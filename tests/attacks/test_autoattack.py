"""AutoAttack: what it is made of, who is asked, costs that add up, and the authors' code."""

import importlib.util
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

import innermax as im
from innermax.attacks.apgd import APGD
from innermax.attacks.autoattack import AutoAttack
from innermax.attacks.fab import FAB
from innermax.attacks.problem import Problem
from innermax.attacks.square import Square
from innermax.losses import dlr, margin
from innermax.threat import L1, L2, Linf
from innermax.utils import randomness
from tests.helpers.attacks import RADII, SMALL, crowd, logits_of
from tests.helpers.networks import Noisy


def test_what_autoattack_is_made_of():
    for threat in (Linf(0.1), L2(0.5)):
        assert AutoAttack(threat).attacks() == (
            APGD(threat, steps=100, restarts=1, loss="cross_entropy", targets=None, eot=1),
            APGD(threat, steps=100, restarts=1, loss="dlr", targets=9),
            FAB(threat, steps=100, restarts=1, targets=9),
            Square(threat, queries=5000, restarts=1, p_init=0.8),
        )
    threat = L1(12.0)
    assert AutoAttack(threat).attacks() == (
        APGD(threat, steps=100, restarts=5),
        APGD(threat, steps=100, restarts=1, loss="dlr", targets=5),
        FAB(threat, steps=100, restarts=1, targets=9),
        Square(threat, queries=5000),
    )
    assert AutoAttack(threat, version="rand").attacks() == (APGD(threat, eot=20), APGD(threat, loss="dlr", eot=20))


def test_autoattack_asks_survivors_only(short):
    model, x, y = crowd(20)
    x, y, threat = x[1:], y[1:], RADII["l2"]
    result = AutoAttack(threat)(model, x, y, seed=5, final="loss")
    alive, gradients, forwards = torch.ones(19, dtype=torch.bool), torch.zeros(19).long(), torch.ones(19).long()
    highest = margin(logits_of(model, x), y)
    fell_by = []
    for number, make in enumerate(SMALL.values()):
        rows = alive.nonzero()[:, 0]
        part = make(threat)(model, x[rows], y[rows], seed=randomness.derive_seed(5, number), index=rows, final="loss")
        gradients[rows] += part.gradient_calls
        forwards[rows] += part.forward_calls - 1
        fell_by.append(int(part.misclassified.sum()))
        fallen = rows[part.misclassified]
        torch.testing.assert_close(result.x_adv[fallen], part.x_adv[part.misclassified])
        highest[rows] = torch.maximum(highest[rows], margin(part.logits, y[rows]))
        alive[fallen] = False
    assert 0 < fell_by[0] < sum(fell_by) < 19
    assert torch.equal(result.misclassified, ~alive)
    assert torch.equal(result.gradient_calls, gradients)
    assert torch.equal(result.forward_calls, forwards)
    torch.testing.assert_close(result.loss, torch.where(alive, highest, result.loss))


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes, caplog):
    """DLR gives way to the margin, with a reason, and there are no more targets than classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    x = torch.rand(6, 1, 4, 4)
    y = logits_of(model, x).argmax(1)
    with caplog.at_level(logging.WARNING, "innermax"):
        result = AutoAttack(Linf(0.9))(model, x, y)
    assert result.misclassified.all()
    assert not caplog.records  # all fell to the first attack
    weak = Linf(1e-4)
    targeted = APGD(weak, steps=5, loss="dlr", targets=9)
    with caplog.at_level(logging.WARNING, "innermax"):
        result = targeted(model, x, y)
    assert f"'dlr' needs more than the model's {classes} classes" in caplog.text
    assert result.gradient_calls.tolist() == [6 * (classes - 1) + 1] * 6
    torch.testing.assert_close(result.loss, margin(logits_of(model, result.x_adv), y), rtol=1e-4, atol=1e-6)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "innermax"):
        result = APGD(weak, steps=5, loss="dlr")(model, x, y)
    assert bool(caplog.records) == (classes == 2)
    loss = margin if classes == 2 else dlr
    torch.testing.assert_close(result.loss, loss(logits_of(model, result.x_adv), y), rtol=1e-4, atol=1e-6)
    fab = FAB(weak, steps=2)(model, x, y)
    assert fab.gradient_calls.tolist() == [2 * (classes - 1) + 1] * 6


def test_autoattack_for_models_that_draw():
    model, x, y = crowd(4, torch.float32)
    result = AutoAttack(Linf(0.3), version="rand")(Noisy(model), x, y)
    assert result.misclassified.all()
    assert (result.forward_calls == 20).all()
    assert (result.gradient_calls % 20 == 0).all()
    assert Linf(0.3).contains(result.x_adv, x).all()


def test_autoattack_in_an_evaluation(short):
    model, x, y = crowd(5, torch.float32)
    attack = AutoAttack(RADII["linf"])
    evaluation = im.evaluate(model, (x, y), {"aa": attack}, batch_size=3)
    whole = attack(model, x, y)
    assert (evaluation.correct("aa") == ~whole.misclassified.numpy()).all()
    assert evaluation.convergence["aa"].gradients == pytest.approx(whole.gradient_calls.double().mean().item())
    assert evaluation.convergence["aa"].overturned == 0


@pytest.mark.parametrize("norm", RADII)
def test_no_example_falls_on_the_word_of_bf16(short, norm):
    """Logits so large that bf16 tells no class from the other: some clean images seem to have fallen in it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3))
    model[1].bias.data[:] = torch.tensor([100.0, 100.0, -200.0])
    x = 0.3 + 0.4 * torch.rand(16, 2, 5, 5)
    y = model(x).argmax(1)
    oracle = im.Oracle.fast(model, x, "bf16")
    assert oracle.lowered
    assert (oracle.logits(x).argmax(1) != y).sum() >= 3
    assert torch.equal(oracle.precise.logits(x), model(x).detach())
    for row in (oracle.logits(x).argmax(1) != y).nonzero():  # each of them by itself
        one = Problem.of(RADII[norm], oracle, x[row], y[row])
        assert not one.won(x[row], oracle.logits(x)[row]).any()
    for radius in (1e-3, 0.3):
        threat = replace(RADII[norm], eps=radius * {"linf": 1, "l2": 50**0.5, "l1": 50}[norm])
        fast = im.evaluate(model, (x, y), {"aa": AutoAttack(threat)}, precision="bf16")
        exact = im.evaluate(model, (x, y), {"aa": AutoAttack(threat)})
        assert (fast.correct("aa") == exact.correct("aa")).all()
    assert not exact.correct("aa").any()


def test_survivors_too_near_a_boundary_for_bf16_are_searched_again(short):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 2))
    slope = (model[1].weight[1] - model[1].weight[0]).detach()
    x = 0.3 + 0.4 * torch.rand(16, 2, 5, 5)
    wanted = torch.tensor([0.0004] * 8 + [0.2] * 8)
    lacking = wanted - (model(x)[:, 1] - model(x)[:, 0]).detach()
    x = x + (lacking[:, None] * slope / slope.square().sum()).reshape(x.shape)
    y = torch.ones(16, dtype=torch.int64)
    oracle = im.Oracle.fast(model, x, "bf16")
    assert 0.0004 < oracle.doubt < 0.1
    attack = AutoAttack(Linf(1e-5))
    fast, exact = (attack(one, x, y, final="loss") for one in (oracle, model))
    assert not exact.misclassified.any()
    assert (fast.gradient_calls[:8] > exact.gradient_calls[:8]).all()
    assert (fast.gradient_calls[8:] == exact.gradient_calls[8:]).all()


# Beside the authors' code


@pytest.fixture(scope="module")
def digits():
    """A robust digit classifier and forty test images."""
    data = im.load_data("digits")
    torch.manual_seed(0)
    model = im.build_model("digits-cnn", input_shape=data.train.shape)
    strategy = im.Standard(im.PGD(Linf(0.15), steps=5))
    im.train(model, data.train, strategy, epochs=8, batch_size=64, lr=0.05)
    return model.eval(), *data.test.batch(torch.arange(40))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    importlib.util.find_spec("pyautoattack") is None,
    reason="pyautoattack is not installed (pip install --no-deps pyautoattack==0.2.0): no comparison with it",
)
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.12), ("L2", 0.6), ("L1", 1.5)])
def test_robust_accuracy_is_that_of_the_authors_code(digits, monkeypatch, norm, eps):
    """Both with fewer queries; what two seeds of theirs disagree on may come out either way here."""
    import pyautoattack

    model, x, y = digits
    threat = {"Linf": Linf, "L2": L2, "L1": L1}[norm](eps)
    theirs = []
    for seed in (0, 1):
        reference = pyautoattack.AutoAttack(model, norm=norm, eps=eps, seed=seed)
        reference.square.n_queries = 300
        x_adv, _ = reference.run_standard_evaluation(x.clone(), y.clone())
        theirs.append(model(x_adv).argmax(1) == y)
    attacks = (*AutoAttack(threat).attacks()[:3], Square(threat, queries=300))
    monkeypatch.setattr(AutoAttack, "attacks", lambda self: attacks)
    ours = ~AutoAttack(threat)(model, x, y).misclassified
    clear = theirs[0] == theirs[1]
    assert 5 < theirs[0].sum() < 35
    assert clear.sum() >= 37
    assert (ours == theirs[0])[clear].sum() >= clear.sum() - 1
