"""What APGD, FAB, Square and AutoAttack have in common."""

import itertools
import math
from dataclasses import fields

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import innermax as im
from innermax.attacks.apgd import APGD
from innermax.attacks.autoattack import AutoAttack
from innermax.attacks.base import VerdictAttack, build_result, looks_like_probabilities
from innermax.attacks.cost import search_cost
from innermax.attacks.fab import FAB
from innermax.attacks.guided_pgd import GuidedPGD
from innermax.attacks.search import AttackResult
from innermax.attacks.square import Square
from innermax.losses import cross_entropy, likeliest_others, margin, targeted_dlr
from innermax.oracle.oracle import Oracle
from innermax.threat import L2, Linf
from tests.helpers.attacks import ALL, NORMS, RADII, SMALL, crowd, gradient_of, logits_of
from tests.helpers.data import images
from tests.helpers.networks import Logged, convnet, half_trained, same, snapshot


@settings(max_examples=15, phases=[Phase.generate])
@given(
    name=st.sampled_from(list(SMALL)),
    norm=st.sampled_from(list(NORMS)),
    size=st.floats(0.02, 3.0),
    bounds=st.sampled_from([(0.0, 1.0), (-0.5, 1.25), None]),
    seed=st.integers(0, 100),
)
def test_x_adv_lies_in_the_set(name, norm, size, bounds, seed):
    make, eps = NORMS[norm]
    threat = make(min(eps * size, 0.9 if norm == "linf" else 4.0), bounds=bounds)
    x, y = images(5, seed=seed)
    model = convnet(seed % 3)
    result = SMALL[name](threat)(model, x, y, seed=seed)
    assert threat.contains(result.x_adv, x).all()
    if bounds is not None:
        assert bounds[0] <= result.x_adv.min()
        assert result.x_adv.max() <= bounds[1]
    assert torch.isfinite(result.loss).all()
    assert torch.equal(result.misclassified, logits_of(model, result.x_adv).argmax(1) != y)
    gradient = gradient_of(model, result.x_adv, y, margin)
    if name in ("fab", "square"):
        torch.testing.assert_close(result.fosc, threat.gap(gradient, result.x_adv, x), rtol=1e-3, atol=1e-5)
    clean = logits_of(model, x).argmax(1) != y
    assert torch.equal(result.x_adv[clean], x[clean])


def test_bounds_that_differ_from_pixel_to_pixel():
    x, y = images(4)
    bounds = torch.zeros(2, 5, 5), torch.ones(2, 5, 5)
    for name, make in SMALL.items():
        result = make(Linf(0.1, bounds=bounds))(convnet(), x, y)
        assert torch.equal(result.x_adv, make(Linf(0.1))(convnet(), x, y).x_adv), name


@pytest.mark.parametrize(("name", "norm"), [*itertools.product(SMALL, NORMS), ("autoattack", "l2")])
def test_an_examples_result_is_its_own(name, norm, short):
    model, x, y = crowd()
    attack = ALL[name](RADII[norm])
    whole = attack(model, x, y, seed=3)
    assert 1 < whole.misclassified.sum() < 10
    rows = torch.tensor([9, 6, 2, 7, 0])
    part = attack(model, x[rows], y[rows], seed=3, index=rows)
    assert 1 < part.misclassified.sum() < 5
    for field in fields(AttackResult):
        mine, other = getattr(part, field.name), getattr(whole, field.name)[rows]
        if field.name == "steps":  # of several ways to the same point roundings choose
            mine, other = mine[part.misclassified], other[part.misclassified]
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9, equal_nan=True)
    again = attack(model, x[rows], y[rows], seed=3, index=rows)
    assert all(same(getattr(again, f.name).nan_to_num(), getattr(part, f.name).nan_to_num()) for f in fields(part))


