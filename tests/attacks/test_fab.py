"""FAB: the shortest way to a hyperplane within a box, and the radius at which it crosses."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch

from innermax.attacks.fab import FAB, shortest_way
from innermax.threat import Linf
from tests.helpers.attacks import NORMS, Linear, logits_of
from tests.helpers.data import images
from tests.helpers.networks import Logged, mlp

# The shortest way to a hyperplane within a box


def programmed(norm, slope, amount, down, up):
    """The same by linear programming, or for L2 by bisection of the multiplier."""
    d = len(slope)
    if norm == "l2":
        low, high = 0.0, 1e6
        for _ in range(200):
            s = (low + high) / 2
            low, high = (s, high) if slope @ np.clip(s * amount * slope, down, up) / amount < 1 else (low, s)
        return np.linalg.norm(np.clip(low * amount * slope, down, up))
    # d = p − n; L1 minimises Σ p + n, L∞ a common upper bound t.
    box = list(zip(np.zeros(d), np.maximum(up, 0), strict=True)) + list(
        zip(np.zeros(d), np.maximum(-down, 0), strict=True)
    )
    equality = np.concatenate([slope, -slope])[None]
    if norm == "l1":
        return scipy.optimize.linprog(np.ones(2 * d), A_eq=equality, b_eq=[amount], bounds=box).fun
    cap = np.hstack([np.eye(2 * d), -np.ones((2 * d, 1))])
    cost, equality = np.eye(1, 2 * d + 1, 2 * d)[0], np.hstack([equality, [[0.0]]])
    bounds = [*box, (0, None)]
    return scipy.optimize.linprog(cost, A_ub=cap, b_ub=np.zeros(2 * d), A_eq=equality, b_eq=[amount], bounds=bounds).fun


@pytest.mark.parametrize("norm", NORMS)
def test_the_shortest_way_within_a_box(norm):
    threat, generator = NORMS[norm][0](1.0), np.random.default_rng(0)
    for trial in range(20):
        slope, x = generator.normal(size=8), generator.uniform(size=8)
        x[:3] = generator.integers(0, 2, size=3)
        slope[trial % 8] *= trial % 2
        furthest = np.where(slope > 0, 1 - x, -x) @ slope
        amount = generator.uniform(0.05, 0.98) * furthest
        if trial % 3 == 0:
            slope, amount = -slope, -amount
        arguments = [torch.tensor(value)[None] for value in (slope, [amount], -x, 1 - x)]
        way = shortest_way(threat, *arguments)[0].numpy()
        assert (way >= -x).all()
        assert (way <= 1 - x).all()
        assert slope @ way == pytest.approx(amount, rel=1e-9)
        length = float(threat.norm(torch.tensor(way)[None]))
        assert length == pytest.approx(programmed(norm, slope, amount, -x, 1 - x), rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("norm", NORMS)
def test_the_shortest_way_without_a_box(norm, scale):
    slope, amount = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, -2.0]]), torch.tensor([[-5.0], [1.0]])
    unbounded = torch.full_like(slope, math.inf)
    way = shortest_way(NORMS[norm][0](1.0), slope * scale, amount * scale, -unbounded, unbounded)
    expected = {
        "linf": [[-5 / 7, 5 / 7, 0], [0, 0, -0.5]],
        "l2": [[-3 / 5, 4 / 5, 0], [0, 0, -0.5]],
        "l1": [[0, 5 / 4, 0], [0, 0, -0.5]],
    }[norm]
    torch.testing.assert_close(way, torch.tensor(expected))


@pytest.mark.parametrize("norm", NORMS)
def test_a_plane_out_of_reach_and_no_slope(norm):
    slope = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    low, high = torch.tensor([[-0.1, -0.2, -0.3]] * 2), torch.tensor([[0.9, 0.8, 0.7]] * 2)
    way = shortest_way(NORMS[norm][0](1.0), slope, torch.tensor([[100.0], [1.0]]), low, high)
    torch.testing.assert_close(way, torch.tensor([[0.9, -0.2, 0.0], [0.0, 0.0, 0.0]]))
    # Farther than a number can say, on either side.
    for amount, corner in ((1e10, [0.9, -0.2, 0.0]), (-1e10, [-0.1, 0.8, 0.0])):
        way = shortest_way(NORMS[norm][0](1.0), slope[:1] * 1e-30, torch.tensor([[amount]]), low[:1], high[:1])
        torch.testing.assert_close(way, torch.tensor([corner]))


# Linear models


def first_crossing(problem, norm, row):
    """The smallest ε at which an example of a linear model falls, by bisection."""
    low, high, sign = 0.0, 100.0, -1.0 if problem.y[row] == 0 else 1.0
    for _ in range(30):
        eps = (low + high) / 2
        moved = sign * np.array(problem.optimum(norm, eps, np.full(len(problem.y), sign)))
        low, high = (low, eps) if problem.loss("margin", moved)[row] > 0 else (eps, high)
    return high


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
@pytest.mark.parametrize("norm", NORMS)
def test_fab_crosses_a_hyperplane_at_the_smallest_radius(norm, bounds):
    problem = Linear(6, (1, 4, 4), bounds, seed=3)
    x, y = problem.inputs
    correct = (problem.loss("margin", 0) < 0).nonzero()[0][:2]
    assert len(correct) == 2
    for row in correct:
        radius = first_crossing(problem, norm, row)
        for eps, falls in ((radius * 1.02, True), (radius * 0.99, False)):
            threat = NORMS[norm][0](eps, bounds=bounds)
            result = FAB(threat, steps=20)(problem.model, x[row : row + 1], y[row : row + 1])
            assert result.misclassified.item() == falls
            assert threat.contains(result.x_adv, x[row : row + 1]).all()
        # With room to overshoot, the first step is enough.
        threat = NORMS[norm][0](radius * 1.1, bounds=bounds)
        first = FAB(threat, steps=20)(problem.model, x[row : row + 1], y[row : row + 1])
        assert (first.steps.item(), first.misclassified.item()) == (1, True)
        assert threat.norm((first.x_adv - x[row : row + 1]).flatten(1)).item() < radius * 1.06
        # The survivor comes as near to the boundary as X(x) allows.
        sign = -1.0 if problem.y[row] == 0 else 1.0
        best = sign * np.array(problem.optimum(norm, eps, np.full(6, sign)))[row]
        assert sign * problem.moved(result.x_adv.expand(6, -1, -1, -1))[row] > 0.97 * sign * best


def test_fab_starts_again_within_half_the_ball():
    x, y = images(4, dtype=torch.float64)
    model = Logged(mlp(inputs=50))
    y = logits_of(model.model, x).argmax(1)
    FAB(Linf(1e-3), steps=1, targets=1, restarts=2)(model, x, y)
    away = [float((point - x).abs().max()) for point in model.log.inputs if len(point) == len(x)]
    started = [length for length in away if 0 < length < 0.9e-3]  # others are x itself, or at the ball's edge
    assert started
    assert all(0.4e-3 < length <= 0.5e-3 + 1e-9 for length in started)
