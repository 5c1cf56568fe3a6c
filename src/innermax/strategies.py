"""Strategies: which attack to train against at a moment of training.

A strategy is a small immutable value with one pure function, `attack_at(progress, history)`. Progress is epoch /
epochs; the history holds what the epochs so far have measured, one mapping per epoch, as in a run's metrics.jsonl.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from innermax.attacks.noisy_pgd import NoisyPGD
from innermax.attacks.pgd import FGSM, PGD
from innermax.attacks.search import Gauge, measure
from innermax.losses import Loss, cross_entropy, is_stationary_at_clean
from innermax.oracle.oracle import Oracle
from innermax.utils.validation import check_count, check_number, unknown

History = Sequence[Mapping[str, Any]]
Measure = Literal["halfway_gauge"]
Shape = Literal["linear", "cosine", "constant"]
Threshold = float | Literal["auto"]
SAMPLE = 1000  # training examples on which an automatic c_max is measured
_NEAR = 0.001  # standard deviation of the noise around x where ATTA starts
_C_MAX: Mapping[Gauge, Threshold] = {"ball": 0.5, "exact": 0.15, "relative": "auto"}


@runtime_checkable
class Strategy(Protocol):
    """What a training loop asks of a strategy.

    Every row of the history holds "accuracy", in [0, 1], under the attack that the epoch trained against.

    A strategy may have two attributes more. `measures`, a set, names what the first row must hold besides:
    "halfway_gauge", the median gauge of training examples after half of the steps of the strategy's `attack`, measured
    at the end of the first epoch. With `warm_start = True` its attacks start, from the second epoch on, where the last
    one left each example; in an epoch, counted from 0, for which its method `resets(epoch)` is true, they start afresh.
    With `momentum` and `weight` they take one step and start where FGSMPGI's would, with `replays` updates move the
    perturbations as Free's do.
    """

    def attack_at(self, progress: float, history: History = ()) -> PGD | None:
        """The attack to train against at progress = epoch / epochs in [0, 1); None trains on clean examples."""
        ...


@dataclass(frozen=True)
class Unsecured:
    """No attack: training on clean examples."""

    measures: ClassVar[frozenset[Measure]] = frozenset()

    def attack_at(self, progress: float, history: History = ()) -> None:
        """Always None."""
        _check_progress(progress)


@dataclass(frozen=True)
class Standard:
    """Always the same attack (Madry et al. 2018)."""

    attack: PGD
    measures: ClassVar[frozenset[Measure]] = frozenset()

    def __post_init__(self) -> None:
        _check_attack(self.attack)

    def attack_at(self, progress: float, history: History = ()) -> PGD:
        """The attack."""
        _check_progress(progress)
        return self.attack


@dataclass(frozen=True)
class Curriculum:
    """More steps as training goes on, from none to the attack's own (Cai et al. 2018).

    Args:
        attack: the attack at full strength, K steps.
        full_at: progress in (0, 1] from which all K steps are taken; until then their number grows linearly.
        patience: instead of that, one more step whenever the accuracy under the current attack has not improved for so
            many epochs (Cai et al. 2018).
    """

    attack: PGD
    full_at: float = 100 / 120
    patience: int | None = None
    measures: ClassVar[frozenset[Measure]] = frozenset()

    def __post_init__(self) -> None:
        _check_attack(self.attack)
        _check_share("full_at", self.full_at)
        if self.patience is not None and (not isinstance(self.patience, int) or self.patience < 1):
            raise ValueError(f"patience must be an integer ≥ 1 or None, got {self.patience!r}")

    def attack_at(self, progress: float, history: History = ()) -> PGD | None:
        """The attack with the number of steps that the curriculum has reached; None while that is 0."""
        _check_progress(progress)
        if self.patience is None:
            # The tolerance: by rounding, epoch 5 of 10 would fall one step short.
            steps = math.floor(self.attack.steps * progress / self.full_at + 1e-9)
        else:
            steps = _count_plateaus([_read_measure(epoch, "accuracy") for epoch in history], self.patience)
        steps = min(steps, self.attack.steps)
        return None if steps == 0 else replace(self.attack, steps=steps, step_size=self.attack.step_sizes()[:steps])


@dataclass(frozen=True)
class FGSMThenPGD:
    """FGSM first, then the attack, from progress `switch` in (0, 1] on (Wang et al. 2019, §3.2: 20 epochs of 120)."""

    attack: PGD
    switch: float = 1 / 6
    measures: ClassVar[frozenset[Measure]] = frozenset()

    def __post_init__(self) -> None:
        _check_attack(self.attack)
        _check_share("switch", self.switch)

    def attack_at(self, progress: float, history: History = ()) -> PGD:
        """FGSM before the switch, the attack after it."""
        _check_progress(progress)
        return self.attack if progress >= self.switch - 1e-9 else FGSM(self.attack.threat, self.attack.loss)


@dataclass(frozen=True)
class Dynamic:
    """Stops each example's search once its gauge is ≤ c_t, which falls to 0 (Wang et al. 2019, Algorithm 1).

    c_t = max(c_max − t·c_max / T', 0) for shape "linear"; every shape is 0 from T' on.

    Args:
        attack: PGD, whose steps are the most that an example takes, and whose gauge is compared with c_t.
        c_max: c_t at the start, > 0, in units of the gauge. None: 0.5 (the paper's) on the "ball" gauge, 0.15 (the best
            on MNIST's validation split) on the "exact" gauge, "auto" on the "relative" gauge and, as these two are in
            units of the cross-entropy, where the attack maximises another loss. "auto": the median gauge after half of
            the attack's steps, measured at the end of the first epoch, which trains against the whole attack.
        zero_at: T' / T in (0, 1], the progress from which c_t is 0 (the paper: 40 / 50 on MNIST, 100 / 120 on
            CIFAR-10).
        shape: how c_t falls until then: "linear", "cosine" or "constant".
    """

    attack: PGD
    c_max: Threshold | None = None
    zero_at: float = 100 / 120
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        _check_attack(self.attack)
        _check_share("zero_at", self.zero_at)
        if self.shape not in get_args(Shape):
            raise unknown("shape", self.shape, get_args(Shape))
        if isinstance(self.c_max, str):
            if self.c_max != "auto":
                raise ValueError(f"c_max must be a number > 0, 'auto' or None, got {self.c_max!r}")
        elif self.c_max is not None and not 0 < self.c_max < math.inf:
            raise ValueError(f"c_max must be a finite number > 0, 'auto' or None, got {self.c_max}")

    @property
    def _start(self) -> Threshold:
        """c_max, or the default of gauge and loss."""
        if self.c_max is not None:
            return self.c_max
        return _C_MAX[self.attack.gauge] if self.attack.objective() is cross_entropy else "auto"

    @property
    def automatic(self) -> bool:
        """Whether c_max is measured."""
        return self._start == "auto"

    @property
    def measures(self) -> frozenset[Measure]:
        """The halfway gauge, where c_max is measured."""
        return frozenset({"halfway_gauge"}) if self.automatic else frozenset()

    def threshold(self, progress: float, history: History = ()) -> float | None:
        """c_t; None in the first epoch of an automatic c_max, before it is measured."""
        _check_progress(progress)
        if self.automatic and not history:
            if progress > 0:
                raise ValueError("history must hold the first epoch's 'halfway_gauge', which sets c_max, got none")
            return None
        c_max = _read_measure(history[0], "halfway_gauge") if self._start == "auto" else self._start
        return c_max * _decay(self.shape, progress / self.zero_at)

    def attack_at(self, progress: float, history: History = ()) -> PGD:
        """The attack that stops each example at c_t."""
        return replace(self.attack, stop_at=self.threshold(progress, history))


@dataclass(frozen=True)
class WarmStart:
    """A few shrinking steps per epoch, from where the example's search ended in the epoch before.

    The network changes little in an epoch, so that point is still close to a maximum, which a new search would have to
    find again: two gradients per epoch do the work of ten. To keep perturbations over epochs, and to undo and redo the
    augmentation around them, is Zheng et al. 2020's idea (see ATTA; one step, of ε/2, is ATTA-1 without its reset). New
    are the shrinking steps and the floor, by which examples that are still converged take no step. The perturbations
    take two bytes for each value of the training set, in memory and in every checkpoint.

    Args:
        attack: the attack at full strength; its threat model and its loss are used.
        steps: per epoch, at most. The first is ε/2 long, each other half as long as the one before.
        floor: relative FOSC in [0, 1] at or below which an example takes no further step. One that starts there takes
            none, and costs one gradient. None: every step is taken.
    """

    attack: PGD
    steps: int = 2
    floor: float | None = None
    measures: ClassVar[frozenset[Measure]] = frozenset()
    warm_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_attack(self.attack)
        check_count(self.steps, "steps")
        if self.floor is not None and not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be in [0, 1] or None, got {self.floor}")

    def attack_at(self, progress: float, history: History = ()) -> PGD:
        """The attack of a few steps, which training starts where the last epoch's ended."""
        _check_progress(progress)
        sizes = tuple(self.attack.threat.eps * 0.5**step for step in range(1, self.steps + 1))
        attack = replace(self.attack, steps=self.steps, step_size=sizes, stop_at=None)
        return attack if self.floor is None else replace(attack, stop_at=self.floor, gauge="relative")


@dataclass(frozen=True)
class FGSMRS:
    """FGSM-RS: one step from a random point of X(x) (Wong et al. 2020, Algorithm 3).

    Published for CIFAR-10: ε = 8/255, α = 10/255, 15 epochs of 128 images, SGD with weight decay 5e-4 and a learning
    rate that climbs to 0.2 and falls again; for MNIST: ε = 0.3, α = 0.375, 10 epochs, Adam, 5e-3. The released code
    attacks in training mode, this one in evaluation mode. It can overfit catastrophically: robust against its own step,
    and against nothing else.

    Args:
        attack: the attack at full strength; its threat model and its loss are used.
        step: α over ε, > 0.
    """

    attack: PGD
    step: float = 1.25
    measures: ClassVar[frozenset[Measure]] = frozenset()

    def __post_init__(self) -> None:
        _check_attack(self.attack)
        _check_step(self.step)

    def attack_at(self, progress: float, history: History = ()) -> PGD:
        """The one step."""
        _check_progress(progress)
        return PGD(self.attack.threat, 1, self.step * self.attack.threat.eps, loss=self.attack.loss)


@dataclass(frozen=True)
class NFGSM:
    """N-FGSM: one step from noise beyond the ball, without a projection onto it (de Jorge et al. 2022, Algorithm 1).

    Its points lie within the pixel bounds, but mostly outside X(x); gauges are those of their projections. Published
    for CIFAR-10: ε = 8/255, 30 epochs of 128 images, SGD with weight decay 5e-4 and a learning rate that climbs to 0.2
    and falls again. The released code attacks in training mode, this one in evaluation mode.

    Args:
        attack: the attack at full strength; its threat model and its loss are used.
        step: α over ε, > 0.
        noise: k, the radius of the ball of the uniform noise over ε, ≥ 0.
    """

    attack: PGD
    step: float = 1.0
    noise: float = 2.0
    measures: ClassVar[frozenset[Measure]] = frozenset()

    def __post_init__(self) -> None:
        _check_attack(self.attack)
        _check_step(self.step)
        self.attack_at(0.0)

    def attack_at(self, progress: float, history: History = ()) -> PGD:
        """The one step."""
        _check_progress(progress)
        threat = self.attack.threat
        return NoisyPGD(threat, 1, self.step * threat.eps, loss=self.attack.loss, noise=self.noise)


@dataclass(frozen=True)
class ATTA:
    """ATTA: a few steps per epoch, from where the example's search ended in the epoch before (Zheng et al. 2020).

    Perturbations are kept without the augmentation, which every epoch does to them anew. The first epoch, and each
    whose number, from 1, is a multiple of `reset_every`, starts from x and Gaussian noise of 0.001. Published for
    CIFAR-10: ε = 0.031, 38 epochs of 64 images, SGD with learning rate 0.1, divided by 10 at epochs 30 and 36, weight
    decay 2e-4; steps of 0.015 (one step), 0.01 (3) or 0.007 (10), reset every 10 epochs; for MNIST: ε = 0.3, steps of
    0.01, 60 epochs of 128 images, SGD with learning rate 0.01, divided by 10 at epoch 55, no reset. The perturbations
    take two bytes for each value of the training set, in memory and in every checkpoint. The released code keeps them
    for the image with its margin, this one without: what is shifted out of the image loses its perturbation.

    Args:
        attack: the attack at full strength; its threat model and its loss are used.
        steps: per epoch.
        step: length of a step over ε, > 0.
        reset_every: epochs; None: never.
    """

    attack: PGD
    steps: int = 1
    step: float = 0.5
    reset_every: int | None = 10
    measures: ClassVar[frozenset[Measure]] = frozenset()
    warm_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_attack(self.attack)
        check_count(self.steps, "steps")
        _check_step(self.step)
        if self.reset_every is not None:
            check_count(self.reset_every, "reset_every")

    def attack_at(self, progress: float, history: History = ()) -> PGD:
        """The attack of a few steps, which training starts where the last epoch's ended."""
        _check_progress(progress)
        size = self.step * self.attack.threat.eps
        return PGD(self.attack.threat, self.steps, size, random_start=_NEAR, loss=self.attack.loss)

    def resets(self, epoch: int) -> bool:
        """Whether searches of an epoch, counted from 0, start afresh."""
        return self.reset_every is not None and (epoch + 1) % self.reset_every == 0


@dataclass(frozen=True)
class FAT:
    """FAT: friendly adversarial training, whose search stops τ steps after the example fell (Zhang et al. 2020,
    Algorithms 1 and 2).

    τ is 0 at first, and one more from each of `rise_at` on. Published for CIFAR-10: ε = 0.031, at most 10 steps of
    0.007, 120 epochs of 128 images, SGD with learning rate 0.1, divided by 10 at epochs 60 and 90 and by 2 at 110,
    weight decay 2e-4; τ rises after epochs 50 and 90. The released code also adds Gaussian noise of 0.001 to every
    step, which the paper does not.

    Args:
        attack: PGD, whose steps are the most that an example takes.
        rise_at: shares of the training, in (0, 1).
    """

    attack: PGD
    rise_at: Sequence[float] = (50 / 120, 90 / 120)
    measures: ClassVar[frozenset[Measure]] = frozenset()

    def __post_init__(self) -> None:
        _check_attack(self.attack)
        for share in self.rise_at:
            _check_share("rise_at", share)
        object.__setattr__(self, "rise_at", tuple(self.rise_at))

    def attack_at(self, progress: float, history: History = ()) -> PGD:
        """The attack that stops an example τ steps after it fell."""
        _check_progress(progress)
        tau = sum(progress >= share - 1e-9 for share in self.rise_at)
        return replace(self.attack, stop_at=None, stop_on_success=True, steps_after_success=tau)


@dataclass(frozen=True)
class Free:
    """Free adversarial training: m updates with each batch, whose own input gradients are the attack (Shafahi et al.
    2019, Algorithm 1).

    Each update is at x + δ; the gradient that it finds in x moves δ by ε, and the next update starts there, that with
    the next batch, too. These gradients are the update's, in training mode, so the attack costs nothing. A training
    takes 1/m of its epochs, rounded, at least one: as many updates as without replays. Published for CIFAR-10:
    ε = 8/255, m = 8, 80,000 updates of 128 images, SGD with learning rate 0.1, divided by 10 after 40,000 and 60,000,
    weight decay 2e-4. The perturbations of one batch are kept, in memory and in every checkpoint. δ is 0 at first, or
    random where the attack's loss has no slope at x.

    Args:
        attack: the attack at full strength; its threat model is used. What an update minimises is what it maximises.
        replays: m ≥ 1.
        step: length of a step over ε, > 0.
    """

    attack: PGD
    replays: int = 8
    step: float = 1.0
    measures: ClassVar[frozenset[Measure]] = frozenset()

    def __post_init__(self) -> None:
        _check_attack(self.attack)
        check_count(self.replays, "replays")
        _check_step(self.step)
        self.attack_at(0.0)

    def attack_at(self, progress: float, history: History = ()) -> PGD:
        """The step that each update takes, from x on."""
        _check_progress(progress)
        threat = self.attack.threat
        random_start = is_stationary_at_clean(self.attack.objective())
        return PGD(threat, 1, self.step * threat.eps, random_start=random_start, loss=self.attack.loss)


@dataclass(frozen=True)
class FGSMPGI:
    """FGSM-PGI by momentum (FGSM-MEP): one step from where the momentum of earlier gradients leads (Jia et al. 2022).

    Each example has a momentum, m ← g / ‖g‖₁ + μ·m, and its next search starts a step along it from where this one
    started. Updates minimise the objective plus λ times the mean squared difference of the logits at x' and at the
    start of its search, which costs a forward and a backward pass more. In the first epoch, and each whose number, from
    0, is a multiple of `reset_every`, searches start a step from x in a random direction. Published for CIFAR-10:
    ε = 8/255, α = ε, 110 epochs of 128 images, SGD with learning rate 0.1, divided by 10 at epochs 100 and 105, weight
    decay 5e-4, label smoothing that leaves 0.6 to the label (0.444 for ten classes). Start and momentum take two bytes
    each for every value of the training set, in memory and in every checkpoint. The released code attacks in training
    mode, measures ‖g‖₁ over the whole batch, and does not move what it keeps with the augmentation; here the attack is
    in evaluation mode, the norm an example's own, and the augmentation is undone.

    Args:
        attack: the attack at full strength; its threat model and its loss are used.
        step: length of the step over ε, > 0.
        momentum: μ ≥ 0.
        weight: λ ≥ 0.
        reset_every: epochs; None: never.
    """

    attack: PGD
    step: float = 1.0
    momentum: float = 0.3
    weight: float = 10.0
    reset_every: int | None = 40
    measures: ClassVar[frozenset[Measure]] = frozenset()
    warm_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_attack(self.attack)
        _check_step(self.step)
        for name in ("momentum", "weight"):
            check_number(getattr(self, name), name, "a finite number ≥ 0", lambda value: 0 <= value < math.inf)
        if self.reset_every is not None:
            check_count(self.reset_every, "reset_every")

    def attack_at(self, progress: float, history: History = ()) -> PGD:
        """The one step."""
        _check_progress(progress)
        return PGD(self.attack.threat, 1, self.step * self.attack.threat.eps, loss=self.attack.loss)

    def resets(self, epoch: int) -> bool:
        """Whether searches of an epoch, counted from 0, start afresh."""
        return self.reset_every is not None and epoch % self.reset_every == 0


def search_for(strategy: Strategy, loss: Loss | None) -> Strategy:
    """The strategy with attacks that maximise a loss, the one of an objective; None: their own.

    Raises:
        ValueError: the strategy has no attack, an attack that was told to maximise another loss, or one that cannot
            maximise this.
    """
    if loss is None:
        return strategy
    if isinstance(strategy, Unsecured):
        raise ValueError(
            f"strategy must attack where the objective says what attacks maximise ({loss!r}), got Unsecured; use "
            "objective cross_entropy, or a strategy such as Standard"
        )
    attack = getattr(strategy, "attack", None)
    if is_dataclass(strategy) and isinstance(attack, PGD) and "attack" in {field.name for field in fields(strategy)}:
        return replace(strategy, attack=_maximising(attack, loss))
    return _Searching(strategy, loss)


def awaits_halfway_gauge(strategy: Strategy, history: History) -> bool:
    """Whether a strategy asks for the median `halfway_gauge` at the end of this epoch, which is then the first."""
    return "halfway_gauge" in getattr(strategy, "measures", ()) and not history


def halfway_gauge(
    strategy: Strategy,
    oracle: Oracle,
    x: Float[Tensor, "b ..."],
    y: Int[Tensor, " b"],
    *,
    seed: int = 0,
    index: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, " b"]:
    """Each example's gauge after the first half of the steps of a strategy's attack; 0 where it is undefined.

    x: (B, *features) clean inputs; y: (B,) labels; index: (B,) example numbers, 0…B − 1 unless told.
    """
    attack: PGD = strategy.attack  # type: ignore[attr-defined]  # what asks for the gauge has one
    steps = math.ceil(attack.steps / 2)
    half = replace(attack, steps=steps, step_size=attack.step_sizes()[:steps], restarts=1, stop_at=None)
    found = half(oracle, x, y, seed=seed, index=index, final="none")
    gradient = half.gradient_at(oracle, x, y, found.x_adv, seed).gradient
    return measure(half.threat.around(x), gradient, found.x_adv, half.gauge).nan_to_num(0.0)


# By name, for the command line and the paper's settings. Each takes the attack first, if it has one, then its options.
STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "unsecured": Unsecured,
    "standard": Standard,
    "curriculum": Curriculum,
    "fgsm-pgd": FGSMThenPGD,
    "dynamic": Dynamic,
    "warm-start": WarmStart,
    "fgsm-rs": FGSMRS,
    "n-fgsm": NFGSM,
    "atta": ATTA,
    "fat": FAT,
    "free": Free,
    "fgsm-pgi": FGSMPGI,
}


