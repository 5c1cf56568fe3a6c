"""How long a training still takes: what it has timed so far, applied to the work that is known to come.

Batches differ in cost, by a known measure: the gradients they need. So gradients, updates and the time between two
epochs are timed separately, and the gradients to come are counted from the strategy.
"""

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from innermax.attacks.pgd import PGD
from innermax.strategies import History, Strategy

# Used before anything was timed. Measured on two cores, on innermax's own networks and data sets:
_GRADIENT = 0.5  # the time of a gradient, as a share of an update's
_TAKEN = 2 / 3  # the steps that an example takes under a threshold, as a share of the attack's


@dataclass
class TrainingClock:
    """Estimates the time a training still takes.

    Attributes:
        strategy: says which attack each coming epoch trains against.
        epochs: of the training.
        examples: of an epoch.
        validation: the cost of scoring the validation split, in gradients of one example.
        updating, updated: seconds spent on updates, and their examples.
        attacking, gradients: seconds spent on attacks, and their gradients.
        between, ended: seconds spent at the ends of epochs, and their number.
    """

    strategy: Strategy
    epochs: int
    examples: int
    validation: float = 0.0
    updating: float = 0.0
    updated: int = 0
    attacking: float = 0.0
    gradients: float = 0.0
    between: float = 0.0
    ended: int = 0
    _batches: int = 0
    _in_epoch: float = 0.0
    _running: bool = False  # an epoch has begun that has not ended
    _now: PGD | None = None
    _coming: list[PGD | None] = field(default_factory=list)

    def start(self, epoch: int, history: History) -> None:
        """An epoch begins; asks the strategy for its attack and, as far as it can tell, those of all later epochs."""
        self._in_epoch, self._running = 0.0, True
        self._now = self.strategy.attack_at(epoch / self.epochs, history)
        self._coming = [self._foresee(later / self.epochs, history) for later in range(epoch + 1, self.epochs)]

    def batch(self, examples: int, gradients: float, attacking: float, updating: float) -> None:
        """A batch has spent `attacking` seconds on its gradients and `updating` seconds on the rest."""
        self._batches += 1
        self._in_epoch += attacking + updating
        if self._batches == 2:  # the first one was slow: it did work that is done once
            self.updating, self.updated, self.attacking, self.gradients = 0.0, 0, 0.0, 0.0
        self.updating, self.updated = self.updating + updating, self.updated + examples
        if gradients:
            self.attacking, self.gradients = self.attacking + attacking, self.gradients + gradients

    def end(self, seconds: float) -> None:
        """An epoch has ended, with validation and saving, after so many seconds of this process."""
        self.between, self.ended = self.between + max(seconds - self._in_epoch, 0.0), self.ended + 1
        self._running = False

    def left(self, done: int, taken: float) -> float | None:
        """The seconds left, when `done` examples of the epoch have taken `taken` gradients each; None before the first
        batch.
        """
        if not self.updated:
            return None
        update = self.updating / self.updated
        gradient = self.attacking / self.gradients if self.gradients else _GRADIENT * update
        between = self.between / self.ended if self.ended else gradient * self.validation
        to_do = self.examples - done
        later = sum(expected_gradients(attack, self._now, taken) for attack in self._coming)
        updates = to_do + self.examples * len(self._coming)
        ends = self._running + len(self._coming)
        return update * updates + gradient * (to_do * taken + self.examples * later) + between * ends

    def _foresee(self, moment: float, history: History) -> PGD | None:
        if hasattr(self.strategy, "replays"):  # an update's own gradients are the attack
            return None
        try:
            return self.strategy.attack_at(moment, history)
        except Exception:  # noqa: BLE001  it needs measures first; a user's own strategy may raise anything
            attack: PGD | None = getattr(self.strategy, "attack", None)
            return attack and replace(attack, stop_at=0.0)


def mark(device: torch.device) -> Any:
    """This moment in the work of a device: a GPU comes to it later, and is not waited for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(one: Any, other: Any) -> float:
    """How long a device took from one mark to another, both of which it has passed."""
    return float(other - one if isinstance(one, float) else one.elapsed_time(other) / 1e3)


def expected_gradients(attack: PGD | None, now: PGD | None, taken: float) -> float:
    """Gradients per example of a coming epoch with `attack`, when the present attack `now` takes `taken`.

    At a threshold of 0 all steps are taken; between that and the present threshold the number is interpolated linearly.
    """
    if attack is None:
        return 0.0
    steps = float(attack.steps * attack.restarts)
    if attack.stop_on_success:
        return min(taken, steps) if now is not None and now.stop_on_success else _TAKEN * steps
    if attack.stop_at is None:
        return steps
    if now is None or now.stop_at is None:
        return _TAKEN * steps
    if now.stop_at == 0:
        return min(taken, steps)
    return steps - (steps - min(taken, steps)) * min(attack.stop_at / now.stop_at, 1.0)
