"""FGSM, PGD and C&W∞: the optimum where it is known, an independent search where it is not."""

import copy
import inspect
import math
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from innermax.attacks.pgd import CW, FGSM, PGD
from innermax.attacks.search import AttackResult
from innermax.losses import margin
from innermax.oracle.oracle import Oracle
from innermax.threat import L1, L2, Linf
from tests.helpers.attacks import NORMS, UNBOUNDED, Linear, gradient_of, logits_of, starts
from tests.helpers.data import images
from tests.helpers.networks import Log, Logged, convnet, half_trained, mlp, same, snapshot

SEARCHES = {
    "fgsm": lambda threat: FGSM(threat),
    "fgsm margin": lambda threat: FGSM(threat, loss="margin"),
    "pgd": lambda threat: PGD(threat, steps=30),
    "pgd margin": lambda threat: PGD(threat, steps=30, loss="margin"),
    "annealed": lambda threat: PGD(threat, steps=32, step_size="annealed"),
    "shrinking": lambda threat: PGD(threat, steps=40, step_size=[threat.eps * 0.93**k for k in range(40)]),
    "restarts": lambda threat: PGD(threat, steps=25, restarts=2),
    "cw": lambda threat: CW(threat, confidence=1e3),
    "stopping": lambda threat: PGD(threat, steps=40, stop_at=1e-5, gauge="relative"),
}


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SEARCHES)
def test_the_optimum_of_a_linear_model_is_found(name, norm, bounds):
    make, eps = NORMS[norm]
    threat = make(eps, bounds=bounds)
    attack, rtol = SEARCHES[name](threat), 1e-3 if norm == "l2" else 1e-5  # on a ball the last bit of the way is long
    for batch, shape in ((1, (20,)), (3, (1, 6, 6)), (17, (2, 3, 4))):
        problem = Linear(batch, shape, bounds)
        result = attack(problem.model, *problem.inputs)
        down = np.where(problem.y == 0, -1.0, 1.0)
        best = down * problem.optimum(norm, eps, down)
        kind = "cross_entropy" if attack.loss == "cross_entropy" else "margin"
        start, optimum = problem.loss(kind, 0), problem.loss(kind, best)
        assert (optimum > start).all()
        np.testing.assert_allclose(result.loss.numpy(), optimum, rtol=rtol, atol=1e-5)
        np.testing.assert_allclose(problem.loss(kind, problem.moved(result.x_adv)), optimum, rtol=rtol, atol=1e-5)
        assert threat.contains(result.x_adv, problem.inputs[0]).all()
        assert (result.relative_fosc < 1e-3).all()
        assert not result.zero_gradient.any()
        assert torch.equal(result.misclassified, logits_of(problem.model, result.x_adv).argmax(1) != problem.inputs[1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SEARCHES)
def test_the_optimum_of_a_linear_model_is_found_in_bf16(name, norm):
    make, eps = NORMS[norm]
    threat = make(eps)
    attack = SEARCHES[name](threat)
    problem = Linear(17, (1, 6, 6), threat.bounds)
    oracle = Oracle.fast(problem.model, problem.inputs[0], "bf16")
    assert oracle.scheme.endswith("bf16")
    result = attack(oracle, *problem.inputs)
    down = np.where(problem.y == 0, -1.0, 1.0)
    best, moved = np.array(problem.optimum(norm, eps, down)), down * problem.moved(result.x_adv)
    assert (moved <= best * (1 + 1e-4)).all()
    assert (moved >= best * 0.97).all()
    assert threat.contains(result.x_adv, problem.inputs[0]).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_two_classes(norm, loss):
    make, eps = NORMS[norm]
    torch.manual_seed(0)
    w = torch.randn(12)
    model = nn.Linear(12, 2)
    model.weight.data, model.bias.data = torch.stack([w, -w]), torch.zeros(2)
    x, y = torch.rand(5, 12), torch.tensor([0, 1, 0, 1, 1])
    result = PGD(make(eps, bounds=None), steps=30, loss=loss)(model, x, y)
    longest = {"linf": w.abs().sum(), "l2": w.norm(), "l1": w.abs().max()}[norm]  # the dual norm
    value = 2 * (eps * longest - (x @ w) * torch.where(y == 0, 1, -1))
    expected = F.softplus(value) if loss == "cross_entropy" else value
    torch.testing.assert_close(result.loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["cross_entropy", "margin", "cw"])
def test_a_target_is_reached(norm, loss):
    make, eps = NORMS[norm][0], {"linf": 0.8, "l2": 2.0, "l1": 4.0}[norm]
    threat = make(eps, bounds=None)
    problem = Linear(9, (1, 4, 4), None)
    x, y = problem.inputs
    target = 2 - y
    attack = CW(threat, confidence=1e3) if loss == "cw" else PGD(threat, steps=30, loss=loss)
    result = attack(problem.model, x, y, target=target)
    predicted = logits_of(problem.model, result.x_adv).argmax(1)
    assert torch.equal(predicted, target)
    assert torch.equal(result.misclassified, predicted != y)
    down = np.where(problem.y == 0, -1.0, 1.0)
    best = down * problem.optimum(norm, eps, down)
    kind = "cross_entropy" if loss == "cross_entropy" else "margin"
    np.testing.assert_allclose(result.loss.numpy(), -problem.loss(kind, best, target.numpy()), rtol=1e-3, atol=1e-4)


def test_a_targeted_search_stops_on_its_target_not_on_any_error():
    """From label 0 the path to label 2 leads through label 1."""
    model = nn.Linear(1, 3)
    model.weight.data, model.bias.data = torch.tensor([[-2.0], [0.0], [2.0]]), torch.tensor([0.0, 1.0, -1.0])
    x, y, target = torch.zeros(1, 1), torch.tensor([0]), torch.tensor([2])
    threat = Linf(2.5, bounds=None)
    attack = PGD(threat, steps=20, step_size=0.3, random_start=False, stop_on_success=True)
    assert model(x).argmax(1) == 1
    untargeted = attack(model, x - 1, y)
    assert untargeted.logits.argmax(1) == 1
    targeted = attack(model, x - 1, y, target=target)
    assert targeted.logits.argmax(1) == 2
    assert targeted.misclassified.all()
    assert targeted.steps > untargeted.steps > 0
    assert 1 <= targeted.steps < 20
    one_less = PGD(threat, steps=int(targeted.steps) - 1, step_size=0.3, random_start=False)
    assert one_less(model, x - 1, y, target=target).logits.argmax(1) == 1


def test_misclassified_is_about_y_even_where_the_target_was_missed():
    problem = Linear(4, (6,), None)
    x = problem.inputs[0]
    y = logits_of(problem.model, x).argmax(1)
    result = PGD(Linf(1e-6, bounds=None), steps=1)(problem.model, x, y, target=(y + 1) % 3)
    assert not result.misclassified.any()


# Steps


@pytest.mark.parametrize(("steps", "step_size"), [(7, 0.005), (1, 0.02), (3, 0.01)])
def test_as_many_moves_as_steps(steps, step_size):
    """On a constant slope K steps of length α displace by Kα."""
    problem = Linear(4, (6,), None)
    x, y = problem.inputs
    model = Logged(problem.model.double())
    result = PGD(UNBOUNDED, steps, step_size, random_start=False)(model, x.double(), y)
    direction = torch.tensor(np.sign(problem.w)) * torch.where(y == 0, -1, 1)[:, None]
    torch.testing.assert_close(result.x_adv - x, steps * step_size * direction, rtol=1e-9, atol=1e-9)
    assert result.steps.tolist() == [steps] * 4
    assert result.gradient_calls.tolist() == [steps + 1] * 4
    assert len(model.log.inputs) == steps + 1


def test_the_default_step_is_a_quarter_of_the_radius():
    assert PGD(Linf(0.2), steps=3).step_sizes() == (0.05, 0.05, 0.05)
    assert PGD(Linf(0.2)).steps == 10
    assert CW(Linf(0.2)).steps == 30


def test_step_sizes_are_taken_in_turn():
    sizes = [0.03, 0.02, 0.005]
    assert PGD(UNBOUNDED, 3, sizes).step_sizes() == tuple(sizes)
    model = Logged(nn.Linear(1, 2).double())
    x = torch.zeros(1, 1, dtype=torch.float64)
    PGD(UNBOUNDED, 3, sizes, random_start=False)(model, x, torch.tensor([0]))
    path = torch.cat(model.log.inputs)[:, 0].abs()
    torch.testing.assert_close(path.diff(), torch.tensor(sizes).double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("steps", "halvings"),
    [
        (8, [0, 0, 1, 1, 2, 2, 3, 3]),
        (4, [0, 1, 2, 3]),
        (1, [0]),
        (10, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]),
        (12, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
    ],
)
def test_annealed_steps_halve_with_every_quarter(steps, halvings):
    assert PGD(Linf(0.5), steps, "annealed").step_sizes() == tuple(0.5 / 2**k for k in halvings)


def test_without_a_random_start_the_search_starts_at_x():
    x, y = images()
    model = Logged(convnet())
    PGD(Linf(0.1), steps=2, random_start=False)(model, x, y)
    assert torch.equal(model.log.inputs[0], x)
    model = Logged(convnet())
    FGSM(Linf(0.1))(model, x, y)
    assert torch.equal(model.log.inputs[0], x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-0.5, 1.25), None])
