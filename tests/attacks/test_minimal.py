"""FMN and DDN: the smallest perturbation, on linear models whose smallest one is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import innermax as im
from innermax.oracle.oracle import Oracle
from tests.helpers.attacks import NORMS, RADII, crowd, logits_of
from tests.helpers.networks import Logged

ATTACKS = [(im.FMN, "linf"), (im.FMN, "l2"), (im.FMN, "l1"), (im.DDN, "l2")]
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
CLOSE = {"linf": 1.003, "l2": 1.003, "l1": 1.01}
EPS = {"linf": 0.1, "l2": 0.3, "l1": 0.8}
BOUNDS = [None, (0.0, 1.0)]


class Plane:
    """A linear model of `classes` classes, inputs in [0, 1], and its own answers as labels."""

    def __init__(self, seed, features=12, classes=4, count=5):
        self.generator = np.random.default_rng(seed)
        self.weight = self.generator.normal(size=(classes, features))
        self.x = self.generator.uniform(size=(count, features))
        self.x[:, ::4] = self.generator.integers(0, 2, size=self.x[:, ::4].shape)
        bias = -self.weight @ np.full(features, 0.5)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(features, classes).double())
        self.model[1].weight.data, self.model[1].bias.data = torch.tensor(self.weight), torch.tensor(bias)
        self.logits = self.x @ self.weight.T + bias
        self.y = self.logits.argmax(1)
        self.inputs = torch.tensor(self.x), torch.tensor(self.y)

    def smallest(self, norm, bounds):
        """The norm of each example's smallest perturbation onto the boundary."""
        others = [[other for other in range(len(self.weight)) if other != y] for y in self.y]
        return np.array(
            [min(self.to_class(norm, bounds, row, other) for other in others[row]) for row in range(len(self.y))]
        )

    def to_class(self, norm, bounds, row, other):
        slope = self.weight[other] - self.weight[self.y[row]]
        lacking = self.logits[row, self.y[row]] - self.logits[row, other]
        if bounds is None:
            return lacking / np.linalg.norm(slope, DUAL[norm])
        return smallest_within(norm, slope, lacking, bounds[0] - self.x[row], bounds[1] - self.x[row])


def smallest_within(norm, slope, lacking, down, up):
    """The smallest norm of a d in [down, up] with slope·d ≥ lacking, infinite where there is none.

    By linear programming; for L2 by bisection of the multiplier.
    """
    d = len(slope)
    if np.maximum(slope * up, slope * down).sum() < lacking:
        return math.inf
    if norm == "l2":
        low, high = 0.0, 1e8
        for _ in range(200):
            s = (low + high) / 2
            low, high = (s, high) if slope @ np.clip(s * slope, down, up) < lacking else (low, s)
        return np.linalg.norm(np.clip(high * slope, down, up))
    # d = p − n with p, n ≥ 0: L1 minimises Σ p + n, L∞ the largest of p + n.
    box = [*zip(np.zeros(d), up, strict=True), *zip(np.zeros(d), -down, strict=True)]
    reach = -np.concatenate([slope, -slope])[None]
    if norm == "l1":
        return scipy.optimize.linprog(np.ones(2 * d), A_ub=reach, b_ub=[-lacking], bounds=box).fun
    cap = np.hstack([np.eye(d), np.eye(d), -np.ones((d, 1))])
    reach = np.hstack([reach, [[0.0]]])
    cost, above = np.eye(1, 2 * d + 1, 2 * d)[0], np.append(np.zeros(d), -lacking)
    return scipy.optimize.linprog(cost, A_ub=np.vstack([cap, reach]), b_ub=above, bounds=[*box, (0, None)]).fun


def check_truth(problem, threat, norm, result):
    """What a result says of the nearest point is so."""
    x, y = problem.inputs
    distance = result.distance.numpy()
    away, found = (result.nearest - x).numpy(), np.isfinite(distance)
    wrong = (logits_of(problem.model, result.nearest).argmax(1) != y).numpy()
    assert wrong[found].all()
    assert (away[~found] == 0).all()
    np.testing.assert_allclose(distance[found], np.linalg.norm(away, ORDER[norm], axis=1)[found], rtol=1e-9)
    if threat.bounds is not None:
        assert threat.bounds[0] <= result.nearest.min()
        assert result.nearest.max() <= threat.bounds[1]
    assert threat.contains(result.x_adv, x).all()
    assert np.array_equal(result.misclassified.numpy(), distance <= threat.eps * (1 + 1e-9))


