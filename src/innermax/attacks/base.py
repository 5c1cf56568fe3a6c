"""What attacks have in common: how they are called, what they declare, and the frame of those that seek a verdict."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, cast, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from innermax.attacks.cost import UNKNOWN
from innermax.attacks.problem import Problem
from innermax.attacks.search import AttackResult, Final, choose_better, concatenate, gauges
from innermax.losses import Loss, margin
from innermax.oracle.oracle import Oracle
from innermax.threat import Threat
from innermax.utils.validation import are_classes, check_labels, unknown


@runtime_checkable
class Attack(Protocol):
    """What can be evaluated: a threat model, and a search inside it.

    It may have a `cost`, about how many gradients per example it takes, for the display of the time left.
    """

    @property
    def threat(self) -> Threat:
        """The set the attack searches."""

    def __call__(
        self,
        model: nn.Module | Oracle,
        x: Tensor,
        y: Tensor,
        *,
        seed: int = 0,
        index: Tensor | None = None,
        final: Final = "gradient",
    ) -> AttackResult:
        """Attacks a batch; `seed` and the example numbers `index` decide all that is random."""


@dataclass(frozen=True)
class BaseAttack(ABC):
    """An attack of this library. A class of attacks is `solve` and what it declares:

    Attributes:
        norms: the threat models it supports; `Threat`: any, by the methods that all have.
        accepts: which of the optional arguments "target" and "start" it can follow.

    Raises:
        TypeError: the threat is no threat model, or not one that the attack supports.
    """

    threat: Threat
    norms: ClassVar[tuple[type[Threat], ...]] = (Threat,)
    accepts: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Threat):
            raise TypeError(f"threat must be a threat model such as Linf(8 / 255), got {self.threat!r}")
        if not self.supports(self.threat):
            names = " or ".join(norm.__name__ for norm in self.norms)
            raise TypeError(
                f"threat of {type(self).__name__} must be {names}, whose geometry it needs, got {self.threat!r}; "
                "PGD, GuidedPGD and APGD support any threat model"
            )

    @classmethod
    def supports(cls, threat: Threat) -> bool:
        """Whether attacks of this class can search a threat model."""
        return isinstance(threat, cls.norms)

    @property
    def cost(self) -> float:
        """About how many gradients per example it takes."""
        return UNKNOWN

    @property
    def samples(self) -> int:
        """How many answers of the network are averaged each time it is asked."""
        return 1

    def __call__(
        self,
        model: nn.Module | Oracle,
        x: Float[Tensor, "b ..."],
        y: Int[Tensor, " b"],
        *,
        target: Int[Tensor, " b"] | None = None,
        seed: int = 0,
        index: Int[Tensor, " b"] | None = None,
        start: Float[Tensor, "b ..."] | None = None,
        final: Final = "gradient",
    ) -> AttackResult:
        """Attacks a batch.

        Args:
            model: any nn.Module with logits, in any mode, left exactly as found; or an Oracle of one.
            x: (B, *features) clean inputs within the threat's bounds; half precision is attacked in float32.
            y: (B,) int64 true labels.
            target: (B,) int64 labels to reach instead of y to leave, where the attack accepts them.
            seed: any integer; with `index` it alone decides all random draws.
            index: (B,) int64 example numbers; 0…B − 1 by default.
            start: (B, *features) where the first search begins, projected onto X(x), where the attack accepts it: where
                an earlier one ended. An example whose gauge is ≤ stop_at there takes no step. None: the attack chooses.
            final: what is computed where the search ends: "gradient" (loss, logits, FOSC), "loss" (loss, logits) or
                "none".

        Raises:
            ValueError, TypeError: x, y, target, index or start do not fit the attack, or the model's answer is not
                (B, classes) numbers.
        """
        if final not in get_args(Final):
            raise unknown("final", final, get_args(Final))
        problem = Problem.of(self.threat, model, x, y, target=target, seed=seed, index=index, start=start)
        self.check(problem)
        with problem.oracle.private_randomness(seed):
            result = self.solve(replace(problem, samples=self.samples), final)
        return check_result(result, y)

    def check(self, problem: Problem) -> None:
        """Raises ValueError where the attack cannot take the problem on."""
        reasons = {"target": "it leaves y, whatever class that leads to", "start": "it chooses where searches begin"}
        for name, reason in reasons.items():
            if getattr(problem, name) is not None and name not in self.accepts:
                raise ValueError(f"{name} is not supported by {type(self).__name__}: {reason}")

    @abstractmethod
    def solve(self, problem: Problem, final: Final) -> AttackResult:
        """What the attack finds; `final` as for a call."""


@dataclass(frozen=True)
class VerdictAttack(BaseAttack):
    """An attack that only asks whether an example falls: those that have fallen leave, and cost nothing more.

    Examples that are misclassified as they are count as fallen from the start. x_adv is the point where an example
    fell, or else the point of the highest loss found. A class of such attacks implements `search`.
    """

    def solve(self, problem: Problem, final: Final) -> AttackResult:
        """What the search finds, with its FOSC where `final` is "gradient"."""
        clean = problem.logits(problem.feasible.x)
        for name, label in {"y": problem.y, "target": problem.target}.items():
            if label is not None:
                check_labels(label, len(label), clean.shape[1], name)
        found = self.search(problem, clean)
        found = replace(found, forward_calls=found.forward_calls + problem.samples)
        return self._gauge(problem, found) if final == "gradient" else found

    @abstractmethod
    def search(self, problem: Problem, clean: Float[Tensor, "b classes"]) -> AttackResult:
        """What was found, without FOSC, given the clean inputs' logits; `misclassified` is where the search has won."""

    def reported_loss(self, classes: int, reach: bool) -> Loss:
        """The loss (logits, label) → (B,) that results report, and whose FOSC."""
        return margin

    def _gauge(self, problem: Problem, found: AttackResult) -> AttackResult:
        """The result with loss, logits and FOSC at x_adv in the oracle's best precision."""
        classes = cast(Tensor, found.logits).shape[1]
        precise = replace(problem, oracle=problem.oracle.precise)
        answer = precise.gradient(found.x_adv, self.reported_loss(classes, problem.reach))
        return replace(
            found,
            loss=answer.loss,
            logits=answer.logits,
            gradient_calls=found.gradient_calls + problem.samples,
            **gauges(problem.feasible, answer.gradient, found.x_adv),
        )


