"""Objectives: what training minimises, a function of the network, the clean and the attacked batch.

An objective may have two attributes more. `search_loss` is the loss that attacks maximise instead of their own.
`weight_perturbation`, γ > 0, asks for an update against the worst weights nearby (see AWP).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from innermax.losses import KLDivergence, Loss
from innermax.models.wrappers import unwrap
from innermax.threat import Threat
from innermax.utils.validation import check_logits, check_number, unknown

# (model, x, y, x_adv, epoch) → the scalar to minimise and the (B, classes) logits at x_adv
Objective = Callable[[nn.Module, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def cross_entropy(
    model: nn.Module, x: Float[Tensor, "b ..."], y: Int[Tensor, " b"], x_adv: Float[Tensor, "b ..."], epoch: int
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy on the attacked batch (Wang et al. 2019, Eq. 1)."""
    return CrossEntropy()(model, x, y, x_adv, epoch)


def loss_weighted(
    model: nn.Module, x: Float[Tensor, "b ..."], y: Int[Tensor, " b"], x_adv: Float[Tensor, "b ..."], epoch: int
) -> tuple[Tensor, Tensor]:
    """From the second epoch on, weights each attacked example's cross-entropy by itself; weights get no gradient.

    This is in the code released with Wang et al. 2019, not in the paper.
    """
    return LossWeighted()(model, x, y, x_adv, epoch)