def test_every_iterate_lies_in_the_set(norm, bounds):
    make, eps = NORMS[norm]
    x, y = images()
    model = Logged(convnet())
    threat = make(eps, bounds=bounds)
    result = PGD(threat, steps=6, step_size=eps, restarts=2)(model, x, y)
    for point in (*model.log.inputs, result.x_adv):
        assert threat.contains(point, x).all()
        if bounds is not None:
            assert bounds[0] <= point.min()
            assert point.max() <= bounds[1]


def test_fgsm_is_the_sign_of_the_gradient():
    x, y = images()
    model = convnet()
    result = FGSM(Linf(0.1))(model, x, y)
    assert torch.equal(result.x_adv, (x + 0.1 * gradient_of(model, x, y).sign()).clamp(0, 1))
    assert result.steps.tolist() == [1] * 6


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_a_function_of_seed_index_and_restart(norm):
    make, eps = NORMS[norm]
    x, y = images()
    model, index = convnet(), torch.tensor([7, 3, 12, 0, 5, 9])
    attack = PGD(make(eps), steps=1, restarts=3)
    # One step: the network is asked at the start and at its end, restart after restart.
    first = starts(attack, model, x, y, seed=1, index=index)[::2]
    assert len(first) == 3
    assert all(
        torch.equal(a, b) for a, b in zip(first, starts(attack, model, x, y, seed=1, index=index)[::2], strict=True)
    )
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (first[a] != first[b]).flatten(1).any(1).all()
    other = starts(attack, model, x, y, seed=2, index=index)[::2]
    assert all((a != b).flatten(1).any(1).all() for a, b in zip(first, other, strict=True))
    other = starts(attack, model, x, y, seed=1)[::2]
    changed = (first[0] != other[0]).flatten(1).any(1)
    assert changed.tolist() == (index != torch.arange(6)).tolist()
    # The same input as another example has another start.
    twins = starts(attack, model, x[:1].expand(4, -1, -1, -1), y[:1].expand(4))[0]
    assert len({tuple(row.flatten().tolist()) for row in twins}) == 4
    # The rows of a smaller, shuffled batch start where they did.
    rows = torch.tensor([4, 1, 5])
    other = starts(attack, model, x[rows], y[rows], seed=1, index=index[rows])[::2]
    assert all(torch.equal(a[rows], b) for a, b in zip(first, other, strict=True))


