"""The guided attack: closed forms, what ends a search and a hunt, costs that add up, and few survivors."""

import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import innermax as im
from innermax.attacks.guided_pgd import GuidedPGD, _begin, _losses, _towards
from innermax.attacks.named import build_attack
from innermax.attacks.problem import Problem
from innermax.attacks.search import AttackResult
from innermax.losses import difference, margin
from innermax.oracle.oracle import Oracle
from innermax.threat import L2, Linf
from tests.helpers.attacks import NORMS, RADII, Linear, crowd, logits_of
from tests.helpers.data import images
from tests.helpers.networks import Logged, convnet, half_trained, same, snapshot


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
@pytest.mark.parametrize("norm", NORMS)
def test_the_optimum_of_a_linear_model(norm, bounds):
    """Whoever can fall falls; the others end near the maximum, and soon."""
    make, eps = NORMS[norm]
    threat = make(0.8 if norm == "l1" and bounds is None else eps, bounds=bounds)
    problem = Linear(17, (2, 3, 4), bounds)
    result = GuidedPGD(threat, budget=400)(problem.model, *problem.inputs)
    sign = np.where(problem.y == 0, -1.0, 1.0)
    best = sign * problem.optimum(norm, threat.eps, sign)
    falls = problem.loss("margin", best) > 0
    assert 0 < falls.sum() < 17
    assert (result.misclassified.numpy() == falls).all()
    margins = problem.loss("margin", problem.moved(result.x_adv))
    # FOSC says how far from the maximum: exactly, since the model is linear.
    ends = margins + result.fosc.numpy()
    np.testing.assert_allclose(ends[~falls], problem.loss("margin", best)[~falls], rtol=1e-3, atol=1e-4)
    assert (result.relative_fosc[~result.misclassified] <= 0.02).all()
    # Where the boundary is nearer than ends differ, the budget is used.
    assert (result.gradient_calls[~falls] < 400).sum() >= (~falls).sum() - 1


def test_the_losses_of_the_aims():
    logits = torch.tensor([[3.0, 1.0, -2.0, 2.5], [-1.0, 4.0, 5.0, 0.0]])
    label = torch.tensor([0, 1])
    aims = _losses(logits, label)
    assert aims.tolist() == [[-0.5, -2.0, -5.0, -0.5], [-5.0, 1.0, 1.0, -4.0]]
    for aim in range(4):
        aimed = torch.full((2,), aim)
        assert torch.equal(_towards(logits, label, aimed), aims[:, aim])
    assert torch.equal(aims[:, 3], difference(logits, label, torch.tensor([3, 3])))


def hunt_of(model, x, y, threat=RADII["linf"]):
    problem = Problem.of(threat, model, x, y)
    return problem, _begin(problem, logits_of(model, x))


def turns(problem, hunt, count):
    """The hunts after each turn, before they move."""
    for _ in range(count):
        hunt = hunt.learn(problem, hunt.ask(problem))
        yield hunt
        hunt = hunt.move(problem.feasible)


def test_a_step_is_halved_where_the_gauge_stalls_and_goes_on_from_the_best_point():
    """|x|: ascent from the middle overshoots for ever, so that the gauge stands still."""

    class Tent(nn.Module):
        def forward(self, x):
            z = -(x - 0.5).abs().flatten(1).sum(1, keepdim=True)
            return torch.cat([torch.zeros_like(z) + 5.0, z], 1)

    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    problem, hunt = hunt_of(Tent(), x, torch.tensor([0]), Linf(0.25))
    seen = list(turns(problem, hunt, 61))
    sizes = [float(one.step_size) for one in seen if one.number == 0]
    assert sizes == sorted(sizes, reverse=True)
    assert {size / 0.25 for size in sizes} == {2.0**-k for k in range(8)}
    stalled = 0
    for one, other in itertools.pairwise([one for one in seen if one.number == 0]):
        stalled = 0 if other.gauge <= 0.98 * one.gauge else stalled + 1
        assert bool(other.step_size < one.step_size) == (stalled == 5)
        stalled %= 5
    for one, other in itertools.pairwise(seen):
        assert other.number > one.number or other.best_loss >= one.best_loss
        if other.step_size < one.step_size:
            assert torch.equal(other.point, other.best)
            assert torch.equal(other.gradient, other.best_gradient)
    assert seen[-1].number == 1
    assert seen[-1].tries.tolist() == [[1, 0]]