@pytest.mark.parametrize("name", ALL)
def test_threads_share_a_search(name, short):
    model, x, y = crowd(20)
    attack, before = ALL[name](RADII["l2"]), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        oracle = Oracle.fast(model, x, "float32")
        assert oracle.plan.endswith(", 2 threads")
        shared = attack(oracle, x, y, seed=3)
        assert oracle._workers is not None
    finally:
        torch.set_num_threads(before)
    alone = attack(model, x, y, seed=3)
    for part in (shared, alone):
        part.steps[~part.misclassified] = 0
    torch.testing.assert_close(vars(shared), vars(alone), rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", SMALL)
def test_draws_are_a_function_of_seed_index_and_restart(name):
    model, x, _ = crowd()
    y = model(x).argmax(1)
    first = {"apgd": [1, 11], "apgd-t": [1, 11], "fab": [14], "square": [1, 13]}[name]  # where searches begin

    def starts(**options):
        logged = Logged(model)
        SMALL[name](Linf(1e-6))(logged, x, y, **options)
        return [logged.log.inputs[number] for number in first]

    known = starts(seed=1)
    assert all(torch.equal(*pair) for pair in zip(known, starts(seed=1), strict=True))
    index = torch.tensor([0, 1, 2, 13, 14, 15, 16, 17, 18, 19])
    for other, same_rows in ((starts(seed=2), 0), (starts(seed=1, index=index), 3), (known[::-1], 0)):
        for one, another in zip(known, other, strict=True):
            if one is not another:
                assert (one == another).flatten(1).all(1).tolist() == [row < same_rows for row in range(10)]


@pytest.mark.parametrize(("name", "final"), [*itertools.product(ALL, ["gradient"]), ("apgd", "loss"), ("fab", "none")])
def test_costs_are_what_the_network_saw(name, final, short):
    model, x, y = crowd()
    model = Logged(model)
    result = ALL[name](RADII["l2"])(model, x, y, final=final)
    assert 1 < result.misclassified.sum() < 10
    assert model.log.gradients == int(result.gradient_calls.sum())
    assert sum(model.log.rows) == int((result.gradient_calls + result.forward_calls).sum())
    # Who was wrong from the start costs the look that found out, and the gauge.
    gauge = int(final == "gradient")
    assert (result.gradient_calls[0], result.forward_calls[0]) == (gauge, 1)
    full = {"apgd": (20, 1), "apgd-t": (20, 1), "fab": (24, 29), "square": (0, 25), "autoattack": (64, 53)}[name]
    survivors = ~result.misclassified
    assert (result.gradient_calls[survivors] == full[0] + gauge).all()
    assert (result.forward_calls[survivors] == full[1]).all()
    fallen = result.misclassified
    total = result.gradient_calls + result.forward_calls
    assert (total[fallen] < sum(full) + gauge).all()
    for field in ("fosc", "relative_fosc", "zero_gradient"):
        assert (getattr(result, field) is None) == (final != "gradient")
    torch.testing.assert_close(result.logits, logits_of(model.model, result.x_adv), rtol=1e-4, atol=1e-5)
    assert not any(getattr(result, f.name).requires_grad for f in fields(result) if getattr(result, f.name) is not None)


@pytest.mark.parametrize("name", SMALL)
def test_the_loss_is_that_of_the_returned_point(name):
    model, x, y = crowd()
    attack = SMALL[name](RADII["linf"])
    for final in ("gradient", "loss"):
        result = attack(model, x, y, final=final)
        logits = logits_of(model, result.x_adv)
        expected = cross_entropy(logits, y) if name == "apgd" else margin(logits, y)
        if name == "apgd-t":
            expected = targeted_dlr(logits, y, likeliest_others(logits, y)[:, 0])
        torch.testing.assert_close(result.loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_model_is_left_as_found(name, short):
    x, y = images(3)
    model = half_trained()
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            before = snapshot(model)
            ALL[name](Linf(0.05))(model, x, y)
            assert same(snapshot(model), before)


def test_what_looks_like_probabilities():
    assert looks_like_probabilities(torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
    assert not looks_like_probabilities(torch.tensor([[0.25, 0.75], [1.5, -0.5]]))
    assert not looks_like_probabilities(torch.tensor([[0.25, 0.75], [0.5, 0.6]]))


# Bad input


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (APGD, {"threat": 0.1}, TypeError, r"threat must be a threat model"),
        (AutoAttack, {"threat": None}, TypeError, r"threat must be a threat model"),
        (APGD, {"steps": 0}, ValueError, r"steps must be at least 1, got 0"),
        (APGD, {"steps": True}, TypeError, r"steps must be an integer, got True"),
        (APGD, {"restarts": 1.0}, TypeError, r"restarts must be an integer, got 1\.0"),
        (APGD, {"targets": 0}, ValueError, r"targets must be at least 1, got 0"),
        (APGD, {"eot": 0}, ValueError, r"eot must be at least 1, got 0"),
        (APGD, {"loss": "drl"}, ValueError, r"unknown loss 'drl'; did you mean 'dlr'\?"),
        (FAB, {"steps": 0}, ValueError, r"steps must be at least 1, got 0"),
        (FAB, {"targets": None}, TypeError, r"targets must be an integer, got None"),
        (FAB, {"restarts": -1}, ValueError, r"restarts must be at least 1, got -1"),
        (Square, {"queries": 0}, ValueError, r"queries must be at least 1, got 0"),
        (Square, {"restarts": "2"}, TypeError, r"restarts must be an integer, got '2'"),
        (Square, {"p_init": 0.0}, ValueError, r"p_init must be in \(0, 1\], got 0\.0"),
        (Square, {"p_init": math.nan}, ValueError, r"p_init must be in \(0, 1\], got nan"),
        (Square, {"p_init": "0.8"}, TypeError, r"p_init must be a number, got '0\.8'"),
        (AutoAttack, {"version": "standart"}, ValueError, r"unknown version 'standart'; did you mean 'standard'\?"),
    ],
)
def test_bad_settings(untyped, make, options, error, message):
    with pytest.raises(error, match=message):
        make(**{"threat": Linf(0.1), **options})


X, Y = images()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"y": Y[:5]}, ValueError, r"y must have shape \(6,\), got \(5,\)"),
        ({"y": Y + 1}, ValueError, r"y must be in 0…2, got values from 1 to 3"),
        ({"index": Y.int()}, TypeError, r"index must be int64"),
        ({"x": X + 0.1}, ValueError, r"x must lie within the bounds"),
        ({"x": X / 0}, ValueError, r"x holds NaN or infinite values"),
        ({"seed": 1.0}, TypeError, r"seed must be an integer, got 1\.0"),
        ({"final": "gradients"}, ValueError, r"unknown final 'gradients'; did you mean 'gradient'\?"),
        ({"model": lambda x: x}, TypeError, r"model must be a torch.nn.Module, got function"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(50, 1))}, ValueError, r"model must return logits .* \(6, 1\)"),
    ],
)
@pytest.mark.parametrize("make", [APGD, FAB, Square, AutoAttack])
def test_bad_arguments(untyped, make, options, error, message):
    with pytest.raises(error, match=message):
        make(Linf(0.1))(**{"model": convnet(), "x": X, "y": Y, **options})