def build_strategy(name: str, attack: PGD, **options: Any) -> Strategy:
    """The strategy of a name in STRATEGIES against an attack, with options of its own, such as Dynamic's c_max.

    Raises:
        ValueError, TypeError: the name is unknown, or the strategy does not take the attack or an option.
    """
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES)
    build = STRATEGIES[name]
    return build(attack, **options) if "attack" in inspect.signature(build).parameters else build(**options)


class _Searching:
    """Somebody's strategy with attacks that maximise another loss; all else that it has stays as it is."""

    def __init__(self, strategy: Strategy, loss: Loss) -> None:
        self._strategy, self._loss = strategy, loss
        attack = getattr(strategy, "attack", None)
        if isinstance(attack, PGD):
            self.attack = _maximising(attack, loss)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_strategy":
            raise AttributeError(name)
        return getattr(self._strategy, name)

    def attack_at(self, progress: float, history: History = ()) -> PGD | None:
        attack = self._strategy.attack_at(progress, history)
        return None if attack is None else _maximising(attack, self._loss)


def _maximising(attack: PGD, loss: Loss) -> PGD:
    """The attack with another loss. Raises ValueError where it was told to maximise a third."""
    if attack.objective() == loss:
        return attack
    if attack.objective() is not cross_entropy:
        raise ValueError(
            f"loss of the strategy's attack must be left out where the objective says what attacks maximise ({loss!r}),"
            f" got {attack.loss!r}"
        )
    return replace(attack, loss=loss)


