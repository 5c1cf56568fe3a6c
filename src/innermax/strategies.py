"""Strategies: which attack to train against at a moment of training.

A strategy is a short value with one pure function, `attack_at(progress, history)`. Progress is epoch / epochs; the
history is what was measured in the epochs so far, one mapping an epoch, as in a run's metrics.jsonl.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from innermax.attacks.pgd import FGSM, PGD
from innermax.attacks.search import Gauge, measure
from innermax.oracle.oracle import Oracle
from innermax.utils.validation import check_count, unknown

History = Sequence[Mapping[str, Any]]
Measure = Literal["halfway_gauge"]
Shape = Literal["linear", "cosine", "constant"]
Threshold = float | Literal["auto"]
SAMPLE = 1000  # training examples on which an automatic c_max is measured
_C_MAX: Mapping[Gauge, Threshold] = {"ball": 0.5, "exact": 0.15, "relative": "auto"}


@runtime_checkable
class Strategy(Protocol):
    """What a training loop asks of a strategy.

    Every row of the history holds "accuracy", in [0, 1], under the attack that the epoch trained against. `measures`
    names what the first row must hold besides: "halfway_gauge", the median gauge of training examples after half of the
    steps of the strategy's `attack`, measured at the end of the first epoch.

    A strategy may have `warm_start = True`: from the second epoch on its attacks then start where the last one left
    each example.
    """

    @property
    def measures(self) -> frozenset[Measure]: ...

    def attack_at(self, progress: float, history: History = ()) -> PGD | None:
        """The attack to train against at progress = epoch / epochs in [0, 1); None trains on clean examples."""
        ...


@dataclass(frozen=True)
class Unsecured:
    """Training on clean examples."""

    measures: ClassVar[frozenset[Measure]] = frozenset()

    def attack_at(self, progress: float, history: History = ()) -> None:
        """Never an attack."""
        _check(progress)


@dataclass(frozen=True)
class Standard:
    """The same attack always (Madry et al. 2018)."""

    attack: PGD
    measures: ClassVar[frozenset[Measure]] = frozenset()

    def __post_init__(self) -> None:
        _check_attack(self.attack)

    def attack_at(self, progress: float, history: History = ()) -> PGD:
        """The attack."""
        _check(progress)
        return self.attack


@dataclass(frozen=True)
class Curriculum:
    """More steps as training goes on, from none to the attack's own (Cai et al. 2018).

    Args:
        attack: the attack at full strength, K steps.
        full_at: progress from which all K steps are taken; they grow linearly until then.
        patience: instead, one step more whenever the accuracy under the current attack has not improved for this many
            epochs (Cai et al. 2018).
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
        """The attack with as many steps as the curriculum has reached."""
        _check(progress)
        if self.patience is None:
            # The tolerance keeps epoch 5 of 10 from falling one step short by a rounding.
            steps = math.floor(self.attack.steps * progress / self.full_at + 1e-9)
        else:
            steps = _level([_recorded(epoch, "accuracy") for epoch in history], self.patience)
        steps = min(steps, self.attack.steps)
        return None if steps == 0 else replace(self.attack, steps=steps, step_size=self.attack.step_sizes()[:steps])


@dataclass(frozen=True)
class FGSMThenPGD:
    """FGSM first, the attack from progress `switch` on (Wang et al. 2019, §3.2: 20 epochs of 120)."""

    attack: PGD
    switch: float = 1 / 6
    measures: ClassVar[frozenset[Measure]] = frozenset()

    def __post_init__(self) -> None:
        _check_attack(self.attack)
        _check_share("switch", self.switch)

    def attack_at(self, progress: float, history: History = ()) -> PGD:
        """FGSM or the attack."""
        _check(progress)
        return self.attack if progress >= self.switch - 1e-9 else FGSM(self.attack.threat, self.attack.loss)


