"""Theorem 1's constants, Algorithm 1 and the bound, against the losses written out, grids, SciPy and a plain loop."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import optimize

from innermax.reproduce import theorem
from innermax.reproduce.convergence import _shares, algorithm_1, bounds, inner_maximization
from innermax.reproduce.strongly_concave import MinMaxProblem, build_problem
from innermax.threat import Linf

PROBLEMS = {name: build_problem(spread) for name, spread in theorem.SPREADS.items()}
WIDE = build_problem(2.0)  # many maximizers inside the ball, many on its surface
MU, BETA, LAMBDA, EPS = 2.0, 1.5, 4.0, 0.5
R, S = MU * EPS / BETA, LAMBDA + BETA**2 / MU


@pytest.fixture(params=[*PROBLEMS, "wide"])
def problem(request) -> MinMaxProblem:
    return (PROBLEMS | {"wide": WIDE})[request.param]


def loss(problem: MinMaxProblem, theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """f_i(θ, x_i) of each example, (n,), written out."""
    bowl = (LAMBDA / 2 * theta**2 + 2 * S * R**2 / math.pi * torch.cos(math.pi * theta / (2 * R))).sum()
    return bowl + ((BETA * theta + problem.offsets) * x - MU / 2 * (x - problem.centres) ** 2).sum(1)


def slopes(problem: MinMaxProblem, theta: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(∇_θ f_i, ∇_x f_i) of each example by automatic differentiation."""
    x = x.clone().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda t: loss(problem, t, x), theta)
    (outer,) = torch.autograd.grad(loss(problem, theta, x).sum(), x)
    return jacobian.detach(), outer