@dataclass(frozen=True)
class _Smoothed:
    """What objectives with a cross-entropy in them share.

    Raises:
        ValueError, TypeError: label_smoothing is out of range, or no number.
    """

    label_smoothing: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        allowed = "a number ≥ 0 and < 1"
        check_number(self.label_smoothing, "label_smoothing", allowed, lambda value: 0 <= value < 1)

    def _cross_entropies(self, logits: Float[Tensor, "b classes"], y: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Each example's, in float32."""
        return F.cross_entropy(logits.float(), y, reduction="none", label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class CrossEntropy(_Smoothed):
    """Mean cross-entropy on the attacked batch (Wang et al. 2019, Eq. 1); attacks maximise their own loss.

    Args:
        label_smoothing: α in [0, 1): the target is 1 − α for the label, and α is shared by all classes (Szegedy et al.
            2016, §7).
    """

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The mean, and the logits at x_adv."""
        logits = _ask(model, x_adv)
        return F.cross_entropy(logits.float(), y, label_smoothing=self.label_smoothing), logits


@dataclass(frozen=True)
class LossWeighted(_Smoothed):
    """From the second epoch on, the mean of each attacked example's cross-entropy, weighted by itself.

    Weights get no gradient. This is in the code released with Wang et al. 2019, not in the paper.

    Args:
        label_smoothing: as for CrossEntropy.
    """

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The mean, and the logits at x_adv."""
        logits = _ask(model, x_adv)
        losses = self._cross_entropies(logits, y)
        return (losses if epoch == 0 else losses * losses.detach()).mean(), logits


@dataclass(frozen=True)
class TRADES(_Smoothed):
    """Mean of CE(x, y) + β · KL(p(x) ‖ p(x')): accuracy on clean inputs, and the same answer around them (Zhang et al.
    2019, Eq. 5).

    Attacks maximise the KL divergence. It takes one forward pass more than the cross-entropy, and attacks one more.

    Args:
        beta: β ≥ 0, which the paper calls 1/λ.
        label_smoothing: of the cross-entropy, as for CrossEntropy.
    """

    beta: float = 6.0
    search_loss: ClassVar[Loss] = KLDivergence()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight(self.beta, "beta")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The mean, and the logits at x_adv."""
        clean, logits = _ask(model, x), _ask(model, x_adv)
        return (self._cross_entropies(clean, y) + self.beta * _divergences(clean, logits)).mean(), logits


@dataclass(frozen=True)
class MART(_Smoothed):
    """Mean of BCE(x', y) + β · KL(p(x) ‖ p(x')) · (1 − p(y | x)): more weight where the clean input is misclassified.

    BCE is −log p(y | x') − log(1 − p(k | x')) for the likeliest wrong class k (Wang et al. 2020, Eqs. 8 and 11).
    Attacks maximise their own loss, the cross-entropy. It takes one forward pass more than the cross-entropy.

    Args:
        beta: β ≥ 0, which the paper calls λ.
        label_smoothing: of the cross-entropy −log p(y | x'), as for CrossEntropy.
    """

    beta: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight(self.beta, "beta")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The mean, and the logits at x_adv."""
        clean, logits = _ask(model, x), _ask(model, x_adv)
        losses = self._cross_entropies(logits, y) - _log_of_others(logits, _likeliest_wrong(logits, y))
        doubt = 1 - clean.float().softmax(1).gather(1, y[:, None])[:, 0]
        return (losses + self.beta * _divergences(clean, logits) * doubt).mean(), logits


@dataclass(frozen=True)
class AWP:
    """An objective at the worst weights nearby: adversarial weight perturbation (Wu et al. 2020).

    An update first finds the gradient of the objective at the weights w. It moves every tensor of at least two
    dimensions upwards along its own gradient g, by γ‖w‖·g/‖g‖, and takes the gradient of the objective there. Then the
    weights are put back, and the optimiser steps with that gradient. An update costs twice its forward and backward
    passes, and a copy of the weights. BatchNorm's statistics are those of the second pass.

    Args:
        objective: any; attacks search as it says.
        gamma: γ > 0, the size of the perturbation over that of the weights.

    Raises:
        ValueError, TypeError: an argument is not as described above.
    """

    objective: str | Objective = "cross_entropy"
    gamma: float = 0.005

    def __post_init__(self) -> None:
        _check_perturbation(self.gamma, "gamma")
        if weight_perturbation(find_objective(self.objective)) is not None:
            raise ValueError(f"objective of AWP must not perturb weights itself, got {self.objective!r}")

    @property
    def search_loss(self) -> Loss | None:
        """What attacks maximise for the objective."""
        return search_loss(find_objective(self.objective))

    @property
    def weight_perturbation(self) -> float:
        """γ."""
        return self.gamma

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The objective at the weights that the model has."""
        return find_objective(self.objective)(model, x, y, x_adv, epoch)


@dataclass(frozen=True)
class GradAlign:
    """An objective, and input gradients that point the same way all over X(x): the objective plus β times the mean of
    1 − cos(∇ℓ(x), ∇ℓ(x + η)), with ℓ the cross-entropy (Andriushchenko & Flammarion 2020).

    It keeps training against a single step from overfitting catastrophically. η is drawn anew for each update,
    uniformly from X(x), by torch's generator: like a model's own draws it belongs to the batch and the process. As in
    the released code, weights get a gradient through the one at x + η alone, and both are those of the network in
    training mode; there x + η is not projected onto the pixel bounds. Examples with a zero gradient are left out. An
    update takes two forward passes more, two gradients in the inputs, and one through such a gradient. Published for
    CIFAR-10, with FGSM and ε = 8/255: β = 0.2, 30 epochs of 128 images, SGD with weight decay 5e-4 and a learning rate
    that climbs to 0.3 and falls again.

    Args:
        objective: any; attacks search as it says.
        beta: β ≥ 0, which the paper calls λ.
        threat: whose X(x) η is drawn from; None: that of the strategy's attack.

    Raises:
        ValueError, TypeError: an argument is not as described above.
    """

    objective: str | Objective = "cross_entropy"
    beta: float = 0.2
    threat: Threat | None = None

    def __post_init__(self) -> None:
        _check_weight(self.beta, "beta")
        if self.threat is not None and not isinstance(self.threat, Threat):
            raise TypeError(f"threat must be a threat model such as Linf(8 / 255) or None, got {self.threat!r}")
        if weight_perturbation(find_objective(self.objective)) is not None:
            raise ValueError(f"objective of GradAlign must not perturb weights, got {self.objective!r}: put it in AWP")

    @property
    def search_loss(self) -> Loss | None:
        """What attacks maximise for the objective."""
        return search_loss(find_objective(self.objective))

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The sum, and the logits at x_adv."""
        if self.threat is None:
            raise ValueError("threat of GradAlign must be given outside of im.train, such as Linf(8 / 255), got None")
        network = unwrap(model)  # in its own precision: the second derivative of a rounded one is noise
        keys = torch.randint(2**62, (len(x),), device=x.device)
        clean = _input_gradient(network, x, y, further=False)
        value, logits = find_objective(self.objective)(model, x, y, x_adv, epoch)
        near = _input_gradient(network, self.threat.around(x).sample(keys), y, further=True)
        return value + self.beta * _misalignment(clean, near), logits


def _input_gradient(network: nn.Module, x: Tensor, y: Tensor, further: bool) -> Float[Tensor, "b d"]:
    """The gradient of each example's cross-entropy in its own input, flat; further: that it has a gradient itself."""
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(_ask(network, point).float(), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point, create_graph=further)
    return gradient.flatten(1)


def _misalignment(one: Float[Tensor, "b d"], other: Float[Tensor, "b d"]) -> Tensor:
    """The mean of 1 − cos, over the examples whose vectors are both not 0."""
    with torch.no_grad():
        moving = ((one != 0).any(1) & (other != 0).any(1)).nonzero()[:, 0]
    if len(moving) == 0:
        return 0 * other.sum()
    return (1 - F.cosine_similarity(one[moving], other[moving])).mean()


def _ask(model: nn.Module, x: Tensor) -> Tensor:
    return check_logits(model(x), len(x), "in training mode, the model")


def _divergences(clean: Float[Tensor, "b classes"], logits: Float[Tensor, "b classes"]) -> Float[Tensor, " b"]:
    """KL(p(x) ‖ p(x')) of each example, with gradients of both."""
    target = F.log_softmax(clean.float(), dim=1)
    return F.kl_div(F.log_softmax(logits.float(), dim=1), target, reduction="none", log_target=True).sum(1)


def _likeliest_wrong(logits: Float[Tensor, "b classes"], y: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    return logits.detach().scatter(1, y[:, None], -inf).argmax(1)


def _log_of_others(logits: Float[Tensor, "b classes"], k: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """log(1 − p(k)), exact where p(k) is close to 1."""
    logits = logits.float()
    return torch.logsumexp(logits.scatter(1, k[:, None], -inf), 1) - torch.logsumexp(logits, 1)


def _check_perturbation(value: float, name: str) -> None:
    check_number(value, name, "a finite number > 0", lambda value: 0 < value < inf)


def _check_weight(value: float, name: str) -> None:
    check_number(value, name, "a finite number ≥ 0", lambda value: 0 <= value < inf)


# By name, for `im.train`, the command line and recipes.
OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": cross_entropy,
    "loss_weighted": loss_weighted,
    "trades": TRADES(),
    "mart": MART(),
}
_KINDS: dict[str, Callable[..., Objective]] = {
    "cross_entropy": CrossEntropy,
    "loss_weighted": LossWeighted,
    "trades": TRADES,
    "mart": MART,
}


def find_objective(objective: str | Objective) -> Objective:
    """The objective of a name in OBJECTIVES, or the function itself.

    Raises:
        ValueError, TypeError: the name is unknown, or it is neither a name nor a function.
    """
    if callable(objective):
        return objective
    if not isinstance(objective, str):
        raise TypeError(f"objective must be a name or a function, got {objective!r}")
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    return OBJECTIVES[objective]


def build_objective(
    name: str, beta: float | None = None, label_smoothing: float | None = None, awp: float | None = None
) -> str | Objective:
    """The objective of a name with options of its own, each None where it was not given; the name where none was.

    Raises:
        ValueError, TypeError: the name is unknown, it has no such option, or a value is out of range.
    """
    find_objective(name)
    if name == "grad_align":
        smoothed = "cross_entropy" if label_smoothing is None else CrossEntropy(label_smoothing=label_smoothing)
        aligned = name if beta is label_smoothing is None else GradAlign(smoothed, 0.2 if beta is None else beta)
        return _perturbed(aligned, awp)
    options = {"beta": beta, "label_smoothing": label_smoothing}
    given: dict[str, Any] = {option: value for option, value in options.items() if value is not None}
    if "beta" in given and name not in ("trades", "mart"):
        raise ValueError(f"beta goes with objective trades, mart or grad_align, not with {name}: leave it out")
    return _perturbed(_KINDS[name](**given) if given else name, awp)


def _perturbed(objective: str | Objective, awp: float | None) -> str | Objective:
    if awp is None:
        return objective
    _check_perturbation(awp, "awp")
    return AWP(objective, awp)


def search_loss(objective: Objective) -> Loss | None:
    """What attacks maximise for an objective; None: their own loss."""
    return getattr(objective, "search_loss", None)


def within(objective: Objective, threat: Threat | None) -> Objective:
    """The objective with the threat model of a strategy's attack, where it needs one and was not told another.

    Raises ValueError where there is none.
    """
    if isinstance(objective, AWP):
        inner = find_objective(objective.objective)
        return objective if within(inner, threat) is inner else replace(objective, objective=within(inner, threat))
    if not isinstance(objective, GradAlign) or objective.threat is not None:
        return objective
    if threat is None:
        raise ValueError(
            "objective grad_align needs the threat model of the strategy's attack, got a strategy without one: use one "
            "such as Standard, or GradAlign(threat=…)"
        )
    return replace(objective, threat=threat)


def differentiates_twice(objective: Objective) -> bool:
    """Whether an update takes second derivatives of the network."""
    return isinstance(objective, GradAlign) or (
        isinstance(objective, AWP) and differentiates_twice(find_objective(objective.objective))
    )


def weight_perturbation(objective: Objective) -> float | None:
    """γ of the weight perturbation that an objective asks for; None: it asks for none."""
    return getattr(objective, "weight_perturbation", None)


OBJECTIVES["grad_align"] = GradAlign()  # at the end: it asks the functions above