def test_the_global_random_state_has_no_part_in_it():
    x, y = images()
    model, attack = convnet(), PGD(Linf(0.1), steps=2)
    torch.manual_seed(0)
    first = attack(model, x, y, seed=5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(attack(model, x, y, seed=5).x_adv, first.x_adv)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(attack(model, x, y, seed=6).x_adv, first.x_adv)


def test_a_model_that_draws_random_numbers_depends_on_the_seed_alone():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = convnet()

        def forward(self, x):
            return self.model(x + 0.2 * torch.randn_like(x))

    x, y = images()
    attack = PGD(Linf(0.1), steps=4, restarts=2, random_start=True)
    torch.manual_seed(3)
    model = Noisy()
    state = torch.get_rng_state()
    first = attack(model, x, y, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(100)
    again = attack(model, x, y, seed=1)
    assert torch.equal(first.x_adv, again.x_adv)
    assert torch.equal(first.logits, again.logits)
    assert not torch.equal(first.logits, attack(model, x, y, seed=2).logits)
    # Where the starts are given, too.
    still = PGD(Linf(0.1), steps=4, random_start=False)
    assert torch.equal(still(model, x, y, seed=1).x_adv, still(model, x, y, seed=1).x_adv)
    assert not torch.equal(still(model, x, y, seed=1).x_adv, still(model, x, y, seed=2).x_adv)


def test_probabilities_are_warned_of():
    x, y = images()
    with pytest.warns(UserWarning, match="seems to return probabilities"):
        PGD(Linf(0.1), steps=1)(nn.Sequential(convnet(), nn.Softmax(1)), x, y)


def test_cw_has_no_gradient_left_once_it_has_won():
    x, y = images(12, shape=(6,), dtype=torch.float64)
    model, attack = mlp(), CW(Linf(0.3), steps=6)
    logged = Logged(model)
    result = attack(logged, x, y)
    fallen = result.misclassified
    assert 0 < fallen.sum() < 12
    assert torch.equal(result.zero_gradient, fallen)
    assert (result.loss[fallen] == 0).all()
    assert (result.loss[~fallen] < 0).all()
    torch.testing.assert_close(
        result.loss, margin(logits_of(model, result.x_adv), y).clamp(max=0), rtol=1e-9, atol=1e-9
    )
    for row in fallen.nonzero()[:, 0]:
        path = torch.stack([point[row] for point in logged.log.inputs])
        first = int((logits_of(model, path).argmax(1) != y[row]).long().argmax())
        assert (path[first:] == path[first]).all()
    # Also where it stops on a gauge.
    result = CW(Linf(0.3), steps=6)(model, x, y)
    stopping = PGD(Linf(0.3), steps=6, loss=attack.loss, stop_at=0.0)(model, x, y)
    assert (stopping.steps[stopping.zero_gradient] == 6).all()


def test_the_confidence_of_cw():
    x, y = images(12, shape=(6,), dtype=torch.float64)
    result = CW(Linf(0.3), steps=20, confidence=0.4)(mlp(), x, y)
    assert result.loss.max() == 0.4
    assert (margin(result.logits, y)[result.loss == 0.4] >= 0.4).all()


# The model


class Raising(nn.Module):
    """Fails at the third batch it, or a copy of it, is asked about."""

    def __init__(self, model, error):
        super().__init__()
        self.model, self.error, self.log = model, error, Log()

    def forward(self, x):
        self.log.inputs.append(x)
        if len(self.log.inputs) == 3:
            raise self.error
        return self.model(x + 0.01 * torch.randn_like(x))


ATTACKS = {
    "pgd": lambda: PGD(Linf(0.1), steps=3, restarts=2),
    "stopping": lambda: PGD(Linf(0.1), steps=3, stop_at=0.3, gauge="relative", stop_on_success=True, restarts=2),
    "fgsm": lambda: FGSM(L2(0.5)),
    "cw": lambda: CW(L1(2.0), steps=3),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ATTACKS)
def test_the_model_is_left_as_found(name, mode):
    x, y = images()
    model = Logged(half_trained())
    truth = ATTACKS[name]()(copy.deepcopy(model).eval(), x, y)
    model.log.modules.clear()
    fired = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: fired.append(module))
    kept, labels = x.clone(), y.clone()
    with mode():
        before = snapshot(model)
        result = ATTACKS[name]()(model, x, y)
        assert same(snapshot(model), before)
    assert torch.equal(x, kept)
    assert torch.equal(y, labels)
    assert model.log.modules
    assert not any(module is model for module in model.log.modules)
    assert not any(module.training for module in model.log.modules)
    assert not set(fired) & set(model.modules())
    for field in fields(AttackResult):
        value = getattr(result, field.name)
        torch.testing.assert_close(value, getattr(truth, field.name), rtol=0, atol=0, equal_nan=True)
        assert not value.requires_grad


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyError("broken")])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_is_left_as_found_by_an_attack_that_fails(error, mode):
    x, y = images()
    model = Raising(half_trained(), error)
    with mode():
        before = snapshot(model)
        with pytest.raises(ValueError, match="broken"):
            PGD(Linf(0.1), steps=5)(model, x, y)
        assert same(snapshot(model), before)


