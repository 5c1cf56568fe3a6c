"""APGD: the optimum of linear models, and the paper's algorithm written naively."""

import math

import numpy as np
import pytest
import torch

from innermax.attacks.apgd import APGD, _checkpoints, _direction
from innermax.losses import cross_entropy, margin
from innermax.threat import L1, Linf
from innermax.utils import randomness
from tests.helpers.attacks import NORMS, Linear, crowd, gradient_of, logits_of
from tests.helpers.data import images
from tests.helpers.networks import Logged, Noisy, convnet, mlp


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [{}, {"loss": "margin", "targets": 2}])
def test_apgd_finds_the_optimum_of_a_linear_model(options, norm, bounds):
    """Whoever can fall falls, and the others end at the exact maximum."""
    make, eps = NORMS[norm]
    eps = 0.8 if norm == "l1" and bounds is None else eps
    threat = make(eps, bounds=bounds)
    problem = Linear(17, (2, 3, 4), bounds)
    result = APGD(threat, steps=60, **options)(problem.model, *problem.inputs)
    sign = np.where(problem.y == 0, -1.0, 1.0)
    best = sign * problem.optimum(norm, eps, sign)
    falls = problem.loss("margin", best) > 0
    assert 0 < falls.sum() < 17
    assert (result.misclassified.numpy() == falls).all()
    margins = problem.loss("margin", problem.moved(result.x_adv))
    np.testing.assert_allclose(margins[~falls], problem.loss("margin", best)[~falls], rtol=1e-3, atol=1e-5)
    if "loss" not in options:
        expected = problem.loss("cross_entropy", problem.moved(result.x_adv))
        np.testing.assert_allclose(result.loss.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert (result.relative_fosc[~result.misclassified] < 1e-3).all()


# APGD, against the paper's algorithm on one example


def test_the_papers_checkpoints():
    assert list(_checkpoints(100, False)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(_checkpoints(100, False).values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert sum(_checkpoints(7, False).values()) <= 7
    assert _checkpoints(1, False) == {1: 1}
    assert _checkpoints(40, True) == dict.fromkeys(range(1, 41), 1)
    assert _checkpoints(60, True) == dict.fromkeys(range(2, 61, 2), 2)


def naive_apgd(model, x, y, start, steps, eps, norm):
    """One example: Algorithm 1 of Croce & Hein 2020 with the cross-entropy, for L∞ and L2 without bounds."""

    def f(v):
        return cross_entropy(logits_of(model, v[None]), y[None]).item()

    def project(v):
        u = v - x
        return x + (u.clamp(-eps, eps) if norm == "linf" else u * min(1.0, eps / u.norm().item()))

    def ascend(v, g, eta):
        return project(v + eta * (g.sign() if norm == "linf" else g / g.norm()))

    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    w = [math.ceil(q * steps - 1e-9) for q in p]
    eta, path, best, f_best = 2 * eps, [start], start, f(start)
    last_best, last_eta, previous, since = f_best, None, start, 0
    for k in range(1, steps + 1):
        v = path[-1]
        z = ascend(v, gradient_of(model, v[None], y[None])[0], eta)
        nxt = z if k == 1 else project(v + 0.75 * (z - v) + 0.25 * (v - previous))
        previous = v
        rose = f(nxt) > f(v)
        since += rose
        if f(nxt) > f_best:
            best, f_best = nxt, f(nxt)
        path.append(nxt)
        if k in w[1:]:
            j = w.index(k)
            few = since < 0.75 * (w[j] - w[j - 1])
            stuck = eta == last_eta and f_best == last_best
            last_eta, last_best, since = eta, f_best, 0
            if few or stuck:
                eta, path[-1] = eta / 2, best
    return best, f_best


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_is_the_papers_algorithm(norm):
    x, y = images(5, shape=(6,), dtype=torch.float64)
    model = mlp()
    y = logits_of(model, x).argmax(1)
    threat = NORMS[norm][0](0.15, bounds=None)
    result = APGD(threat, steps=50)(model, x, y, seed=4)
    survived = (~result.misclassified).nonzero()[:, 0].tolist()
    assert len(survived) >= 2
    start = threat.around(x).sample(randomness.hash_keys(4, torch.arange(5), 0, 0))
    for row in survived:
        best, value = naive_apgd(model, x[row], y[row], start[row], 50, 0.15, norm)
        assert result.loss[row].item() == pytest.approx(value, rel=1e-9)
        torch.testing.assert_close(result.x_adv[row], best, rtol=1e-7, atol=1e-9)


def test_in_l1_apgd_first_searches_larger_balls():
    x, y = images(4, shape=(12,), dtype=torch.float64)
    model = Logged(mlp(inputs=12))
    y = logits_of(model.model, x).argmax(1)
    eps = 0.05
    result = APGD(L1(eps), steps=20)(model, x, y)
    assert not result.misclassified.any()
    points = model.log.inputs[1:-1]
    assert len(points) == 7 + 7 + 9  # six, six and eight steps, and a gradient at each start
    radii = [
        torch.stack([(point - x).abs().sum(1) for point in part]).amax(0)
        for part in (points[:7], points[7:14], points[14:])
    ]
    for radius, factor in zip(radii, (3, 2, 1), strict=True):
        torch.testing.assert_close(radius, torch.full_like(radius, factor * eps), rtol=1e-6, atol=0)
    assert result.gradient_calls.tolist() == [7 + 7 + 9 + 1] * 4
    assert result.steps.tolist() == [
        12,
        12,
        12,
        0,
    ]  # at which the best points were found: x itself, or in the last ball
    # A ball of 3ε may be larger than the bounds.
    wide = APGD(L1(8.0), steps=20)(model, x, y)
    assert L1(8.0).contains(wide.x_adv, x).all()


def test_a_label_to_reach():
    problem = Linear(9, (1, 4, 4), None)
    x, y = problem.inputs
    result = APGD(Linf(0.8, bounds=None), steps=30)(problem.model, x, y, target=2 - y)
    assert torch.equal(logits_of(problem.model, result.x_adv).argmax(1), 2 - y)
    nowhere = APGD(Linf(1e-4, bounds=None), steps=5)(problem.model, x, y, target=torch.ones_like(y))
    assert not (logits_of(problem.model, nowhere.x_adv).argmax(1) == 1).all()
    assert torch.equal(nowhere.misclassified, logits_of(problem.model, nowhere.x_adv).argmax(1) != y)


def test_a_loss_without_a_hash():
    """Such as a value that can be changed; with targets and without."""
    loss = type("Loss", (), {"__hash__": None, "__call__": lambda self, *given: margin(*given)})()
    x, y = images(4)
    for options in ({}, {"targets": 2}):
        attacks = (APGD(Linf(0.1), steps=5, loss=one, **options) for one in (loss, lambda *given: margin(*given)))
        one, other = (attack(convnet(), x, y) for attack in attacks)
        assert torch.equal(one.x_adv, other.x_adv)


@pytest.mark.parametrize("norm", NORMS)
def test_apgd_stands_still_where_the_gradient_is_zero(norm):
    around = NORMS[norm][0](0.5).around(torch.full((2, 6), 0.5))
    gradient = torch.stack([torch.zeros(6), torch.arange(6) - 2.0])
    direction = _direction(around, gradient, torch.tensor([3, 3]))
    assert (direction[0] == 0).all()
    assert float(around.threat.norm(direction[1:])) == pytest.approx(1)


def test_expectation_over_transformation():
    exact, x, y = crowd(5, torch.float32)
    attack, model = APGD(Linf(0.001), steps=3, eot=7), Logged(Noisy(exact))
    state = torch.get_rng_state()
    result = attack(model, x, y, seed=1)
    survivors = ~result.misclassified
    assert survivors.any()
    assert (result.gradient_calls[survivors] == 7 * 5).all()
    assert (result.forward_calls == 7).all()
    assert model.log.gradients == int(result.gradient_calls.sum())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(attack(model, x, y, seed=1).x_adv, result.x_adv)
    assert not torch.equal(attack(model, x, y, seed=2).x_adv, result.x_adv)
    # Without noise all answers are one.
    one, many = (APGD(Linf(0.01), steps=3, eot=eot)(exact, x, y) for eot in (1, 4))
    torch.testing.assert_close(one.x_adv, many.x_adv)
    torch.testing.assert_close(one.loss, many.loss)


def test_a_label_to_reach_and_targets():
    x, y = images()
    with pytest.raises(ValueError, match=r"target needs targets=None: targets=2 chooses"):
        APGD(Linf(0.1), targets=2)(convnet(), x, y, target=y)
    with pytest.raises(ValueError, match=r"target must be in 0…2, got values from 1 to 3"):
        APGD(Linf(0.1))(convnet(), x, y, target=y + 1)
