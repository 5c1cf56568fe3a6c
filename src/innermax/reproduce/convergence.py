"""Theorem 1 (Wang et al. 2019, Section 4.2) and the Algorithm 1 it is about, on a problem of known constants.

The theorem bounds the averaged squared gradient norm of L_S(θ) = 1/n Σ_i max over x ∈ X_i of f_i(θ, x), X_i an L∞ ball,
when SGD uses maximizers x̂_i with FOSC ≤ δ. Let g be the gradient of a mini-batch at the true maximizers x*_i, ĝ the one
at the x̂_i, which SGD uses, and L = L_θx L_xθ/μ + L_θθ. The proof rests on three facts:

- strong concavity, from x̂ to x* and back: μ‖x̂ − x*‖² ≤ FOSC(x̂) ≤ δ, so that ‖ĝ − g‖ ≤ L_θx √(δ/μ) =: B;
- ‖x*_i(θ) − x*_i(θ')‖ ≤ L_xθ/μ ‖θ − θ'‖, so that L_S is L-smooth;
- a step of length η ≤ 1/L: η/2 ‖∇L_S(θ_t)‖² ≤ L_S(θ_t) − E L_S(θ_{t+1}) + ηB²/2 + Lη²(σ² + B²).

Sum over t, divide by ηT/2 and put in η = min(1/L, √(Δ/(Lσ²T))), of which 1/η ≤ L + σ√(LT/Δ). For every T,

    1/T Σ_t E‖∇L_S(θ_t)‖² ≤ 2LΔ/T + 4σ√(LΔ/T) + 3B²,   and 3B² is less than the paper's 5B² = 5 L²_θx δ/μ.

The paper prints the bound without its first term. That holds where 1/L does not limit η: T ≥ LΔ/σ².
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from innermax.reproduce.strongly_concave import MinMaxProblem
from innermax.threat import FeasibleSet, Linf
from innermax.utils import randomness


def bounds(problem: MinMaxProblem, iterations: int, sigma: float, delta: float) -> tuple[float, float]:
    """The right-hand side of Theorem 1: (for every T, as printed)."""
    scaled = problem.smoothness * problem.descent / iterations
    printed = 4 * sigma * math.sqrt(scaled) + 5 * problem.coupling**2 * delta / problem.concavity
    return 2 * scaled + printed, printed


def inner_maximization(
    slope: Float[Tensor, "b p"], around: FeasibleSet, concavity: float, delta: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "b p"], Int[Tensor, " b"], Float[Tensor, " b"]]:
    """The inner loop of Algorithm 1, K unlimited: projected gradient ascent from the clean inputs until FOSC ≤ δ > 0.

    Where the ball does not bind, one step of 1/μ would end at the maximum whatever δ; steps of a quarter of it end with
    FOSC near δ. The paper's sign steps of constant length need not get there. Returns each x̂, its number of gradients
    and its FOSC.
    """
    found, calls, fosc = around.x.clone(), torch.zeros(len(slope), dtype=torch.int64), torch.zeros_like(delta)
    rows, x, gradient, count = torch.arange(len(slope)), around.x, slope, 1
    while len(rows):
        x, count = around.project(x + gradient / (4 * concavity)), count + 1
        gradient = slope - concavity * (x - around.x)
        gap = around.gap(gradient, x)
        within = gap <= delta
        if bool(within.any()):
            done, on = within.nonzero()[:, 0], (~within).nonzero()[:, 0]
            found[rows[done]], calls[rows[done]], fosc[rows[done]] = x[done], count, gap[done]
            rows, x, gradient, slope, delta = (values[on] for values in (rows, x, gradient, slope, delta))
            around = around[on]
    return found, calls, fosc


def algorithm_1(
    problem: MinMaxProblem,
    iterations: int,
    delta: Float[Tensor, " r"],
    batch: Int[Tensor, " r"],
    seed: Int[Tensor, " r"],
) -> dict[str, Float[Tensor, "r t"]]:
    """Algorithm 1 for T iterations, one row per run, each with its δ, batch size (0: all examples) and seed.

    Returns one column per iteration: "squared", ‖∇L_S(θ_t)‖²; "bias", ‖1/n Σ_i ∇_θ f_i(θ_t, x̂_i) − ∇L_S(θ_t)‖; "noise",
    the deviation of one example's gradient at the true maximizers; "fosc", the largest FOSC; "calls", the mean number
    of inner gradients per example.
    """
    runs, n = len(delta), len(problem.centres)
    sigma = torch.where(batch > 0, problem.noise / batch.double().sqrt(), 0.0)
    rate = (problem.descent / (problem.smoothness * sigma**2 * iterations)).sqrt().clamp(max=1 / problem.smoothness)
    around = Linf(problem.eps, bounds=None).around(problem.centres.repeat(runs, 1))
    theta, levels = problem.start.repeat(runs, 1), delta.repeat_interleave(n)
    names = ("squared", "bias", "noise", "fosc", "calls")
    columns = {name: torch.empty(iterations, runs, dtype=torch.float64) for name in names}
    for t in range(iterations):
        # Every example is maximised, whatever the batch: a search depends only on θ and its example.
        found, calls, fosc = inner_maximization(problem.slope(theta).flatten(0, 1), around, problem.concavity, levels)
        used = problem.gradients(theta, found.reshape(runs, n, -1))
        true = problem.gradients(theta, problem.maximizers(theta))
        mean = true.mean(1)
        columns["squared"][t] = mean.square().sum(1)
        columns["bias"][t] = (used.mean(1) - mean).norm(dim=1)
        columns["noise"][t] = (true - mean[:, None]).square().sum(2).mean(1).sqrt()
        columns["fosc"][t] = fosc.reshape(runs, n).amax(1)
        columns["calls"][t] = calls.reshape(runs, n).double().mean(1)
        theta = theta - rate[:, None] * (_shares(batch, seed, t, n)[:, :, None] * used).sum(1)
    return {name: values.T for name, values in columns.items()}


def _shares(batch: Int[Tensor, " r"], seed: Int[Tensor, " r"], t: int, n: int) -> Float[Tensor, "r n"]:
    """The share of each example in iteration t's batches, drawn with replacement."""
    shares = torch.full((len(batch), n), 1 / n, dtype=torch.float64)
    for size in set(batch.tolist()) - {0}:
        rows = batch == size
        drawn = (randomness.uniform(randomness.hash_keys(0, seed[rows], t, size), size) * n).long()
        counts = torch.zeros(len(drawn), n, dtype=torch.float64)
        shares[rows] = counts.scatter_add(1, drawn, torch.full_like(drawn, 1 / size, dtype=torch.float64))
    return shares