def _decay(shape: Shape, share: float) -> float:
    """From 1 at share 0 to exactly 0 at share 1 and after it."""
    if share >= 1 - 1e-9:
        return 0.0
    return {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2, "constant": 1.0}[shape]


def _count_plateaus(accuracies: Sequence[float], patience: int) -> int:
    """How often the accuracy has not improved for `patience` epochs; after each time, its best is counted anew."""
    plateaus, best, waited = 0, -math.inf, 0
    for accuracy in accuracies:
        best, waited = (accuracy, 0) if accuracy > best else (best, waited + 1)
        if waited == patience:
            plateaus, best, waited = plateaus + 1, -math.inf, 0
    return plateaus


def _read_measure(epoch: Mapping[str, Any], name: str) -> float:
    """A measure of an epoch. Raises ValueError where the history lacks it."""
    if epoch.get(name) is None:
        raise ValueError(f"history must hold {name!r}, which this strategy needs, got {sorted(epoch)}")
    return float(epoch[name])


def _check_attack(attack: object) -> None:
    if not isinstance(attack, PGD):
        raise TypeError(f"attack must be a PGD such as PGD(Linf(8 / 255)), got {attack!r}")


def _check_step(step: float) -> None:
    check_number(step, "step", "a finite number > 0", lambda value: 0 < value < math.inf)


def _check_progress(progress: float) -> None:
    if not 0 <= progress < 1:
        raise ValueError(f"progress must be in [0, 1), got {progress}")


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}")
