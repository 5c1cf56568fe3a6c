"""Objectives: hand-written formulas, and gradients worked out on paper."""

import math
import re

import pytest
import torch
from torch import nn

from innermax.cli import main
from innermax.losses import KLDivergence
from innermax.objectives import (
    AWP,
    MART,
    OBJECTIVES,
    TRADES,
    CrossEntropy,
    GradAlign,
    LossWeighted,
    _misalignment,
    build_objective,
    cross_entropy,
    find_objective,
    loss_weighted,
    search_loss,
    weight_perturbation,
)
from innermax.threat import Linf


@pytest.fixture
def problem():
    """A linear network of three classes, clean and attacked inputs, and labels."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(5, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x, x_adv = torch.rand(2, 7, 5, generator=generator)
    return model, x, torch.randint(0, 3, (7,), generator=generator), x_adv


def worked_out(model, inputs, y):
    """Each example's cross-entropy, and its gradient in the logits: softmax − one-hot."""
    with torch.no_grad():
        logits = inputs @ model.weight.T + model.bias
        softmax = logits.exp() / logits.exp().sum(1, keepdim=True)
        losses = -softmax[torch.arange(len(y)), y].log()
        return logits, losses, softmax - torch.eye(3)[y]


def check(model, found, logits, loss, per_logit, inputs):
    """per_logit: (B, classes) gradient of the mean in each logit."""
    value, given = found
    torch.testing.assert_close(given.detach(), logits)
    assert value.shape == ()
    torch.testing.assert_close(value.detach(), loss)
    value.backward()
    torch.testing.assert_close(model.weight.grad, per_logit.T @ inputs / len(inputs))
    torch.testing.assert_close(model.bias.grad, per_logit.mean(0))


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_cross_entropy(problem, epoch):
    model, x, y, x_adv = problem
    logits, losses, slope = worked_out(model, x_adv, y)
    check(model, cross_entropy(model, x, y, x_adv, epoch), logits, losses.mean(), slope, x_adv)


@pytest.mark.parametrize("epoch", [1, 2, 7])
def test_weights_get_no_gradient(problem, epoch):
    model, x, y, x_adv = problem
    logits, losses, slope = worked_out(model, x_adv, y)
    found = loss_weighted(model, x, y, x_adv, epoch)
    check(model, found, logits, losses.square().mean(), losses[:, None] * slope, x_adv)


def test_the_first_epoch_is_unweighted(problem):
    model, x, y, x_adv = problem
    logits, losses, slope = worked_out(model, x_adv, y)
    check(model, loss_weighted(model, x, y, x_adv, 0), logits, losses.mean(), slope, x_adv)


@pytest.mark.parametrize("name", ["cross_entropy", "loss_weighted"])
def test_low_precision_logits_are_weighed_in_float32(problem, name):
    model, x, y, x_adv = problem
    loss, logits = OBJECTIVES[name](model.bfloat16(), x.bfloat16(), y, x_adv.bfloat16(), 1)
    assert (loss.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    _, losses, _ = worked_out(model.float(), x_adv, y)
    expected = losses.mean() if name == "cross_entropy" else losses.square().mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=0.05, atol=0.02)


def by_hand(model, x, y, x_adv, formula):
    """The mean of a formula of (label, clean probabilities, attacked probabilities), an example at a time."""
    with torch.no_grad():
        clean, attacked = ((inputs @ model.weight.T + model.bias).double() for inputs in (x, x_adv))
    both = zip(y.tolist(), clean.softmax(1).tolist(), attacked.softmax(1).tolist(), strict=True)
    return sum(formula(*one) for one in both) / len(y)


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def smoothed(p, label, alpha):
    return -sum(((1 - alpha) * (k == label) + alpha / len(p)) * math.log(value) for k, value in enumerate(p))


def margin_term(label, q):
    return -math.log(1 - max(value for k, value in enumerate(q) if k != label))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("beta", [0.0, 0.5, 6.0])