def points(count: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * R * (2 * torch.rand(count, 4, generator=generator, dtype=torch.float64) - 1)


def inside(problem: MinMaxProblem, seed: int = 0) -> torch.Tensor:
    return problem.centres + EPS / (3 * R) * points(len(problem.centres), seed=seed)


def full_gradient(problem: MinMaxProblem, theta: torch.Tensor) -> torch.Tensor:
    return problem.gradients(theta, problem.maximizers(theta)).mean(-2)


# ------------------------------------------------------------------------------------------------------ the problem


def test_maximizers_are_the_best_of_a_fine_grid(problem):
    grid = torch.linspace(-EPS, EPS, 201, dtype=torch.float64)
    for theta in [*points(5), problem.start, torch.full((4,), R, dtype=torch.float64)]:
        x = problem.maximizers(theta)
        best = loss(problem, theta, x)
        for j in range(4):
            values = []
            for u in grid:
                other = x.clone()
                other[:, j] = problem.centres[:, j] + u
                values.append(loss(problem, theta, other))
            values = torch.stack(values)
            assert (values <= best + 1e-12).all()
            assert torch.allclose(problem.centres[:, j] + grid[values.argmax(0)], x[:, j], atol=EPS / 199)


def test_value_and_gradients_are_those_of_the_losses(problem):
    for theta in points(10):
        x = inside(problem)
        assert torch.allclose(problem.gradients(theta, x), slopes(problem, theta, x)[0], atol=1e-12)
        assert problem.value(theta) == pytest.approx(float(loss(problem, theta, problem.maximizers(theta)).mean()))


def test_gradient_of_the_maximum_by_finite_differences(problem):
    step = 1e-6 * torch.eye(4, dtype=torch.float64)
    for theta in points(10):
        differences = (problem.value(theta + step) - problem.value(theta - step)) / 2e-6
        assert torch.allclose(full_gradient(problem, theta), differences, atol=1e-6)


def test_lipschitz_constants_hold_and_are_attained(problem):
    x, other = inside(problem), inside(problem, seed=1)
    ratios = {"θθ": [], "θx": [], "xθ": []}
    near = [torch.full((4,), 2 * R + shift, dtype=torch.float64) for shift in (-0.01, 0.01)]
    for a, b in [*zip(points(40), points(40, seed=1), strict=True), near]:
        (theta_a, x_a), (theta_b, x_b), (moved, _) = (slopes(problem, *at) for at in ((a, x), (b, x), (a, other)))
        ratios["θθ"].append((theta_a - theta_b).norm(dim=1).max() / (a - b).norm())
        ratios["xθ"].append((x_a - x_b).norm(dim=1).max() / (a - b).norm())
        ratios["θx"].append(((theta_a - moved).norm(dim=1) / (x - other).norm(dim=1)).max())
    claimed = {"θθ": problem.outer_smoothness, "θx": problem.coupling, "xθ": problem.coupling}
    for name, values in ratios.items():
        assert 0.999 * claimed[name] <= max(values) <= claimed[name] * (1 + 1e-9)


def test_strong_concavity_holds_with_equality(problem):
    x, other = inside(problem), inside(problem, seed=1)
    theta = points(1)[0]
    linear = loss(problem, theta, other) + (slopes(problem, theta, other)[1] * (x - other)).sum(1)
    bent = linear - problem.concavity / 2 * (x - other).square().sum(1)
    assert torch.allclose(loss(problem, theta, x), bent, atol=1e-12)


def test_the_maximum_is_smooth_and_not_convex(problem):
    assert problem.smoothness == problem.coupling**2 / problem.concavity + problem.outer_smoothness
    start = torch.cat([points(4000), torch.full((1, 4), 2 * R, dtype=torch.float64)])
    step = 0.01 * points(4001, seed=1)
    step[-1] = 0.01
    change = full_gradient(problem, start + step) - full_gradient(problem, start)
    ratio = change.norm(dim=1) / step.norm(dim=1)
    assert 0.85 * problem.smoothness <= ratio.max() <= problem.smoothness
    zero = torch.zeros(4, dtype=torch.float64)
    assert (full_gradient(problem, zero + 1e-4) - full_gradient(problem, zero - 1e-4)).sum() < 0


def test_descent_is_that_of_the_worst_cases_closed_form():
    """From |θ_j| = r/10 to r, where the wave is 0, what is left of a coordinate is s/2 θ_j²."""
    aligned = PROBLEMS["aligned"]
    exact = 4 * (S * R**2 * (0.1**2 - 1) / 2 + 2 * S * R**2 / math.pi * math.cos(math.pi / 20))
    assert exact <= aligned.descent <= exact + 1e-6
    for signs in ((1, 1, 1, 1), (1, -1, 1, -1)):
        assert full_gradient(aligned, R * torch.tensor(signs, dtype=torch.float64)).norm() < 1e-12


def test_descent_is_the_best_of_many_searches(problem):
    def objective(theta):
        theta = torch.from_numpy(theta)
        return float(problem.value(theta)), full_gradient(problem, theta).numpy()

    lowest = min(optimize.minimize(objective, start.numpy(), jac=True, tol=1e-12).fun for start in points(60))
    assert 0 <= problem.descent - (float(problem.value(problem.start)) - lowest) <= 1e-6


def test_noise_bounds_the_variance_for_every_theta(problem):
    theta = torch.cat([points(5000), points(5000, scale=0.5)])
    gradients = problem.gradients(theta, problem.maximizers(theta))
    deviation = (gradients - gradients.mean(1, keepdim=True)).square().sum(2).mean(1).sqrt()
    assert deviation.max() <= problem.noise * (1 + 1e-12)
    assert deviation.max() >= 0.6 * problem.noise


def test_noise_is_attained_where_the_examples_are_shifted_alone():
    gradients = PROBLEMS["aligned"].gradients(points(50), PROBLEMS["aligned"].maximizers(points(50)))
    deviation = (gradients - gradients.mean(1, keepdim=True)).square().sum(2).mean(1).sqrt()
    assert torch.allclose(deviation, torch.tensor(PROBLEMS["aligned"].noise, dtype=torch.float64))
    assert PROBLEMS["aligned"].noise == pytest.approx(2)


# --------------------------------------------------------------------------------------------------- Algorithm 1


def plain_search(problem: MinMaxProblem, theta: np.ndarray, i: int, delta: float) -> tuple[np.ndarray, int, float]:
    """(x̂ − x_i, gradients, FOSC) of one example, by the book: the first iterate after x_i with FOSC ≤ δ."""
    slope, u, calls = BETA * theta + problem.offsets[i].numpy(), np.zeros(4), 1
    while True:
        u = np.clip(u + (slope - MU * u) / (4 * MU), -EPS, EPS)
        gradient, calls = slope - MU * u, calls + 1
        fosc = np.abs(gradient).sum() * EPS - u @ gradient  # the paper's closed form
        if fosc <= delta:
            return u, calls, fosc


@given(
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.lists(st.floats(-4, 0.5), min_size=8, max_size=8),
    st.sampled_from([*PROBLEMS.values(), WIDE]),
)
@settings(max_examples=60)
def test_inner_maximization_stops_at_the_first_iterate_within_delta(place, powers, problem):
    theta, delta = R * torch.tensor(place, dtype=torch.float64), 10 ** torch.tensor(powers, dtype=torch.float64)
    around = Linf(EPS, bounds=None).around(problem.centres)
    found, calls, fosc = inner_maximization(problem.slope(theta), around, MU, delta)
    assert bool(around.contains(found, atol=1e-12).all())
    gradient = slopes(problem, theta, found)[1]
    high, low = problem.centres + EPS - found, problem.centres - EPS - found
    exact = torch.maximum(gradient * high, gradient * low).sum(1)
    assert torch.allclose(fosc, exact, atol=1e-12)
    assert (exact <= delta + 1e-12).all()
    distance = (found - problem.maximizers(theta)).square().sum(1)
    assert (MU * distance <= exact + 1e-12).all()  # twice what FOSC ≤ δ gives by strong concavity used once
    for i in range(8):
        u, count, _ = plain_search(problem, theta.numpy(), i, float(delta[i]))
        assert calls[i] == count
        assert np.allclose(found[i] - problem.centres[i], u, atol=1e-12)


def test_focs_quadratic_relation_is_attained_at_the_surface():
    """Where the maximizer just reaches the surface, FOSC = μ‖x̂ − x*‖²: nothing better can be said of x̂."""
    aligned, theta = PROBLEMS["aligned"], torch.full((4,), R, dtype=torch.float64)
    around = Linf(EPS, bounds=None).around(aligned.centres)
    found, _, fosc = inner_maximization(aligned.slope(theta), around, MU, torch.full((8,), 0.01, dtype=torch.float64))
    distance = (found - aligned.maximizers(theta)).square().sum(1)
    assert torch.allclose(MU * distance, fosc, rtol=1e-9)
    assert (fosc > 0.01 * 0.75**2).all()  # near δ, not near 0: a step shrinks the distance by a quarter


def runs(*rows: tuple[float, int, int]) -> tuple[torch.Tensor, ...]:
    delta, batch, seed = zip(*rows, strict=True)
    return torch.tensor(delta, dtype=torch.float64), torch.tensor(batch), torch.tensor(seed)


@pytest.mark.parametrize(("batch", "shorten"), [(0, False), (2, True), (400, False)])
def test_algorithm_1_is_gradient_descent_on_approximate_maximizers(problem, batch, shorten):
    """Against a plain loop, at η = min(1/L, √(Δ/(Lσ²T))): noise shortens the step only where it is large."""
    theta, T, L = problem.start.numpy(), 20, problem.smoothness
    rate = math.sqrt(problem.descent / (L * (problem.noise**2 / batch) * T)) if batch else math.inf
    assert (rate < 1 / L) is shorten
    columns = algorithm_1(problem, T, *runs((0.05, batch, 5)))
    for t in range(T):
        found = [plain_search(problem, theta, i, 0.05) for i in range(8)]
        x = problem.centres + torch.from_numpy(np.stack([u for u, _, _ in found]))
        used = slopes(problem, torch.from_numpy(theta), x)[0].numpy()
        each = problem.gradients(torch.from_numpy(theta), problem.maximizers(torch.from_numpy(theta))).numpy()
        true = each.mean(0)
        assert columns["squared"][0, t] == pytest.approx(true @ true, rel=1e-9)
        assert columns["bias"][0, t] == pytest.approx(np.linalg.norm(used.mean(0) - true), abs=1e-9)
        assert columns["noise"][0, t] == pytest.approx(math.sqrt(((each - true) ** 2).sum(1).mean()))
        assert columns["calls"][0, t] == np.mean([count for _, count, _ in found])
        assert columns["fosc"][0, t] == pytest.approx(max(fosc for _, _, fosc in found))
        shares = _shares(torch.tensor([batch]), torch.tensor([5]), t, 8)[0].numpy()
        theta = theta - min(1 / L, rate) * shares @ used


def test_batches_are_drawn_with_replacement_anew_each_iteration():
    """Shares of 1/8 in the mean, with a multinomial's variance, and nothing common to two iterations or two seeds."""
    for m in (1, 16):
        shares = torch.stack([_shares(torch.tensor([m, m]), torch.tensor([0, 1]), t, 8) for t in range(1000)])
        assert torch.equal((shares * m).round(), shares * m)
        assert torch.allclose(shares.sum(2), torch.ones(1000, 2, dtype=torch.float64))
        off, variance = shares - 1 / 8, 7 / 64 / m
        assert off.mean(0).abs().max() < 5 * math.sqrt(variance / 1000)
        assert (off.square().mean((0, 1)) / variance - 1).abs().max() < 0.25
        assert abs((off[1:] * off[:-1]).mean()) < 0.05 * variance
        assert abs((off[:, 0] * off[:, 1]).mean()) < 0.05 * variance
    assert torch.equal(_shares(torch.tensor([0]), torch.tensor([0]), 0, 8), torch.full((1, 8), 1 / 8).double())


def test_runs_do_not_depend_on_their_company():
    problem = PROBLEMS["varied"]
    rows = [(0.1, 1, 0), (0.001, 1, 0), (0.1, 64, 3), (0.01, 0, 0), (0.1, 1, 1)]
    together = algorithm_1(problem, 20, *runs(*rows))
    for place, row in enumerate(rows):
        alone = algorithm_1(problem, 20, *runs(row))
        for name, values in alone.items():
            assert torch.allclose(values[0], together[name][place], rtol=1e-9)
    assert not torch.allclose(together["squared"][0], together["squared"][4])


# ------------------------------------------------------------------------------------------------------ the bound


def test_the_bound_written_out():
    problem = PROBLEMS["aligned"]
    L, T, sigma, delta = BETA * BETA / MU + LAMBDA + math.pi / 2 * S, 50, 0.7, 0.03
    noisy, floor = 4 * sigma * math.sqrt(L * problem.descent / T), 5 * BETA**2 * delta / MU
    expected = (2 * L * problem.descent / T + noisy + floor, noisy + floor)
    assert bounds(problem, T, sigma, delta) == pytest.approx(expected)


@pytest.fixture(scope="module")
def numbers():
    return json.loads(json.dumps(theorem.measure("smoke"), allow_nan=False))


def cells(numbers):
    return [*numbers["grid"], *(cell for row in numbers["sweep"].values() for cell in row)]


def test_the_bound_holds_and_so_does_what_it_rests_on(numbers):
    assert len(cells(numbers)) == 22
    for cell in cells(numbers):
        assert cell["low"] <= cell["measured"] <= cell["high"] <= cell["bound"]
        assert cell["ratio"] >= 1.9
        assert cell["fosc_over_delta"] <= 1
        assert cell["noise_over_sigma"] <= 1 + 1e-12
        assert cell["largest_bias"] <= cell["bias_bound"] == pytest.approx(BETA * math.sqrt(cell["delta"] / MU))
        assert cell["inner_gradients"] >= 2
        if cell["printed_condition"]:
            assert cell["high"] <= cell["printed_bound"]


def test_the_printed_bound_fails_where_its_condition_does(numbers):
    assert any(cell["low"] > cell["printed_bound"] and cell["sigma"] > 0 for cell in cells(numbers))
    L, delta = numbers["constants"]["varied"]["L"], numbers["constants"]["varied"]["Delta"]
    for cell in numbers["grid"]:
        assert cell["printed_condition"] == (cell["sigma"] > 0 and cell["iterations"] >= L * delta / cell["sigma"] ** 2)
    assert {cell["printed_condition"] for cell in numbers["grid"] if cell["sigma"]} == {True, False}


def test_the_floor_of_the_worst_case_is_the_closed_form(numbers):
    """Where θ rests, λ(θ − r) = βe with e = ε − |û_j|, and FOSC = Σ (μe + β²e/λ)e: β²‖e‖² = β² FOSC/(μ + β²/λ)."""
    for cell in numbers["sweep"]["aligned"][1:]:
        highest = BETA**2 * cell["delta"] / (MU + BETA**2 / LAMBDA)
        assert 0.75**2 * 0.9 * highest <= cell["last_tenth"] <= 1.1 * highest
    assert theorem._power(numbers["sweep"]["aligned"]) == pytest.approx(1, abs=0.1)
    assert theorem._power(numbers["sweep"]["varied"]) > 1.5


def test_seed_means_and_their_interval():
    problem = PROBLEMS["varied"]
    (cell,) = theorem._cells(problem, 10, (0.1,), (4,), 12)
    averages = algorithm_1(problem, 10, *runs(*((0.1, 4, seed) for seed in range(12))))["squared"].mean(1).numpy()
    half = 1.96 * averages.std(ddof=1) / math.sqrt(12)
    assert cell["measured"] == pytest.approx(averages.mean())
    assert (cell["low"], cell["high"]) == pytest.approx((averages.mean() - half, averages.mean() + half))
    assert cell["sigma"] == problem.noise / 2


def test_the_words_follow_the_numbers(numbers):
    text = theorem.markdown(numbers)
    assert "holds in 22 of 22 settings" in text
    assert text.count("**exceeded**") == sum(c["high"] > c["printed_bound"] for c in numbers["grid"])
    changed = copy.deepcopy(numbers)
    changed["grid"][0] |= {"measured": 50.0, "high": 51.0, "ratio": 0.2}
    text = theorem.markdown(changed)
    assert "holds in 21 of 22 settings, and is 0.2 to" in text
    assert "exceeded in 1 of 4 settings with T ≥ LΔ/σ²" in text


def test_tables_are_whole(numbers):
    tables = [part.splitlines() for part in theorem.markdown(numbers).split("\n\n") if part.startswith("|")]
    assert [len(table) - 2 for table in tables] == [2, 12, 10]
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_the_picture_is_drawn(numbers, tmp_path):
    figure = Figure(layout="constrained", dpi=150)
    theorem.draw(numbers, figure)
    figure.savefig(tmp_path / "theorem.png")
    from matplotlib.image import imread

    image = imread(tmp_path / "theorem.png")
    assert image.shape[1] >= 1200
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20


def test_an_unknown_scale_is_named():
    with pytest.raises(ValueError, match="unknown scale 'smok'; did you mean 'smoke'"):
        theorem.measure("smok")