def test_a_fast_oracle_is_attacked_like_its_model():
    x, y = images(12)
    model = half_trained()
    attack = PGD(Linf(0.1), steps=5)
    truth = attack(model, x, y)
    result = attack(Oracle.fast(model, x, "float32"), x, y)
    torch.testing.assert_close(result.loss, truth.loss, rtol=0.01, atol=1e-3)
    assert torch.equal(result.steps, truth.steps)


def test_inputs_that_require_a_gradient():
    x, y = images()
    point = x.clone().requires_grad_()
    result = PGD(Linf(0.1), steps=2)(convnet(), point, y)
    assert point.grad is None
    assert point.requires_grad
    assert torch.equal(result.x_adv, PGD(Linf(0.1), steps=2)(convnet(), x, y).x_adv)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    x, y = images()
    x = x.to(dtype)
    result = PGD(Linf(0.1), steps=3)(convnet(), x, y)
    assert result.x_adv.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert Linf(0.1).contains(result.x_adv, x.to(result.x_adv.dtype)).all()


def test_batchnorm_without_running_statistics_is_refused():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten())
    with pytest.raises(ValueError, match=r"layer '1' .* has no running statistics"):
        PGD(Linf(0.1))(model, *images())


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threat": 0.1}, TypeError, r"threat must be a threat model"),
        ({"steps": 0}, ValueError, r"steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, r"steps must be an integer, got 2\.0"),
        ({"steps": True}, TypeError, r"steps must be an integer, got True"),
        ({"restarts": 0}, ValueError, r"restarts must be at least 1, got 0"),
        ({"restarts": "2"}, TypeError, r"restarts must be an integer, got '2'"),
        ({"restarts": 2, "random_start": False}, ValueError, r"restarts need random_start=True"),
        ({"random_start": -0.1}, ValueError, r"random_start must be a bool or a finite number > 0, got -0\.1"),
        ({"random_start": "yes"}, TypeError, r"random_start must be a bool or a finite number > 0, got 'yes'"),
        ({"steps_after_success": -1}, ValueError, r"steps_after_success must be at least 0, got -1"),
        ({"steps_after_success": 1}, ValueError, r"steps_after_success needs stop_on_success=True, got 1 without"),
        ({"gauge": "exakt"}, ValueError, r"unknown gauge 'exakt'; did you mean 'exact'\?"),
        ({"stop_at": -0.1}, ValueError, r"stop_at must be ≥ 0 or None, got -0\.1"),
        ({"stop_at": math.nan}, ValueError, r"stop_at must be ≥ 0 or None, got nan"),
        ({"stop_at": "0.1"}, TypeError, r"stop_at must be a number or None, got '0\.1'"),
        ({"loss": "cross-entropy"}, ValueError, r"unknown loss 'cross-entropy'; did you mean 'cross_entropy'\?"),
        ({"step_size": 0.0}, ValueError, r"step_size must be > 0, got 0\.0"),
        ({"step_size": -0.1}, ValueError, r"step_size must be > 0"),
        ({"step_size": math.nan}, ValueError, r"step_size must be > 0"),
        ({"step_size": [0.1] * 9}, ValueError, r"step_size must hold one length per step \(10\), got 9"),
        ({"step_size": [0.1] * 9 + [0.0]}, ValueError, r"step_size must be > 0"),
        ({"step_size": "anealed"}, ValueError, r"unknown step_size 'anealed'; did you mean 'annealed'\?"),
        ({"step_size": ["a"] * 10}, TypeError, r"step_size must be None, a number, numbers or 'annealed'"),
        ({"step_size": {}}, TypeError, r"step_size must be None, a number, numbers or 'annealed'"),
    ],
)
def test_bad_settings(untyped, options, error, message):
    with pytest.raises(error, match=message):
        PGD(**{"threat": Linf(0.1), **options})