def test_trades_by_hand(problem, beta, alpha):
    model, x, y, x_adv = problem
    value, logits = TRADES(beta, label_smoothing=alpha)(model, x, y, x_adv, 0)
    expected = by_hand(model, x, y, x_adv, lambda k, p, q: smoothed(p, k, alpha) + beta * divergence(p, q))
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(logits, model(x_adv))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("beta", [0.0, 0.5, 6.0])
def test_mart_by_hand(problem, beta, alpha):
    model, x, y, x_adv = problem
    value, logits = MART(beta, label_smoothing=alpha)(model, x, y, x_adv, 0)

    def formula(k, p, q):
        return smoothed(q, k, alpha) + margin_term(k, q) + beta * divergence(p, q) * (1 - p[k])

    assert float(value.detach()) == pytest.approx(by_hand(model, x, y, x_adv, formula), rel=1e-5)
    torch.testing.assert_close(logits, model(x_adv))


@pytest.mark.parametrize("epoch", [0, 1])
def test_label_smoothing_by_hand(problem, epoch):
    model, x, y, x_adv = problem
    value, _ = CrossEntropy(label_smoothing=0.3)(model, x, y, x_adv, epoch)
    assert float(value.detach()) == pytest.approx(
        by_hand(model, x, y, x_adv, lambda k, _, q: smoothed(q, k, 0.3)), rel=1e-5
    )
    value, _ = LossWeighted(label_smoothing=0.3)(model, x, y, x_adv, epoch)
    expected = by_hand(model, x, y, x_adv, lambda k, _, q: smoothed(q, k, 0.3) ** (1 + epoch))
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("one", "other", "value"),
    [
        ([[1.0, 0.0], [3.0, 4.0]], [[2.0, 0.0], [4.0, -3.0]], 0.5),  # the same way, and a right angle
        ([[1.0, 0.0], [0.0, 0.0]], [[-1.0, 0.0], [1.0, 0.0]], 2.0),  # the second is left out
        ([[0.0, 0.0]], [[1.0, 0.0]], 0.0),
    ],
)
def test_misalignment_by_hand(one, other, value):
    far = torch.tensor(other, requires_grad=True)
    found = _misalignment(torch.tensor(one), far)
    assert float(found.detach()) == pytest.approx(value)
    found.backward()
    assert torch.isfinite(far.grad).all()


