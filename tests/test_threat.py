"""Threat models against independent solvers in double precision: linear programs, bisection on the dual and SLSQP."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from scipy import optimize, stats

import innermax as im
from innermax.threat import L1, L2, Linf, Threat, build_threat, format_eps
from innermax.threat import NORMS as NAMES
from tests.helpers.threats import ScaledL2, WeightedLinf

NORMS = [Linf, L2, L1]
SHAPES = [(1,), (2,), (3,), (6,), (2, 2), (1, 2, 2), (3, 1, 2), (2, 1, 3)]
ORDER = {Linf: math.inf, L2: 2, L1: 1}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-7}


# ------------------------------------------------------------------------------------------------ independent solvers


def support(norm: type[Threat], c: np.ndarray, low: np.ndarray, high: np.ndarray, eps: float) -> float:
    """max of ⟨c, u⟩ over ‖u‖ ≤ ε, low ≤ u ≤ high, where low ≤ 0 ≤ high."""
    scale = np.abs(c).max()
    if scale == 0:
        return 0.0
    c = c / scale
    if norm is L2:
        return scale * _support_l2(c, low, high, eps)
    if norm is Linf:
        box = np.stack([np.maximum(low, -eps), np.minimum(high, eps)], axis=1)
        return -scale * optimize.linprog(-c, bounds=box).fun
    # u = p − n with p, n ≥ 0 and Σ p + n ≤ ε.
    box = [(0, h) for h in high] + [(0, -l) for l in low]
    ones = np.ones((1, 2 * len(c)))
    return -scale * optimize.linprog(np.concatenate([-c, c]), A_ub=ones, b_ub=[eps], bounds=box).fun


def _support_l2(c: np.ndarray, low: np.ndarray, high: np.ndarray, eps: float) -> float:
    """The ball's multiplier by bisection: ‖clip(c/λ, low, high)‖ falls with λ."""
    corner = np.where(c > 0, high, np.where(c < 0, low, 0.0))
    if np.linalg.norm(corner) <= eps:
        return float(c @ corner)
    small, large = -200.0, math.log(np.linalg.norm(c) / eps) + 1e-9
    for _ in range(120):
        middle = (small + large) / 2
        if np.linalg.norm(np.clip(c * math.exp(-middle), low, high)) > eps:
            small = middle
        else:
            large = middle
    return float(c @ np.clip(c * math.exp(-large), low, high))


def slsqp(norm: type[Threat], objective, low: np.ndarray, high: np.ndarray, eps: float) -> np.ndarray:
    """Minimum of a smooth convex objective(u) -> (value, gradient) over ball ∩ [low, high]; L1 as u = p − n."""
    d = len(low)
    if norm is L1:
        split = lambda z: (lambda value, slope: (value, np.concatenate([slope, -slope])))(*objective(z[:d] - z[d:]))  # noqa: E731
        bounds = [(0, h) for h in high] + [(0, -l) for l in low]
        ball = {"type": "ineq", "fun": lambda z: eps - z.sum(), "jac": lambda z: -np.ones_like(z)}
        z = optimize.minimize(
            split, np.zeros(2 * d), jac=True, bounds=bounds, constraints=ball, method="SLSQP", tol=1e-12
        ).x
        return z[:d] - z[d:]
    if norm is Linf:
        low, high, ball = np.maximum(low, -eps), np.minimum(high, eps), ()
    else:
        ball = {"type": "ineq", "fun": lambda z: eps**2 - z @ z, "jac": lambda z: -2 * z}
    start, bounds = np.zeros(d), np.stack([low, high], axis=1)
    return optimize.minimize(objective, start, jac=True, bounds=bounds, constraints=ball, method="SLSQP", tol=1e-12).x


# --------------------------------------------------------------------------------------------------------- generators


@dataclass
class Case:
    """A threat, clean inputs, points of X(x) and gradients; `low` and `high` bound the flat perturbation."""

    threat: Threat
    x: torch.Tensor
    x_adv: torch.Tensor
    gradient: torch.Tensor

    @property
    def norm(self) -> type[Threat]:
        return type(self.threat)

    @property
    def tolerance(self) -> float:
        """Absolute, for lengths: what rounding does to values of this case's size."""
        size = max(1.0, self.threat.eps, float(self.x.abs().max()))
        return TOLERANCE[self.x.dtype] * size

    def rows(self):
        """(x, low, high, eps) of each example in double precision, the interval relative to x."""
        low, high = box(self.threat, self.x)
        for x, l, h in zip(double(self.x), double(low), double(high), strict=True):
            yield x, l - x, h - x, self.threat.eps


def double(values: torch.Tensor) -> np.ndarray:
    return values.flatten(1).double().numpy()


