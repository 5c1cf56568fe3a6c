"""FGSM, PGD and C&W∞: the optimum where it is known, an independent search where it is not."""

import copy
import inspect
import math
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from innermax.attacks.pgd import CW, FGSM, PGD
from innermax.attacks.search import AttackResult, better, measure, search
from innermax.losses import cross_entropy, margin
from innermax.oracle.oracle import Oracle
from innermax.threat import L1, L2, Linf
from innermax.utils import randomness

NORMS = {"linf": (Linf, 0.1), "l2": (L2, 0.5), "l1": (L1, 2.0)}
UNBOUNDED = Linf(0.1, bounds=None)


def mlp(dtype=torch.float64, inputs=6, classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes)).to(
        dtype
    )


def convnet(seed=0):
    """With dropout, and BatchNorm whose statistics are not those of a new one."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(36, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    for _ in range(5):
        model(torch.rand(8, 2, 5, 5))
    return model


def images(count=6, shape=(2, 5, 5), dtype=torch.float32, seed=0):
    """Clean images, a fifth of whose pixels are at a bound, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(count, *shape, generator=generator, dtype=dtype) * 1.5 - 0.25).clamp(0, 1)
    return x, torch.arange(count) % 3


def logits_of(model, x):
    return (copy.deepcopy(model).eval() if model.training else model)(x)


def gradient_of(model, x, y, loss=cross_entropy):
    point = x.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(logits_of(model, point), y).sum(), point)[0]


class Log:
    """What passed through a network; copies of the network write into the same one."""

    def __init__(self):
        self.inputs, self.gradients, self.modules = [], 0, []

    def __deepcopy__(self, memo):
        return self

    @property
    def rows(self):
        return [len(x) for x in self.inputs]


class Logged(nn.Module):
    """A model that writes down each batch that it, or a copy of it, is asked about, and each gradient."""

    def __init__(self, model):
        super().__init__()
        self.model, self.log = model, Log()

    def forward(self, x):
        self.log.inputs.append(x.detach().clone())
        self.log.modules.append(self)
        if x.requires_grad:
            x.register_hook(self._backward)
        return self.model(x)

    def _backward(self, gradient):
        self.log.gradients += len(gradient)


# The optimum of a linear model


SLOPES = np.array(
    [1.0, 0.2, -1.0]
)  # logits = slopes · z + offsets: leaving label 0 is to lower z, leaving 2 to raise it
OFFSETS = np.array([0.1, 0.0, -0.2])


class Linear:
    """A problem whose optimum is known: a model linear in z = x·w, inputs, labels 0 and 2."""

    def __init__(self, batch, shape, bounds, seed=0):
        generator = np.random.default_rng(seed)
        size = math.prod(shape)
        self.w = generator.normal(size=size)
        self.x = generator.uniform(size=(batch, size)).astype(np.float32)
        self.x[:, ::5] = generator.integers(0, 2, size=self.x[:, ::5].shape)
        self.y = generator.choice([0, 2], size=batch)
        self.bounds = bounds
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(size, 3))
        self.model[1].weight.data = torch.tensor(np.outer(SLOPES, self.w), dtype=torch.float32)
        self.model[1].bias.data = torch.tensor(OFFSETS, dtype=torch.float32)
        self.inputs = torch.tensor(self.x).reshape(batch, *shape), torch.tensor(self.y)

    def room(self):
        """How far each coordinate of x may move, down and up."""
        if self.bounds is None:
            return np.full(self.x.shape, -np.inf), np.full(self.x.shape, np.inf)
        return self.bounds[0] - self.x.astype(np.float64), self.bounds[1] - self.x.astype(np.float64)

    def optimum(self, norm, eps, direction):
        """The largest direction·(w·δ) of each example over ‖δ‖ ≤ ε and the bounds."""
        down, up = self.room()
        return [
            {"linf": best_linf, "l2": best_l2, "l1": best_l1}[norm](sign * self.w, eps, lo, hi)
            for sign, lo, hi in zip(direction, down, up, strict=True)
        ]

    def loss(self, loss, moved, label=None):
        """The loss where z has moved by `moved`."""
        z = self.x.astype(np.float64) @ self.w + moved
        logits = z[:, None] * SLOPES + OFFSETS
        label = self.y if label is None else label
        own = logits[np.arange(len(z)), label]
        if loss == "cross_entropy":
            return np.log(np.exp(logits - own[:, None]).sum(1))
        others = np.where(np.arange(3) == label[:, None], -np.inf, logits)
        return others.max(1) - own

    def moved(self, x_adv):
        return (x_adv.double().flatten(1).numpy() - self.x.astype(np.float64)) @ self.w


