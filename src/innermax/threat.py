"""Threat models: which inputs X(x) the adversary may choose around a clean input x.

X(x) = {x' : ‖x' − x‖_p ≤ ε} ∩ [low, high]^d. A threat model is a short value; `threat.around(x)` is the set X(x) itself
for a batch, with the operations an attack needs. The mathematics of each norm is written in terms of the perturbation
u = x' − x, flattened to (B, d), with an interval [floor, ceiling] ∋ 0 for each coordinate: what the bounds leave of
[−ε, ε], in which every p-norm ball lies.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from innermax.utils import randomness
from innermax.utils.files import hash_tensors
from innermax.utils.validation import check_inputs, check_labels, is_number, unknown

Bounds = tuple[float | Tensor, float | Tensor] | None
Flat = Float[Tensor, "b d"]
Scalar = Float[Tensor, "b 1"]
_ROUNDING = 1 + 1e-6  # an ε as large as the bounds may come out a little larger in float32
_UNITS = 64  # coordinates of which an own norm is checked


@dataclass(frozen=True)
class Threat(ABC):
    """A norm ball of radius `eps` around each input, cut by pixel `bounds`.

    A subclass is a norm, by its six abstract methods; it must have ‖u‖ ≥ |u_i| for every coordinate, as p-norms have.

    Args:
        eps: radius ε ≥ 0, in the units of the input; 0 allows nothing but x itself.
        bounds: (low, high), floats or tensors that broadcast to one input; None for inputs without bounds.

    Raises:
        ValueError: ε is not a finite number of at least 0, or exceeds what the bounds allow; low ≥ high somewhere.
    """

    symbol: ClassVar[str]  # by which reports call a norm of NORMS
    eps: float
    bounds: Bounds = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not is_number(self.eps):
            raise TypeError(f"eps must be a number, got {type(self.eps).__name__}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps must be a finite number of at least 0, got {self.eps}")
        object.__setattr__(self, "eps", abs(_to_python(self.eps)))  # equal threat models have one name: 0 is no -0
        if self.bounds is None:
            return
        object.__setattr__(self, "bounds", tuple(map(_to_python, self.bounds)))
        low, high = (torch.as_tensor(bound, dtype=torch.float64, device="cpu") for bound in self.bounds)
        if not bool((low < high).all()) or not bool(torch.isfinite(high - low).all()):
            raise ValueError(f"bounds must be finite with low < high, got {self.bounds}")

    def __eq__(self, other: object) -> bool:
        """Whether the other is the same set around every input; bounds may be tensors."""
        return type(self) is type(other) and self._key == other._key

    def __hash__(self) -> int:
        return hash((type(self), self._key))

    @property
    def _key(self) -> tuple[Any, ...]:
        """What it is made of, tensors as tuples."""
        return tuple(_to_plain(getattr(self, part.name)) for part in fields(self))

    def around(self, x: Float[Tensor, "b ..."]) -> "FeasibleSet":
        """The set X(x) for a batch of clean inputs.

        Raises ValueError where x is not finite or outside the bounds, or where the norm gives a coordinate less than
        its size.
        """
        check_inputs(x)
        feasible, fits = self.enclose(x)
        if not bool(fits):
            self._refuse(x)
        return feasible

    def enclose(self, x: Float[Tensor, "b ..."]) -> tuple["FeasibleSet", Bool[Tensor, ""]]:
        """X(x), and whether it is one: a bool on x's device, which nobody has waited for; False where `around` raises.

        x: (B, *features) floats.
        """
        flat = x.detach().flatten(1)
        low, high = self.box(x)
        fits = ((flat >= low) & (flat <= high)).all() & ~(self._largest(low, high) * _ROUNDING < self.eps)
        if type(self) not in NORMS.values():
            fits = fits & ~(self._least(flat) < 1 / _ROUNDING)
        return FeasibleSet(self, x.detach(), *self._cut(low - flat, high - flat)), fits

    def _refuse(self, x: Float[Tensor, "b ..."]) -> None:
        """Raises where X(x) is none, and says why."""
        flat = x.detach().flatten(1)
        low, high = self.box(x)
        if not bool(((flat >= low) & (flat <= high)).all()):
            raise ValueError(
                f"x must lie within the bounds, got values from {float(x.min()):g} to {float(x.max()):g}; "
                "where images are normalised, let the model do it: torch.nn.Sequential(im.Normalize(mean, std), model)"
            )
        largest = float(self._largest(low, high))
        if largest * _ROUNDING < self.eps:
            raise ValueError(f"eps must be at most {largest:g}, the size of the bounds, got {self.eps:g}")
        raise ValueError(
            f"norm of {type(self).__name__} must be at least 1 for a change of one coordinate by 1, got "
            f"{float(self._least(flat)):g}: divide norm and eps by that"
        )

    def box(self, x: Float[Tensor, "b ..."]) -> tuple[Flat, Flat]:
        """(low, high) of every coordinate of x, flat; −∞ and ∞ without bounds."""
        low, high = (-math.inf, math.inf) if self.bounds is None else self.bounds
        return _expand(low, x), _expand(high, x)

    def project(self, x_adv: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The point of X(x) nearest to x_adv in Euclidean distance."""
        return self.around(x).project(x_adv)

    def contains(
        self, x_adv: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."], atol: float = 1e-6
    ) -> Bool[Tensor, " b"]:
        """Whether each x_adv lies in X(x), within `atol` in norm and bounds. NaN never does."""
        return self.around(x).contains(x_adv, atol)

    def sample(
        self, x: Float[Tensor, "b ..."], seed: int = 0, index: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b ..."]:
        """A random start in X(x): uniform in the ball, then projected; a function of (seed, index) alone.

        Args:
            x: (B, *features) clean inputs.
            seed: any integer.
            index: (B,) int64 example numbers; 0…B − 1 by default.
        """
        feasible = self.around(x)
        index = torch.arange(len(x), device=x.device) if index is None else index
        check_labels(index, len(x), name="index")
        return feasible.sample(randomness.hash_keys(seed, index))

    def maximizer(self, gradient: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """argmax over x' ∈ X(x) of ⟨x', gradient⟩: the vertex behind the gap; coordinates without gradient stay."""
        return self.around(x).maximizer(gradient)

    def step(
        self,
        x_adv: Float[Tensor, "b ..."],
        gradient: Float[Tensor, "b ..."],
        step_size: float,
        x: Float[Tensor, "b ..."],
    ) -> Float[Tensor, "b ..."]:
        """One projected steepest-ascent step of length `step_size` in this norm; math.inf lands on the maximizer."""
        return self.around(x).step(x_adv, gradient, step_size)

    def gap(
        self,
        gradient: Float[Tensor, "b ..."],
        x_adv: Float[Tensor, "b ..."],
        x: Float[Tensor, "b ..."],
        *,
        bounded: bool = True,
        relative: bool = False,
    ) -> Float[Tensor, " b"]:
        """FOSC, max over x' ∈ X(x) of ⟨x' − x_adv, gradient⟩ ≥ 0 (Wang et al. 2019, Eq. 4), at x_adv ∈ X(x).

        Args:
            gradient: (B, *features) loss gradient at x_adv.
            x_adv: (B, *features) points of X(x).
            x: (B, *features) clean inputs.
            bounded: False gives the paper's closed form, which ignores the bounds.
            relative: divide by the width of the linear model on X(x): in [0, 1], NaN where the gradient is 0.
        """
        feasible = self.around(x) if bounded else self.around(x).without_bounds()
        return feasible.gap(gradient, x_adv, relative=relative)

    def _cut(self, low: Flat, high: Flat) -> tuple[Flat, Flat]:
        """The interval of each coordinate in which the ball and the bounds, as changes of x, both lie."""
        return low.clamp(min=-self.eps), high.clamp(max=self.eps)

    def _holds(self, u: Flat, atol: float) -> Bool[Tensor, " b"]:
        """Whether the ball holds each u of its interval, within atol."""
        return self.norm(u) <= self.eps + atol

    def _largest(self, low: Flat, high: Flat) -> Float[Tensor, ""]:
        """The norm of the way from one end of the bounds to the other, which all examples share."""
        return self.norm(high[:1] - low[:1]).max().double()

    def _least(self, flat: Flat) -> Float[Tensor, ""]:
        """The least norm of a change of one coordinate by 1, of some that are tried. Below 1 a coordinate could move
        farther than ε, at which [floor, ceiling] ends.
        """
        d = flat.shape[1]
        some = torch.linspace(0, d - 1, min(d, _UNITS), device=flat.device).round().long()
        units = torch.zeros(len(some), d, dtype=flat.dtype, device=flat.device).scatter_(1, some[:, None], 1.0)
        return self.norm(units).min().double()

    def _inside(self, point: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The point, drawn towards x where the roundings of many coordinates add up to a norm beyond ε."""
        length = self.norm((point.double() - x.double()).flatten(1)).reshape(-1, *[1] * (x.ndim - 1))
        back = self.eps / length * (1 - 8 * torch.finfo(x.dtype).eps)
        way = (point - x) * back.to(x.dtype)
        nearer = x + way
        # Each coordinate is rounded towards x: on a uniform image all would else be rounded away from it.
        nearer = torch.where((nearer - x).abs() > way.abs(), torch.nextafter(nearer, x), nearer)
        return torch.where(length > self.eps, nearer, point)

    @abstractmethod
    def norm(self, u: Flat) -> Float[Tensor, " b"]:
        """‖u‖_p of each row."""

    @abstractmethod
    def _draw(self, key: Int[Tensor, " b"], d: int) -> Flat:
        """Uniform in the unit ball."""

    @abstractmethod
    def _nearest(self, u: Flat, floor: Flat, ceiling: Flat) -> Flat:
        """Euclidean projection of u onto ball ∩ [floor, ceiling]."""

    @abstractmethod
    def _vertex(self, gradient: Flat, floor: Flat, ceiling: Flat) -> Flat:
        """argmax of ⟨u, gradient⟩ over ball ∩ [floor, ceiling]."""

    @abstractmethod
    def _ascend(self, u: Flat, gradient: Flat, step_size: float, floor: Flat, ceiling: Flat) -> Flat:
        """One step of steepest ascent from u, projected."""

    @abstractmethod
    def _gap(self, gradient: Flat, u: Flat, floor: Flat, ceiling: Flat) -> Float[Tensor, " b"]:
        """max of ⟨u' − u, gradient⟩ over ball ∩ [floor, ceiling], as a sum of terms that are each ≥ 0."""


@dataclass(frozen=True, eq=False)
class FeasibleSet:
    """X(x) for a batch: clean inputs, and the interval [floor, ceiling] of each flat coordinate of x' − x."""

    threat: Threat
    x: Float[Tensor, "b ..."]
    floor: Flat
    ceiling: Flat

    def __getitem__(self, rows: Tensor) -> "FeasibleSet":
        """The same set for some of the examples."""
        return replace(self, x=self.x[rows], floor=self.floor[rows], ceiling=self.ceiling[rows])

    def without_bounds(self) -> "FeasibleSet":
        """The ball alone."""
        everywhere = torch.full_like(self.ceiling, math.inf)
        floor, ceiling = self.threat._cut(-everywhere, everywhere)
        return replace(self, threat=replace(self.threat, bounds=None), floor=floor, ceiling=ceiling)

    def project(self, x_adv: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The point of X(x) nearest to x_adv."""
        u = self._perturbation(x_adv)
        return self._at(self.threat._nearest(u, self.floor, self.ceiling))

    def contains(self, x_adv: Float[Tensor, "b ..."], atol: float = 1e-6) -> Bool[Tensor, " b"]:
        """Whether each x_adv lies in X(x) within atol."""
        u = self._flat(x_adv, "x_adv").double() - self.x.flatten(1).double()
        inside = ((u >= self.floor - atol) & (u <= self.ceiling + atol)).all(1)
        return inside & self.threat._holds(u, atol)

    def with_radius(self, eps: float) -> "FeasibleSet":
        """The inputs within the same bounds and another radius, which may be larger than the bounds allow."""
        low, high = self.threat.box(self.x)
        largest = float(self.threat.norm(high[:1] - low[:1]))  # from which on the bounds are all there is
        flat, wider = self.x.flatten(1), replace(self.threat, eps=eps, bounds=None)
        floor, ceiling = wider._cut(low - flat, high - flat)
        return replace(self, threat=replace(self.threat, eps=min(eps, largest)), floor=floor, ceiling=ceiling)

    def sample(self, key: Int[Tensor, " b"], radius: float | None = None) -> Float[Tensor, "b ..."]:
        """A random start in X(x) for each key: uniform in the ball, or in a ball of another radius, then projected."""
        u = self.threat._draw(key, self.floor.shape[1]).to(self.x.dtype)
        return self._at(
            self.threat._nearest((self.threat.eps if radius is None else radius) * u, self.floor, self.ceiling)
        )

    def sample_near(self, key: Int[Tensor, " b"], deviation: float) -> Float[Tensor, "b ..."]:
        """A random start in X(x) for each key: x and Gaussian noise of a standard deviation, projected."""
        u = deviation * randomness.normal(key, self.floor.shape[1]).to(self.x.dtype)
        return self._at(self.threat._nearest(u, self.floor, self.ceiling))

    def maximizer(self, gradient: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """argmax over X(x) of ⟨x', gradient⟩."""
        return self._at(self.threat._vertex(self._flat(gradient, "gradient"), self.floor, self.ceiling))

    def step(
        self, x_adv: Float[Tensor, "b ..."], gradient: Float[Tensor, "b ..."], step_size: float | Float[Tensor, " b"]
    ) -> Float[Tensor, "b ..."]:
        """One projected steepest-ascent step; of one length, or of one per example."""
        if isinstance(step_size, Tensor):
            for size in set(step_size.tolist()):
                rows = (step_size == size).nonzero()[:, 0]
                x_adv = x_adv.index_copy(0, rows, self[rows].step(x_adv[rows], gradient[rows], size))
            return x_adv
        if not step_size >= 0:
            raise ValueError(f"step_size must be at least 0, got {step_size}")
        u = self._perturbation(x_adv)
        if step_size == math.inf:
            return self.maximizer(gradient)
        gradient = self._flat(gradient, "gradient")
        return self._at(self.threat._ascend(u, gradient, step_size, self.floor, self.ceiling))

    def gap(
        self, gradient: Float[Tensor, "b ..."], x_adv: Float[Tensor, "b ..."], *, relative: bool = False
    ) -> Float[Tensor, " b"]:
        """FOSC of each x_adv ∈ X(x); relative: over the width of the linear model on X(x)."""
        gradient = self._flat(gradient, "gradient")
        if relative:  # free of the gradient's scale, so take the scale away before it can underflow
            gradient = _rescale(gradient)
        gap = self.threat._gap(gradient, self._perturbation(x_adv), self.floor, self.ceiling)
        if not relative:
            return gap
        lowest = self.threat._vertex(-gradient, self.floor, self.ceiling)
        width = self.threat._gap(gradient, lowest, self.floor, self.ceiling)
        share = (gap / width).clamp(max=1.0).masked_fill(width == 0, 0.0)  # x alone, where nothing else is allowed
        return share.masked_fill((gradient == 0).all(1), math.nan)

    def _flat(self, values: Tensor, name: str) -> Flat:
        if values.shape != self.x.shape:
            raise ValueError(f"{name} must have the shape of x {tuple(self.x.shape)}, got {tuple(values.shape)}")
        return values.flatten(1)

    def _perturbation(self, x_adv: Tensor) -> Flat:
        return self._flat(x_adv, "x_adv") - self.x.flatten(1)

    def _at(self, u: Flat) -> Float[Tensor, "b ..."]:
        """x + u, corrected where rounding would leave the bounds or the ball."""
        point = self.threat._inside((self.x.flatten(1) + u).reshape(self.x.shape), self.x)
        if self.threat.bounds is None:
            return point
        low, high = self.threat.bounds
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            return point.clamp(
                *(torch.as_tensor(bound, dtype=point.dtype, device=point.device) for bound in (low, high))
            )
        return point.clamp(low, high)


class Linf(Threat):
    """‖x' − x‖_∞ ≤ ε: every coordinate may move by ε, so [floor, ceiling] is all there is to X(x)."""

    symbol: ClassVar[str] = "L∞"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bounds is None:
            return
        width = float(torch.as_tensor(self.bounds[1] - self.bounds[0], dtype=torch.float64, device="cpu").max())
        if self.eps > width * _ROUNDING:
            raise ValueError(f"eps must be at most {width:g}, the width of the bounds, got {self.eps:g}")

    def norm(self, u: Flat) -> Float[Tensor, " b"]:
        """Largest |u_i|."""
        return u.abs().amax(1)

    def _draw(self, key: Int[Tensor, " b"], d: int) -> Flat:
        return 2 * randomness.uniform(key, d) - 1

    def _inside(self, point: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        return point

    def nearest(self, u: Flat, radius: float | Scalar, floor: Flat, ceiling: Flat) -> Flat:
        """The point nearest to u in the ball of a radius, one for all or one per row, and in [floor, ceiling]."""
        return u.clamp(floor.clamp(min=-radius), ceiling.clamp(max=radius))

    def _nearest(self, u: Flat, floor: Flat, ceiling: Flat) -> Flat:
        return u.clamp(floor, ceiling)

    def _vertex(self, gradient: Flat, floor: Flat, ceiling: Flat) -> Flat:
        return (self.eps * gradient.sign()).clamp(floor, ceiling)

    def _ascend(self, u: Flat, gradient: Flat, step_size: float, floor: Flat, ceiling: Flat) -> Flat:
        return torch.add(u, gradient.sign(), alpha=step_size).clamp(floor, ceiling)

    def _gap(self, gradient: Flat, u: Flat, floor: Flat, ceiling: Flat) -> Float[Tensor, " b"]:
        # The way to the vertex; where the gradient is 0 either bound will do. As few passes over the batch as can be.
        way = torch.copysign(gradient.new_full((), self.eps), gradient).clamp_(floor, ceiling).sub_(u)
        return way.mul_(gradient).sum(1).clamp(min=0)


class L2(Threat):
    """‖x' − x‖_2 ≤ ε.

    Projection and maximizer have the same form: clip(s·v, floor, ceiling), with the scale s ≥ 0 at which its norm is ε
    (by the KKT conditions; s follows from the ball's multiplier).
    """

    symbol: ClassVar[str] = "L2"

    def norm(self, u: Flat) -> Float[Tensor, " b"]:
        """Euclidean length."""
        length: Tensor = torch.linalg.vector_norm(u, dim=1)
        return length

    def _draw(self, key: Int[Tensor, " b"], d: int) -> Flat:
        normal = randomness.normal(key, d)
        radius = randomness.uniform(key, 2 * d + 1)[:, -1:].pow(1 / d)
        return normal / self.norm(normal)[:, None] * radius

    def nearest(self, u: Flat, radius: float | Scalar, floor: Flat, ceiling: Flat) -> Flat:
        """The point nearest to u in the ball of a radius, one for all or one per row, and in [floor, ceiling]."""
        return (self._scale(u, radius, floor, ceiling).clamp(max=1.0) * u).clamp(floor, ceiling)

    def stretch(self, u: Flat, radius: float | Scalar, floor: Flat, ceiling: Flat) -> Flat:
        """The point clip(s·u, floor, ceiling) whose norm is the radius, or the farthest one where none is so far."""
        direction = _rescale(u)
        return self._along(direction, self._scale(direction, radius, floor, ceiling), floor, ceiling)

    def _nearest(self, u: Flat, floor: Flat, ceiling: Flat) -> Flat:
        return self.nearest(u, self.eps, floor, ceiling)

    def _vertex(self, gradient: Flat, floor: Flat, ceiling: Flat) -> Flat:
        return self.stretch(gradient, self.eps, floor, ceiling)

    def _ascend(self, u: Flat, gradient: Flat, step_size: float, floor: Flat, ceiling: Flat) -> Flat:
        direction = _rescale(gradient)
        unit = direction / self.norm(direction)[:, None].clamp(min=1e-12)
        return self._nearest(u + step_size * unit, floor, ceiling)

    def _gap(self, gradient: Flat, u: Flat, floor: Flat, ceiling: Flat) -> Float[Tensor, " b"]:
        size = gradient.abs().amax(1)
        direction = _rescale(gradient)
        scale = self._scale(direction, self.eps, floor, ceiling)
        best = self._along(direction, scale, floor, ceiling)
        multiplier = 1 / scale  # 0 where the ball does not bind
        terms = (best - u) * (direction - multiplier * (best + u) / 2)
        slack = (self.eps**2 - u.square().sum(1)).clamp(min=0)
        return size * (terms.clamp(min=0).sum(1) + multiplier[:, 0] / 2 * slack)

    @staticmethod
    def _along(direction: Flat, scale: Scalar, floor: Flat, ceiling: Flat) -> Flat:
        """clip(s·direction) for s up to infinity, where a coordinate without direction stays at 0."""
        return (scale * direction).masked_fill(direction == 0, 0.0).clamp(floor, ceiling)

    def _scale(self, v: Flat, radius: float | Scalar, floor: Flat, ceiling: Flat) -> Scalar:
        """The s with ‖clip(s·v, floor, ceiling)‖ = radius; infinite where no s reaches it.

        In s² the squared norm Σ min(s²·v², room²) is concave and piecewise linear, so Newton's method from the left
        climbs to the root in finitely many steps, each of which finds further coordinates at their bounds. What is
        squared is first divided by its largest, so that neither tiny nor huge v leave the range of floats.
        """
        size, room = v.abs(), torch.where(v > 0, ceiling, -floor)
        scale = torch.zeros_like(size[:, :1])
        while True:
            free = scale * size < room
            left = (radius**2 - room.masked_fill(free, 0.0).square().sum(1, keepdim=True)).clamp(min=0)
            moving = size.masked_fill(~free, 0.0)
            further = left.sqrt() / moving.amax(1, keepdim=True) / self.norm(_rescale(moving))[:, None]
            further = further.masked_fill(~moving.any(1, keepdim=True), math.inf)
            if not bool((further > scale * (1 + 4 * torch.finfo(scale.dtype).eps)).any()):
                return scale
            scale = torch.maximum(scale, further)


class L1(Threat):
    """‖x' − x‖_1 ≤ ε: few coordinates move far, so the bounds bind often."""

    symbol: ClassVar[str] = "L1"

    def norm(self, u: Flat) -> Float[Tensor, " b"]:
        """Σ |u_i|."""
        return u.abs().sum(1)

    def _draw(self, key: Int[Tensor, " b"], d: int) -> Flat:
        draws = randomness.uniform(key, 2 * d + 1)
        exponential = -draws[:, d:].log()  # d of d + 1 exponentials over their sum: uniform in the simplex
        return (draws[:, :d] - 0.5).sign() * exponential[:, :d] / exponential.sum(1, keepdim=True)

    def nearest(self, u: Flat, radius: float | Scalar, floor: Flat, ceiling: Flat) -> Flat:
        """The point nearest to u in the ball of a radius, one for all or one per row, and in [floor, ceiling].

        It is sign(u)·clip(|u| − λ, 0, room) with the λ ≥ 0 at which its norm is the radius; λ by a sweep over the
        sorted knots.
        """
        size, room = u.abs(), torch.where(u > 0, ceiling, -floor)
        knots, order = torch.cat([size, (size - room).clamp(min=0)], dim=1).sort(dim=1, descending=True)
        # From λ = ∞ downwards the norm grows at rate 1 for each coordinate between its two knots.
        turn = 2 * (order < size.shape[1]).to(u.dtype) - 1
        slope = turn.cumsum(1)
        mass = torch.nn.functional.pad((slope[:, :-1] * (knots[:, :-1] - knots[:, 1:])).cumsum(1), (1, 0))
        level = knots.gather(1, (mass <= radius).sum(1, keepdim=True) - 1)  # below it the norm grows past ε
        full = size - room >= level
        moving = (size >= level) & ~full
        held = torch.where(full, room, size.masked_fill(~moving, 0.0)).sum(1, keepdim=True)
        threshold = ((held - radius) / moving.sum(1, keepdim=True)).minimum(level).clamp(min=0)
        inside = size.minimum(room).sum(1, keepdim=True) <= radius
        return u.sign() * (size - threshold.masked_fill(inside, 0.0)).clamp(min=0).minimum(room)

    def _nearest(self, u: Flat, floor: Flat, ceiling: Flat) -> Flat:
        return self.nearest(u, self.eps, floor, ceiling)

    def _vertex(self, gradient: Flat, floor: Flat, ceiling: Flat) -> Flat:
        room = torch.where(gradient > 0, ceiling, -floor) * (gradient != 0)
        return gradient.sign() * fill(gradient.abs(), room, self.eps)

    def _ascend(self, u: Flat, gradient: Flat, step_size: float, floor: Flat, ceiling: Flat) -> Flat:
        """Moves mass `step_size` from where it serves least to the largest coordinates with room left.

        A step on the single largest coordinate stalls once that one is at its bound, and a projection takes from every
        coordinate alike; this exchange stays in the ball by itself and rests at the maximizer of a linear loss.
        """

        def room(u: Flat) -> Flat:
            return torch.where(gradient > 0, ceiling - u, u - floor).clamp(min=0) * (gradient != 0)

        # Neither more than there is room for nor more than the ball holds: a projection would have to undo it.
        amount = room(u).sum(1, keepdim=True).clamp(max=min(step_size, self.eps))
        excess = (self.norm(u)[:, None] + amount - self.eps).clamp(min=0)
        u = u - u.sign() * fill(-gradient * u.sign(), u.abs(), excess)
        return self._nearest(u + gradient.sign() * fill(gradient.abs(), room(u), amount), floor, ceiling)

    def _gap(self, gradient: Flat, u: Flat, floor: Flat, ceiling: Flat) -> Float[Tensor, " b"]:
        best = self._vertex(gradient, floor, ceiling)
        size = gradient.abs()
        room = torch.where(gradient > 0, ceiling, -floor)
        # The ball's multiplier is the largest gradient that found no full room; 0 where everything fitted.
        multiplier = size.masked_fill(~(best.abs() < room), 0.0).amax(1, keepdim=True)
        gain = (size - multiplier).clamp(min=0) * room
        terms = gain - (gradient * u - multiplier * u.abs())
        return terms.clamp(min=0).sum(1) + multiplier[:, 0] * (self.eps - self.norm(u)).clamp(min=0)


class Shares:
    """A tensor or array of numbers in [0, 1], one above 0, as a value: equal where shape and numbers are, with a hash.

    Raises ValueError for other numbers.
    """

    def __init__(self, values: Any) -> None:
        self.values = torch.as_tensor(values, device="cpu").detach().double()
        self._placed: dict[tuple[torch.device, torch.dtype], Flat] = {}
        if not bool(((self.values >= 0) & (self.values <= 1)).all()) or not bool((self.values > 0).any()):
            raise ValueError("shares must be numbers in [0, 1], or true and false, of which one is above 0")

    def of(self, u: Flat) -> Float[Tensor, "1 d"]:
        """The numbers, flat, on u's device. Raises ValueError where u has another number of coordinates."""
        place = u.device, u.dtype
        if place not in self._placed:
            self._placed[place] = self.values.to(u).flatten()[None]
        found = self._placed[place]
        if found.shape[1] != u.shape[1]:
            raise ValueError(f"shares must have the {u.shape[1]} numbers of one input, got {tuple(self.values.shape)}")
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shares) and torch.equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return f"Shares({'×'.join(map(str, self.values.shape))}, {self._digest})"

    def __reduce__(self) -> tuple[type["Shares"], tuple[Tensor]]:
        return Shares, (self.values,)

    @property
    def _digest(self) -> str:
        return hash_tensors([("shares", self.values)])


@dataclass(frozen=True, eq=False)  # as every threat model is compared
class LinfBox(Threat):
    """|x'_i − x_i| ≤ ε · share_i: L∞ with an ε of its own for each coordinate, or for some alone, where share_i is a
    mask. Its norm is max |u_i| / share_i, so that a step of ε/4 moves each coordinate by a quarter of what it may.

    PGD, FGSM, CW, GuidedPGD and APGD support it; FAB, Square, AutoAttack, FMN and DDN refuse it.

    Args:
        eps: ε ≥ 0; `LinfBox.of` takes the ε of each coordinate instead.
        bounds: as for every threat model.
        shares: of the shape of one input, numbers in [0, 1] or a mask of true and false, of which one is above 0. Where
            it is 0, nothing may change.

    Raises:
        ValueError: an argument is not as described above; when called, the inputs have another shape than shares.
    """

    shares: Any = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.shares, Shares):
            object.__setattr__(self, "shares", Shares(self.shares))

    @classmethod
    def of(cls, eps: Tensor, bounds: Bounds = (0.0, 1.0)) -> "LinfBox":
        """From the ε ≥ 0 of each coordinate, in the shape of one input, of which one is above 0."""
        sizes = torch.as_tensor(eps, device="cpu").detach().double()
        largest = float(sizes.max())
        if not bool(torch.isfinite(sizes).all()) or not bool((sizes >= 0).all()) or not largest > 0:
            raise ValueError("eps must hold finite numbers of at least 0, of which one is above 0")
        return cls(largest, bounds, shares=sizes / largest)

    def enclose(self, x: Float[Tensor, "b ..."]) -> tuple["FeasibleSet", Bool[Tensor, ""]]:
        """As of every threat model; raises ValueError where shares have another shape than one input."""
        told = tuple(self._shares.values.shape)
        if told != x.shape[1:]:
            raise ValueError(
                f"shares must have the shape of one input {tuple(x.shape[1:])}, got {told}; one per channel: "
                "shares.expand(C, H, W)"
            )
        return super().enclose(x)

    def norm(self, u: Flat) -> Float[Tensor, " b"]:
        """Largest |u_i| / share_i; infinite where a coordinate moves whose share is 0."""
        return (u.abs() / self._shares.of(u)).masked_fill(u == 0, 0.0).amax(1)

    def scale(self, u: Flat) -> Flat:
        """Each coordinate times its share."""
        return u * self._shares.of(u)

    @property
    def _shares(self) -> Shares:
        return cast(Shares, self.shares)

    def _cut(self, low: Flat, high: Flat) -> tuple[Flat, Flat]:
        room = self.eps * self._shares.of(low)
        return torch.maximum(low, -room), torch.minimum(high, room)

    def _holds(self, u: Flat, atol: float) -> Bool[Tensor, " b"]:
        """The interval is all there is; over a small share, the norm would enlarge what rounding does."""
        return torch.ones_like(u[:, 0], dtype=torch.bool)

    def _draw(self, key: Int[Tensor, " b"], d: int) -> Flat:
        return self.scale(2 * randomness.uniform(key, d) - 1)

    def _inside(self, point: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        return point

    def _nearest(self, u: Flat, floor: Flat, ceiling: Flat) -> Flat:
        return u.clamp(floor, ceiling)

    def _vertex(self, gradient: Flat, floor: Flat, ceiling: Flat) -> Flat:
        return torch.where(gradient > 0, ceiling, floor).masked_fill(gradient == 0, 0.0)

    def _ascend(self, u: Flat, gradient: Flat, step_size: float, floor: Flat, ceiling: Flat) -> Flat:
        return (u + step_size * self.scale(gradient.sign())).clamp(floor, ceiling)

    def _gap(self, gradient: Flat, u: Flat, floor: Flat, ceiling: Flat) -> Float[Tensor, " b"]:
        return (gradient * (torch.where(gradient > 0, ceiling, floor) - u)).clamp(min=0).sum(1)


NORMS: dict[str, type[Threat]] = {"linf": Linf, "l2": L2, "l1": L1}


def build_threat(norm: str, eps: float) -> Threat:
    """The threat model of a norm by its name in NORMS, on images in [0, 1].

    Raises ValueError for an unknown norm.
    """
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    return NORMS[norm](eps)


def format_eps(eps: float) -> str:
    """A size of perturbations as it is usually written: in 255ths where that is a whole number, but 0.2 as 0.2."""
    levels = eps * 255
    whole = 1 <= round(levels) < 64 and abs(levels - round(levels)) < 1e-6
    return f"{levels:.0f}/255" if whole and round(eps, 2) != eps else f"{eps:g}"


def fill(worth: Flat, room: Flat, amount: float | Scalar) -> Flat:
    """How much of `amount` each coordinate takes when the worthiest are filled to their room first."""
    order = worth.argsort(dim=1, descending=True, stable=True)
    room = room.clamp(max=amount).gather(1, order)
    taken = torch.minimum(room, (amount - (room.cumsum(1) - room)).clamp(min=0))
    return torch.zeros_like(taken).scatter(1, order, taken)


def _to_python(value: Any) -> Any:
    """NumPy's numbers as Python's, its arrays as tensors; others as they are."""
    if isinstance(value, np.ndarray) and value.ndim > 0:
        return torch.from_numpy(value)
    return value.item() if isinstance(value, np.generic | np.ndarray) else value


def _to_plain(value: Any) -> Any:
    """A value that can be compared: tensors, and those in a tuple, by shape and numbers."""
    if isinstance(value, tuple):
        return tuple(map(_to_plain, value))
    return (tuple(value.shape), *value.flatten().tolist()) if isinstance(value, Tensor) else value


def _rescale(values: Flat) -> Flat:
    """Each row over its largest magnitude, so that sums neither under- nor overflow; what is below 1e-30 becomes 0."""
    scaled = values / values.abs().amax(1, keepdim=True)
    return scaled.masked_fill(~(scaled.abs() > 1e-30), 0.0)


def _expand(bound: float | Tensor, x: Tensor) -> Tensor:
    """A bound for every coordinate of x, flat. Raises ValueError where its shape does not fit one input."""
    # A number is filled in on the device, not copied there: a copy is waited for.
    bound = bound.to(x) if isinstance(bound, Tensor) else torch.full((), bound, dtype=x.dtype, device=x.device)
    try:
        return bound.expand(x.shape[1:]).flatten()[None].expand(len(x), -1)
    except RuntimeError:
        raise ValueError(f"bounds of shape {tuple(bound.shape)} do not fit inputs {tuple(x.shape[1:])}") from None
