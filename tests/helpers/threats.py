"""Threat models of a user's own: what extend.md asks of a norm, and nothing more."""

from dataclasses import dataclass

import torch

from innermax.threat import Threat
from innermax.utils import randomness


@dataclass(frozen=True)
class WeightedLinf(Threat):
    """max w_i |u_i| ≤ ε: coordinate i may move by ε/w_i. The weights repeat along the flattened input."""

    weights: tuple[float, ...] = (1.0, 2.0)

    def per_coordinate(self, u):
        weights = torch.tensor(self.weights, dtype=u.dtype, device=u.device)
        return weights.repeat(-(-u.shape[1] // len(weights)))[: u.shape[1]]

    def norm(self, u):
        return (self.per_coordinate(u) * u).abs().amax(1)

    def _draw(self, key, d):
        draws = 2 * randomness.uniform(key, d) - 1
        return draws / self.per_coordinate(draws)

    def _nearest(self, u, floor, ceiling):
        room = self.eps / self.per_coordinate(u)
        return u.clamp(-room, room).clamp(floor, ceiling)

    def _vertex(self, gradient, floor, ceiling):
        return (self.eps * gradient.sign() / self.per_coordinate(gradient)).clamp(floor, ceiling)

    def _ascend(self, u, gradient, step_size, floor, ceiling):
        return self._nearest(u + step_size * gradient.sign() / self.per_coordinate(u), floor, ceiling)

    def _gap(self, gradient, u, floor, ceiling):
        return (gradient * (self._vertex(gradient, floor, ceiling) - u)).clamp(min=0).sum(1)


@dataclass(frozen=True)
class ScaledL2(Threat):
    """‖w ∘ u‖₂ ≤ ε; projection and maximizer by bisection of the ball's multiplier."""

    weights: tuple[float, ...] = (1.0, 3.0)

    per_coordinate = WeightedLinf.per_coordinate

    def norm(self, u):
        return torch.linalg.vector_norm(self.per_coordinate(u) * u, dim=1)

    def _draw(self, key, d):
        normal = randomness.normal(key, d)
        radius = randomness.uniform(key, 2 * d + 1)[:, -1:].pow(1 / d)
        return normal / normal.norm(dim=1, keepdim=True) * radius / self.per_coordinate(normal)

    def _within(self, point, least, most):
        """point(λ) for the smallest λ, between those given, at which it lies in the ball."""
        for _ in range(80):
            middle = (least + most) / 2
            outside = self.norm(point(middle.exp()))[:, None] > self.eps
            least, most = torch.where(outside, middle, least), torch.where(outside, most, middle)
        return point(most.exp())

    def _nearest(self, u, floor, ceiling):
        squares, ends = self.per_coordinate(u).square(), torch.full_like(u[:, :1], 30.0)
        shrunk = self._within(lambda lam: (u / (1 + lam * squares)).clamp(floor, ceiling), -ends, ends)
        free = u.clamp(floor, ceiling)
        return torch.where(self.norm(free)[:, None] <= self.eps, free, shrunk)

    def _vertex(self, gradient, floor, ceiling):
        squares = self.per_coordinate(gradient).square()
        size = gradient.abs().amax(1, keepdim=True)
        along = gradient / torch.where(size > 0, size, 1.0) / squares
        ends = torch.full_like(size, 30.0)
        return self._within(lambda lam: (along / lam).clamp(floor, ceiling), -ends, ends)

    def _ascend(self, u, gradient, step_size, floor, ceiling):
        """Along the gradient itself, whose steps a Euclidean projection holds at the maximum."""
        size = gradient.abs().amax(1, keepdim=True)
        along = gradient / torch.where(size > 0, size, 1.0)
        unit = along / self.norm(along)[:, None].clamp(min=1e-12)
        return self._nearest(u + step_size * unit, floor, ceiling)

    def _gap(self, gradient, u, floor, ceiling):
        return (gradient * (self._vertex(gradient, floor, ceiling) - u)).sum(1).clamp(min=0)