@pytest.mark.parametrize("make", [FAB, Square, AutoAttack])
def test_labels_to_reach_are_not_for_all(make):
    with pytest.raises(ValueError, match=f"target is not supported by {make.__name__}"):
        make(Linf(0.1))(convnet(), X, Y, target=Y)


@pytest.mark.parametrize("make", [APGD, FAB, Square, AutoAttack, GuidedPGD])
def test_a_start_is_not_for_all(make):
    with pytest.raises(ValueError, match=f"start is not supported by {make.__name__}: it chooses where searches begin"):
        make(Linf(0.1))(convnet(), X, Y, start=X)


class OneGradient(VerdictAttack):
    """An attack in four lines, as extend.md has them: one step of ε on the margin."""

    def search(self, problem, clean):
        answer = problem.gradient(problem.feasible.x, margin)
        point = problem.feasible.step(problem.feasible.x, answer.gradient, self.threat.eps)
        logits = problem.logits(point)
        return build_result(problem, point, margin(logits, problem.y), logits, 1, gradients=1, forwards=1)


def test_an_own_verdict_attack(untyped):
    attack = OneGradient(Linf(0.1))
    result = attack(convnet(), X, Y)
    fgsm = im.FGSM(Linf(0.1), loss="margin")(convnet(), X, Y)
    torch.testing.assert_close(result.x_adv, fgsm.x_adv)
    torch.testing.assert_close(result.fosc, fgsm.fosc, rtol=1e-4, atol=1e-6)
    assert (result.gradient_calls == 2).all()
    assert (result.forward_calls == 2).all()
    assert search_cost(attack) == 20.0
    with pytest.raises(ValueError, match="target is not supported by OneGradient"):
        attack(convnet(), X, Y, target=Y)
    with pytest.raises(TypeError, match="threat must be a threat model"):
        OneGradient(None)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_that_answers_nan(name):
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3))
    model[1].bias.data[:] = math.nan
    with pytest.raises(ValueError, match=r"the model returns NaN logits for 6 of 6 inputs"):
        SMALL[name](Linf(0.1))(model, X, Y)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_without_slope(name):
    """Nothing to follow: the clean point returns, or some other of the same loss."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3))
    model[1].weight.data[:] = 0
    model[1].bias.data = torch.tensor([0.3, 0.1, 0.2])
    result = SMALL[name](L2(0.5))(model, X, torch.zeros(6, dtype=torch.int64))
    assert result.zero_gradient.all()
    assert not result.misclassified.any()
    assert torch.isnan(result.relative_fosc).all()
    assert L2(0.5).contains(result.x_adv, X).all()