def best_linf(g, eps, lo, hi):
    return sum(gi * (min(eps, h) if gi > 0 else max(-eps, l)) for gi, l, h in zip(g, lo, hi, strict=True))


def best_l1(g, eps, lo, hi):
    """The largest slopes first, each to its bound."""
    total = 0.0
    for i in sorted(range(len(g)), key=lambda i: -abs(g[i])):
        taken = min(eps, hi[i] if g[i] > 0 else -lo[i])
        total, eps = total + abs(g[i]) * taken, eps - taken
    return total


def best_l2(g, eps, lo, hi):
    """Along clip(s·g), whose length grows with s, by bisection."""
    least, most = 0.0, 1e6
    for _ in range(200):
        s = (least + most) / 2
        least, most = (s, most) if np.linalg.norm(np.clip(s * g, lo, hi)) < eps else (least, s)
    return float(g @ np.clip(least * g, lo, hi))


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
    assert oracle.plan.endswith("bf16")
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


# Randomness


def starts(attack, model, x, y, **options):
    logged = Logged(model)
    attack(logged, x, y, **options)
    return logged.log.inputs


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


# An example's result is its own


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "options", [{}, {"stop_at": 0.3, "gauge": "relative"}, {"stop_on_success": True, "restarts": 2}]
)
def test_an_examples_result_does_not_depend_on_its_batch(norm, options):
    make, eps = NORMS[norm]
    x, y = images(11, shape=(6,), dtype=torch.float64)
    model = mlp()
    attack = PGD(make(eps), steps=6, **options)
    whole = attack(model, x, y)
    for rows in (torch.arange(10, -1, -1), torch.tensor([8, 2, 5]), torch.tensor([6])):
        part = attack(model, x[rows], y[rows], index=rows)
        for field in fields(AttackResult):
            mine, other = getattr(part, field.name), getattr(whole, field.name)[rows]
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_neighbours_do_not_change_a_bit_at_the_same_shape():
    x, y = images(8)
    model, attack = convnet(), PGD(Linf(0.1), steps=5)
    whole = attack(model, x, y)
    other = attack(model, torch.cat([x[:4], 1 - x[4:]]), torch.cat([y[:4], (y[4:] + 1) % 3]))
    for field in fields(AttackResult):
        assert torch.equal(getattr(whole, field.name)[:4], getattr(other, field.name)[:4])
    assert not torch.equal(whole.x_adv[4:], other.x_adv[4:])


# Stopping, against an independent search


def naive_gauges(norm, eps, bounded, g, v, x):
    """(exact, ball, relative) FOSC of one example, straight from the definitions."""
    delta = v - x
    dual = {"linf": g.abs().sum(), "l2": g.norm()}[norm]
    ball = eps * dual - (delta * g).sum()
    if not bounded:
        return {"exact": ball, "ball": ball, "relative": ball / (2 * eps * dual)}
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    exact = torch.maximum(g * (high - v), g * (low - v)).sum()
    return {"exact": exact, "ball": ball, "relative": exact / (g.abs() * (high - low)).sum()}


def naive_move(norm, eps, bounded, g, v, x, step):
    if norm == "linf":
        moved = (v + step * g.sign()).clamp(x - eps, x + eps)
        return moved.clamp(0, 1) if bounded else moved
    delta = v + step * g / g.norm() - x
    return x + delta * min(1.0, eps / float(delta.norm()))


def naive_search(model, norm, eps, bounded, x, y, start, sizes, gauge, threshold):
    """One example after the other: its path, and the gauges on it."""
    found, model = [], copy.deepcopy(model).eval()
    for i in range(len(x)):
        v, recorded = start[i], []
        for k in range(len(sizes) + 1):
            g = gradient_of(model, v[None], y[i : i + 1])[0]
            recorded.append(float(naive_gauges(norm, eps, bounded, g, v, x[i])[gauge]))
            if k == len(sizes) or (k >= 1 and recorded[-1] <= threshold):
                break
            v = naive_move(norm, eps, bounded, g, v, x[i], sizes[k])
        found.append((v, recorded))
    return found