def test_a_stationary_search_ends_and_the_nearest_class_is_next():
    problem = Linear(6, (1, 4, 4), (0.0, 1.0), seed=3)
    right = problem.loss("margin", 0) < 0
    model, x, y = problem.model, problem.inputs[0][right], problem.inputs[1][right]
    asked, hunt = hunt_of(model, x, y, Linf(1e-3))
    seen = list(turns(asked, hunt, 40))
    assert torch.equal(seen[0].aim, y)
    assert seen[-1].number.min() > 5
    for one, other in itertools.pairwise(seen):
        renewed = other.number > one.number
        assert torch.equal(renewed, other.tries.sum(1) > one.tries.sum(1))
        expected = (-other.reached * (1 + other.tries) ** 2).argmin(1)
        assert torch.equal(other.aim, torch.where(renewed, expected, one.aim))
        assert not (other.point[renewed] == one.point[renewed]).flatten(1).all(1).any()
    assert (seen[-1].tries.amax(1) > seen[-1].tries.amin(1)).all()
    assert (seen[-1].tries[:, 0] > 0).any()


def test_who_is_hopeless():
    model, x, _ = crowd()
    _, hunt = hunt_of(model, x[:6], torch.zeros(6, dtype=torch.int64))
    tries = torch.tensor([3, 1, 1, 2]).expand(6, 4).clone()
    highest, lowest = torch.full((6, 4), -5.0), torch.full((6, 4), -6.0)
    bound = torch.full((6, 4), -4.0)
    tries[1, 0] = 2  # too few to say
    tries[2, 1] = 0  # a class never tried
    bound[3, 2] = -1.5  # the linear model comes near enough: 2 · 1 more would do
    lowest[4, 3] = -7.5  # searches differ too much: 2 · 2.5 more would do
    lowest[5, 1] = -9.0  # a single search does not differ from itself
    hunt = replace(hunt, tries=tries, highest=highest, lowest=lowest, bound=bound)
    assert hunt.is_hopeless().tolist() == [True, False, False, False, False, True]


def test_a_smaller_budget_is_a_beginning():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 5))
    for layer in model[1::2]:
        layer.weight.data *= 5
    x, _ = images(30)
    y = model(x).argmax(1)
    whole = GuidedPGD(RADII["linf"], budget=60)(model, x, y, final="none")
    later = whole.misclassified & (whole.gradient_calls > 3)
    assert later.any()
    for budget in (3, 10, 25):
        part = GuidedPGD(RADII["linf"], budget=budget)(model, x, y, final="none")
        assert torch.equal(part.misclassified, whole.misclassified & (whole.gradient_calls <= budget))
        assert torch.equal(part.gradient_calls, whole.gradient_calls.clamp(max=budget))


@pytest.mark.parametrize("norm", NORMS)
def test_an_examples_result_is_its_own(norm):
    model, x, y = crowd()
    attack = GuidedPGD(RADII[norm], budget=40)
    whole = attack(model, x, y, seed=3)
    assert 1 < whole.misclassified.sum() < 10
    rows = torch.tensor([9, 6, 2, 7, 0])
    part = attack(model, x[rows], y[rows], seed=3, index=rows)
    for field in fields(AttackResult):
        mine, other = getattr(part, field.name), getattr(whole, field.name)[rows]
        if field.name == "steps":  # of several ways to the same point roundings choose
            mine, other = mine[part.misclassified], other[part.misclassified]
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_threads_share_a_hunt():
    model, x, y = crowd(20)
    attack, before = GuidedPGD(RADII["l2"], budget=30), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        shared = attack(Oracle.fast(model, x, "float32"), x, y, seed=3)
    finally:
        torch.set_num_threads(before)
    alone = attack(model, x, y, seed=3)
    for part in (shared, alone):
        part.steps[~part.misclassified] = 0
    torch.testing.assert_close(vars(shared), vars(alone), rtol=1e-6, atol=1e-9, equal_nan=True)


def test_each_search_draws_its_own_start():
    model, x, y = (part[1:] if torch.is_tensor(part) else part for part in crowd())
    problem, hunt = hunt_of(model, x, y, Linf(1e-6))
    starts = [hunt.point, *(one.point for one in turns(problem, hunt, 30) if (one.age == 0).all())]
    assert len(starts) > 2
    assert len(torch.stack(starts).unique(dim=0)) == len(starts)
    _, again = hunt_of(model, x, y, Linf(1e-6))
    assert torch.equal(again.point, starts[0])
    other = Problem.of(Linf(1e-6), model, x, y, seed=1)
    assert not torch.equal(_begin(other, logits_of(model, x)).point, starts[0])


