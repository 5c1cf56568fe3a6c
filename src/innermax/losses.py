"""Per-example losses an attack maximises: functions of (logits, label) that grow as the label is left behind.

A loss may also depend on the clean input, by what the network answers there. It is then a function of (logits, label,
*given), and `given = loss.prepare(clean_logits, label)`: tensors with a row for each example, which a search takes as
constants. Such a loss is a frozen value that holds no tensor. Where it has its minimum at the clean input, it says so
by `stationary_at_clean = True`: a search cannot start there, where there is no slope to follow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from innermax.utils.validation import unknown

Logits = Float[Tensor, "b classes"]
Labels = Int[Tensor, " b"]
Loss = Callable[..., Tensor]  # (logits, label, *given) → (B,)
Given = tuple[Tensor, ...]
TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy(logits: Logits, label: Labels) -> Float[Tensor, " b"]:
    """−log softmax(logits)[label] ≥ 0."""
    return F.cross_entropy(logits, label, reduction="none")


def margin(logits: Logits, label: Labels) -> Float[Tensor, " b"]:
    """Best other logit − the label's: positive exactly when the example is misclassified (Carlini & Wagner 2017)."""
    own = logits.gather(1, label[:, None])[:, 0]
    return _without_label(logits, label).amax(1) - own


def dlr(logits: Logits, label: Labels) -> Float[Tensor, " b"]:
    """Difference of logits ratio: the margin over (largest − third largest logit) (Croce & Hein 2020, Eq. 6)."""
    if logits.shape[1] < 3:
        raise ValueError(f"loss 'dlr' needs at least 3 classes, the model has {logits.shape[1]}")
    top = logits.topk(3, dim=1).values
    return margin(logits, label) / (top[:, 0] - top[:, 2] + 1e-12)


def difference(logits: Logits, label: Labels, target: Labels) -> Float[Tensor, " b"]:
    """The target's logit − the label's."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, label[:, None]))[:, 0]


def targeted_dlr(logits: Logits, label: Labels, target: Labels) -> Float[Tensor, " b"]:
    """The difference over (largest − mean of third and fourth largest logit) (Croce & Hein 2020, Eq. 7)."""
    if logits.shape[1] < 4:
        raise ValueError(f"the targeted loss 'dlr' needs at least 4 classes, the model has {logits.shape[1]}")
    top = logits.topk(4, dim=1).values
    return difference(logits, label, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


@dataclass(frozen=True)
class Paired:
    """A loss of (logits, label, target) as one of (logits, pair), where pair is one number for both classes."""

    loss: TargetedLoss

    def __call__(self, logits: Logits, pair: Labels) -> Float[Tensor, " b"]:
        """The loss for pair = label · classes + target."""
        classes = logits.shape[1]
        return self.loss(logits, pair // classes, pair % classes)


@dataclass(frozen=True)
class TowardsLikeliest:
    """A loss of (logits, label, target) for the target with the largest logit."""

    loss: TargetedLoss

    def __call__(self, logits: Logits, label: Labels) -> Float[Tensor, " b"]:
        """The loss for the label and the most likely other class."""
        return self.loss(logits, label, likeliest_others(logits, label)[:, 0])


def likeliest_others(logits: Logits, label: Labels, count: int = 1) -> Int[Tensor, "b k"]:
    """The classes other than the label with the `count` largest logits, largest first."""
    return _without_label(logits, label).topk(count, dim=1).indices


@dataclass(frozen=True)
class CappedMargin:
    """The margin, constant once it exceeds `confidence`: the objective of C&W∞ (Carlini & Wagner 2017, f₆)."""

    confidence: float = 0.0

    def __call__(self, logits: Logits, label: Labels) -> Float[Tensor, " b"]:
        """min(best other logit − the label's, confidence)."""
        return margin(logits, label).clamp(max=self.confidence)

    def reach(self, logits: Logits, target: Labels) -> Float[Tensor, " b"]:
        """min(the target's logit − best other, confidence)."""
        return (-margin(logits, target)).clamp(max=self.confidence)


@dataclass(frozen=True)
class KLDivergence:
    """KL(p(x) ‖ p(x')) ≥ 0, from the softmax at the clean input to that at x' (TRADES: Zhang et al. 2019, Eq. 5)."""

    stationary_at_clean: ClassVar[bool] = True

    def prepare(self, clean_logits: Logits, label: Labels) -> Given:
        """(B, classes) log softmax at the clean inputs."""
        return (F.log_softmax(clean_logits, dim=1),)

    def __call__(self, logits: Logits, label: Labels, clean: Float[Tensor, "b classes"]) -> Float[Tensor, " b"]:
        """Σ p(x) · (log p(x) − log p(x')); clean: log p(x)."""
        return F.kl_div(F.log_softmax(logits, dim=1), clean, reduction="none", log_target=True).sum(1)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}


def find_loss(loss: str | Loss) -> Loss:
    """A loss by its name, or the function itself. Raises ValueError for an unknown name."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    return LOSSES[loss]


def needs_clean(loss: Loss) -> bool:
    """Whether a loss depends on what the network answers to the clean input."""
    return hasattr(loss, "prepare")


def is_stationary_at_clean(loss: Loss) -> bool:
    """Whether a loss has no slope at the clean input, so that no search can start there."""
    return bool(getattr(loss, "stationary_at_clean", False))


def select(given: Given, rows: Tensor | slice) -> Given:
    """What a loss is given, for some of the examples."""
    return tuple(value[rows] for value in given)


def make_reaching(loss: Loss) -> Loss:
    """What to maximise in order to reach a label instead of leaving it: the loss's own `reach`, or its negative.

    Raises ValueError for a loss that depends on the clean input: to come back there reaches no label.
    """
    own: Loss | None = getattr(loss, "reach", None)
    if own is None and needs_clean(loss):
        raise ValueError(
            f"loss {loss!r} leaves the clean input and reaches no label: leave target out, or use 'cross_entropy'"
        )
    return own if own is not None else _Negative(loss)


def make_targeted(loss: Loss) -> TargetedLoss:
    """A loss as a function of (logits, label, target) that leaves the label for the target."""
    if loss is margin:
        return difference
    return targeted_dlr if loss is dlr else _Reaching(make_reaching(loss))


@dataclass(frozen=True)
class _Reaching:
    """A loss that reaches the target, whatever the label."""

    loss: Loss

    def __call__(self, logits: Logits, label: Labels, target: Labels) -> Float[Tensor, " b"]:
        return self.loss(logits, target)


@dataclass(frozen=True)
class _Negative:
    """A value, so that two of the same loss are equal."""

    loss: Loss

    def __call__(self, logits: Logits, label: Labels) -> Float[Tensor, " b"]:
        return -self.loss(logits, label)


def _without_label(logits: Tensor, label: Tensor) -> Tensor:
    """The logits with the label's replaced by −∞."""
    return logits.scatter(1, label[:, None], -inf)
