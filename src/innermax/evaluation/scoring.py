"""What every evaluation shares, whatever models it measures: examples in batches, and which images count.

An attack reports images and the cost of its search. Its verdicts do not count: its images are projected onto X(x) and
scored by the model itself.
"""

import math
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from innermax.attacks.base import Attack
from innermax.attacks.minimal import MinimalResult
from innermax.attacks.search import AttackResult
from innermax.data.image_set import ImageSet
from innermax.evaluation.arguments import TOLERANCE
from innermax.evaluation.progress import EvaluationDisplay, ProgressCallback
from innermax.evaluation.store import AttackRows, Column
from innermax.losses import cross_entropy
from innermax.oracle.oracle import Oracle, Precision
from innermax.threat import FeasibleSet
from innermax.utils.generators import cuda_devices, private_randomness, seed_randomness
from innermax.utils.randomness import derive_seed
from innermax.utils.validation import check_labels

_STRETCHES = 1.0, 1.01, 1.02, 1.04, 1.08, 1.16, 1.32
PROBABLE = "the model seems to return probabilities"


@dataclass(frozen=True)
class Settings:
    """What was evaluated and how; `attack_network` is the oracle's plan."""

    count: int
    seed: int
    quantize: int | None
    precision: str
    batch_size: int
    attacks: dict[str, str]
    attack_network: str
    torch: str
    device: str


def round_to_grid(point: Float[Tensor, "b ..."], feasible: FeasibleSet, bits: int) -> Float[Tensor, "b ..."]:
    """The points of X(x) rounded to multiples of 1/(2^bits − 1), the grid, within X(x); x must lie on the grid.

    Each value goes to its nearest level, or, if that would leave X(x), to the next level towards x. Rounding everything
    towards x would always stay in X(x), but weaken every attack by up to a level. Rounding to the nearest can leave
    X(x): ε need not be on the grid, and in L2 and L1 the roundings of many values add up. There the values closest to
    their outer level are rounded outwards first, as many as the ball allows.
    """
    levels = 2**bits - 1
    clean = (feasible.x.flatten(1).double() * levels).round()
    u = point.flatten(1).double() * levels - clean
    inwards = u.trunc()
    outwards = inwards + u.sign()
    room = (outwards <= (feasible.ceiling + TOLERANCE) * levels) & (outwards >= (feasible.floor - TOLERANCE) * levels)
    share = torch.where(room, (u - inwards).abs(), 0.0)

    def round_above(threshold: Tensor) -> Tensor:
        grid: Tensor = (clean + torch.where(share >= threshold[:, None], outwards, inwards)) / levels
        return grid.to(point.dtype).reshape(point.shape)

    low = torch.full_like(share[:, 0], 0.5)
    high = torch.where(feasible.contains(round_above(low), TOLERANCE), low, 1.0)  # shares are below 1: all towards x
    for _ in range(10 if bool((high > low).any()) else 0):
        middle = (low + high) / 2
        inside = feasible.contains(round_above(middle), TOLERANCE)
        low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
    return round_above(high)


@dataclass(frozen=True)
class AttackedBatch:
    """A batch after an attack: the images (B, *features) to score, their labels, the attack's report and its seconds.

    start: the number of its first example. feasible: X(x).
    """

    image: Tensor
    label: Tensor
    result: AttackResult
    seconds: float
    start: int
    feasible: FeasibleSet