@pytest.mark.parametrize("final", ["gradient", "loss", "none"])
def test_costs_are_what_the_network_saw(final):
    model, x, y = crowd()
    model = Logged(model)
    result = GuidedPGD(RADII["l2"], budget=24)(model, x, y, final=final)
    assert 1 < result.misclassified.sum() < 10
    assert model.log.gradients == int(result.gradient_calls.sum())
    assert sum(model.log.rows) == int((result.gradient_calls + result.forward_calls).sum())
    gauge = int(final == "gradient")
    assert result.gradient_calls[0] == gauge  # who was wrong from the start
    assert (result.forward_calls == 1).all()
    assert (result.gradient_calls <= 24 + gauge).all()
    logits = logits_of(model.model, result.x_adv)
    torch.testing.assert_close(result.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.loss, margin(logits, y), rtol=1e-4, atol=1e-5)


@settings(max_examples=10, phases=[Phase.generate])
@given(
    norm=st.sampled_from(list(NORMS)),
    size=st.floats(0.02, 3.0),
    bounds=st.sampled_from([(0.0, 1.0), (-0.5, 1.25), None]),
    seed=st.integers(0, 100),
)
def test_x_adv_lies_in_the_set(norm, size, bounds, seed):
    make, eps = NORMS[norm]
    threat = make(min(eps * size, 0.9 if norm == "linf" else 4.0), bounds=bounds)
    x, y = images(5, seed=seed)
    model = convnet(seed % 3)
    result = GuidedPGD(threat, budget=30)(model, x, y, seed=seed)
    assert threat.contains(result.x_adv, x).all()
    assert torch.equal(result.misclassified, logits_of(model, result.x_adv).argmax(1) != y)
    clean = logits_of(model, x).argmax(1) != y
    assert torch.equal(result.x_adv[clean], x[clean])


def test_without_a_slope_nothing_is_converged():
    """A zero gradient is no evidence: the hunt goes on to its budget, from one random point to another."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3))
    model[1].weight.data[:] = 0
    model[1].bias.data = torch.tensor([0.3, 0.1, 0.2])
    x, _ = images()
    result = GuidedPGD(L2(0.5), budget=50)(model, x, torch.zeros(6, dtype=torch.int64))
    assert result.zero_gradient.all()
    assert not result.misclassified.any()
    assert (result.gradient_calls == 51).all()


def test_two_classes_and_other_shapes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.rand(20, 6)
    y = model(x).argmax(1)
    result = GuidedPGD(Linf(0.2), budget=100)(model, x, y)
    assert result.misclassified.sum() > 0


def test_the_model_is_left_as_found():
    x, y = images(3)
    model = half_trained()
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            before = snapshot(model)
            GuidedPGD(Linf(0.05), budget=8)(model, x, y)
            assert same(snapshot(model), before)


def test_a_model_that_answers_nan():
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3))
    model[1].bias.data[:] = math.nan
    x, y = images()
    with pytest.raises(ValueError, match=r"the model returns NaN logits for 6 of 6 inputs"):
        GuidedPGD(Linf(0.1), budget=5)(model, x, y)


def test_names_and_evaluation():
    threat = Linf(0.1)
    assert build_attack("guided", threat) == im.GuidedPGD(threat)
    assert build_attack("guided-40", threat) == im.GuidedPGD(threat, budget=40)
    for name in ("guided-0", "guided-x", "guide"):
        with pytest.raises(ValueError, match=f"unknown attack '{name}'; did you mean 'guided'"):
            build_attack(name, threat)
    model, x, y = crowd(5, torch.float32)
    attack = GuidedPGD(RADII["linf"], budget=20)
    evaluation = im.evaluate(model, (x, y), {"guided": attack}, batch_size=3)
    assert (evaluation.correct("guided") == ~attack(model, x, y).misclassified.numpy()).all()
    assert evaluation.convergence["guided"].overturned == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threat": 0.1}, TypeError, r"threat must be a threat model"),
        ({"budget": 0}, ValueError, r"budget must be at least 1, got 0"),
        ({"budget": 10.0}, TypeError, r"budget must be an integer, got 10\.0"),
    ],
)
def test_bad_settings(untyped, options, error, message):
    with pytest.raises(error, match=message):
        GuidedPGD(**{"threat": Linf(0.1), **options})


def test_a_label_to_reach_is_refused():
    x, y = images()
    with pytest.raises(ValueError, match="target is not supported by GuidedPGD"):
        GuidedPGD(Linf(0.1))(convnet(), x, y, target=y)
