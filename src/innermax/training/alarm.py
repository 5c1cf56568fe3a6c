"""The alarm for catastrophic overfitting: a single step still raises the loss that it sees, and nothing else.

Training against one step can collapse within a fraction of an epoch: accuracy under that step rises to 100 %, under PGD
it falls to 0, and the training's own loss only looks better (Wong et al. 2020). What gives it away is the gradient
where the step has led. While the loss is nearly linear over X(x), it still points where the step went, and the relative
FOSC there is small; before a collapse the loss bends, and it grows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal, NamedTuple

from innermax.attacks.pgd import PGD
from innermax.strategies import Strategy
from innermax.utils.serialization import is_finite_number

OnOverfit = Literal["ignore", "warn", "stop", "strengthen"]
LEVEL, RISE = 0.3, 1.5  # set by eye on a few trainings, tested on others: results/alarm.md
PARTS = 4  # of an epoch, at whose ends the alarm looks
_REST = 2  # parts for which a strengthened attack is given time


class Overfitting(ArithmeticError):
    """A training against few steps overfits catastrophically, and was told to stop where it does."""


class Raised(NamedTuple):
    """That the alarm was raised: after which batch of which epoch, both from 0, at which mean relative FOSC."""

    epoch: int
    batch: int
    value: float


@dataclass(frozen=True)
class Alarm:
    """What the alarm has heard so far; a checkpoint keeps it.

    Attributes:
        total, examples: the sum of the relative FOSC of this part of the epoch, and of how many examples.
        lowest: the least mean of a part so far.
        rest: parts for which it is not raised again.
        raised: when it was.
    """

    total: float = 0.0
    examples: int = 0
    lowest: float | None = None
    rest: int = 0
    raised: tuple[Raised, ...] = ()

    def hear(self, gauges: Iterable[float]) -> "Alarm":
        """The alarm once it has the relative FOSC of a batch's examples."""
        values = list(gauges)
        return replace(self, total=self.total + sum(values), examples=self.examples + len(values))

    def end_part(self, epoch: int, batch: int) -> "Alarm":
        """The alarm at the end of a part of an epoch, after a batch: raised, where the part's mean is high."""
        if self.examples == 0:
            return self
        mean = self.total / self.examples
        lowest = mean if self.lowest is None else min(mean, self.lowest)
        if self.rest > 0:
            return Alarm(lowest=lowest, rest=self.rest - 1, raised=self.raised)
        raised = (*self.raised, Raised(epoch, batch, mean)) if mean >= max(LEVEL, RISE * lowest) else self.raised
        return Alarm(lowest=lowest, rest=_REST if raised != self.raised else 0, raised=raised)

    def explain(self) -> str:
        """What the last time says, in a sentence without its end."""
        epoch, batch, value = self.raised[-1]
        return (
            f"relative FOSC is {value:.2f} on average at batch {batch + 1} of epoch {epoch + 1}, after "
            f"{self.lowest:.2f} at its lowest: the training seems to overfit catastrophically"
        )

    def row(self, epoch: int) -> dict[str, float]:
        """What metrics.jsonl says of an epoch: the batch, from 0, at whose end it was first raised, and the value."""
        found = [raised for raised in self.raised if raised.epoch == epoch]
        return {"overfit_batch": found[0].batch, "overfit_relative_fosc": found[0].value} if found else {}

    def position(self) -> dict[str, Any]:
        """As plain values, from which `at` makes it again."""
        return vars(self) | {"raised": [list(raised) for raised in self.raised]}

    @classmethod
    def at(cls, position: Mapping[str, Any]) -> "Alarm":
        """The alarm that a checkpoint keeps; a fresh one where it keeps none."""
        return cls(**dict(position) | {"raised": tuple(Raised(*raised) for raised in position.get("raised", ()))})


def is_alarm(value: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's value is one that `Alarm.position` gives."""
    known = {"total", "examples", "lowest", "rest", "raised"}
    raised = value.get("raised")
    return (
        set(value) == known
        and isinstance(raised, list)
        and all(isinstance(each, list) and len(each) == 3 and all(map(is_finite_number, each)) for each in raised)
        and all(is_finite_number(value[name]) for name in ("total", "examples", "rest"))
        and (value["lowest"] is None or is_finite_number(value["lowest"]))
    )


def strengthen(attack: PGD, more: int) -> PGD:
    """The attack with so many steps more, all as long as one another and together as long as its own."""
    if more == 0:
        return attack
    length = sum(attack.threat.eps if size == inf else size for size in attack.step_sizes())
    steps = attack.steps + more
    return replace(attack, steps=steps, step_size=length / steps)


def check_strengthening(strategy: Strategy) -> None:
    """Raises ValueError where the attacks of a strategy cannot take a step more."""
    if any(hasattr(strategy, name) for name in ("momentum", "replays")):
        raise ValueError(
            f"on_overfit must not be 'strengthen' with strategy {type(strategy).__name__}, which takes one step by its "
            "definition: use 'warn' or 'stop'"
        )