def box(threat: Threat, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds as tensors of x's shape and dtype."""
    low, high = (-math.inf, math.inf) if threat.bounds is None else threat.bounds
    return tuple(torch.as_tensor(bound, dtype=x.dtype).expand(x.shape) for bound in (low, high))


@st.composite
def cases(draw, norms=NORMS, dtypes=(torch.float32, torch.float64), bounded=None) -> Case:
    norm, dtype, shape = draw(st.sampled_from(norms)), draw(st.sampled_from(dtypes)), draw(st.sampled_from(SHAPES))
    batch = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["unit", "tensor", "none"] if bounded is None else ["unit", "tensor"]))

    def tensor(values: st.SearchStrategy[float], *size: int) -> torch.Tensor:
        count = math.prod(size)
        return torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=dtype).reshape(size)

    place = st.floats(0, 1) | st.sampled_from([0.0, 1.0])
    fraction = draw(st.floats(0.02, 1) | st.sampled_from([0.1, 1.0]))
    at = tensor(place, batch, *shape)
    if kind == "none":
        bounds, x, eps = None, 4 * at - 2, 3 * fraction
    else:
        bounds = (0.0, 1.0)
        if kind == "tensor":
            bound_shape = draw(st.sampled_from([shape, (shape[0],) + (1,) * (len(shape) - 1)]))
            low = tensor(st.floats(-2, 2), *bound_shape)
            bounds = (low, low + tensor(st.floats(0.125, 2), *bound_shape))
        low, high = (torch.as_tensor(bound, dtype=dtype) for bound in bounds)
        x = torch.minimum(torch.maximum(low + at * (high - low), low), high)
        widest = (high.double() - low.double()).expand(shape).flatten()
        eps = fraction * float(np.linalg.norm(widest.numpy(), ORDER[norm]))
    threat = norm(eps, bounds=bounds)

    away = draw(st.sampled_from([0.0, 0.3, 1.0, 5.0])) * eps
    x_adv = threat.project(x + away * tensor(st.floats(-1, 1), batch, *shape), x)
    if draw(st.booleans()):
        mantissa, exponent = st.floats(-2, 2).filter(lambda v: v == 0 or abs(v) > 0.01), st.just(0)
    else:  # wildly different scales
        mantissa, exponent = st.sampled_from([-1.0, 0.0, 1.0, 1.5]), st.integers(-30, 10)
    gradient = tensor(mantissa, batch, *shape).double() * 10.0 ** tensor(exponent, batch, *shape).double()
    return Case(threat, x, x_adv, gradient.to(dtype))


def assert_feasible(case: Case, points: torch.Tensor) -> None:
    """Within the bounds exactly, within the norm up to rounding."""
    low, high = box(case.threat, case.x)
    assert points.dtype == case.x.dtype
    assert points.shape == case.x.shape
    assert bool(((points >= low) & (points <= high)).all())
    length = np.linalg.norm(double(points) - double(case.x), ORDER[case.norm], axis=1)
    assert (length <= case.threat.eps + case.tolerance).all()
    assert bool(case.threat.contains(points, case.x, atol=case.tolerance).all())


def inner(gradient: torch.Tensor, points: torch.Tensor, x: torch.Tensor) -> np.ndarray:
    """⟨points − x, gradient⟩ of each example in double precision."""
    return ((double(points) - double(x)) * double(gradient)).sum(1)


def largest(case: Case) -> np.ndarray:
    """max of ⟨x' − x, gradient⟩ over X(x) by the independent solvers."""
    rows = zip(double(case.gradient), case.rows(), strict=True)
    return np.array([support(case.norm, c, low, high, eps) for c, (_, low, high, eps) in rows])


def size(gradient: torch.Tensor) -> np.ndarray:
    return np.abs(double(gradient)).max(1)


# ------------------------------------------------------------------------------------------------- the solvers agree


