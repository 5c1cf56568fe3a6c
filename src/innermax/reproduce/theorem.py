"""Theorem 1 (Wang et al. 2019, Section 4.2) beside runs of Algorithm 1 on problems whose every constant is known.

The theorem bounds the averaged squared gradient norm of L_S(θ) = 1/n Σ_i max over x ∈ X_i of f_i(θ, x), X_i an L∞ ball,
when SGD uses maximizers x̂_i with FOSC ≤ δ. With g a mini-batch's gradient at the true maximizers x*_i, ĝ the one at the
x̂_i, which is used, and L = L_θx L_xθ/μ + L_θθ, it rests on three facts:

- strong concavity, from x̂ to x* and back: μ‖x̂ − x*‖² ≤ FOSC(x̂) ≤ δ, so that ‖ĝ − g‖ ≤ L_θx √(δ/μ) =: B;
- ‖x*_i(θ) − x*_i(θ')‖ ≤ L_xθ/μ ‖θ − θ'‖, so that L_S is L-smooth;
- a step of length η ≤ 1/L: η/2 ‖∇L_S(θ_t)‖² ≤ L_S(θ_t) − E L_S(θ_{t+1}) + ηB²/2 + Lη²(σ² + B²).

Sum over t, divide by ηT/2 and put in η = min(1/L, √(Δ/(Lσ²T))), of which 1/η ≤ L + σ√(LT/Δ). For every T,

    1/T Σ_t E‖∇L_S(θ_t)‖² ≤ 2LΔ/T + 4σ√(LΔ/T) + 3B²,   and 3B² is less than the paper's 5B² = 5 L²_θx δ/μ.

The paper prints the bound without its first term: so it holds where 1/L does not cut η, T ≥ LΔ/σ².
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from innermax import randomness
from innermax.checks import unknown
from innermax.reproduce.strongly_concave import Problem, build_problem
from innermax.threat import FeasibleSet, Linf

Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is run: numbers of iterations T, and seeds."""

    iterations: tuple[int, ...]
    seeds: int


SCALES = {
    "smoke": Scale((16, 64), 64),
    "cpu": Scale((16, 64, 256, 1024, 4096), 64),
    "full": Scale((16, 64, 256, 1024, 4096, 16384), 256),
}
SPREADS = {"varied": 0.3, "aligned": 0.0}  # of the offsets: examples as they come, and δ's worst case
BATCHES = (1, 64, 0)  # 0: every iteration sees all examples, σ = 0
GRID_DELTAS = (1e-1, 1e-3)
SWEEP_DELTAS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe & Ito (2008): told apart without colour vision


def bounds(problem: Problem, iterations: int, sigma: float, delta: float) -> tuple[float, float]:
    """(the bound for every T, the bound as printed)."""
    scaled = problem.smoothness * problem.descent / iterations
    printed = 4 * sigma * math.sqrt(scaled) + 5 * problem.coupling**2 * delta / problem.concavity
    return 2 * scaled + printed, printed


def inner_maximization(
    slope: Float[Tensor, "b p"], around: FeasibleSet, concavity: float, delta: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "b p"], Int[Tensor, " b"], Float[Tensor, " b"]]:
    """Algorithm 1's inner loop, K unlimited: projected gradient ascent from the clean inputs, until FOSC ≤ δ.

    One step of 1/μ would do where the ball does not bind, whatever δ; at a quarter of that, FOSC ends near δ. The paper's
    sign steps do not converge at a constant length. Returns each x̂, the gradients it took, and its FOSC.
    """
    found, calls, fosc = around.x.clone(), torch.zeros(len(slope), dtype=torch.int64), torch.zeros_like(delta)
    rows, x, gradient, count = torch.arange(len(slope)), around.x, slope, 1
    while len(rows):
        x, count = around.project(x + gradient / (4 * concavity)), count + 1
        gradient = slope - concavity * (x - around.x)
        gap = around.gap(gradient, x)
        done, on = (gap <= delta).nonzero()[:, 0], (gap > delta).nonzero()[:, 0]
        if len(done):
            found[rows[done]], calls[rows[done]], fosc[rows[done]] = x[done], count, gap[done]
            rows, x, gradient, slope, delta, around = (v[on] for v in (rows, x, gradient, slope, delta, around))
    return found, calls, fosc