def build_result(
    problem: Problem,
    x_adv: Float[Tensor, "b ..."],
    loss: Float[Tensor, " b"],
    logits: Float[Tensor, "b classes"],
    steps: int | Tensor = 0,
    gradients: int = 0,
    forwards: int = 0,
) -> AttackResult:
    """A result without FOSC; each of its gradients and forward passes costs the problem's `samples`."""
    zeros = torch.zeros_like(problem.y)
    return AttackResult(
        x_adv=x_adv,
        loss=loss,
        logits=logits,
        fosc=None,
        relative_fosc=None,
        zero_gradient=None,
        misclassified=problem.won(x_adv, logits),
        steps=zeros + steps,
        gradient_calls=zeros + gradients * problem.samples,
        forward_calls=zeros + forwards * problem.samples,
    )


def search_survivors(
    found: AttackResult, once: Callable[[Int[Tensor, " k"]], AttackResult], oracle: Oracle | None = None
) -> AttackResult:
    """The better of what was found and of one more search, `once`, of the rows that have survived so far.

    Where an oracle is given, its threads share the search.
    """
    rows = (~cast(Tensor, found.misclassified)).nonzero()[:, 0]
    if len(rows) == 0:
        return found
    result = once(rows) if oracle is None else concatenate(oracle.side_by_side(once, rows))
    return found.with_rows(rows, choose_better(found[rows], result))


def check_result(result: AttackResult, y: Int[Tensor, " b"]) -> AttackResult:
    """The result, with `misclassified` by its own logits where it has them.

    Raises ValueError where the model answered NaN or has no class for a label; warns where it answers probabilities.
    """
    if result.logits is None:
        return result
    classes = result.logits.shape[1]
    bad = torch.isnan(result.logits).any(1).sum()
    # Looked at together, so that their device is waited for once.
    known, whole, probable = torch.stack(
        [are_classes(y, classes), bad == 0, looks_like_probabilities(result.logits)]
    ).tolist()
    if not known:
        check_labels(y, len(y), classes)
    if not whole:
        raise ValueError(f"the model returns NaN logits for {int(bad)} of {len(y)} inputs")
    if probable:
        warnings.warn(
            "the model seems to return probabilities; attacks and gauges need logits (leave the softmax out)",
            stacklevel=3,
        )
    return replace(result, misclassified=result.logits.argmax(1) != y)


def looks_like_probabilities(logits: Float[Tensor, "b classes"]) -> Bool[Tensor, ""]:
    """Whether every row is non-negative and sums to one: one bool, on the logits' device."""
    return (logits >= 0).all() & ((logits.sum(1) - 1).abs() < 1e-4).all()