@pytest.mark.parametrize("norm", NORMS)
def test_solvers_agree(norm):
    """The oracle of these tests against a second one, so that it can be believed."""
    rng = np.random.default_rng(0)
    for _ in range(15):
        low, high, c = -rng.random(5), rng.random(5), rng.normal(size=5)
        eps = rng.uniform(0.1, 0.9)
        u = slsqp(norm, lambda z, c=c: (-c @ z, -c), low, high, eps)
        assert support(norm, c, low, high, eps) == pytest.approx(c @ u, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- project


@given(case=cases(), data=st.data())
@settings(max_examples=120)
def test_projection_is_feasible_idempotent_and_nearest(case, data):
    """Nearest, by the variational inequality: ⟨z − p, x' − p⟩ ≤ 0 for every x' in X(x)."""
    away = data.draw(st.sampled_from([0.0, 0.5, 2.0, 20.0])) * case.threat.eps
    noise = data.draw(st.lists(st.floats(-1, 1), min_size=case.x.numel(), max_size=case.x.numel()))
    z = case.x + away * torch.tensor(noise, dtype=case.x.dtype).reshape(case.x.shape)
    p = case.threat.project(z, case.x)
    assert_feasible(case, p)
    tolerance = case.tolerance * (1 + away)
    torch.testing.assert_close(case.threat.project(p, case.x), p, rtol=0, atol=case.tolerance)
    for x, low, high, eps, point, target in (
        (*row, point, target) for row, point, target in zip(case.rows(), double(p), double(z), strict=True)
    ):
        normal = target - point
        assert support(case.norm, normal, low, high, eps) - normal @ (point - x) <= tolerance * (
            eps + np.abs(normal).max()
        )


@given(case=cases(dtypes=[torch.float64]))
@settings(max_examples=25)
def test_projection_agrees_with_slsqp(case):
    z = double(case.x + 1.5 * case.threat.eps * torch.where(case.gradient == 0, 0.1, case.gradient.sign() * 0.7))
    p = double(case.threat.project(torch.from_numpy(z).reshape(case.x.shape), case.x))
    for (x, low, high, eps), target, point in zip(case.rows(), z, p, strict=True):
        v = target - x
        u = slsqp(case.norm, lambda u, v=v: ((u - v) @ (u - v) / 2, u - v), low, high, eps)
        np.testing.assert_allclose(point - x, u, atol=2e-4 * eps)
        assert np.linalg.norm(point - target) <= np.linalg.norm(x + u - target) + 1e-7 * eps


@pytest.mark.parametrize("norm", NORMS)
def test_points_of_the_set_stay_where_they_are(norm):
    x = torch.tensor([[0.0, 1.0, 0.5, 0.25]])
    inside = x + torch.tensor([[0.03, -0.01, 0.02, 0.0]])
    torch.testing.assert_close(norm(0.1).project(inside, x), inside, rtol=0, atol=1e-7)
    assert torch.equal(norm(0.1).project(x, x), x)


@pytest.mark.parametrize("norm", NORMS)
def test_roundings_of_many_coordinates_do_not_add_up(norm):
    """At the size of photographs, a norm of sums in float32 is looser than what an evaluation allows."""
    x = torch.linspace(0, 1, 150_000).reshape(1, 3, 200, 250).sin()
    gradient = (1000 * x).cos()
    threat = norm({Linf: 0.1, L2: 2.0, L1: 12.0}[norm])
    many, far = threat.project(x + 0.2 * gradient.sign(), x), threat.project(x + gradient, x)
    for point in (many, far, threat.maximizer(gradient, x), threat.sample(x)):
        assert np.linalg.norm((double(point) - double(x))[0], ORDER[norm]) <= threat.eps + 1e-6


@pytest.mark.parametrize("grey", [0.3, 0.77])
@pytest.mark.parametrize("norm", [L2, L1])
def test_roundings_of_a_uniform_image_do_not_add_up(norm, grey):
    """There all coordinates are rounded alike."""
    x = torch.full((1, 3, 200, 250), grey)
    up = torch.ones_like(x)
    for eps in np.linspace(0.5, 5, 10) if norm is L2 else np.linspace(5, 600, 10):
        threat = norm(float(eps))
        for point in (threat.project(x + 0.3, x), threat.maximizer(up, x), threat.step(x, up, threat.eps, x)):
            length = np.linalg.norm((double(point) - double(x))[0], ORDER[norm])
            assert 0.999 * threat.eps <= length <= threat.eps


@pytest.mark.parametrize("norm", NORMS)
def test_projection_of_points_far_beyond(norm):
    """Their squares overflow float32."""
    x = torch.full((1, 3), 0.5)
    for bounds in [(0.0, 1.0), None]:
        threat = norm(0.5, bounds=bounds)
        p = threat.project(torch.tensor([[1e25, 1e25, -1e25]]), x)
        assert bool(threat.contains(p, x, atol=1e-6))


# ---------------------------------------------------------------------------------------------------------- contains


@given(case=cases())
@settings(max_examples=40)
def test_contains_rejects_what_lies_outside(case):
    threat, x = case.threat, case.x
    assert bool(threat.contains(x, x).all())
    atol = case.tolerance
    u = torch.zeros_like(x).flatten(1)
    u[:, 0] = threat.eps + 3 * atol
    assert not bool(threat.contains(x + u.reshape(x.shape), x, atol=atol).any())
    for bound, side in zip(box(threat, x), (-1, 1), strict=True):
        beyond = x.clone().flatten(1)
        beyond[:, -1] = bound.flatten(1)[:, -1] + side * 3 * atol
        assert not bool(threat.contains(beyond.reshape(x.shape), x, atol=atol).any())
    hole = x.clone().flatten(1)
    hole[0, -1] = math.nan
    assert threat.contains(hole.reshape(x.shape), x).tolist() == [False] + [True] * (len(x) - 1)


def test_contains_judges_each_norm():
    x, u = torch.full((1, 4), 0.5), torch.full((1, 4), 0.1)
    for norm, length in [(Linf, 0.1), (L2, 0.2), (L1, 0.4)]:
        assert bool(norm(length + 1e-4).contains(x + u, x))
        assert not bool(norm(length - 1e-4).contains(x + u, x))
        assert bool(norm(length - 1e-4).contains(x + u, x, atol=1e-3))


# --------------------------------------------------------------------------------------------------------------- gap


@given(case=cases())
@settings(max_examples=150)
def test_gap_is_the_maximum_over_the_set(case):
    gap = case.threat.gap(case.gradient, case.x_adv, case.x)
    assert gap.shape == (len(case.x),)
    assert gap.dtype == case.x.dtype
    assert bool((gap >= 0).all())
    expected = largest(case) - inner(case.gradient, case.x_adv, case.x)
    np.testing.assert_array_less(
        np.abs(gap.double().numpy() - expected), case.tolerance * 4 * size(case.gradient) + 1e-300
    )


@given(case=cases())
@settings(max_examples=120)
def test_gap_without_bounds_is_the_closed_form(case):
    gap = case.threat.gap(case.gradient, case.x_adv, case.x, bounded=False)
    assert bool((gap >= 0).all())
    dual = {Linf: 1, L2: 2, L1: math.inf}[case.norm]
    scale = np.where(size(case.gradient) > 0, size(case.gradient), 1.0)
    length = scale * np.linalg.norm(double(case.gradient) / scale[:, None], dual, axis=1)
    expected = case.threat.eps * length - inner(case.gradient, case.x_adv, case.x)
    np.testing.assert_array_less(
        np.abs(gap.double().numpy() - expected), case.tolerance * 4 * size(case.gradient) + 1e-300
    )
    exact = case.threat.gap(case.gradient, case.x_adv, case.x)
    assert bool((exact <= gap + case.tolerance * 4 * case.gradient.abs().flatten(1).amax(1)).all())


@given(case=cases(), power=st.integers(-40, 40))
@settings(max_examples=60)
def test_gap_scales_with_the_gradient(case, power):
    gradient = case.gradient.sign() * case.gradient.abs().clamp(1e-3, 1e3) * (case.gradient != 0)
    gap, relative = (case.threat.gap(gradient, case.x_adv, case.x, relative=r) for r in (False, True))
    scaled = case.threat.gap(gradient * 2.0**power, case.x_adv, case.x)
    torch.testing.assert_close(scaled / 2.0**power, gap, rtol=1e-6, atol=0)
    tiny = case.threat.gap(gradient * 2.0**-110, case.x_adv, case.x, relative=True)
    torch.testing.assert_close(tiny, relative, rtol=1e-5, atol=1e-6, equal_nan=True)


@given(case=cases())
@settings(max_examples=100)
def test_relative_gap(case):
    """Over the width of the linear model: the highest value less the lowest."""
    relative = case.threat.gap(case.gradient, case.x_adv, case.x, relative=True)
    still = (case.gradient == 0).flatten(1).all(1)
    assert torch.equal(relative.isnan(), still)
    moving = relative[~still]
    assert bool(((moving >= 0) & (moving <= 1)).all())
    highest = largest(case)
    width = highest + largest(Case(case.threat, case.x, case.x_adv, -case.gradient))
    expected = (highest - inner(case.gradient, case.x_adv, case.x)) / np.where(still, 1.0, width)
    # Rounding of positions counts more the narrower X(x) is.
    tolerance = 8 * case.tolerance * np.maximum(1.0, size(case.gradient) / np.where(still, 1.0, width))
    assert (np.abs(moving.double().numpy() - expected[~still.numpy()]) <= tolerance[~still.numpy()]).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [2.0**-145, 2.0**-100, 2.0**33, 2.0**126])