def algorithm_1(
    problem: Problem, iterations: int, delta: Float[Tensor, " r"], batch: Int[Tensor, " r"], seed: Int[Tensor, " r"]
) -> dict[str, Float[Tensor, "r t"]]:
    """Algorithm 1 for T iterations, a row a run: each with its δ, its batch size (0: all examples) and its seed.

    Returns a column an iteration: "squared", ‖∇L_S(θ_t)‖²; "bias", ‖1/n Σ_i ∇_θ f_i(θ_t, x̂_i) − ∇L_S(θ_t)‖; "noise",
    the deviation of one example's gradient at the true maximizers; "fosc", the largest FOSC; "calls", the mean number of
    inner gradients an example.
    """
    runs, n = len(delta), len(problem.centres)
    sigma = torch.where(batch > 0, problem.noise / batch.double().sqrt(), 0.0)
    rate = (problem.descent / (problem.smoothness * sigma**2 * iterations)).sqrt().clamp(max=1 / problem.smoothness)
    around = Linf(problem.eps, bounds=None).around(problem.centres.repeat(runs, 1))
    theta, levels = problem.start.repeat(runs, 1), delta.repeat_interleave(n)
    rows = []
    for t in range(iterations):
        # All examples are solved, whatever the batch: a search depends on θ and its example alone.
        found, calls, fosc = inner_maximization(problem.slope(theta).flatten(0, 1), around, problem.concavity, levels)
        used = problem.gradients(theta, found.unflatten(0, (runs, n)))
        true = problem.gradients(theta, problem.maximizers(theta))
        mean = true.mean(1)
        rows.append(
            {
                "squared": mean.square().sum(1),
                "bias": (used.mean(1) - mean).norm(dim=1),
                "noise": (true - mean[:, None]).square().sum(2).mean(1).sqrt(),
                "fosc": fosc.unflatten(0, (runs, n)).amax(1),
                "calls": calls.unflatten(0, (runs, n)).double().mean(1),
            }
        )
        theta = theta - rate[:, None] * (_shares(batch, seed, t, n)[:, :, None] * used).sum(1)
    return {name: torch.stack([row[name] for row in rows], dim=1) for name in rows[0]}


def _shares(batch: Int[Tensor, " r"], seed: Int[Tensor, " r"], t: int, n: int) -> Float[Tensor, "r n"]:
    """The share of each example in iteration t's batches, drawn with replacement."""
    shares = torch.full((len(batch), n), 1 / n, dtype=torch.float64)
    for size in set(batch.tolist()) - {0}:
        rows = batch == size
        drawn = (randomness.uniform(randomness.keys(0, seed[rows], t, size), size) * n).long()
        counts = torch.zeros(len(drawn), n, dtype=torch.float64)
        shares[rows] = counts.scatter_add(1, drawn, torch.full_like(drawn, 1 / size, dtype=torch.float64))
    return shares