@settings(max_examples=25, phases=[Phase.generate])  # shrinking would take minutes
@given(
    norm=st.sampled_from(["linf", "l2"]),
    gauge=st.sampled_from(["exact", "ball", "relative"]),
    final=st.sampled_from(["gradient", "loss", "none"]),
    seed=st.integers(0, 1000),
    steps=st.integers(1, 8),
    quantile=st.floats(0, 1),
)
def test_an_example_stops_at_its_first_iterate_at_or_below_the_threshold(norm, gauge, final, seed, steps, quantile):
    bounded = norm == "linf"
    eps = 0.3 if bounded else 0.8
    threat = Linf(eps) if bounded else L2(eps, bounds=None)
    x, y = images(7, shape=(6,), dtype=torch.float64, seed=seed)
    model = mlp(seed=seed % 5)
    # A threshold that some of the gauges on the way are below and others above.
    start = starts(PGD(threat, steps), model, x, y, seed=seed)[0]
    sizes = [eps / 4] * steps
    problem = model, norm, eps, bounded, x, y, start, sizes, gauge
    gauges = sorted(value for _, recorded in naive_search(*problem, -1.0) for value in recorded)
    place = quantile * (len(gauges) - 1)
    threshold = gauges[int(place)] / 2 + gauges[math.ceil(place)] / 2 + 1e-7
    expected = naive_search(*problem, threshold)

    logged = Logged(model)
    result = PGD(threat, steps, stop_at=threshold, gauge=gauge)(logged, x, y, seed=seed, final=final)
    taken = torch.tensor([len(recorded) - 1 for _, recorded in expected])
    stopped = torch.tensor([len(g) <= steps or (g[-1] <= threshold and steps < 1) for _, g in expected])
    assert torch.equal(result.steps, taken)
    torch.testing.assert_close(result.x_adv, torch.stack([v for v, _ in expected]), rtol=1e-9, atol=1e-9)
    assert torch.equal(result.gradient_calls, taken + (stopped | torch.tensor(final == "gradient")))
    assert torch.equal(result.forward_calls, (~stopped & torch.tensor(final == "loss")).long())

    # The network saw the active examples, nobody else, and no gradient twice.
    active = [sum(len(recorded) > k for _, recorded in expected) for k in range(steps)]
    active.append(int((~stopped).sum()) if final != "none" else 0)
    assert logged.log.rows == [count for count in active if count > 0]
    assert logged.log.gradients == int(result.gradient_calls.sum())
    assert sum(logged.log.rows) == int((result.gradient_calls + result.forward_calls).sum())

    # What is reported belongs to the returned x_adv.
    if final != "none" or bool(stopped.all()):
        torch.testing.assert_close(result.logits, logits_of(model, result.x_adv), rtol=1e-9, atol=1e-9)
        loss = F.cross_entropy(result.logits, y, reduction="none")
        torch.testing.assert_close(result.loss, loss, rtol=1e-9, atol=1e-9)
        assert torch.equal(result.misclassified, result.logits.argmax(1) != y)
    else:
        assert result.logits is None
        assert result.loss is None
        assert result.misclassified is None
    if final == "gradient" or bool(stopped.all()):
        g = gradient_of(model, result.x_adv, y)
        found = [naive_gauges(norm, eps, bounded, *row) for row in zip(g, result.x_adv, x, strict=True)]
        for name, values in (("exact", result.fosc), ("relative", result.relative_fosc)):
            torch.testing.assert_close(values, torch.stack([row[name] for row in found]), rtol=1e-6, atol=1e-9)
        assert not result.zero_gradient.any()
    else:
        assert result.fosc is None
        assert result.relative_fosc is None
        assert result.zero_gradient is None


@pytest.mark.parametrize("gauge", ["exact", "ball", "relative"])
def test_a_gauge_equal_to_the_threshold_stops(gauge):
    x, y = images(1, shape=(6,), dtype=torch.float64)
    model, threat = mlp(), Linf(0.3)
    point = PGD(threat, steps=1)(model, x, y)
    gradient = Oracle(model).gradient(point.x_adv, y, cross_entropy).gradient
    value = float(threat.gap(gradient, point.x_adv, x, bounded=gauge != "ball", relative=gauge == "relative"))
    assert value > 0
    at = PGD(threat, steps=5, step_size=0.075, stop_at=value, gauge=gauge)(model, x, y)
    below = PGD(threat, steps=5, step_size=0.075, stop_at=math.nextafter(value, 0), gauge=gauge)(model, x, y)
    assert at.steps.tolist() == [1]
    assert at.gradient_calls.tolist() == [2]
    assert torch.equal(at.x_adv, point.x_adv)
    assert below.steps > 1


