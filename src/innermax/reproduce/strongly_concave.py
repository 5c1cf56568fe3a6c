"""A min-max problem, strongly concave inside and not convex outside, whose every constant in Theorem 1 is known."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from innermax.utils import randomness

Parameters = Float[Tensor, "*runs p"]
Inputs = Float[Tensor, "*runs n p"]


@dataclass(frozen=True, eq=False)
class MinMaxProblem:
    """n examples f_i(θ, x) = h(θ) + ⟨βθ + b_i, x⟩ − μ/2 ‖x − x_i‖² with ‖x − x_i‖_∞ ≤ ε, in float64.

    A linear score attacked at a quadratic price, as in Sinha et al. (2018), and a wavy bowl
    h(θ) = Σ_j λ/2 θ_j² + 2sr²/π cos(πθ_j/2r) with s = λ + β²/μ and r = με/β. Where |βθ_j + b_ij| = με the maximizer
    just reaches the ball's surface: there FOSC is as small beside ‖x̂ − x*‖² as it can be. Without offsets b_i, L_S is
    lowest where that is so in every coordinate of every example, |θ_j| = r. At 0 it has a maximum.

    Args:
        centres: (n, p) clean inputs x_i.
        offsets: (n, p) the b_i.
        eps: ε > 0.
        concavity: μ > 0.
        coupling: β > 0.
        curvature: λ > 0.
    """

    centres: Float[Tensor, "n p"]
    offsets: Float[Tensor, "n p"]
    eps: float = 0.5
    concavity: float = 2.0
    coupling: float = 1.5
    curvature: float = 4.0

    @property
    def reach(self) -> float:
        """r = με/β."""
        return self.concavity * self.eps / self.coupling

    @property
    def stiffness(self) -> float:
        """s = λ + β²/μ."""
        return self.curvature + self.coupling**2 / self.concavity

    @property
    def outer_smoothness(self) -> float:
        """L_θθ = max |h''| = λ + πs/2, at θ_j = 2r."""
        return self.curvature + math.pi / 2 * self.stiffness

    @property
    def smoothness(self) -> float:
        """L = L_θx L_xθ/μ + L_θθ, where L_θx = L_xθ = β."""
        return self.coupling**2 / self.concavity + self.outer_smoothness

    @cached_property
    def noise(self) -> float:
        """σ, for every θ, of the gradient of one example drawn at random: β(√Var x_i + √Var b_i/μ).

        That gradient is ∇h + βx_i + β clip((βθ + b_i)/μ, ±ε), and clipping, a 1-Lipschitz map of each coordinate, makes
        no variance larger. A batch of m drawn with replacement has σ/√m.
        """
        return self.coupling * (deviation(self.centres) + deviation(self.offsets) / self.concavity)

    @cached_property
    def descent(self) -> float:
        """Δ = L_S(θ⁰) − min L_S, from above, by less than 1e-6.

        L_S is a sum of L-smooth functions, one per coordinate, which grow beyond the ends of the grid: their minimum
        lies at most L·spacing²/8 below the lowest value on the grid.
        """
        pull = self.stiffness * self.reach + self.coupling * (self.eps + float(self.centres.mean(0).abs().max()))
        grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[:, None] * (pull / self.curvature)
        lowest = self._by_coordinate(grid.expand(-1, self.centres.shape[1])).amin(0)
        below = self.smoothness * float(grid[1] - grid[0]) ** 2 / 8
        return float(self.value(self.start) - (lowest - below).sum())

    @property
    def start(self) -> Float[Tensor, " p"]:
        """θ⁰, beside the maximum: ±r/10 in turn."""
        signs = 1 - 2 * (torch.arange(self.centres.shape[1]) % 2)
        return signs.double() * self.reach / 10

    def slope(self, theta: Parameters) -> Inputs:
        """βθ + b_i, the gradient of f_i in x at the centre x_i."""
        return self.coupling * theta[..., None, :] + self.offsets

    def maximizers(self, theta: Parameters) -> Inputs:
        """x*_i(θ) = x_i + clip((βθ + b_i)/μ, ±ε)."""
        return self.centres + (self.slope(theta) / self.concavity).clamp(-self.eps, self.eps)

    def gradients(self, theta: Parameters, x: Inputs) -> Inputs:
        """∇_θ f_i(θ, x_i) = ∇h(θ) + βx_i of each example; at the maximizers their mean is ∇L_S(θ)."""
        wave = self.stiffness * self.reach * (math.pi * theta / (2 * self.reach)).sin()
        return (self.curvature * theta - wave)[..., None, :] + self.coupling * x

    def value(self, theta: Parameters) -> Float[Tensor, "*runs"]:
        """L_S(θ)."""
        return self._by_coordinate(theta).sum(-1)

    def _by_coordinate(self, theta: Parameters) -> Parameters:
        """What each coordinate adds to L_S(θ)."""
        wave = 2 * self.stiffness * self.reach**2 / math.pi * (math.pi * theta / (2 * self.reach)).cos()
        x = self.maximizers(theta)
        inner = self.slope(theta) * x - self.concavity / 2 * (x - self.centres).square()
        return self.curvature / 2 * theta.square() + wave + inner.mean(-2)


def build_problem(spread: float, examples: int = 8, dimensions: int = 4) -> MinMaxProblem:
    """Random examples with a mean of 0 and √Var = 4/3; random offsets with a mean of 0, the largest spread·με."""
    key = randomness.hash_keys(0, torch.arange(examples))
    draws = 2 * randomness.uniform(key, 2 * dimensions).double() - 1
    draws = draws - draws.mean(0)
    centres, offsets = draws[:, :dimensions], draws[:, dimensions:]
    centres = centres / deviation(centres) * 4 / 3
    largest = spread * MinMaxProblem.concavity * MinMaxProblem.eps
    return MinMaxProblem(centres, largest * offsets / offsets.abs().max())


def deviation(points: Float[Tensor, "n p"]) -> float:
    """√Var: the root of the mean squared distance to the mean."""
    return float((points - points.mean(0)).square().sum(1).mean().sqrt())