def measure(scale: str) -> dict[str, Any]:
    """Runs of Algorithm 1 beside the bound, as JSON: constants; "grid", over T, σ and δ; "sweep", over δ at σ = 0.

    Raises ValueError for a scale that is not in SCALES.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    iterations, seeds = SCALES[scale].iterations, SCALES[scale].seeds
    problems = {name: build_problem(spread) for name, spread in SPREADS.items()}
    varied = problems["varied"]
    return {
        "scale": scale,
        "seeds": seeds,
        "constants": {name: _constants(problem) for name, problem in problems.items()},
        "grid": [cell for T in iterations for cell in _cells(varied, T, GRID_DELTAS, BATCHES, seeds)],
        "sweep": {name: _cells(problem, iterations[-1], SWEEP_DELTAS, (0,), 1) for name, problem in problems.items()},
    }


def _constants(problem: Problem) -> dict[str, float]:
    return {
        "L_theta_theta": problem.outer_smoothness,
        "L_theta_x": problem.coupling,
        "L_x_theta": problem.coupling,
        "mu": problem.concavity,
        "L": problem.smoothness,
        "sigma": problem.noise,
        "Delta": problem.descent,
        "epsilon": problem.eps,
    }


def _cells(
    problem: Problem, iterations: int, deltas: Sequence[float], batches: Sequence[int], seeds: int
) -> list[dict[str, Any]]:
    """A cell for each batch size and δ: the runs of all seeds (one where there is no noise), and the bound."""
    runs = [(m, d, s) for m, d in product(batches, deltas) for s in range(seeds if m else 1)]
    sizes, levels, numbers = zip(*runs, strict=True)
    batch, delta, seed = torch.tensor(sizes), torch.tensor(levels, dtype=torch.float64), torch.tensor(numbers)
    columns = algorithm_1(problem, iterations, delta, batch, seed)
    cells = []
    for m, d in product(batches, deltas):
        own = {name: values[(batch == m) & (delta == d)] for name, values in columns.items()}
        averages = own["squared"].mean(1)
        measured = float(averages.mean())
        half = 1.96 * float(averages.std()) / math.sqrt(len(averages)) if m else 0.0
        sigma = problem.noise / math.sqrt(m) if m else 0.0
        bound, printed = bounds(problem, iterations, sigma, d)
        cells.append(
            {
                "iterations": iterations,
                "batch": m,
                "sigma": sigma,
                "delta": d,
                "seeds": len(averages),
                "measured": measured,
                "low": measured - half,
                "high": measured + half,
                "last_tenth": float(own["squared"][:, -max(iterations // 10, 1) :].mean()),
                "bound": bound,
                "ratio": bound / measured,
                "printed_bound": printed,
                "printed_condition": sigma**2 * iterations >= problem.smoothness * problem.descent,
                "inner_gradients": float(own["calls"].mean()),
                "largest_fosc": float(own["fosc"].max()),
                "largest_noise": float(own["noise"].max()),
                "largest_bias": float(own["bias"].max()),
                "bias_bound": problem.coupling * math.sqrt(d / problem.concavity),
            }
        )
    return cells


def markdown(numbers: Numbers) -> str:
    """The constants, the bound over T, σ and δ, what δ leaves, and what follows."""
    sweep = numbers["sweep"]
    return "\n\n".join(
        [
            _verdict(numbers),
            _table(
                ["problem", "L_θθ", "L_θx", "L_xθ", "μ", "L", "σ, batch of 1", "Δ", "ε"],
                [[name, *(f"{value:.4g}" for value in row.values())] for name, row in numbers["constants"].items()],
            ),
            "The averaged squared gradient norm, a mean over seeds with its 95 % interval, against the bound. Examples "
            "that differ (varied).",
            _table(
                ["δ", "σ", "T", "measured", "95 % interval", "bound", "ratio", "as printed", "T ≥ LΔ/σ²", "∇ₓ"],
                [_grid_row(c) for c in sorted(numbers["grid"], key=lambda c: (-c["delta"], -c["sigma"]))],
            ),
            f"What δ leaves: no noise, T = {sweep['varied'][0]['iterations']:,}. The bias is the largest that was met.",
            _table(
                [
                    "problem",
                    "δ",
                    "measured",
                    "last tenth",
                    "L²_θx δ/μ",
                    "bound",
                    "ratio",
                    "bias",
                    "≤ L_θx √(δ/μ)",
                    "∇ₓ",
                ],
                [[name, *_sweep_row(cell)] for name, cells in sweep.items() for cell in cells],
            ),
            "∇ₓ: inner gradients an example and iteration.",
        ]
    )


def _grid_row(cell: Numbers) -> list[str]:
    return [
        f"{cell['delta']:g}",
        f"{cell['sigma']:.3g}",
        f"{cell['iterations']:,}",
        f"{cell['measured']:.4f}",
        f"{cell['low']:.4f}–{cell['high']:.4f}" if cell["batch"] else "exact",
        f"{cell['bound']:.4f}",
        f"{cell['ratio']:.1f}",
        f"{cell['printed_bound']:.4f}" + ("" if cell["high"] <= cell["printed_bound"] else " **too low**"),
        "yes" if cell["printed_condition"] else "no",
        f"{cell['inner_gradients']:.1f}",
    ]


def _sweep_row(cell: Numbers) -> list[str]:
    values = (cell["measured"], cell["last_tenth"], cell["bias_bound"] ** 2, cell["bound"])
    return [
        f"{cell['delta']:g}",
        *(f"{value:.2g}" for value in values),
        f"{cell['ratio']:.1f}",
        f"{cell['largest_bias']:.3g}",
        f"{cell['bias_bound']:.3g}",
        f"{cell['inner_gradients']:.1f}",
    ]


def _verdict(numbers: Numbers) -> str:
    """What the numbers say, each clause counted from them."""
    sweep, grid = numbers["sweep"], numbers["grid"]
    cells = [*grid, *(cell for row in sweep.values() for cell in row)]
    held = [cell for cell in cells if cell["high"] <= cell["bound"]]
    within, beyond = ([cell for cell in cells if cell["printed_condition"] is condition] for condition in (True, False))
    broken, missed = (sum(cell["high"] > cell["printed_bound"] for cell in group) for group in (within, beyond))
    ratios = [cell["ratio"] for cell in cells]
    left = {name: [cell["last_tenth"] / cell["bias_bound"] ** 2 for cell in row] for name, row in sweep.items()}
    share = max(cell["largest_bias"] / cell["bias_bound"] for cell in cells)
    return (
        f"The bound holds in {len(held)} of {len(cells)} settings and is {min(ratios):.1f} to {max(ratios):.1f} times "
        f"what is measured. As printed, without 2LΔ/T, it is exceeded in {broken} of the {len(within)} settings with "
        f"T ≥ LΔ/σ², and in {missed} of the {len(beyond)} others. Without noise, over the last tenth of the "
        f"iterations, δ = {sweep['varied'][-1]['delta']:g}…{sweep['varied'][0]['delta']:g} leaves "
        f"{min(left['aligned']):.2g} to {max(left['aligned']):.2g} times L²_θx δ/μ where every maximizer just reaches "
        f"the ball's surface (aligned), {min(left['varied']):.2g} to {max(left['varied']):.2g} times where examples "
        f"differ (varied); the theorem allows 5. The largest bias of a gradient is {share:.2f} of L_θx √(δ/μ)."
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(numbers: Numbers, path: Path) -> None:
    """Measured and bound against T for each σ, at the smallest δ; and against δ, without noise; as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    delta = min(cell["delta"] for cell in numbers["grid"])
    cells = [cell for cell in numbers["grid"] if cell["delta"] == delta]
    for sigma, colour, mark in zip(sorted({c["sigma"] for c in cells}, reverse=True), COLOURS, "os^", strict=True):
        own = [cell for cell in cells if cell["sigma"] == sigma]
        T, measured = [cell["iterations"] for cell in own], [cell["measured"] for cell in own]
        errors = [cell["high"] - cell["measured"] for cell in own]
        left.errorbar(T, measured, errors, color=colour, marker=mark, capsize=3, label=f"σ = {sigma:.2g}")
        left.plot(T, [cell["bound"] for cell in own], "--", color=colour)
    left.plot([], [], "--", color="0.3", label="bound")
    left.set(xlabel="iterations T", title=f"averaged ‖∇L_S(θ_t)‖², δ = {delta:g}")
    for (name, row), colour, mark in zip(numbers["sweep"].items(), COLOURS, "os", strict=False):
        deltas = [cell["delta"] for cell in row]
        right.plot(deltas, [cell["last_tenth"] for cell in row], color=colour, marker=mark, label=f"{name}, last tenth")
        right.plot(deltas, [cell["measured"] for cell in row], ":", color=colour, marker=mark, mfc="w", label=name)
    row = numbers["sweep"]["varied"]
    right.plot(deltas, [cell["bound"] for cell in row], "--", color="0.3", label="bound")
    right.plot(deltas, [cell["bias_bound"] ** 2 for cell in row], "-.", color="0.6", label="L²_θx δ/μ")
    right.set(xlabel="δ", title=f"‖∇L_S(θ_t)‖² without noise, T = {row[0]['iterations']:,}")
    for axis in (left, right):
        axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