@pytest.mark.parametrize("confidence", [-0.1, math.inf, math.nan])
def test_bad_confidence(confidence):
    with pytest.raises(ValueError, match=r"confidence must be a finite number ≥ 0"):
        CW(Linf(0.1), confidence=confidence)


X, Y = images()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"y": Y[:5]}, ValueError, r"y must have shape \(6,\), got \(5,\)"),
        ({"y": Y[:, None]}, ValueError, r"y must have shape \(6,\), got \(6, 1\)"),
        ({"y": Y.int()}, TypeError, r"y must be int64, got torch.int32"),
        ({"y": Y.float()}, TypeError, r"y must be int64, got torch.float32"),
        ({"y": Y.tolist()}, TypeError, r"y must be a tensor, got list"),
        ({"y": Y - 1}, ValueError, r"y must be ≥ 0, got values from -1 to 1"),
        ({"y": Y + 1}, ValueError, r"y must be in 0…2, got values from 1 to 3"),
        ({"target": Y + 1}, ValueError, r"target must be in 0…2, got values from 1 to 3"),
        ({"y": Y + 1, "target": Y}, ValueError, r"y must be in 0…2, got values from 1 to 3"),
        ({"target": Y[:5]}, ValueError, r"target must have shape \(6,\)"),
        ({"target": Y.float()}, TypeError, r"target must be int64"),
        ({"index": Y[:5]}, ValueError, r"index must have shape \(6,\)"),
        ({"index": Y.int()}, TypeError, r"index must be int64"),
        ({"index": [0, 1, 2, 3, 4, 5]}, TypeError, r"index must be a tensor, got list"),
        ({"start": X[:5]}, ValueError, r"start must have x's shape \(6, 2, 5, 5\), got \(5, 2, 5, 5\)"),
        ({"start": X / 0}, ValueError, r"start holds NaN or infinite values"),
        ({"start": X.numpy()}, TypeError, r"start must be a tensor, got ndarray"),
        ({"x": X / 0}, ValueError, r"x holds NaN or infinite values"),
        ({"x": X + 0.1}, ValueError, r"x must lie within the bounds, got values from 0\.1 to 1\.1"),
        ({"x": X - 0.1}, ValueError, r"x must lie within the bounds, got values from -0\.1"),
        ({"x": (255 * X).byte()}, TypeError, r"x must be a float tensor, got torch.uint8; scale"),
        ({"x": X.numpy()}, TypeError, r"x must be a tensor, got ndarray"),
        ({"x": X[:0], "y": Y[:0]}, ValueError, r"x must have shape \(B, \*features\) with B ≥ 1"),
        ({"x": X[:, 0, 0, 0]}, ValueError, r"x must have shape \(B, \*features\)"),
        ({"x": X[:, :1]}, ValueError, r"the model fails on x of shape \(6, 1, 5, 5\)"),
        ({"final": "gradients"}, ValueError, r"unknown final 'gradients'; did you mean 'gradient'\?"),
        ({"model": lambda x: x}, TypeError, r"model must be a torch.nn.Module, got function"),
        ({"model": nn.Identity()}, ValueError, r"model must return logits of shape \(6, classes ≥ 2\)"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(50, 1))}, ValueError, r"model must return logits .* \(6, 1\)"),
    ],
)
@pytest.mark.parametrize("attack", [PGD(Linf(0.1)), CW(Linf(0.1)), FGSM(Linf(0.1))], ids=["pgd", "cw", "fgsm"])
def test_bad_arguments(untyped, attack, options, error, message):
    arguments = {"model": convnet(), "x": X, "y": Y, **options}
    with pytest.raises(error, match=message):
        attack(**arguments)


