"""Targeted attacks: an attack that heads for a label of each example, which a rule chooses."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from innermax.attacks.apgd import APGD
from innermax.attacks.base import BaseAttack
from innermax.attacks.cost import FORWARD
from innermax.attacks.pgd import PGD
from innermax.attacks.problem import Problem
from innermax.attacks.search import AttackResult, Final
from innermax.losses import make_reaching
from innermax.oracle.oracle import Oracle
from innermax.threat import Threat
from innermax.utils import randomness
from innermax.utils.validation import check_labels, unknown

Rule = Literal["random", "next", "least-likely"]
_STREAM = 0x7A26E7


@dataclass(frozen=True)
class TargetedResult(AttackResult):
    """What a targeted attack found.

    Attributes:
        target: (B,) int64 the label that it headed for. It has succeeded where that is predicted at x_adv.
    """

    target: Int[Tensor, " b"]


@dataclass(frozen=True)
class Targeted:
    """An attack on the way to one label per example, instead of away from the true one.

    It has succeeded where the model predicts the target: `Evaluation.reached` says how often. Its accuracy counts what
    the model still gets right, as for every attack: an image that is taken for a third class is neither.

    Args:
        attack: PGD, FGSM, CW or APGD, with a loss that can head for a label.
        targets: which label, never the true one. "random": drawn from the seed and the example's number; "next": the
            number after the label's, 0 after the last; "least-likely": that of the smallest logit at the clean input,
            where one forward pass finds it. Or a function (logits, label) → (B,) int64 of the clean input's logits.

    Raises:
        ValueError, TypeError: the attack cannot head for labels, or targets is none of these; when called, a function
            returned something else than labels other than the true ones.
    """

    attack: BaseAttack
    targets: Rule | Callable[[Tensor, Tensor], Tensor] = "random"

    def __post_init__(self) -> None:
        if not isinstance(self.attack, PGD | APGD):
            raise TypeError(
                "attack of Targeted must be PGD, FGSM, CW or APGD, which can head for a label, got "
                f"{type(self.attack).__name__}"
            )
        if isinstance(self.attack, APGD) and self.attack.targets is not None:
            raise ValueError(f"attack of Targeted needs targets=None, got its own choice, {self.attack.targets}")
        if isinstance(self.attack, PGD):
            make_reaching(self.attack.objective())
        if not callable(self.targets) and self.targets not in get_args(Rule):
            raise unknown("targets", str(self.targets), get_args(Rule))

    @property
    def threat(self) -> Threat:
        """The set the attack searches."""
        return self.attack.threat

    @property
    def cost(self) -> float:
        """About how many gradients per example it takes."""
        return self.attack.cost + FORWARD * self.samples

    @property
    def samples(self) -> int:
        """How many answers of the network are averaged each time it is asked."""
        return self.attack.samples

    def __call__(
        self,
        model: nn.Module | Oracle,
        x: Float[Tensor, "b ..."],
        y: Int[Tensor, " b"],
        *,
        seed: int = 0,
        index: Int[Tensor, " b"] | None = None,
        final: Final = "gradient",
    ) -> TargetedResult:
        """Attacks a batch; arguments and errors as for the attack itself."""
        problem = replace(Problem.of(self.threat, model, x, y, seed=seed, index=index), samples=self.samples)
        with problem.oracle.private_randomness(seed):
            logits = problem.logits(problem.feasible.x)
        check_labels(y, len(y), logits.shape[1])
        target = choose_targets(self.targets, logits, y, problem.keys(_STREAM))
        result = self.attack(problem.oracle, x, y, target=target, seed=seed, index=index, final=final)
        values = vars(result) | {"forward_calls": result.forward_calls + self.samples}
        return TargetedResult(**values, target=target)


def choose_targets(
    rule: Rule | Callable[[Tensor, Tensor], Tensor],
    logits: Float[Tensor, "b classes"],
    label: Int[Tensor, " b"],
    key: Int[Tensor, " b"],
) -> Int[Tensor, " b"]:
    """The labels that a rule heads for, none of them the true one.

    key: one per example, which draws random ones. Raises ValueError where a function's answer is none.
    """
    classes = logits.shape[1]
    if rule == "next":
        return (label + 1) % classes
    if rule == "random":
        draw = randomness.uniform(key, 1)[:, 0].double()
        return (label + 1 + (draw * (classes - 1)).long()) % classes
    if rule == "least-likely":
        return logits.scatter(1, label[:, None], torch.inf).argmin(1)
    target = rule(logits, label)
    check_labels(target, len(label), classes, "targets")
    if bool((target == label).any()):
        raise ValueError(f"targets must differ from the true labels, got {int((target == label).sum())} that do not")
    return target