@settings(max_examples=20, phases=[Phase.generate])
@given(attack=st.sampled_from(ATTACKS), bounds=st.sampled_from(BOUNDS), seed=st.integers(0, 1000))
def test_two_classes_the_smallest_perturbation_is_found(attack, bounds, seed):
    (make, norm), problem = attack, Plane(seed, classes=2)
    threat, best = NORMS[norm][0](EPS[norm], bounds=bounds), problem.smallest(norm, bounds)
    result = make(threat, steps=100)(problem.model, *problem.inputs)
    check_truth(problem, threat, norm, result)
    distance = result.distance.numpy()
    assert np.array_equal(np.isinf(distance), np.isinf(best))
    some = np.isfinite(best)
    assert (distance[some] >= best[some] * (1 - 1e-9)).all()
    assert (distance[some] <= best[some] * CLOSE[norm]).all(), distance / best


@settings(max_examples=12, phases=[Phase.generate])
@given(attack=st.sampled_from(ATTACKS), bounds=st.sampled_from(BOUNDS), seed=st.integers(0, 1000))
def test_of_several_classes_none_is_nearer_than_possible(attack, bounds, seed):
    (make, norm), problem = attack, Plane(seed)
    threat, best = NORMS[norm][0](EPS[norm], bounds=bounds), problem.smallest(norm, bounds)
    result = make(threat, steps=60)(problem.model, *problem.inputs)
    check_truth(problem, threat, norm, result)
    assert (result.distance.numpy() >= best * (1 - 1e-9)).all()
    assert torch.isfinite(result.distance).all()  # in L2 the first step of FMN ends where two logits are equal


