"""What attacks have in common: the problem they are given, and, of those that only ask who falls, the frame."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, cast, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from innermax.attacks.search import AttackResult, Final, better, concatenated, gauges, has_won
from innermax.losses import Loss, likeliest_others, margin
from innermax.oracle.oracle import Answer, Oracle
from innermax.threat import L1, L2, FeasibleSet, Linf, Threat
from innermax.utils import randomness
from innermax.utils.validation import check_inputs, check_labels, unknown


@dataclass(frozen=True, eq=False)
class Problem:
    """What an attack is asked about a batch; rows are examples.

    Attributes:
        oracle: what answers for the network.
        feasible: X(x).
        y: (B,) true labels.
        target: (B,) labels to reach; None: y is to be left.
        seed: with index it decides all that is random.
        index: (B,) example numbers.
        pair: (B,) y · classes + the wrong class that a search makes for, where it makes for one: what `losses.Paired`
            takes. Such a search has won wherever y is left.
        samples: answers averaged, each time the network is asked (expectation over transformation).
    """

    oracle: Oracle
    feasible: FeasibleSet
    y: Int[Tensor, " b"]
    target: Int[Tensor, " b"] | None
    seed: int
    index: Int[Tensor, " b"]
    pair: Int[Tensor, " b"] | None = None
    samples: int = 1

    @classmethod
    def of(
        cls,
        threat: Threat,
        model: nn.Module | Oracle,
        x: Tensor,
        y: Tensor,
        *,
        target: Tensor | None,
        seed: int,
        index: Tensor | None,
        final: Final,
    ) -> "Problem":
        """An attack's arguments, checked. Raises ValueError or TypeError for those that do not fit."""
        if final not in get_args(Final):
            raise unknown("final", final, get_args(Final))
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        check_inputs(x)
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        feasible = threat.around(x)
        for name, label in (("y", y), ("target", y if target is None else target)):
            check_labels(label, len(x), name=name)
        index = torch.arange(len(x), device=x.device) if index is None else index
        check_labels(index, len(x), name="index")
        return cls(Oracle.of(model), feasible, y, target, seed, index)

    def __getitem__(self, rows: Tensor) -> "Problem":
        """The same problem for some of the examples."""
        return replace(
            self,
            feasible=self.feasible[rows],
            y=self.y[rows],
            target=None if self.target is None else self.target[rows],
            index=self.index[rows],
            pair=None if self.pair is None else self.pair[rows],
        )

    def towards(self, targets: int, clean: Float[Tensor, "b classes"]) -> "Iterator[Problem]":
        """The problem with one wrong class after the other to make for, the most likely on the clean input first."""
        classes = clean.shape[1]
        for aim in likeliest_others(clean, self.y, min(targets, classes - 1)).unbind(1):
            yield replace(self, pair=self.y * classes + aim)

    @property
    def reach(self) -> bool:
        """Whether a label is to be reached, not left."""
        return self.target is not None

    @property
    def label(self) -> Int[Tensor, " b"]:
        """The label to leave, or to reach."""
        return self.y if self.target is None else self.target

    def keys(self, *streams: int | Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """One key an example for random draws; streams: restart numbers and the like."""
        return randomness.hash_keys(self.seed, self.index, *streams)

    def won(self, point: Float[Tensor, "b ..."], logits: Float[Tensor, "b classes"]) -> Tensor:
        """(B,) where the adversary has what it wants at a point with these logits; never on bf16's word alone."""
        won = has_won(logits, self.label, self.reach)
        rows = won.nonzero()[:, 0]
        if len(rows) > 0 and self.oracle.lowered:
            told = _mean(self.oracle.precise.logits, point[rows], self.samples)
            won[rows] = has_won(told, self.label[rows], self.reach)
        return won

    def logits(self, point: Float[Tensor, "b ..."]) -> Float[Tensor, "b classes"]:
        """The logits at a point of each example, the mean of `samples` answers."""
        return _mean(self.oracle.logits, point, self.samples)

    def gradient(self, point: Float[Tensor, "b ..."], loss: Loss) -> Answer:
        """Gradient, loss and logits at a point of each example, the means of `samples` answers."""
        label = self.label if self.pair is None else self.pair
        answer = self.oracle.gradient(point, label, loss)
        for _ in range(1, self.samples):
            more = self.oracle.gradient(point, label, loss)
            answer = Answer(answer.gradient + more.gradient, answer.loss + more.loss, answer.logits + more.logits)
        return Answer(answer.gradient / self.samples, answer.loss / self.samples, answer.logits / self.samples)


@dataclass(frozen=True)
class VerdictAttack(ABC):
    """An attack that only asks whether an example falls: those that have fallen leave, and cost nothing more.

    Examples that are misclassified as they are have fallen before it begins.
    """

    threat: Threat

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf | L2 | L1):
            raise TypeError(f"threat must be a threat model such as Linf(8 / 255), got {self.threat!r}")

    def __call__(
        self,
        model: nn.Module | Oracle,
        x: Float[Tensor, "b ..."],
        y: Int[Tensor, " b"],
        *,
        target: Int[Tensor, " b"] | None = None,
        seed: int = 0,
        index: Int[Tensor, " b"] | None = None,
        final: Final = "gradient",
    ) -> AttackResult:
        """Attacks a batch: x_adv is the point where an example fell, or else the point of the highest loss found.

        Args:
            model: any nn.Module with logits, in any mode, left exactly as found; or an Oracle of one.
            x: (B, *features) clean inputs within the threat's bounds; half precision is attacked in float32.
            y: (B,) int64 true labels.
            target: (B,) int64 labels to reach instead of y to leave, where the attack can.
            seed: any integer; with `index` it alone decides all random draws.
            index: (B,) int64 example numbers; 0…B − 1 unless told.
            final: "gradient" computes FOSC at x_adv, for one gradient more; with "loss" and "none" it stays untold.

        Raises:
            ValueError, TypeError: x, y, target or index do not fit the attack, or the model's answer is not
                (B, classes) numbers.
        """
        problem = Problem.of(self.threat, model, x, y, target=target, seed=seed, index=index, final=final)
        problem = replace(problem, samples=self.samples)
        self.check(problem)
        with problem.oracle.private_randomness(seed):
            clean = problem.logits(problem.feasible.x)
            for name, label in (("y", y), ("target", problem.label)):
                check_labels(label, len(y), clean.shape[1], name)
            found = self.search(problem, clean)
            found = replace(found, forward_calls=found.forward_calls + problem.samples)
            if final == "gradient":
                found = self._gauged(problem, found)
        return inspected(found, y)

    @property
    def samples(self) -> int:
        """How many answers of the network are averaged."""
        return 1

    def check(self, problem: Problem) -> None:
        """Raises ValueError where the attack cannot take the problem on."""
        if problem.reach:
            raise ValueError(
                f"target is not supported by {type(self).__name__}: it leaves y, whatever class that leads to"
            )

    @abstractmethod
    def search(self, problem: Problem, clean: Float[Tensor, "b classes"]) -> AttackResult:
        """What was found, without FOSC, given the clean inputs' logits; `misclassified` is where the search has won."""

    def reported_loss(self, classes: int, reach: bool) -> Loss:
        """The loss (logits, label) → (B,) that results report, and whose FOSC."""
        return margin

    def _gauged(self, problem: Problem, found: AttackResult) -> AttackResult:
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