def test_relative_gap_is_free_of_the_gradients_scale(norm, scale):
    x = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.3, 0.4]])
    gradient = torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0]])
    threat = norm(0.3)
    expected, scaled = (threat.gap(gradient * s, x, x, relative=True) for s in (1.0, scale))
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=0, equal_nan=True)
    assert scaled.isnan().tolist() == [False, True]
    assert float(threat.gap(gradient, x, x)[1]) == 0


def test_gap_by_hand():
    """One coordinate on its bound, where it cannot follow its gradient."""
    x = torch.tensor([[1.0, 0.5, 0.5]])
    gradient = torch.tensor([[10.0, 4.0, -3.0]])
    for norm, exact, ball in [(Linf, 0.7, 1.7), (L2, 0.5, math.sqrt(1.25)), (L1, 0.4, 1.0)]:
        threat = norm(0.1)
        assert float(threat.gap(gradient, x, x)) == pytest.approx(exact, rel=1e-5)
        assert float(threat.gap(gradient, x, x, bounded=False)) == pytest.approx(ball, rel=1e-5)


# --------------------------------------------------------------------------------------------------------- maximizer


@given(case=cases())
@settings(max_examples=150)
def test_maximizer_is_feasible_and_attains_the_maximum(case):
    best = case.threat.maximizer(case.gradient, case.x)
    assert_feasible(case, best)
    tolerance = case.tolerance * 4 * size(case.gradient) + 1e-300
    assert (inner(case.gradient, best, case.x) >= largest(case) - tolerance).all()
    assert (case.threat.gap(case.gradient, best, case.x).double().numpy() <= tolerance).all()
    climbed = inner(case.gradient, best, case.x_adv)
    assert (
        np.abs(climbed - case.threat.gap(case.gradient, case.x_adv, case.x).double().numpy()) <= 2 * tolerance
    ).all()
    still = case.gradient == 0
    assert torch.equal(best[still], case.x[still])


@pytest.mark.parametrize("norm", NORMS)
def test_gap_vanishes_nowhere_but_at_the_maximizer(norm):
    x = torch.tensor([[0.9, 0.5, 0.3, 0.6]])
    gradient = torch.tensor([[3.0, -2.0, 1.0, 0.5]])
    threat = norm(0.2)
    best = threat.maximizer(gradient, x)
    assert float(threat.gap(gradient, best, x)) == pytest.approx(0, abs=1e-6)
    assert float(threat.gap(gradient, (x + 9 * best) / 10, x)) > 0.01


