"""The paper's settings, and how much of each a scale runs (Wang et al. 2019, §5.1)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from innermax.attacks.guided_pgd import GuidedPGD
from innermax.attacks.pgd import PGD
from innermax.strategies import Strategy, build_strategy
from innermax.threat import Linf
from innermax.training.options import LearningRate
from innermax.utils.validation import unknown


@dataclass(frozen=True)
class Setting:
    """A data set, the network that learns it and its training; L∞ perturbations up to eps.

    Args:
        data: a data set's name.
        model: a network's name, and its options.
        eps: the largest perturbation.
        epochs: passes over the training set.
        zero_at: Dynamic's T'/T, and where Curriculum takes all steps.
        train: number of training images, the first ones; None: all.
        validation: images held out of the training set.
        steps: of the training attack, of length ε/4.
    """

    data: str
    model: str
    eps: float
    epochs: int
    zero_at: float
    lr_drops: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    lr: float = 0.01
    lr_schedule: LearningRate = "drops"
    weight_decay: float = 1e-4
    batch_size: int = 128
    ema: float | None = None
    shift: int = 0
    flip: bool = False
    train: int | None = None
    validation: int = 5000
    steps: int = 10

    @property
    def threat(self) -> Linf:
        """The threat model."""
        return Linf(self.eps)

    def pgd(self, **changes: Any) -> PGD:
        """The paper's training attack, or a change of it."""
        return replace(PGD(self.threat, self.steps), **changes)

    def strategy(self, name: str) -> Strategy:
        """A strategy by its name, as the paper sets it: Dynamic on the closed form of FOSC, with c_max = 0.5."""
        if name == "dynamic":
            return build_strategy(name, self.pgd(gauge="ball"), c_max=0.5, zero_at=self.zero_at)
        options = {"full_at": self.zero_at} if name == "curriculum" else {}
        return build_strategy(name, self.pgd(), **options)


@dataclass(frozen=True)
class Training:
    """One training: a setting, a strategy and a seed."""

    setting: Setting
    strategy: Strategy
    seed: int = 0
    objective: str = "cross_entropy"


@dataclass(frozen=True)
class Scale:
    """The settings of all experiments, and how much is run.

    Args:
        name: "smoke", "cpu" or "full".
        mnist: the 4-layer CNN on MNIST.
        cifar: the 8-layer CNN on CIFAR-10.
        wide: the wide residual network on CIFAR-10.
        sweep: of the networks of Figures 2 and 4, which are trained many times.
        surrogate: of the network that black-box images for CIFAR-10 are made on.
        seeds: number of trainings of each defence, by the setting's name.
        images: number of test images that are attacked, the first ones, by the setting's name; None: all.
        matched: share of the epochs after which Standard has computed about as many gradients as Dynamic in all of
            them, by the setting's name. Measured, for the 8-layer CNN on the network that stands for it.
        note: the differences from the paper, as a sentence.
        budget: gradients per example of the guided attack.
    """

    name: str
    mnist: Setting
    cifar: Setting
    wide: Setting
    sweep: Setting
    surrogate: Setting
    seeds: Mapping[str, int]
    images: Mapping[str, int | None]
    matched: Mapping[str, float]
    note: str
    budget: int = GuidedPGD.budget

    def trainings(self, data: str, strategy: str) -> list[Training]:
        """The trainings of a defence, one per seed."""
        setting = getattr(self, data)
        return [Training(setting, setting.strategy(strategy), seed) for seed in range(self.seeds[data])]


_MNIST = Setting("mnist", "mnist-cnn", 0.3, 50, 40 / 50, (20 / 50, 40 / 50))
_CIFAR = Setting("cifar10", "cifar-cnn", 8 / 255, 120, 100 / 120, (60 / 120, 100 / 120), shift=4, flip=True)
_WIDE = replace(
    _CIFAR, model="wideresnet", epochs=205, lr=0.1, lr_drops=(0.5, 0.75), weight_decay=2e-4, steps=7
)  # Madry et al. 2018's training
_DIGITS = Setting("digits", "digits-cnn", 0.15, 2, 0.5, (0.5,), lr=0.05, batch_size=64, train=192, validation=50)

SCALES = {
    "smoke": Scale(
        "smoke",
        mnist=_DIGITS,
        cifar=replace(_DIGITS, eps=0.1),
        wide=replace(_DIGITS, model="wideresnet", options={"depth": 10, "width": 1}, train=64, epochs=1, steps=7),
        sweep=replace(_DIGITS, eps=0.1, epochs=1),
        surrogate=replace(_DIGITS, eps=0.1, batch_size=32),
        seeds={"mnist": 1, "cifar": 1, "wide": 1, "sweep": 1},
        images={"mnist": 20, "cifar": 20, "wide": 20, "sweep": 20},
        matched={"mnist": 0.7, "cifar": 0.5},
        note="Everything runs on scikit-learn's 8×8 digits for an epoch or two. This shows that the code works, not "
        "how robust anything is.",
        budget=30,
    ),
    "cpu": Scale(
        "cpu",
        mnist=replace(_MNIST, epochs=10, train=20_000, validation=1_000),
        cifar=replace(_CIFAR, model="mnist-cnn", epochs=10, train=20_000, validation=1_000),
        wide=replace(_WIDE, options={"depth": 10, "width": 1}, epochs=10, train=10_000, validation=1_000),
        sweep=replace(_CIFAR, model="mnist-cnn", epochs=8, train=5_000, validation=500),
        surrogate=replace(
            _CIFAR,
            model="wideresnet",
            options={"depth": 10, "width": 1},
            lr=0.1,
            epochs=10,
            train=10_000,
            validation=1_000,
        ),
        seeds={"mnist": 3, "cifar": 3, "wide": 1, "sweep": 1},
        images={"mnist": 2_500, "cifar": 1_000, "wide": 500, "sweep": 1_000},
        matched={"mnist": 0.7, "cifar": 0.5},
        note="Training takes 10 epochs instead of 50 on MNIST and 120 on CIFAR-10, on 20,000 images; tests use 2,500 "
        "and 1,000 images. The 4-layer CNN replaces the 8-layer CNN; in Figures 2 and 4 it is trained for 8 epochs "
        "on 5,000 images. A WideResNet-10-1, trained on 10,000 images and tested on 500, replaces the "
        "WideResNet-34-10 and the ResNet-50. Schedules keep their shares of the training.",
    ),
    "full": Scale(
        "full",
        mnist=_MNIST,
        cifar=_CIFAR,
        wide=_WIDE,
        sweep=_CIFAR,
        surrogate=replace(_CIFAR, model="resnet50"),
        seeds={"mnist": 1, "cifar": 1, "wide": 1, "sweep": 1},
        images={"mnist": None, "cifar": None, "wide": None, "sweep": None},
        matched={"mnist": 0.5, "cifar": 0.5},
        note="The paper's setting, with 5,000 training images held out for validation.",
    ),
}


def find_scale(name: str) -> Scale:
    """A scale by its name. Raises ValueError for an unknown one."""
    if name not in SCALES:
        raise unknown("scale", name, SCALES)
    return SCALES[name]