def test_grad_align_adds_to_its_objective(problem):
    model, x, y, x_adv = problem
    flat = Linf(0.1, bounds=None)
    plain, logits = CrossEntropy()(model, x, y, x_adv, 0)
    value, told = GradAlign(beta=0.0, threat=flat)(model, x, y, x_adv, 0)
    torch.testing.assert_close((value, told), (plain, logits))
    once, thrice = (GradAlign("mart", beta, flat) for beta in (1.0, 3.0))
    torch.manual_seed(0)
    added = (once(model, x, y, x_adv, 0)[0] - MART()(model, x, y, x_adv, 0)[0]).detach()
    torch.manual_seed(0)
    assert float((thrice(model, x, y, x_adv, 0)[0] - MART()(model, x, y, x_adv, 0)[0]).detach()) == pytest.approx(
        3 * float(added), rel=1e-4
    )
    assert float(added) > 0
    with pytest.raises(ValueError, match=r"threat of GradAlign must be given outside of im.train"):
        GradAlign()(model, x, y, x_adv, 0)


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_sure_answers_have_finite_values_and_gradients(problem, name):
    """Where float32 has no number between a probability and 1."""
    model, x, y, x_adv = problem
    with torch.no_grad():
        model.weight.mul_(1000)
    value, _ = OBJECTIVES[name](model, x, y, x_adv, 1)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(model.weight.grad).all()
    assert (model.weight.grad != 0).any()


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_answers_in_low_precision_are_compared_in_float32(problem, name):
    model, x, y, x_adv = problem
    loss, logits = OBJECTIVES[name](model.bfloat16(), x.bfloat16(), y, x_adv.bfloat16(), 1)
    assert (loss.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    exact, _ = OBJECTIVES[name](model.float(), x, y, x_adv, 1)
    torch.testing.assert_close(loss, exact, rtol=0.1, atol=0.02)


def test_the_objective_says_what_attacks_maximise():
    assert search_loss(find_objective("trades")) == search_loss(AWP(TRADES(3))) == KLDivergence()
    for other in ("cross_entropy", "loss_weighted", "mart"):
        assert search_loss(find_objective(other)) is search_loss(AWP(other)) is None


def test_weights_are_perturbed_once(problem):
    model, x, y, x_adv = problem
    assert weight_perturbation(AWP("trades", 0.01)) == 0.01
    assert weight_perturbation(find_objective("trades")) is None
    for inner in ("mart", TRADES(2), loss_weighted):
        value, expected = AWP(inner)(model, x, y, x_adv, 1)[0], find_objective(inner)(model, x, y, x_adv, 1)[0]
        assert torch.equal(value, expected)
    with pytest.raises(ValueError, match="objective of AWP must not perturb weights itself"):
        AWP(AWP())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TRADES(-1.0), ValueError, "beta must be a finite number ≥ 0, got -1"),
        (lambda: MART(math.inf), ValueError, "beta must be a finite number ≥ 0, got inf"),
        (lambda: MART("6"), TypeError, "beta must be a finite number ≥ 0, got '6'"),
        (lambda: TRADES(label_smoothing=1.0), ValueError, "label_smoothing must be a number ≥ 0 and < 1, got 1"),
        (lambda: CrossEntropy(label_smoothing=-0.1), ValueError, "label_smoothing must be a number ≥ 0 and < 1"),
        (lambda: AWP(gamma=0.0), ValueError, "gamma must be a finite number > 0, got 0"),
        (lambda: GradAlign(beta=-1.0), ValueError, "beta must be a finite number ≥ 0, got -1"),
        (lambda: GradAlign(threat=0.1), TypeError, r"threat must be a threat model such as Linf\(8 / 255\) or None"),
        (
            lambda: GradAlign(AWP()),
            ValueError,
            "objective of GradAlign must not perturb weights, got .*: put it in AWP",
        ),
        (lambda: AWP("trade"), ValueError, "unknown objective 'trade'; did you mean 'trades'"),
        (lambda: build_objective("trads", 6.0), ValueError, "unknown objective 'trads'; did you mean 'trades'"),
        (
            lambda: build_objective("cross_entropy", 6.0),
            ValueError,
            "beta goes with objective trades, mart or grad_align, not with",
        ),
    ],
)
def test_values_out_of_range(untyped, make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_options_build_an_objective():
    assert build_objective("trades") == "trades"
    assert build_objective("trades", beta=3.0) == TRADES(3.0)
    assert build_objective("mart", 2.0, 0.1, 0.01) == AWP(MART(2.0, label_smoothing=0.1), 0.01)
    assert build_objective("cross_entropy", label_smoothing=0.1) == CrossEntropy(label_smoothing=0.1)
    assert build_objective("loss_weighted", label_smoothing=0.1) == LossWeighted(label_smoothing=0.1)
    assert build_objective("grad_align") == "grad_align"
    assert build_objective("grad_align", 0.3, 0.1, 0.01) == AWP(GradAlign(CrossEntropy(label_smoothing=0.1), 0.3), 0.01)
    assert build_objective("cross_entropy", awp=0.005) == AWP("cross_entropy", 0.005)


def test_finding_an_objective():
    assert find_objective("cross_entropy") is cross_entropy
    assert find_objective("loss_weighted") is loss_weighted

    def own(model, x, y, x_adv, epoch):
        return cross_entropy(model, x, y, x, epoch)

    assert find_objective(own) is own
    with pytest.raises(ValueError, match=r"unknown objective 'cross-entropy'; did you mean 'cross_entropy'\?"):
        find_objective("cross-entropy")


def test_an_objective_is_a_name_or_a_function(untyped):
    with pytest.raises(TypeError, match=r"objective must be a name or a function, got \['cross_entropy'\]"):
        find_objective(["cross_entropy"])


def test_the_command_line_offers_every_objective(capsys):
    assert main(["train", "digits", "--help"]) == 0
    choices = re.search(r"--objective \{([\w,]+)\}", capsys.readouterr().out)
    assert choices[1].split(",") == [*OBJECTIVES]