@pytest.mark.parametrize("small", [1e-3, 1e-12, 1e-20, 1e-25, 1e-30, 1e-40])
@pytest.mark.parametrize("x", [[1.0, 0.5, 0.5], [0.95, 0.5, 0.5], [0.5, 0.5, 0.5]])
def test_l2_maximizer_of_gradients_whose_squares_underflow(x, small):
    x, gradient = torch.tensor([x]), torch.tensor([[1.0, small, small]])
    threat = L2(0.3)
    best = threat.maximizer(gradient, x)
    assert bool(threat.contains(best, x))
    assert float(threat.gap(gradient, x, x)) == pytest.approx(
        float(((best - x) * gradient).sum()), rel=1e-5, abs=1e-7 * small
    )
    if small > 1e-30 and float(x[0, 0]) == 1.0:  # nothing to gain on the first, so the others share the ball
        torch.testing.assert_close(best - x, torch.tensor([[0.0, 1.0, 1.0]]) * 0.3 / math.sqrt(2), rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- step


@given(case=cases(), fraction=st.sampled_from([0.0, 0.01, 0.25, 1.0, 1.7, 3.0, 1e4]))
@settings(max_examples=200)
def test_step_is_feasible_and_climbs(case, fraction):
    step_size = fraction * case.threat.eps
    after = case.threat.step(case.x_adv, case.gradient, step_size, case.x)
    assert_feasible(case, after)
    climbed = inner(case.gradient, after, case.x_adv)
    assert (climbed >= -4 * case.tolerance * size(case.gradient)).all()
    if fraction == 0:
        torch.testing.assert_close(after, case.x_adv, rtol=0, atol=case.tolerance)
    if fraction:
        gap = case.threat.gap(case.gradient, case.x_adv, case.x).double().numpy()
        assert (climbed[gap > 100 * case.tolerance * size(case.gradient)] > 0).all()
    # Steepest: no longer than asked in this norm, up to the exchange of L1, which takes as much as it gives.
    length = np.linalg.norm(double(after) - double(case.x_adv), ORDER[case.norm], axis=1)
    assert (length <= (2 if case.norm is L1 else 1) * step_size + case.tolerance).all()


@given(case=cases())
@settings(max_examples=40)
def test_infinite_step_lands_on_the_maximizer(case):
    best = case.threat.maximizer(case.gradient, case.x)
    assert torch.equal(case.threat.step(case.x_adv, case.gradient, math.inf, case.x), best)


@given(case=cases(), fraction=st.sampled_from([0.15, 0.25, 1.0, 2.5]))
@settings(max_examples=60)
def test_steps_reach_the_maximum_of_a_linear_loss(case, fraction):
    point = case.x_adv
    if case.norm is L2:
        sizes = [20 * case.threat.eps / (k + 1) for k in range(20)]
        # Projected ascent is at most (2ε)²/2Σα short of the maximum, for a gradient of length one.
        short = 2 * case.threat.eps**2 / sum(sizes) * math.sqrt(case.x[0].numel())
    else:
        sizes = [fraction * case.threat.eps] * math.ceil(2 / fraction + 3)
        short = 0.0
    for step_size in sizes:
        point = case.threat.step(point, case.gradient, step_size, case.x)
    assert_feasible(case, point)
    reached = inner(case.gradient, point, case.x)
    assert (reached >= largest(case) - (short + 8 * case.tolerance) * size(case.gradient)).all()


def test_steps_follow_their_norm():
    x, gradient = torch.full((1, 3), 0.5), torch.tensor([[4.0, -3.0, 0.0]])
    for norm, u in [(Linf, [0.1, -0.1, 0.0]), (L2, [0.08, -0.06, 0.0]), (L1, [0.1, 0.0, 0.0])]:
        torch.testing.assert_close(norm(0.4).step(x, gradient, 0.1, x) - x, torch.tensor([u]), rtol=0, atol=1e-6)


def test_l1_step_passes_over_saturated_coordinates():
    """The largest coordinate is at its upper bound, the next 0.05 below it; the third takes the rest."""
    x = torch.tensor([[1.0, 0.95, 0.5, 0.5]])
    gradient = torch.tensor([[9.0, 5.0, -3.0, 1.0]])
    after = L1(0.5).step(x, gradient, 0.2, x)
    torch.testing.assert_close(after, torch.tensor([[1.0, 1.0, 0.35, 0.5]]), rtol=0, atol=1e-6)


def test_l1_step_passes_over_coordinates_saturated_on_the_way():
    """The largest coordinate has reached its bound by earlier steps, with half of the ball left to spend."""
    x, u = torch.tensor([[0.8, 0.5, 0.5]]), torch.tensor([[0.2, 0.0, 0.0]])
    gradient = torch.tensor([[9.0, 2.0, -1.0]])
    after = L1(0.4).step(x + u, gradient, 0.1, x)
    torch.testing.assert_close(after - x, torch.tensor([[0.2, 0.1, 0.0]]), rtol=0, atol=1e-6)


def test_l1_step_takes_from_where_it_serves_least():
    """The ball is full: what the best coordinate gets, the one that climbs least gives."""
    x, u = torch.full((1, 3), 0.5), torch.tensor([[0.1, 0.1, -0.1]])
    gradient = torch.tensor([[3.0, 2.0, 1.0]])
    after = L1(0.3).step(x + u, gradient, 0.05, x)
    torch.testing.assert_close(after - x, torch.tensor([[0.15, 0.1, -0.05]]), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ sample


@given(case=cases(), seed=st.integers())
@settings(max_examples=80)
def test_samples_are_feasible(case, seed):
    assert_feasible(case, case.threat.sample(case.x, seed))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_samples_belong_to_seed_and_index(norm, bounds):
    threat, x = norm(0.4, bounds=bounds), torch.linspace(0.2, 0.8, 5 * 6).reshape(5, 1, 2, 3)
    index = torch.tensor([3, 100, 0, 7, 2**40])
    starts = threat.sample(x, seed=11, index=index)
    order = torch.tensor([4, 1, 3])
    assert torch.equal(threat.sample(x[order], seed=11, index=index[order]), starts[order])
    for row in range(5):
        assert torch.equal(threat.sample(x[row : row + 1], 11, index[row : row + 1])[0], starts[row])
    assert torch.equal(threat.sample(x, 11), threat.sample(x, 11, torch.arange(5)))
    assert not bool(torch.isclose(threat.sample(x, 12, index), starts).flatten(1).all(1).any())
    assert not bool(torch.isclose(threat.sample(x, 11, index + 1), starts).flatten(1).all(1).any())
    before = torch.get_rng_state()
    threat.sample(x)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("norm", NORMS)
def test_samples_are_uniform_in_the_ball(norm):
    count, d, eps = 4000, 3, 0.7
    x = torch.full((count, d), -3.0, dtype=torch.float64)
    u = double(norm(eps, bounds=None).sample(x, seed=1) - x) / eps
    radius = np.linalg.norm(u, ORDER[norm], axis=1)
    assert radius.max() <= 1
    uniform = [radius**d]
    if norm is L2:  # Archimedes: a coordinate of the unit sphere in three dimensions is uniform
        uniform += list((u / radius[:, None]).T / 2 + 0.5)
    elif norm is L1:  # |u₁| of the simplex has the distribution function 1 − (1 − t)^d
        uniform += list(1 - (1 - np.abs(u).T) ** d)
    else:
        uniform += list(u.T / 2 + 0.5)
    for values in uniform:
        assert stats.kstest(values, "uniform").pvalue > 1e-3
    positive = (u > 0).astype(int) @ [1, 2, 4]  # every orthant alike
    assert stats.chisquare(np.bincount(positive, minlength=8)).pvalue > 1e-3
    assert np.abs(np.corrcoef(radius, u[:, 0])[0, 1]) < 4 / math.sqrt(count)


@pytest.mark.parametrize("norm", NORMS)
def test_samples_near_the_bounds_are_projections(norm):
    x = torch.zeros(500, 3)
    free = norm(0.5, bounds=None).sample(x, seed=2)
    torch.testing.assert_close(norm(0.5).sample(x, seed=2), norm(0.5).project(free, x))


# ------------------------------------------------------------------------------------------------- batches and shapes


@given(case=cases())
@settings(max_examples=40)
def test_images_are_flat_inputs_and_examples_are_alone(case):
    """Neither the shape of the features nor the other examples of the batch matter."""
    threat, x = case.threat, case.x
    rows = torch.arange(len(x)).flip(0)[:2]
    around = threat.around(x)
    some, gradient, x_adv = around[rows], case.gradient[rows], case.x_adv[rows]
    close = {"rtol": 0, "atol": case.tolerance, "equal_nan": True}
    torch.testing.assert_close(some.project(x_adv + 0.3), around.project(case.x_adv + 0.3)[rows], **close)
    torch.testing.assert_close(some.maximizer(gradient), around.maximizer(case.gradient)[rows], **close)
    torch.testing.assert_close(
        some.gap(gradient, x_adv), around.gap(case.gradient, case.x_adv)[rows], rtol=1e-5, atol=0
    )
    if threat.bounds is not None:
        low, high = (bound[0].flatten() for bound in box(threat, x))
        threat = type(threat)(threat.eps, bounds=(low, high))
    flat = threat.maximizer(case.gradient.flatten(1), x.flatten(1))
    torch.testing.assert_close(flat, around.maximizer(case.gradient).flatten(1), **close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
@given(
    size=st.sampled_from([*SHAPES, (2, 1, 2, 2), (1, 1), (50,)]),
    batch=st.integers(1, 3),
    fraction=st.floats(0.02, 0.9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=20)
def test_every_precision_stays_in_the_set_up_to_its_own_rounding(norm, dtype, size, batch, fraction, seed):
    """Half precision too: dtype and shape are kept, bounds hold exactly, ε and the gap up to some roundings."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, *size, generator=generator, dtype=torch.float64).to(dtype)
    gradient, noise = (torch.randn(batch, *size, generator=generator).to(dtype) for _ in range(2))
    d, unit = x[0].numel(), torch.finfo(dtype).eps
    eps = fraction * d ** (1 / ORDER[norm])
    threat = norm(eps)
    inside = threat.project(x + 2 * eps * noise, x)
    best = threat.maximizer(gradient, x)
    for points in (inside, best, threat.sample(x, seed=seed), threat.step(inside, gradient, eps / 3, x)):
        assert (points.dtype, points.shape) == (dtype, x.shape)
        assert bool(((points >= 0) & (points <= 1)).all())
        length = np.linalg.norm(double(points) - double(x), ORDER[norm], axis=1)
        assert (length <= eps + 2 * unit).all()
    gap = threat.gap(gradient, inside, x)
    assert (gap.dtype, gap.shape) == (dtype, (batch,))
    gain = ((double(best) - double(inside)) * double(gradient)).sum(1)
    assert (np.abs(gap.double().numpy() - gain) <= 16 * unit * np.abs(double(gradient)).sum(1)).all()


def test_bounds_a_channel():
    """Per-channel bounds broadcast over height and width."""
    bounds = (torch.tensor([0.0, -1.0]).reshape(2, 1, 1), torch.tensor([1.0, 3.0]).reshape(2, 1, 1))
    x = torch.tensor([0.9, 2.5]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    best = Linf(0.25, bounds=bounds).maximizer(torch.ones_like(x), x)
    assert best[0, :, 0, 0].tolist() == [1.0, 2.75]
    best = Linf(0.25, bounds=(bounds[0], 10.0)).maximizer(-torch.ones_like(x), torch.zeros_like(x))
    assert best[0, :, 1, 1].tolist() == [0.0, -0.25]


@pytest.mark.parametrize("norm", NORMS)
def test_inputs_that_carry_gradients_are_not_followed(norm):
    x = torch.full((2, 3), 0.5, requires_grad=True)
    threat = norm(0.1)
    for point in (threat.sample(x), threat.project(x.detach() + 1, x), threat.maximizer(torch.ones(2, 3), x)):
        assert not point.requires_grad


# -------------------------------------------------------------------------------------------------------- validation


@pytest.fixture
def unhooked():
    """Without the type checks of the test run, as users have it: the library's own messages answer."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("eps", "error"),
    [
        *((eps, ValueError) for eps in (-0.1, math.nan, math.inf)),
        *((eps, TypeError) for eps in (True, "0.1", None, torch.tensor(0.1))),
    ],
)
def test_eps_is_checked(unhooked, norm, eps, error):
    with pytest.raises(error, match="eps"):
        norm(eps)


@pytest.mark.parametrize("norm", NORMS)
def test_equal_threats_have_one_name_whatever_numbers_they_are_given(unhooked, norm):
    plain = norm(0.25, bounds=(0.0, 1.0))
    for eps in (np.float64(0.25), np.float32(0.25), np.float16(0.25)):
        for bounds in ((np.float32(0), np.float64(1)), [0.0, 1.0], (np.array(0.0), np.array(1.0))):
            same = norm(eps, bounds=bounds)
            assert (same, hash(same), repr(same)) == (plain, hash(plain), repr(plain))
    assert repr(norm(-0.0)) == repr(norm(0.0))
    assert norm(np.int64(0)) == norm(0.0)
    own = norm(0.1, bounds=(np.zeros(3, np.float32), np.ones(3, np.float32)))
    x = torch.tensor([[0.0, 0.5, 1.0]])
    assert bool(own.contains(own.maximizer(torch.ones_like(x), x), x).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), None, (torch.zeros(3), torch.ones(3))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_size_nothing_but_x_is_left(norm, bounds, dtype):
    threat, generator = norm(0.0, bounds=bounds), torch.Generator().manual_seed(0)
    x = torch.tensor([[0.0, 0.5, 1.0], [0.2, 0.9, 0.4]], dtype=dtype)
    gradient = torch.randn(2, 3, generator=generator, dtype=dtype)
    gradient[0, 1] = 0
    feasible = threat.around(x)
    for point in (
        threat.project(x + gradient, x),
        threat.sample(x),
        threat.maximizer(gradient, x),
        threat.step(x, gradient, 0.5, x),
        threat.step(x, gradient, 0.0, x),
        threat.step(x, gradient, math.inf, x),
        feasible.sample_near(torch.arange(2), 0.3),
        feasible.without_bounds().project(x + gradient),
    ):
        assert torch.equal(point, x)
    assert threat.contains(x, x).all()
    assert not threat.contains(x + 1e-3 * (1 - 2 * x), x).any()
    for bounded in (True, False):
        assert threat.gap(gradient, x, x, bounded=bounded).tolist() == [0, 0]
        assert threat.gap(gradient, x, x, bounded=bounded, relative=True).tolist() == [0, 0], "x is the maximizer"
    assert bool(threat.gap(0 * gradient, x, x, relative=True).isnan().all())


def test_eps_may_be_an_integer(unhooked):
    x = torch.full((1, 20), 0.5)
    assert float(L1(2).norm(L1(2).maximizer(torch.ones(1, 20), x) - x)) == pytest.approx(2)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eps_may_be_as_large_as_the_bounds_and_no_larger(norm, dtype):
    for width, d in [(1.0, 3), (0.7, 3), (0.1, 5), (1 / 3, 6)]:
        x = torch.zeros(2, d, dtype=dtype)
        size = float(np.linalg.norm(np.full(d, width), ORDER[norm]))
        for bounds in [(0.0, width), (torch.zeros(d, dtype=dtype), torch.full((d,), width, dtype=dtype))]:
            corner = norm(size, bounds=bounds).maximizer(torch.ones_like(x), x)
            torch.testing.assert_close(corner, torch.full_like(x, width), rtol=0, atol=1e-6)
            with pytest.raises(ValueError, match="eps must be at most"):
                norm(1.001 * size, bounds=bounds).project(x, x)
    assert bool(norm(1e3, bounds=None).contains(x, x).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "bounds",
    [
        (1.0, 0.0),
        (0.5, 0.5),
        (0.0, math.nan),
        (-math.inf, 1.0),
        (0.0, math.inf),
        (torch.zeros(3), torch.tensor([1.0, 1.0, 0.0])),
        (torch.tensor([0.0, math.nan, 0.0]), 1.0),
    ],
)
def test_bounds_are_checked(norm, bounds):
    with pytest.raises(ValueError, match="bounds"):
        norm(0.1, bounds=bounds)


@pytest.mark.parametrize("norm", NORMS)
def test_bounds_that_do_not_fit_the_input(norm):
    threat = norm(0.1, bounds=(torch.zeros(4), torch.ones(4)))
    with pytest.raises(ValueError, match="bounds"):
        threat.sample(torch.full((2, 3), 0.5))
    with pytest.raises(ValueError, match="bounds"):
        norm(0.1, bounds=(torch.zeros(1, 3), 1.0)).sample(torch.full((2, 3), 0.5))


OPERATIONS = {
    "project": lambda threat, x, other: threat.project(other, x),
    "contains": lambda threat, x, other: threat.contains(other, x),
    "sample": lambda threat, x, other: threat.sample(x),
    "maximizer": lambda threat, x, other: threat.maximizer(other, x),
    "step": lambda threat, x, other: threat.step(x, other, 0.01, x),
    "step to the end": lambda threat, x, other: threat.step(x, other, math.inf, x),
    "step from": lambda threat, x, other: threat.step(other, x, 0.01, x),
    "gap": lambda threat, x, other: threat.gap(other, x, x),
    "gap at": lambda threat, x, other: threat.gap(x, other, x),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.tensor([[0.5, 1.01]]), ValueError, "^x must lie within the bounds"),
        (torch.tensor([[0.5, -0.01]]), ValueError, "^x must lie within the bounds"),
        (torch.tensor([[0.5, math.nan]]), ValueError, "^x .*NaN"),
        (torch.tensor([[0.5, math.inf]]), ValueError, "^x .*infinite"),
        (torch.tensor([[0, 1]]), TypeError, "^x .*int64"),
        (torch.tensor([[0, 255]], dtype=torch.uint8), TypeError, "^x .*uint8"),
        (torch.tensor([0.5, 0.5]), ValueError, "^x must have shape"),
        (torch.zeros(0, 3), ValueError, "^x must have shape"),
    ],
)
def test_inputs_are_checked(unhooked, operation, norm, x, error, message):
    with pytest.raises(error, match=message):
        OPERATIONS[operation](norm(0.1), x, x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "sample"])