@dataclass(frozen=True)
class Dynamic:
    """Examples of growing convergence quality (Wang et al. 2019, Algorithm 1): each stops once its gauge is ≤ c_t.

    c_t = max(c_max − t·c_max / T', 0) for shape "linear"; every shape is 0 from T' on.

    Args:
        attack: PGD with as many steps as an example may take; its gauge is the one that is controlled.
        c_max: c_t at the start, on a FOSC in units of the loss; None: 0.5 (the paper's) on the "ball" gauge, 0.15 (the
            best on MNIST's validation split) on the "exact" one, "auto" on the "relative" one. "auto": what half of the
            attack's steps reach, the median gauge there after the first epoch, which trains against the whole attack.
        zero_at: T' / T, the progress from which c_t is 0 (the paper: 40 / 50 on MNIST, 100 / 120 on CIFAR-10).
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
        """c_max, of the gauge where it is None."""
        return _C_MAX[self.attack.gauge] if self.c_max is None else self.c_max

    @property
    def automatic(self) -> bool:
        """Whether c_max is measured."""
        return self._start == "auto"

    @property
    def measures(self) -> frozenset[Measure]:
        """The gauge halfway, where c_max is measured."""
        return frozenset({"halfway_gauge"}) if self.automatic else frozenset()

    def threshold(self, progress: float, history: History = ()) -> float | None:
        """c_t; None in the first epoch of an automatic c_max, which has none yet."""
        _check(progress)
        if self.automatic and not history:
            if progress > 0:
                raise ValueError("history must hold the first epoch's 'halfway_gauge', which sets c_max, got none")
            return None
        c_max = _recorded(history[0], "halfway_gauge") if self._start == "auto" else self._start
        return c_max * _falling(self.shape, progress / self.zero_at)

    def attack_at(self, progress: float, history: History = ()) -> PGD:
        """The attack that stops each example at c_t."""
        return replace(self.attack, stop_at=self.threshold(progress, history))


@dataclass(frozen=True)
class WarmStart:
    """Few, shrinking steps an epoch, from where an example's search ended in the epoch before.

    The network moves little in an epoch, so a search that goes on stays near a maximum that a new one has to find
    again: two gradients an epoch do the work of ten. Perturbations kept over epochs are Zheng et al. 2020's; new here
    are the shrinking steps and the floor, with which only those examples pay that are not converged any more.
    The perturbations take two bytes a value of the training set, in memory and in every checkpoint.

    Args:
        attack: the attack at full strength; its threat model and loss are trained against.
        steps: an epoch, at most; the first is ε/2 long, each half as long as the one before.
        floor: relative FOSC in [0, 1] at or below which an example takes no further step, 0 included: one gradient then
            tells that it is still converged. None: every step is taken.
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
        """The attack of few steps, which the training starts where the epoch before ended."""
        _check(progress)
        sizes = tuple(self.attack.threat.eps * 0.5**step for step in range(1, self.steps + 1))
        attack = replace(self.attack, steps=self.steps, step_size=sizes, stop_at=None)
        return attack if self.floor is None else replace(attack, stop_at=self.floor, gauge="relative")


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
    with oracle.private_randomness(seed):
        gradient = oracle.gradient(found.x_adv, y, half.objective()).gradient
    return measure(half.threat.around(x), gradient, found.x_adv, half.gauge).nan_to_num(0.0)


# By name, for the command line and the paper's settings. Each takes the attack first, if it has one, then its options.
STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "unsecured": Unsecured,
    "standard": Standard,
    "curriculum": Curriculum,
    "fgsm-pgd": FGSMThenPGD,
    "dynamic": Dynamic,
    "warm-start": WarmStart,
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


def _falling(shape: Shape, share: float) -> float:
    """From 1 at share 0 to exactly 0 from share 1 on."""
    if share >= 1 - 1e-9:
        return 0.0
    return {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2, "constant": 1.0}[shape]


def _level(accuracies: Sequence[float], patience: int) -> int:
    """How often an accuracy, watched afresh on every level, went without improvement for `patience` epochs."""
    level, best, waited = 0, -math.inf, 0
    for accuracy in accuracies:
        best, waited = (accuracy, 0) if accuracy > best else (best, waited + 1)
        if waited == patience:
            level, best, waited = level + 1, -math.inf, 0
    return level


def _recorded(epoch: Mapping[str, Any], name: str) -> float:
    if epoch.get(name) is None:
        raise ValueError(f"history must hold {name!r}, which this strategy needs, got {sorted(epoch)}")
    return float(epoch[name])


def _check_attack(attack: object) -> None:
    if not isinstance(attack, PGD):
        raise TypeError(f"attack must be a PGD such as PGD(Linf(8 / 255)), got {attack!r}")


def _check(progress: float) -> None:
    if not 0 <= progress < 1:
        raise ValueError(f"progress must be in [0, 1), got {progress}")


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}")