def test_a_threshold_of_zero_stops_at_a_maximum():
    problem = Linear(5, (6,), None)
    x, y = problem.inputs
    attack = PGD(UNBOUNDED, steps=10, step_size=0.1, random_start=False, stop_at=0.0)
    result = attack(problem.model.double(), x.double() * 0, y)
    assert result.steps.tolist() == [1] * 5
    assert result.gradient_calls.tolist() == [2] * 5
    assert result.fosc.tolist() == [0.0] * 5


def test_every_example_takes_one_step_whatever_the_threshold():
    """Even one that starts at the maximum."""
    x, y = images()
    result = PGD(Linf(0.1), steps=5, stop_at=1e9)(convnet(), x, y)
    assert result.steps.tolist() == [1] * 6
    assert result.gradient_calls.tolist() == [2] * 6
    once = PGD(Linf(0.1), steps=1)(convnet(), x, y)
    assert torch.equal(result.x_adv, once.x_adv)


@pytest.mark.parametrize(("final", "gradients", "forwards"), [("gradient", 5, 0), ("loss", 4, 1), ("none", 4, 0)])
def test_what_the_end_costs(final, gradients, forwards):
    x, y = images()
    model = Logged(convnet())
    result = PGD(Linf(0.1), steps=4)(model, x, y, final=final)
    assert result.gradient_calls.tolist() == [gradients] * 6
    assert result.forward_calls.tolist() == [forwards] * 6
    assert model.log.rows == [6] * (gradients + forwards)
    assert model.log.gradients == 6 * gradients
    same = PGD(Linf(0.1), steps=4)(convnet(), x, y)
    assert torch.equal(result.x_adv, same.x_adv)
    for name in ("loss", "logits", "misclassified"):
        assert (getattr(result, name) is None) == (final == "none")
        if final == "loss":
            torch.testing.assert_close(getattr(result, name), getattr(same, name))
    for name in ("fosc", "relative_fosc", "zero_gradient"):
        assert (getattr(result, name) is None) == (final != "gradient")


# Success and restarts