@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (2, 3, 1), (6,)])
def test_shapes_that_differ_name_the_argument(unhooked, operation, norm, shape):
    x_adv = operation in ("project", "contains", "step from", "gap at")
    with pytest.raises(ValueError, match=rf"^{'x_adv' if x_adv else 'gradient'} .*\(2, 3\).*{shape[0]}"):
        OPERATIONS[operation](norm(0.1), torch.full((2, 3), 0.5), torch.full(shape, 0.5))


@pytest.mark.parametrize("step_size", [-0.1, math.nan, -math.inf])
def test_step_size_is_checked(step_size):
    x = torch.full((2, 3), 0.5)
    with pytest.raises(ValueError, match="step_size"):
        Linf(0.1).step(x, x, step_size, x)


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (torch.tensor([1]), ValueError),
        (torch.arange(3), ValueError),
        (torch.zeros(2, 1, dtype=torch.int64), ValueError),
        (torch.tensor([1, 2], dtype=torch.int32), TypeError),
        (torch.tensor([1.0, 2.0]), TypeError),
        ([1, 2], TypeError),
    ],
)
def test_index_is_checked(unhooked, index, error):
    with pytest.raises(error, match="index"):
        Linf(0.1).sample(torch.full((2, 3), 0.5), index=index)


# --------------------------------------------------------------------------------------------------------- own threats


