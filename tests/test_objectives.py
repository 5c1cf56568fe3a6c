"""Objectives: hand-written formulas, and gradients worked out on paper."""

import re

import pytest
import torch
from torch import nn

from innermax.cli import main
from innermax.objectives import OBJECTIVES, cross_entropy, find_objective, loss_weighted


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


@pytest.mark.parametrize("name", OBJECTIVES)
def test_low_precision_logits_are_weighed_in_float32(problem, name):
    model, x, y, x_adv = problem
    loss, logits = OBJECTIVES[name](model.bfloat16(), x.bfloat16(), y, x_adv.bfloat16(), 1)
    assert (loss.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    _, losses, _ = worked_out(model.float(), x_adv, y)
    expected = losses.mean() if name == "cross_entropy" else losses.square().mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=0.05, atol=0.02)


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
