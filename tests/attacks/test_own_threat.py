"""Attacks on a threat model of a user's own, whose methods are all that they know of it."""

import pickle

import pytest
import torch
from torch import nn

import innermax as im
from innermax.threat import NORMS, Threat
from innermax.utils import randomness
from tests.helpers.attacks import FOR_ANY_THREAT, Linear, crowd, logits_of
from tests.helpers.threats import ScaledL2, WeightedLinf


class Borrowed(Threat):
    """A norm of the library under another name: nothing knows that it is one."""


def borrow(norm):
    methods = {name: value for name, value in vars(norm).items() if not name.startswith("__") and name != "symbol"}
    return type(f"Own{norm.__name__}", (Borrowed,), methods)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
@pytest.mark.parametrize("threat", [WeightedLinf(0.15), ScaledL2(0.5)])
@pytest.mark.parametrize("name", FOR_ANY_THREAT)
def test_the_optimum_of_a_linear_model_is_found(name, threat, bounds):
    """FOSC is then how much higher the loss can be: none is left, and whoever can fall falls."""
    threat = type(threat)(threat.eps, bounds)
    problem = Linear(17, (2, 3, 4), bounds)
    x, y = problem.inputs
    slope = torch.tensor(problem.w, dtype=torch.float32) * torch.where(y == 0, -1.0, 1.0)[:, None]
    best = threat.maximizer(slope.reshape(x.shape), x)
    falls = logits_of(problem.model, best).argmax(1) != y
    assert 0 < falls.sum() < 17
    result = FOR_ANY_THREAT[name](threat)(problem.model, x, y)
    assert threat.contains(result.x_adv, x).all()
    assert torch.equal(result.misclassified, falls)
    assert (result.relative_fosc[~falls] < 2e-2).all()
    moved, most = (torch.tensor(problem.moved(point)).abs() for point in (result.x_adv, best))
    assert (moved[~falls] > (0.96 if name == "guided" else 0.99) * most[~falls]).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", FOR_ANY_THREAT)
def test_a_norm_is_known_by_its_methods_alone(name, norm):
    """The same set under another name is searched in the same way, up to rounding."""
    known = {"linf": im.Linf(0.03), "l2": im.L2(0.15)}[norm]
    model, x, y = crowd()
    one, other = (
        FOR_ANY_THREAT[name](threat)(model, x, y, seed=3) for threat in (known, borrow(NORMS[norm])(known.eps))
    )
    assert one.misclassified.sum() > 1
    assert torch.equal(one.misclassified, other.misclassified)
    torch.testing.assert_close(one.x_adv, other.x_adv, rtol=1e-6, atol=1e-6)
    assert torch.equal(one.gradient_calls, other.gradient_calls)


def test_weights_are_another_unit_of_length():
    """max w_i |u_i| ≤ ε around x is L∞ around w ∘ x, whose bounds are scaled, too."""
    model, x, y = crowd(dtype=torch.float64)
    threat = WeightedLinf(0.05, weights=tuple(1 + 0.1 * number for number in range(50)))
    weights = threat.per_coordinate(x.flatten(1)).reshape(x.shape[1:])
    scaled = im.Linf(0.05, bounds=(torch.zeros_like(weights), weights))

    class Unscaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.weights = model, nn.Buffer(weights)

        def forward(self, x):
            return self.model(x / self.weights)

    for name, make in FOR_ANY_THREAT.items():
        one = make(threat)(model, x, y, seed=3)
        other = make(scaled)(Unscaled(), x * weights, y, seed=3)
        assert 0 < one.misclassified.sum() < 10, name
        torch.testing.assert_close(one.x_adv * weights, other.x_adv, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [im.FAB, im.Square, im.AutoAttack, lambda threat: im.AutoAttack(threat, "rand")])
def test_who_needs_a_norms_own_geometry_says_so(make):
    with pytest.raises(
        TypeError, match=r"^threat of \w+ must be Linf or L2 or L1, .* got WeightedLinf\(.*PGD"
    ) as error:
        make(WeightedLinf(0.1))
    assert "\n" not in str(error.value)


def test_a_subclass_of_a_known_norm_keeps_its_own_steps():
    """APGD's formula for L∞ is not that of a class that moves otherwise."""

    class Halted(im.Linf):
        def _ascend(self, u, gradient, step_size, floor, ceiling):
            return u

    model, x, y = crowd()
    threat = Halted(0.03)
    start = threat.around(x).sample(randomness.hash_keys(1, torch.arange(len(x)), 0, 0))
    result = im.APGD(threat, steps=5)(model, x, y, seed=1)
    searched = logits_of(model, x).argmax(1) == y
    assert searched.any()
    at_start, at_x = ((result.x_adv == point).flatten(1).all(1) for point in (start, x))
    assert (at_start | at_x)[searched].all()


def test_threats_and_their_attacks_pickle():
    attack = im.GuidedPGD(WeightedLinf(0.1))
    assert pickle.loads(pickle.dumps(attack)) == attack