def test_every_norm_has_a_name_a_class_and_a_symbol():
    assert list(NAMES) == ["linf", "l2", "l1"]
    assert list(map(build_threat, NAMES, [0.5] * 3)) == [im.Linf(0.5), im.L2(0.5), im.L1(0.5)]
    assert [norm.symbol for norm in NAMES.values()] == ["L∞", "L2", "L1"]
    with pytest.raises(ValueError, match=r"unknown norm 'l3'; did you mean 'l"):
        build_threat("l3", 0.5)


@pytest.mark.parametrize("norm", [WeightedLinf, ScaledL2])
def test_an_own_norm_in_which_a_coordinate_moves_farther_than_eps_is_refused(norm):
    """Its ball would be cut at ε, and the adversary weaker than what was asked for."""
    x = torch.full((2, 200), 0.5)
    threat = norm(0.1, weights=(1.0, 0.5))
    for use in (threat.around, lambda x: threat.project(x, x), lambda x: im.PGD(threat)(torch.nn.Linear(200, 2), x, Y)):
        with pytest.raises(ValueError, match=rf"norm of {norm.__name__} must be at least 1 .*, got 0\.5: divide"):
            use(x)
    inside = norm(0.1, weights=(1.0, 1.0 + 1e-9)).around(x)
    assert inside.contains(inside.maximizer(torch.ones_like(x))).all()


