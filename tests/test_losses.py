"""The losses attacks maximise, against formulas written out one example at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from innermax.losses import (
    LOSSES,
    CappedMargin,
    cross_entropy,
    difference,
    dlr,
    find_loss,
    likeliest_others,
    make_reaching,
    margin,
    targeted_dlr,
)


@st.composite
def answers(draw, min_classes=2):
    """(logits, label): float64 logits of a few examples, distinct within each row."""
    batch, classes = draw(st.integers(1, 5)), draw(st.integers(min_classes, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = 10 ** draw(st.floats(-2, 2))
    logits = scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (batch,), generator=generator)


def naive_cross_entropy(z, y):
    top = max(z)
    return math.log(sum(math.exp(value - top) for value in z)) + top - z[y]


def naive_margin(z, y):
    return max(value for c, value in enumerate(z) if c != y) - z[y]


def naive_dlr(z, y):
    ordered = sorted(z, reverse=True)
    return naive_margin(z, y) / (ordered[0] - ordered[2])


def naive(formula, logits, label):
    return torch.tensor([formula(z, y) for z, y in zip(logits.tolist(), label.tolist(), strict=True)]).double()


@given(answers(min_classes=3))
@pytest.mark.parametrize(
    ("loss", "formula"), [(cross_entropy, naive_cross_entropy), (margin, naive_margin), (dlr, naive_dlr)]
)
def test_formulas(loss, formula, answer):
    logits, label = answer
    torch.testing.assert_close(loss(logits, label), naive(formula, logits, label), rtol=1e-5, atol=1e-6)


@given(answers(), st.sampled_from([0.0, 0.5, 20.0]))
def test_capped_margin(answer, confidence):
    logits, label = answer
    loss = CappedMargin(confidence)
    expected = naive(naive_margin, logits, label)
    torch.testing.assert_close(loss(logits, label), expected.clamp(max=confidence), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.reach(logits, label), (-expected).clamp(max=confidence), rtol=1e-5, atol=1e-6)


@given(answers())
def test_the_margin_is_positive_exactly_where_the_label_is_not_predicted(answer):
    logits, label = answer
    assert torch.equal(margin(logits, label) > 0, logits.argmax(1) != label)
    assert torch.equal(make_reaching(margin)(logits, label) > 0, logits.argmax(1) == label)


@given(answers(min_classes=3), st.floats(0.01, 100), st.floats(-100, 100))
def test_dlr_ignores_scale_and_shift(answer, scale, shift):
    logits, label = answer
    torch.testing.assert_close(dlr(scale * logits + shift, label), dlr(logits, label), rtol=1e-6, atol=1e-6)


@given(answers(min_classes=3))
def test_dlr_lies_within_its_range(answer):
    logits, label = answer
    value = dlr(logits, label)
    assert (value[logits.argmax(1) == label] >= -1).all()
    assert (value[logits.argmax(1) != label] > 0).all()


def test_dlr_of_three_equal_logits_is_finite():
    assert torch.isfinite(dlr(torch.zeros(2, 4), torch.tensor([0, 3]))).all()


def test_dlr_needs_three_classes():
    with pytest.raises(ValueError, match=r"'dlr' needs at least 3 classes, the model has 2"):
        dlr(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("loss", [*LOSSES.values(), CappedMargin(1.0)])
def test_an_examples_loss_is_its_own(loss):
    torch.manual_seed(0)
    logits, label = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    values = loss(logits, label)
    for row in range(6):
        torch.testing.assert_close(values[row], loss(logits[row : row + 1], label[row : row + 1])[0])
        (gradient,) = torch.autograd.grad(values[row], logits, retain_graph=True)
        assert gradient[torch.arange(6) != row].abs().sum() == 0


@pytest.mark.parametrize("loss", LOSSES.values())
def test_gradients(loss):
    torch.manual_seed(0)
    logits, label = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 3, 0])
    assert torch.autograd.gradcheck(lambda z: loss(z, label), (logits,))


def test_cross_entropy_of_large_logits_is_finite():
    value = cross_entropy(torch.tensor([[1e4, -1e4]]), torch.tensor([1]))
    torch.testing.assert_close(value, torch.tensor([2e4]))


def test_a_capped_margin_has_no_gradient_beyond_its_cap():
    logits = torch.tensor([[0.0, 1.0, -1.0], [0.0, 4.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(CappedMargin(2.0)(logits, torch.tensor([0, 0])).sum(), logits)
    assert gradient.tolist() == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_reaching_a_label_negates_the_loss_or_takes_its_own_way():
    logits, label = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([0])
    assert make_reaching(cross_entropy)(logits, label) == -cross_entropy(logits, label)
    assert make_reaching(margin)(logits, label) == -3
    # The negative of the capped loss would be −min(3, 1), constant until the label is nearly reached.
    assert make_reaching(CappedMargin(1.0))(logits, label) == -3
    assert make_reaching(CappedMargin(1.0))(logits, torch.tensor([2])) == 1


def test_losses_by_name():
    assert find_loss("margin") is margin
    own = lambda logits, label: logits[:, 0]  # noqa: E731
    assert find_loss(own) is own
    with pytest.raises(ValueError, match=r"unknown loss 'cross-entropy'; did you mean 'cross_entropy'\?"):
        find_loss("cross-entropy")


# Losses


def test_targeted_dlr_by_direct_arithmetic():
    logits = torch.tensor([[3.0, 1.0, -2.0, 0.5, 2.0], [-1.0, 4.0, 4.0, 0.0, 1.0]])
    label, target = torch.tensor([0, 2]), torch.tensor([3, 1])
    expected = [(0.5 - 3.0) / (3.0 - (1.0 + 0.5) / 2), 0.0]
    np.testing.assert_allclose(targeted_dlr(logits, label, target).numpy(), expected, rtol=1e-6)
    # Neither a shift nor a scale of the logits counts.
    moved = targeted_dlr(7 * logits.double() - 3, label, target)
    np.testing.assert_allclose(moved.numpy(), expected, rtol=1e-6)
    assert difference(logits, label, target).tolist() == [-2.5, 0.0]


def test_targeted_dlr_needs_four_classes():
    with pytest.raises(ValueError, match=r"targeted loss 'dlr' needs at least 4 classes, the model has 3"):
        targeted_dlr(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([1]))


def test_the_likeliest_others():
    logits = torch.tensor([[3.0, 1.0, -2.0, 0.5], [0.0, 4.0, 1.0, 3.0]])
    assert likeliest_others(logits, torch.tensor([0, 3]), 3).tolist() == [[1, 3, 2], [1, 2, 0]]
    assert likeliest_others(logits, torch.tensor([1, 1])).tolist() == [[0], [3]]