@pytest.mark.parametrize("norm", NORMS)
def test_projection_with_a_radius_for_each_row(norm):
    generator = torch.Generator().manual_seed(0)
    u, x = (torch.rand(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    u, radius = 2 * u - 1, torch.tensor([[1e-3], [0.2], [0.5], [0.9], [2.0], [math.inf]], dtype=torch.float64)
    threat = NORMS[norm][0](0.1)
    together = threat.nearest(u, radius, -x, 1 - x)
    for row, size in enumerate(radius[:, 0].tolist()):
        if (norm == "linf" and size > 1) or math.isinf(size):
            expected = (x + u).clamp(0, 1)[row]
        else:
            expected = replace(threat, eps=size).project((x + u)[row : row + 1], x[row : row + 1])[0]
        torch.testing.assert_close(x[row] + together[row], expected)
    if norm == "l2":
        size = threat.norm(threat.stretch(u * 1e-3, radius, -x, 1 - x))
        torch.testing.assert_close(size[:4], radius[:4, 0])
        torch.testing.assert_close(size[5], threat.norm(torch.where(u > 0, 1 - x, -x))[5])


@pytest.mark.parametrize(("make", "norm"), ATTACKS)
def test_the_scale_of_the_inputs_does_not_matter(make, norm):
    problem = Plane(3)
    x, y = problem.inputs
    threat = NORMS[norm][0](EPS[norm])
    wide = replace(threat, eps=256 * threat.eps, bounds=(0.0, 256.0))
    scaled = nn.Sequential(problem.model[0], nn.Linear(12, 4).double())
    scaled[1].weight.data, scaled[1].bias.data = problem.model[1].weight.data / 256, problem.model[1].bias.data
    small, large = make(threat, steps=20)(problem.model, x, y), make(wide, steps=20)(scaled, 256 * x, y)
    torch.testing.assert_close(256 * small.distance, large.distance)


@pytest.mark.parametrize(("make", "norm"), ATTACKS)
def test_an_examples_result_is_its_own_and_threads_share_the_work(make, norm):
    model, x, y = crowd(20)
    attack = make(RADII[norm], steps=15)
    whole, rows = attack(model, x, y), torch.tensor([9, 6, 2, 17, 0])
    assert whole.distance[0] == 0  # misclassified as it is
    assert torch.equal(whole.x_adv[0], x[0])
    assert 1 < whole.misclassified.sum() < 20
    part = attack(model, x[rows], y[rows])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        oracle = Oracle.fast(model, x, "float32")
        shared = attack(oracle, x, y)
        assert oracle._workers is not None
    finally:
        torch.set_num_threads(before)
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(part, name), value[rows], rtol=1e-9, atol=1e-9, equal_nan=True)
        torch.testing.assert_close(getattr(shared, name), value, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize(("make", "norm"), ATTACKS)
def test_costs_are_what_the_network_saw(make, norm):
    model, x, y = crowd()
    logged = Logged(model)
    result = make(RADII[norm], steps=7)(logged, x, y)
    assert sum(logged.log.rows) == int((result.gradient_calls + result.forward_calls).sum())
    assert logged.log.gradients == int(result.gradient_calls.sum())
    assert result.gradient_calls.tolist() == [1, *[8] * 9]
    assert make(RADII[norm], steps=7).cost == 7


@pytest.mark.parametrize(("make", "norm"), ATTACKS)
def test_a_label_to_reach(make, norm):
    problem = Plane(5)
    x, y = problem.inputs
    target = (y + 1) % 4
    target[1] = problem.logits[1].argmax()  # it is there already
    threat = NORMS[norm][0](EPS[norm], bounds=None)
    result = make(threat, steps=60)(problem.model, x, y, target=target)
    assert torch.isfinite(result.distance).all()
    assert torch.equal(logits_of(problem.model, result.nearest).argmax(1), target)
    assert result.distance[1] == 0
    least = [problem.to_class(norm, None, row, int(target[row])) for row in (0, 2, 3, 4)]
    assert (result.distance[[0, 2, 3, 4]].numpy() >= np.array(least) * (1 - 1e-9)).all()


class Threshold(nn.Module):
    """Two classes, split where the first value is 0.5."""

    def forward(self, x):
        score = x[:, 0] - 0.5
        return torch.stack([-score, score], 1)


@pytest.mark.parametrize(("make", "norm"), ATTACKS)
def test_float32_decides_what_counts(make, norm, monkeypatch):
    """Searches are guided by a network that errs: it sees the boundary at 0.2 instead of 0.5."""
    x, y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    model = Threshold()
    wrong, right = Oracle(model), Oracle(model)
    ask_logits, ask_gradient = Oracle._logits, Oracle._gradient
    shift = torch.tensor([0.3, 0.0, 0.0, 0.0])

    monkeypatch.setattr(wrong, "_logits", lambda x: ask_logits(wrong, x + shift))
    monkeypatch.setattr(wrong, "_gradient", lambda x, *rest: ask_gradient(wrong, x + shift, *rest))
    monkeypatch.setattr(Oracle, "precise", property(lambda self: right))
    assert wrong.lowered
    result = make(NORMS[norm][0](0.3), steps=80)(wrong, x, y)
    assert (result.distance >= 0.5).all()
    assert (result.distance < 0.52).all()
    assert (model(result.nearest).argmax(1) == 1).all()
    assert not result.misclassified.any()


@pytest.mark.parametrize(("make", "norm"), ATTACKS)
def test_a_model_that_never_errs(make, norm):
    x, y = torch.rand(3, 5), torch.zeros(3, dtype=torch.int64)
    model = nn.Linear(5, 2)
    model.weight.data.zero_()
    model.bias.data = torch.tensor([1.0, -1.0])
    threat = NORMS[norm][0](0.3)
    for bounds in BOUNDS:
        result = make(replace(threat, bounds=bounds), steps=5)(model, x, y)
        assert torch.isinf(result.distance).all()
        assert torch.equal(result.nearest, x)
        assert torch.isfinite(result.x_adv).all()
        assert not result.misclassified.any()


def test_arguments():
    for make in (im.FMN, im.DDN):
        with pytest.raises(ValueError, match="steps must be at least 1"):
            make(im.L2(0.5), steps=0)
    with pytest.raises(TypeError, match="threat of DDN must be L2"):
        im.DDN(im.Linf(0.5))
