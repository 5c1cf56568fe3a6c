"""Theorem 1: Algorithm 1 beside the theorem's bound, as T, σ and δ vary; numbers, tables and a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from innermax.reproduce.artifact import Artifact, Numbers
from innermax.reproduce.cache import Cache, Result
from innermax.reproduce.convergence import algorithm_1, bounds
from innermax.reproduce.strongly_concave import MinMaxProblem, build_problem
from innermax.utils.validation import unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Size:
    """How much is run: numbers of iterations T, and seeds."""

    iterations: tuple[int, ...]
    seeds: int


SIZES = {
    "smoke": Size((16, 64), 64),
    "cpu": Size((16, 64, 256, 1024, 4096), 64),
    "full": Size((16, 64, 256, 1024, 4096, 16384), 128),
}
SPREADS = {"varied": 0.3, "aligned": 0.0}  # of the offsets: examples that differ, and δ's worst case
BATCHES = (1, 512, 0)  # 0: every iteration sees all examples, σ = 0
GRID_DELTAS = (1e-1, 1e-3)
SWEEP_DELTAS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe & Ito (2008): distinct without colour vision
_SQUARED = r"$\|\nabla L_S(\theta_t)\|^2$"


@dataclass(frozen=True)
class Measured:
    """The experiment at a scale."""

    scale: str

    def run(self, cache: Cache) -> Result:
        """The numbers of `measure`."""
        return measure(self.scale)


def measure(scale: str) -> dict[str, Any]:
    """Runs Algorithm 1 and computes the bound, as JSON: "constants"; "grid", over T, σ and δ; "sweep", over δ at σ = 0.

    Raises ValueError for a scale that is not in SIZES.
    """
    if scale not in SIZES:
        raise unknown("scale", scale, SIZES)
    iterations, seeds = SIZES[scale].iterations, SIZES[scale].seeds
    problems = {name: build_problem(spread) for name, spread in SPREADS.items()}
    grid = [_cells(problems["varied"], T, GRID_DELTAS, BATCHES, seeds) for T in iterations]
    return {
        "scale": scale,
        "constants": {name: _constants(problem) for name, problem in problems.items()},
        "grid": [cell for cells in grid for cell in cells],
        "sweep": {name: _cells(problem, iterations[-1], SWEEP_DELTAS, (0,), 1) for name, problem in problems.items()},
    }


def _constants(problem: MinMaxProblem) -> dict[str, float]:
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
    problem: MinMaxProblem, iterations: int, deltas: Sequence[float], batches: Sequence[int], seeds: int
) -> list[dict[str, Any]]:
    """A cell for each batch size and δ: the runs of all seeds (one where there is no noise) and the bound."""
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
                "largest_bias": float(own["bias"].max()),
                "bias_bound": problem.coupling * math.sqrt(d / problem.concavity),
                "fosc_over_delta": float(own["fosc"].max()) / d,
                "noise_over_sigma": float(own["noise"].max()) / problem.noise,
            }
        )
    return cells


def markdown(numbers: Numbers) -> str:
    """A paragraph of conclusions; the constants; the bound over T, σ and δ; what remains because of δ."""
    sweep, grid = numbers["sweep"], sorted(numbers["grid"], key=lambda cell: (-cell["delta"], -cell["sigma"]))
    constants = ["problem", "L_θθ", "L_θx", "L_xθ", "μ", "L", "σ, batch of 1", "Δ", "ε"]
    over = ["δ", "σ", "T", "measured", "95 % interval", "bound", "ratio", "as printed", "T ≥ LΔ/σ²", "inner gradients"]
    left = ["problem", "δ", "measured", "last tenth", "L²_θx δ/μ", "bound", "ratio", "bias", "L_θx √(δ/μ)"]
    return "\n\n".join(
        [
            _verdict(numbers),
            _table(constants, [[k, *map("{:.4g}".format, row.values())] for k, row in numbers["constants"].items()]),
            "Measured: 1/T Σ ‖∇L_S(θ_t)‖², the mean over seeds, on examples that differ (varied). At σ = 0 every "
            "iteration uses all examples and nothing is random. The paper requires σ > 0; for any σ² ≤ LΔ/T the runs "
            "would be the same, because η is 1/L. Inner gradients: per example and iteration.",
            _table(over, [_grid_row(cell) for cell in grid]),
            f"What remains because of δ, at σ = 0 and T = {sweep['varied'][0]['iterations']:,}. Last tenth: the mean "
            "of ‖∇L_S(θ_t)‖² over the last tenth of the iterations. Bias: the largest error of the gradient on all "
            "examples.",
            _table(left, [[name, *_sweep_row(cell)] for name, cells in sweep.items() for cell in cells]),
        ]
    )


def _grid_row(cell: Numbers) -> list[str]:
    return [
        f"{cell['delta']:g}",
        f"{cell['sigma']:.3g}",
        f"{cell['iterations']:,}",
        f"{cell['measured']:.4f}",
        f"{cell['low']:.4f}–{cell['high']:.4f}" if cell["batch"] else "–",
        f"{cell['bound']:.4f}" + ("" if _holds(cell, "bound") else " **exceeded**"),
        f"{cell['ratio']:.1f}",
        f"{cell['printed_bound']:.4f}" + ("" if _holds(cell, "printed_bound") else " **exceeded**"),
        "yes" if cell["printed_condition"] else "no",
        f"{cell['inner_gradients']:.1f}",
    ]


def _sweep_row(cell: Numbers) -> list[str]:
    values = (cell["measured"], cell["last_tenth"], cell["bias_bound"] ** 2, cell["bound"])
    bias = (f"{cell['ratio']:.1f}", f"{cell['largest_bias']:.2g}", f"{cell['bias_bound']:.2g}")
    return [f"{cell['delta']:g}", *map("{:.2g}".format, values), *bias]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _holds(cell: Numbers, bound: str) -> bool:
    """Whether the whole interval is below the bound."""
    return bool(cell["high"] <= cell[bound])


def _verdict(numbers: Numbers) -> str:
    """A paragraph whose every figure is computed from the numbers."""
    sweep = numbers["sweep"]
    cells = [*numbers["grid"], *sweep["varied"], *sweep["aligned"]]
    within, beyond = ([cell for cell in cells if cell["printed_condition"] is kind] for kind in (True, False))
    broken = [sum(not _holds(cell, "printed_bound") for cell in group) for group in (within, beyond)]
    noisy = sum(cell["sigma"] > 0 and not _holds(cell, "printed_bound") for cell in beyond)
    low, high = (extreme(cell["ratio"] for cell in cells) for extreme in (min, max))
    fosc, noise = (max(cell[key] for cell in cells) for key in ("fosc_over_delta", "noise_over_sigma"))
    bias = max(cell["largest_bias"] / cell["bias_bound"] for cell in cells)
    floors = {name: [cell["last_tenth"] / cell["bias_bound"] ** 2 for cell in row] for name, row in sweep.items()}
    span = {name: f"{min(shares):.2g} to {max(shares):.2g}" for name, shares in floors.items()}
    return (
        f"The bound for every T holds in {sum(_holds(cell, 'bound') for cell in cells)} of {len(cells)} settings, and "
        f"is {low:.1f} to {high:.1f} times the measured value. The printed bound, without 2LΔ/T, is exceeded in "
        f"{broken[0]} of {len(within)} settings with T ≥ LΔ/σ² and in {broken[1]} of the {len(beyond)} others, "
        f"{noisy} of them with σ > 0. The largest values of what the bounds assume: FOSC {fosc:.3f} δ, gradient noise "
        f"of one example {noise:.2f} σ, bias of the gradient {bias:.2f} L_θx √(δ/μ). Without noise, the value that "
        f"remains in the end is {span['aligned']} times L²_θx δ/μ where every maximizer just reaches the surface of "
        f"the ball (aligned, the worst case of δ), and is proportional to δ^{_power(sweep['aligned']):.1f} over the "
        f"smallest two δ. Where examples differ (varied) it is {span['varied']} times, and proportional to "
        f"δ^{_power(sweep['varied']):.1f}. The theorem allows 5 times."
    )


def _power(row: Sequence[Numbers]) -> float:
    """The power of δ to which the value that remains is proportional, over the smallest two δ."""
    large, small = row[-2:]
    return math.log(large["last_tenth"] / small["last_tenth"]) / math.log(large["delta"] / small["delta"])


def draw(numbers: Numbers, figure: "Figure") -> None:
    """Draws measured values and bounds: against T for each σ at the smallest δ of the grid, and against δ at σ = 0."""
    figure.set_size_inches(10.5, 5.6)
    left, right = figure.subplots(1, 2)
    for axis in (left, right):
        axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    delta = min(cell["delta"] for cell in numbers["grid"])
    for batch, colour, mark in zip(BATCHES, COLOURS, "os^", strict=True):
        row = [cell for cell in numbers["grid"] if cell["batch"] == batch and cell["delta"] == delta]
        T, measured = [cell["iterations"] for cell in row], [cell["measured"] for cell in row]
        errors = [cell["high"] - cell["measured"] for cell in row]
        label = f"σ = {row[0]['sigma']:.2g}, average over t"
        left.errorbar(T, measured, errors, color=colour, marker=mark, capsize=3, label=label)
        left.plot(T, [cell["bound"] for cell in row], "--", color=colour)
    left.set_xticks(T, [f"{value:,}" for value in T])
    left.set_xticks([], minor=True)
    left.set(xlabel="iterations T", title=f"{_SQUARED}, δ = {delta:g}, varied")
    for (name, row), colour, mark in zip(numbers["sweep"].items(), COLOURS, "os", strict=False):
        keys = ("delta", "measured", "last_tenth", "bound")
        deltas, average, end, bound = ([cell[key] for cell in row] for key in keys)
        right.plot(deltas, average, ":", color=colour, marker=mark, mfc="w", label=f"{name}, average over t")
        right.plot(deltas, end, color=colour, marker=mark, label=f"{name}, last tenth")
        right.plot(deltas, bound, "--", color=colour)
    right.plot(
        deltas, [cell["bias_bound"] ** 2 for cell in row], "-.", color="0.5", label=r"$L_{\theta x}^2\delta/\mu$"
    )
    right.set(xlabel="δ", title=f"{_SQUARED}, σ = 0, T = {row[0]['iterations']:,}")
    for axis in (left, right):
        axis.plot([], [], "--", color="0.3", label="bound, in the same colour")
        axis.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))


ARTIFACTS = (
    Artifact(
        "theorem1",
        "Theorem 1: the bound beside Algorithm 1",
        lambda scale: [Measured(scale.name)],
        lambda scale, find: {"theorem": find(Measured(scale.name))},
        lambda numbers: "" if numbers["theorem"] is None else markdown(numbers["theorem"]),
        lambda numbers, figure: draw(numbers["theorem"], figure),
    ),
)