def test_fallen_examples_leave():
    x, y = images(12, shape=(6,), dtype=torch.float64)
    model = Logged(mlp())
    y[2:] = logits_of(model.model, x).argmax(1)[2:]
    threat = Linf(0.5, bounds=None)
    attack = PGD(threat, steps=6, stop_on_success=True, step_size=0.1)
    result = attack(model, x, y)
    fallen = result.misclassified
    assert 0 < fallen.sum() < 12
    # Each fell at the first iterate that is misclassified, which may be its start.
    path = starts(PGD(threat, steps=6, step_size=0.1), model.model, x, y)
    wrong = torch.stack([logits_of(model.model, point).argmax(1) != y for point in path])
    first = torch.where(wrong.any(0), wrong.long().argmax(0), 6)
    assert torch.equal(result.steps, first)
    assert torch.equal(fallen, wrong.any(0))
    assert (first == 0).any()
    assert ((first > 0) & (first < 6)).any()
    expected = torch.stack([path[k][row] for row, k in enumerate(first.tolist())])
    torch.testing.assert_close(result.x_adv, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(result.gradient_calls, first + 1)
    assert model.log.rows == [int((first >= k).sum()) for k in range(7)]


def single_searches(attack, model, x, y, seed, restarts):
    """Each restart's search for itself."""
    oracle, feasible, index = Oracle(model), attack.threat.around(x), torch.arange(len(x))
    found = []
    for restart in range(restarts):
        start = feasible.sample(randomness.hash_keys(seed, index, restart))
        found.append(search(oracle, feasible, start, y, attack.objective(), attack.step_sizes()))
    return found


def last_logit(logits, label):
    """A loss that is higher where the label is predicted, for some: success and loss part ways."""
    return logits[:, -1]


@pytest.mark.parametrize("loss", ["cross_entropy", last_logit])
@pytest.mark.parametrize("norm", NORMS)
def test_the_best_restart_is_kept_for_each_example(norm, loss):
    make, eps = NORMS[norm][0], {"linf": 0.3, "l2": 1.5, "l1": 4.0}[norm]
    x, y = images(24, shape=(6,), dtype=torch.float64)
    model, attack = mlp(seed=5), PGD(make(eps), steps=2, restarts=4, loss=loss)
    result = attack(model, x, y, seed=3)
    searches = single_searches(attack, model, x, y, 3, 4)
    choice, by_loss = [], []
    for row in range(24):
        ranks = [(bool(found.misclassified[row]), float(found.loss[row])) for found in searches]
        choice.append(max(range(4), key=lambda k: ranks[k]))
        by_loss.append(max(range(4), key=lambda k: ranks[k][1]))
    assert choice != by_loss or loss == "cross_entropy"
    assert len(set(choice)) > 1
    for field in fields(AttackResult):
        if field.name not in ("gradient_calls", "forward_calls"):
            expected = torch.stack([getattr(searches[k], field.name)[row] for row, k in enumerate(choice)])
            torch.testing.assert_close(getattr(result, field.name), expected, rtol=1e-12, atol=1e-12)
    assert result.gradient_calls.tolist() == [4 * 3] * 24
    one = PGD(make(eps), steps=2, loss=loss)(model, x, y, seed=3)
    assert (result.misclassified | ~one.misclassified).all()
    assert ((result.loss >= one.loss) | (result.misclassified & ~one.misclassified)).all()


def test_success_comes_before_loss():
    def result(loss, fallen, calls):
        rows = len(loss)
        return AttackResult(
            x_adv=torch.full((rows, 2), float(calls)),
            loss=torch.tensor(loss),
            logits=torch.full((rows, 3), float(calls)),
            fosc=None,
            relative_fosc=None,
            zero_gradient=None,
            misclassified=torch.tensor(fallen),
            steps=torch.full((rows,), calls),
            gradient_calls=torch.full((rows,), calls),
            forward_calls=torch.full((rows,), 1),
        )

    one = result([1.0, 1.0, 1.0, 1.0, 1.0, math.nan, 1.0], [False, True, False, True, True, False, True], 1)
    two = result([2.0, 2.0, 0.5, 0.5, 2.0, 1.0, 1.0], [False, False, True, True, True, True, True], 2)
    best = better(one, two)
    taken = [2, 1, 2, 1, 2, 2, 1]  # of two alike the first
    assert best.steps.tolist() == taken
    assert best.x_adv[:, 0].tolist() == taken
    assert best.logits[:, 2].tolist() == taken
    assert best.loss.tolist() == [2.0, 1.0, 0.5, 1.0, 2.0, 1.0, 1.0]
    assert best.misclassified.tolist() == [False, True, True, True, True, True, True]
    assert best.gradient_calls.tolist() == [3] * 7
    assert best.forward_calls.tolist() == [2] * 7


def test_only_survivors_start_again():
    x, y = images(12, shape=(6,), dtype=torch.float64)
    model = mlp()
    attack = PGD(Linf(0.2), steps=2, restarts=4, stop_on_success=True)
    logged = Logged(model)
    result = attack(logged, x, y, seed=1)
    options = {"stop_on_success": True}
    oracle, feasible, rows = Oracle(model), attack.threat.around(x), torch.arange(12)
    expected_rows, calls = [], torch.zeros(12, dtype=torch.int64)
    fallen = torch.zeros(12, dtype=torch.bool)
    for restart in range(4):
        start = feasible[rows].sample(randomness.hash_keys(1, rows, restart))
        found = search(oracle, feasible[rows], start, y[rows], cross_entropy, attack.step_sizes(), **options)
        expected_rows += [int((found.steps >= k).sum()) for k in range(3)]
        calls[rows] += found.gradient_calls
        fallen[rows] = found.misclassified
        rows = rows[~found.misclassified]
    assert 0 < len(rows) < 12
    assert logged.log.rows == [count for count in expected_rows if count > 0]
    assert torch.equal(result.gradient_calls, calls)
    assert torch.equal(result.misclassified, fallen)
    assert len(set(calls[~fallen].tolist())) == 1


# A given start


def test_a_search_in_two_halves_is_the_search():
    x, y = images(12, shape=(6,), dtype=torch.float64)
    model, threat = mlp(), Linf(0.2)
    whole = PGD(threat, steps=6)(model, x, y, seed=3)
    first = PGD(threat, steps=4)(model, x, y, seed=3, final="none")
    second = PGD(threat, steps=2)(model, x, y, seed=9, start=first.x_adv)
    assert torch.equal(second.x_adv, whole.x_adv)
    assert torch.equal(second.steps, torch.full((12,), 2))
    assert (second.x_adv != PGD(threat, steps=2)(model, x, y, seed=9).x_adv).any()


def test_a_start_is_projected():
    x, y = images(12, shape=(6,))
    attack = PGD(L2(0.3), steps=1, step_size=1e-9)
    outside = x + torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    found = attack(mlp(), x.double(), y, start=outside.double(), final="none").x_adv
    torch.testing.assert_close(found, L2(0.3).project(outside.double(), x.double()), rtol=0, atol=1e-8)
    assert ((found - x).norm(dim=1) > 0.29).any()


@pytest.mark.parametrize("gauge", ["exact", "ball", "relative"])
def test_an_example_that_is_still_converged_takes_no_step(gauge):
    x, y = images(12, shape=(6,), dtype=torch.float64)
    model, threat = mlp(), Linf(0.2)
    start = PGD(threat, steps=3)(model, x, y, final="none").x_adv
    gauges = measure(threat.around(x), gradient_of(model, start, y), start, gauge)
    threshold = float(gauges.sort().values[5:7].mean())
    logged = Logged(model)
    found = PGD(threat, steps=2, gauge=gauge, stop_at=threshold)(logged, x, y, start=start, final="none")
    still = gauges <= threshold
    assert still.sum() == 6
    assert torch.equal(found.steps == 0, still)
    assert torch.equal(found.x_adv[still], start[still])
    assert set(found.gradient_calls[still].tolist()) == {1}
    assert (found.x_adv[~still] != start[~still]).any(1).all()
    assert logged.log.rows[0] == 12
    assert logged.log.rows[1] <= 6


def test_a_start_without_gradient_moves_on():
    """Zero gradients are nothing to follow, not convergence: such an example stays in the search."""
    x, y = images(6, shape=(6,), dtype=torch.float64)
    flat = nn.Sequential(nn.Linear(6, 3), nn.Hardtanh(9.0, 9.5)).double()
    found = PGD(Linf(0.2), steps=2, stop_at=0.1)(flat, x, y, start=x, final="none")
    assert found.steps.tolist() == [2] * 6


def test_further_restarts_start_at_random():
    x, y = images(12, shape=(6,), dtype=torch.float64)
    model, attack = mlp(), PGD(Linf(0.2), steps=2, restarts=3)
    start = x.clone()
    found = attack(model, x, y, seed=4, start=start)
    single = replace(attack, restarts=1)
    begun = [start, *(attack.threat.around(x).sample(randomness.hash_keys(4, torch.arange(12), r)) for r in (1, 2))]
    losses = torch.stack([single(model, x, y, start=one).loss for one in begun])
    fallen = torch.stack([single(model, x, y, start=one).misclassified for one in begun])
    assert torch.equal(found.misclassified, fallen.any(0))
    never = ~fallen.any(0)
    torch.testing.assert_close(found.loss[never], losses.max(0).values[never], rtol=1e-9, atol=0)


def test_restarts_end_when_nobody_survives():
    x, _ = images()
    model = convnet()
    wrong = (logits_of(model, x).argmax(1) + 1) % 3
    logged = Logged(model)
    result = PGD(Linf(1e-6), steps=3, restarts=5, stop_on_success=True)(logged, x, wrong)
    assert result.misclassified.all()
    assert logged.log.rows == [6]
    assert result.steps.tolist() == [0] * 6


@pytest.mark.parametrize("final", ["loss", "none"])
@pytest.mark.parametrize("stop_on_success", [True, False])
@pytest.mark.parametrize("stop_at", [None, 0.3])
def test_restarts_with_every_final(final, stop_on_success, stop_at):
    """Also where the examples of one restart all stop early, so that it knows more than the next."""
    x, y = images(4, shape=(6,), dtype=torch.float64)
    model = mlp()
    options = {"steps": 3, "restarts": 3, "stop_at": stop_at, "gauge": "relative"}
    attack = PGD(Linf(0.1), stop_on_success=stop_on_success, **options)
    for seed in range(5):
        result = attack(model, x, y, seed=seed, final=final)
        torch.testing.assert_close(result.logits, logits_of(model, result.x_adv), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result.loss, F.cross_entropy(result.logits, y, reduction="none"))
        full = attack(model, x, y, seed=seed)
        torch.testing.assert_close(result.x_adv, full.x_adv, rtol=1e-9, atol=1e-9)
        if result.fosc is not None:
            torch.testing.assert_close(result.fosc, full.fosc, rtol=1e-6, atol=1e-9)


# Gradients that are zero, NaN; answers that are NaN


def saturated(net, x):
    return 1e4 * net(x)


class Wrapped(nn.Module):
    def __init__(self, forward, model):
        super().__init__()
        self.model, self._own = model, forward

    def forward(self, x):
        return self._own(self.model, x)


@pytest.mark.parametrize("gauge", ["exact", "ball", "relative"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "forward", [saturated, lambda net, x: net(x).detach(), lambda net, x: net(0 * x), lambda net, x: net(x).round()]
)
def test_a_zero_gradient_is_reported_and_never_convergence(forward, norm, gauge):
    make, eps = NORMS[norm]
    torch.manual_seed(0)
    x, _ = images()
    model = Wrapped(forward, nn.Sequential(nn.Flatten(), nn.Linear(50, 3)))
    y = logits_of(model, x).argmax(1)
    threat = make(eps)
    attack = PGD(threat, steps=4, stop_at=10.0 if gauge != "relative" else 1.0, gauge=gauge)
    logged = Logged(model)
    result = attack(logged, x, y)
    if forward is saturated:
        zero = (gradient_of(model, result.x_adv, y) == 0).flatten(1).all(1)
        assert zero.any()
    else:
        zero = torch.ones(6, dtype=torch.bool)
    assert torch.equal(result.zero_gradient, zero)
    assert result.relative_fosc[zero].isnan().all()
    assert not result.relative_fosc[~zero].isnan().any()
    assert result.steps[zero].tolist() == [4] * int(zero.sum())
    assert (result.fosc[zero] == 0).all()
    assert torch.equal(result.x_adv[zero], logged.log.inputs[0][zero])  # nothing to follow: they stay
    assert threat.contains(result.x_adv, x).all()


def test_an_l1_example_without_gradient_stays():
    x, y = images()
    model = Logged(Wrapped(lambda net, x: net(0 * x), convnet()))
    result = PGD(L1(2.0), steps=4)(model, x, y)
    assert torch.equal(result.x_adv, model.log.inputs[0])


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_that_are_nan(norm):
    """√ of 0: an infinite slope times 0. Only where the gradient is a number is it followed."""
    make, eps = NORMS[norm]
    x, y = images()
    model = Wrapped(lambda net, x: net(x) + (0 * x[:, :1]).sqrt().flatten(1).sum(1, keepdim=True), convnet())
    assert gradient_of(model, x, y)[:, 0].isnan().all()
    threat = make(eps)
    result = PGD(threat, steps=3, random_start=False)(model, x, y)
    assert threat.contains(result.x_adv, x).all()
    assert torch.equal(result.x_adv[:, 0], x[:, 0])
    assert (result.loss > F.cross_entropy(logits_of(model, x), y, reduction="none")).all()
    assert result.fosc.isfinite().all()
    nothing = Wrapped(lambda net, x: net(x) + (0 * x).sqrt().flatten(1).sum(1, keepdim=True), convnet())
    result = PGD(threat, steps=3)(nothing, x, y)
    assert result.zero_gradient.all()
    assert result.relative_fosc.isnan().all()


@pytest.mark.parametrize("final", ["gradient", "loss"])
def test_nan_logits_are_refused(final):
    x, y = images()
    model = Wrapped(lambda net, x: torch.where(x[:, :1, 0, 0] > 0.5, math.nan, net(x)), convnet())
    with pytest.raises(ValueError, match=r"the model returns NaN logits for \d of 6 inputs"):
        PGD(Linf(0.01), steps=2)(model, x, y, final=final)


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


def snapshot(model):
    """Everything about a model that an attack might touch."""
    return {
        "flags": [(name, module.training) for name, module in model.named_modules()],
        "tensors": {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())},
        "identities": [id(value) for value in (*model.parameters(), *model.buffers())],
        "versions": [value._version for value in (*model.parameters(), *model.buffers())],
        "strides": [value.stride() for value in model.parameters()],
        "requires_grad": [value.requires_grad for value in model.parameters()],
        "grads": [None if value.grad is None else value.grad.clone() for value in model.parameters()],
        "grad identities": [id(value.grad) for value in model.parameters()],
        "random": torch.get_rng_state(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def half_trained():
    """In training mode but for one frozen BatchNorm, with some gradients and some frozen parameters."""
    model = convnet().train()
    F.cross_entropy(model(torch.rand(8, 2, 5, 5)), torch.arange(8) % 3).backward()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].weight.grad = None
    return model


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
        ({"gauge": "exakt"}, ValueError, r"unknown gauge 'exakt'; did you mean 'exact'\?"),
        ({"stop_at": -0.1}, ValueError, r"stop_at must be ≥ 0 or None, got -0\.1"),
        ({"stop_at": math.nan}, ValueError, r"stop_at must be ≥ 0 or None, got nan"),
        ({"stop_at": "0.1"}, TypeError, r"stop_at must be a number or None, got '0\.1'"),
        ({"loss": "cross-entropy"}, ValueError, r"unknown loss 'cross-entropy'; did you mean 'cross_entropy'\?"),
        ({"step_size": 0.0}, ValueError, r"step_size must be > 0, got 0\.0"),
        ({"step_size": -0.1}, ValueError, r"step_size must be > 0"),
        ({"step_size": math.nan}, ValueError, r"step_size must be > 0"),
        ({"step_size": [0.1] * 9}, ValueError, r"step_size must hold one length a step \(10\), got 9"),
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


@pytest.mark.parametrize(("final", "coarse", "precise"), [("none", 8, 0), ("loss", 6, 2), ("gradient", 6, 3)])
def test_where_an_end_is_scored_the_last_quarter_of_the_steps_is_asked_in_float32(final, coarse, precise, monkeypatch):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(2, 1, 3, 4), torch.tensor([0, 1])
    oracle = Oracle.fast(model, x, "bf16")
    asked = []
    for one in (oracle, oracle.precise):
        answer = one.gradient

        def counted(*arguments, one=one, answer=answer):
            asked.append(one)
            return answer(*arguments)

        monkeypatch.setattr(one, "gradient", counted)
    PGD(Linf(0.1), steps=8)(oracle, x, y, final=final)
    assert asked == [oracle] * coarse + [oracle.precise] * precise


def misled():
    """A model whose clean answers seem wrong in bf16: logits so large that it tells the classes of few images apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 2))
    model[1].bias.data[:] = 100
    x = 0.3 + 0.4 * torch.rand(16, 2, 5, 5)
    y = model(x).argmax(1)
    oracle = Oracle.fast(model, x, "bf16")
    assert (oracle.logits(x).argmax(1) != y).sum() >= 3
    return model, oracle, x, y


@pytest.mark.parametrize("options", [{}, {"restarts": 3}])
@pytest.mark.parametrize("final", ["gradient", "loss", "none"])
@pytest.mark.parametrize("eps", [1e-4, 0.02, 0.3])
def test_nobody_leaves_on_the_word_of_bf16(eps, final, options, monkeypatch):
    model, oracle, x, y = misled()
    asked, answer = [], oracle.precise.logits
    monkeypatch.setattr(oracle.precise, "logits", lambda x: asked.append(len(x)) or answer(x))
    attack = PGD(Linf(eps), **{"steps": 8, "stop_on_success": True, **options})
    result = attack(oracle, x, y, final=final)
    fallen = model(result.x_adv).argmax(1) != y
    exact = attack(model, x, y, final="loss").misclassified
    assert (fallen == exact).float().mean() > 0.9
    if eps == 1e-4:
        assert not fallen.any()
        assert (result.forward_calls >= 2).sum() >= 3, "asked at more than one point"
    if eps == 0.3:
        assert fallen.all()
    assert len(asked) > 0
    assert int(result.forward_calls.sum()) == sum(asked)
    if result.misclassified is not None:
        assert torch.equal(result.misclassified, fallen)
    if result.logits is not None:
        truth = model(result.x_adv)
        torch.testing.assert_close(result.logits[fallen], truth[fallen])
        torch.testing.assert_close(result.loss[fallen], F.cross_entropy(truth, y, reduction="none")[fallen])


@pytest.mark.parametrize("final", ["gradient", "loss"])
def test_who_stops_on_its_gauge_has_not_fallen_on_the_word_of_bf16(final):
    """And starts again, as a survivor does."""
    _, oracle, x, y = misled()
    attack = PGD(Linf(1e-4), steps=8, restarts=2, stop_at=1e9, stop_on_success=True)
    result = attack(oracle, x, y, final=final)
    assert not result.misclassified.any()
    assert result.steps.tolist() == [1] * 16
    assert result.gradient_calls.tolist() == [4] * 16


def test_in_float32_nobody_is_asked_twice():
    model, _, x, y = misled()
    logged = Logged(model)
    result = PGD(Linf(0.3), steps=8, stop_on_success=True)(logged, x, y)
    assert result.misclassified.all()
    assert result.forward_calls.tolist() == [0] * 16
    assert sum(logged.log.rows) == int(result.gradient_calls.sum())


def test_an_oracle_in_float32_is_its_own_precise_one():
    oracle = Oracle.fast(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(2, 1, 2, 2), "float32")
    assert oracle.precise is oracle


def test_the_precise_oracle_learns_with_the_other():
    torch.manual_seed(0)
    x = torch.rand(4, 1, 2, 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    oracle = Oracle.fast(model, x, "bf16")
    with torch.no_grad():
        model[1].weight.mul_(-2)
    oracle.refresh()
    assert torch.allclose(oracle.precise.logits(x), model(x).detach(), atol=1e-6)