@pytest.mark.parametrize("final", ["gradient", "loss", "none"])
def test_labels_beyond_the_classes_with_every_final(final):
    with pytest.raises(ValueError, match=r"y must be in 0…2, got values from 1 to 3"):
        PGD(Linf(0.1))(convnet(), X, Y + 1, final=final)


@pytest.mark.parametrize("loss", [lambda logits, label: logits.sum(), lambda logits, label: logits])
def test_a_loss_that_is_not_per_example(loss):
    with pytest.raises(ValueError, match=r"loss must return one value an example \(6,\)"):
        PGD(Linf(0.1), loss=loss)(convnet(), X, Y)


def test_dlr_with_two_classes():
    with pytest.raises(ValueError, match=r"'dlr' needs at least 3 classes"):
        PGD(Linf(0.1), loss="dlr")(nn.Sequential(nn.Flatten(), nn.Linear(50, 2)), X, Y % 2)


def test_bad_types_are_caught_by_the_type_checker_too():
    """The tests run with it; that is what the annotations say."""
    with pytest.raises(TypeError):
        PGD(Linf(0.1), steps="3")


def test_own_losses():
    """A function's values are maximised; the gradient of an example is that of its own value."""
    seen = Counter()

    def own(logits, label):
        seen[tuple(logits.shape)] += 1
        return -(logits.gather(1, label[:, None])[:, 0] ** 3)

    x, y = images(5, shape=(6,), dtype=torch.float64)
    model = mlp()
    result = PGD(Linf(0.1), steps=4, loss=own, random_start=False)(model, x, y)
    assert seen == {(5, 3): 5}
    v = x
    for _ in range(4):
        v = (v + 0.025 * gradient_of(model, v, y, own).sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    torch.testing.assert_close(result.x_adv, v, rtol=1e-12, atol=1e-12)


def test_settings_are_values():
    assert PGD(Linf(0.1), steps=3) == PGD(Linf(0.1), steps=3)
    assert CW(Linf(0.1)) == CW(Linf(0.1))
    assert hash(FGSM(Linf(0.1))) == hash(FGSM(Linf(0.1)))
    assert set(inspect.signature(PGD.__call__).parameters) >= {"model", "x", "y", "target", "seed", "index", "final"}