Y = torch.tensor([0, 1])


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(2.0), WeightedLinf(0.1)])
def test_steps_of_several_lengths_at_once(threat):
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.rand(6, 3, 4, generator=generator), torch.randn(6, 3, 4, generator=generator)
    around = threat.around(x)
    sizes = torch.tensor([0.1, 0.02, 0.1, 0.0, math.inf, 0.02])
    steps = around.step(x, gradient, sizes)
    for row, size in enumerate(sizes.tolist()):
        part = torch.tensor([row])
        assert torch.equal(steps[part], around[part].step(x[part], gradient[part], size))
    with pytest.raises(ValueError, match="step_size must be at least 0, got -"):
        around.step(x, gradient, sizes - 1)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("eps", [np.float32(0.25), np.float64(0.25), np.int64(1)])
def test_a_numpy_number_is_a_number(eps):
    threat = Linf(eps)
    assert threat == Linf(float(eps))
    assert repr(threat) == repr(Linf(eps.item()))


def test_sizes_are_written_as_usual():
    assert (format_eps(8 / 255), format_eps(0.3), format_eps(0.5)) == ("8/255", "0.3", "0.5")
    assert (format_eps(0.2), format_eps(1 / 255), format_eps(63 / 255)) == ("0.2", "1/255", "63/255")