@dataclass(frozen=True, eq=False)
class Bench:
    """A test bench: the examples in batches, and how attacks and scores treat them, whatever the model."""

    images: ImageSet
    device: torch.device
    batch_size: int
    seed: int
    quantize: int | None
    progress: ProgressCallback | None

    @contextmanager
    def isolate(self, *models: nn.Module) -> Iterator[None]:
        """Context manager that shuts out a caller's autocast and inference mode; models draw from the seed."""
        autocast = torch.autocast(self.device.type, enabled=False)
        private = private_randomness(self.seed, cuda_devices(*models))
        with torch.inference_mode(False), torch.no_grad(), autocast, private:
            yield

    def example(self) -> Float[Tensor, "b ..."]:
        """The first images, 32 at most."""
        index = torch.arange(min(32, len(self.images)), device=self.device)
        return self.images[:32].to(self.device).batch(index)[0]

    def attack_oracle(self, model: nn.Module, precision: Precision) -> Oracle:
        """The oracle that attacks search with."""
        # What a model draws here must not depend on what came before.
        with private_randomness(self.seed, cuda_devices(model)):
            return Oracle.fast(model, self.example(), precision)

    def batches(self, title: str, only: Container[int] | None = None) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Each batch's start, and its examples' numbers, images and labels, on the device.

        title: names the progress. only: batches to yield, by their start, the position of their first example; None:
        all.
        """
        for start in range(0, len(self.images), self.batch_size):
            stop = min(start + self.batch_size, len(self.images))
            if only is None or start in only:
                place = torch.arange(start, stop, device=self.images.images.device)
                x, y = self.images.batch(place)
                # For models that draw random numbers; the caller's random state was set aside.
                seed_randomness(derive_seed(self.seed, start))
                if isinstance(self.progress, EvaluationDisplay):
                    self.progress.begin_batch()
                yield start, self.images.index[place].to(self.device), x.to(self.device), y.to(self.device)
            if self.progress is not None:
                self.progress(title, stop, len(self.images))

    def attack_batches(
        self, title: str, name: str, attack: Attack, oracle: Oracle, only: Container[int] | None = None
    ) -> Iterator[AttackedBatch]:
        """Each batch after the attack of this name. title, only: as for `batches`."""
        for start, index, x, y in self.batches(title, only):
            feasible = attack.threat.around(x)
            began = time.perf_counter()
            # Copies: an attack that works in place must not move what it is measured against.
            result = attack(oracle, x.clone(), y.clone(), seed=self.seed, index=index, final="gradient")
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            seconds = time.perf_counter() - began
            yield AttackedBatch(self.admit(name, result, feasible), y, result, seconds, start, feasible)

    def settings(self, attacks: Mapping[str, Attack], precision: Precision, attack_network: str) -> Settings:
        """What is evaluated and how."""
        return Settings(
            count=len(self.images),
            seed=self.seed,
            quantize=self.quantize,
            precision=precision,
            batch_size=self.batch_size,
            attacks={name: repr(attack) for name, attack in attacks.items()},
            attack_network=attack_network,
            torch=str(torch.__version__),
            device=str(self.device),
        )

    def admit(self, name: str, result: AttackResult, feasible: FeasibleSet) -> Tensor:
        """The images to score: what the attack returned, projected onto X(x) where it lies outside, then quantised."""
        return self._admit(name, result.x_adv, feasible)

    def admit_beyond(
        self, nearest: Float[Tensor, "b ..."], feasible: FeasibleSet, stretch: float
    ) -> tuple[Tensor, Float[Tensor, " b"]]:
        """The images to score at `stretch` times the way to `nearest`, be they in X(x) or not, and their sizes."""
        x, threat = feasible.x, feasible.threat
        low, high = threat.box(x)
        point = torch.lerp(x, nearest, stretch).flatten(1).clamp(low, high).reshape(x.shape)
        largest = max(threat.eps, float(_measure(feasible, point).max()))
        image = self._admit("nearest", point, replace(threat, eps=largest).around(x))
        return image, _measure(feasible, image)

    def _admit(self, name: str, x_adv: Tensor, feasible: FeasibleSet) -> Tensor:
        x = feasible.x
        if x_adv.shape != x.shape or not bool(torch.isfinite(x_adv).all()):
            wrong = f"shape {tuple(x_adv.shape)}" if x_adv.shape != x.shape else "NaN or infinite values"
            raise ValueError(f"attack {name!r} must return finite x_adv of shape {tuple(x.shape)}, got {wrong}")
        x_adv = x_adv.detach().to(x)
        # Points of X(x) stay as they are, bit for bit: a rounding can turn the verdict on one that just fell.
        inside = feasible.contains(x_adv, TOLERANCE).reshape(-1, *[1] * (x.ndim - 1))
        x_adv = torch.where(inside, x_adv, feasible.project(x_adv))
        x_adv = x_adv if self.quantize is None else round_to_grid(x_adv, feasible, self.quantize)
        if not bool(feasible.contains(x_adv, 10 * TOLERANCE).all()):
            raise RuntimeError(f"attack {name!r}: {feasible.threat!r} projects points that it does not contain")
        return x_adv


def scoring_logits(exact: Oracle, x: Float[Tensor, "b ..."], y: Int[Tensor, " b"]) -> Float[Tensor, "b classes"]:
    """The logits that decide a verdict. Raises ValueError where one is NaN, or a label exceeds the classes."""
    logits = exact.logits(x)
    bad = int(torch.isnan(logits).any(1).sum())
    if bad:
        raise ValueError(f"the model returns NaN logits for {bad} of {len(x)} inputs")
    check_labels(y, len(y), logits.shape[1], name="the labels of test_set")
    return logits


def measure_distances(bench: Bench, exact: Oracle, batch: AttackedBatch, correct: Column) -> Column:
    """(B,) size of the smallest perturbation with which the model itself errs, infinite where none was found.

    The nearest inputs that an attack reports lie at the decision boundary, where rounding decides. Where the model is
    right on one after all, it is asked again a little farther out; what counts is always the size of an image on which
    it errs.

    correct: whether it is right on the images that were scored, which count, too.
    """
    result, feasible, y = cast(MinimalResult, batch.result), batch.feasible, batch.label
    scored = _measure(feasible, batch.image)
    distance = torch.where(torch.from_numpy(correct).to(y.device), math.inf, scored)
    rows = torch.isfinite(result.distance).nonzero()[:, 0]
    for stretch in _STRETCHES:
        if len(rows) == 0:
            break
        image, size = bench.admit_beyond(result.nearest[rows], feasible[rows], stretch)
        wrong = scoring_logits(exact, image, y[rows]).argmax(1) != y[rows]
        distance[rows] = torch.where(wrong, size, math.inf).minimum(distance[rows])
        rows = rows[~wrong]
    found: Column = distance.cpu().numpy()
    return found


def _measure(feasible: FeasibleSet, image: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """How far images are from the clean ones, in the threat's norm; float64."""
    return feasible.threat.norm((image.double() - feasible.x.double()).flatten(1))


def attack_rows(result: AttackResult, logits: Float[Tensor, "b classes"], y: Int[Tensor, " b"]) -> AttackRows:
    """One batch's rows: the attack's own report, and the verdict on the scored image."""
    prediction = logits.argmax(1)
    correct = prediction == y
    untold = torch.full(y.shape, math.nan, device="cpu")
    told = torch.zeros_like(correct) if result.misclassified is None else result.misclassified.to(correct)
    columns = {
        "correct": correct,
        "prediction": prediction,
        "loss": cross_entropy(logits, y),
        "fosc": untold if result.fosc is None else result.fosc,
        "relative_fosc": untold if result.relative_fosc is None else result.relative_fosc,
        "zero_gradient": untold if result.zero_gradient is None else result.zero_gradient,
        "steps": result.steps,
        "gradient_calls": result.gradient_calls,
        "forward_calls": result.forward_calls,
        "overturned": told & correct,
    }
    return AttackRows(
        **{
            key: (value.double() if value.is_floating_point() else value).detach().cpu().numpy()
            for key, value in columns.items()
        }
    )