def _mean(logits: Callable[[Tensor], Tensor], point: Tensor, samples: int) -> Tensor:
    """The mean of so many answers."""
    total = logits(point)
    for _ in range(1, samples):
        total = total + logits(point)
    return total / samples


def reported(
    problem: Problem,
    x_adv: Float[Tensor, "b ..."],
    loss: Float[Tensor, " b"],
    logits: Float[Tensor, "b classes"],
    steps: int | Tensor = 0,
    gradients: int = 0,
    forwards: int = 0,
) -> AttackResult:
    """A result without FOSC; each gradient and forward pass is one of the problem's averages."""
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


def pursued(
    found: AttackResult, once: Callable[[Int[Tensor, " k"]], AttackResult], oracle: Oracle | None = None
) -> AttackResult:
    """The better of what was found and of one search more, which only survivors, the rows given to it, undergo.

    Where an oracle is given its threads share the search.
    """
    rows = (~cast(Tensor, found.misclassified)).nonzero()[:, 0]
    if len(rows) == 0:
        return found
    result = once(rows) if oracle is None else concatenated(oracle.side_by_side(once, rows))
    return found.updated(rows, better(found[rows], result))


def inspected(result: AttackResult, y: Tensor) -> AttackResult:
    """The result with its verdicts. Raises ValueError where the model answered NaN, warns of probabilities."""
    if result.logits is None:
        return result
    classes = result.logits.shape[1]
    check_labels(y, len(y), classes)
    bad = int(torch.isnan(result.logits).any(1).sum())
    if bad:
        raise ValueError(f"the model returns NaN logits for {bad} of {len(y)} inputs")
    if looks_like_probabilities(result.logits):
        warnings.warn(
            "the model seems to return probabilities; attacks and gauges need logits (leave the softmax out)",
            stacklevel=3,
        )
    return replace(result, misclassified=result.logits.argmax(1) != y)


def looks_like_probabilities(logits: Float[Tensor, "b classes"]) -> bool:
    """Whether every row is non-negative and sums to one."""
    return bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all())


@runtime_checkable
class Attack(Protocol):
    """What can be evaluated: a threat model, and a search inside it."""

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
