"""How long a training or an evaluation still takes: from what was timed of it, and what is known to come.

Batches differ in cost, but by a known measure: the gradients they ask for. So gradients, updates and what lies between
two epochs are timed apart, and the gradients to come are counted from the strategy or the attacks.
"""

from dataclasses import dataclass, field, replace

from innermax.attacks.pgd import PGD
from innermax.strategies import History, Strategy

# Where nothing has been timed or measured yet. Measured on two cores, on the networks and data sets that come along:
_GRADIENT = 0.5  # of an update's time, a gradient's
_TAKEN = 2 / 3  # of its steps, an example's under a threshold


@dataclass
class TrainingClock:
    """What a training has spent, and how much of what it has still to spend.

    Args:
        strategy: asked which attack each coming epoch trains against.
        epochs: of the training.
        examples: of an epoch.
        validation: gradients that scoring the validation split takes, all examples together.
    """

    strategy: Strategy
    epochs: int
    examples: int
    validation: float = 0.0
    updating: float = 0.0  # seconds, for so many examples
    updated: int = 0
    attacking: float = 0.0  # seconds, for so many gradients
    gradients: float = 0.0
    between: float = 0.0  # seconds, at so many ends of epochs
    ended: int = 0
    _batches: int = 0
    _in_epoch: float = 0.0
    _running: bool = False  # an epoch has begun that has not ended
    _now: PGD | None = None
    _coming: list[PGD | None] = field(default_factory=list)

    def start(self, epoch: int, history: History) -> None:
        """An epoch begins: the strategy is asked about this one and, as far as it can tell, all later ones."""
        self._in_epoch, self._running = 0.0, True
        self._now = self.strategy.attack_at(epoch / self.epochs, history)
        self._coming = [self._foreseen(later / self.epochs, history) for later in range(epoch + 1, self.epochs)]

    def batch(self, examples: int, gradients: float, attacking: float, updating: float) -> None:
        """A batch took so many seconds for its gradients, all examples together, and for the rest."""
        self._batches += 1
        self._in_epoch += attacking + updating
        if self._batches == 2:  # the first one was slow with preparations that all share
            self.updating, self.updated, self.attacking, self.gradients = 0.0, 0, 0.0, 0.0
        self.updating, self.updated = self.updating + updating, self.updated + examples
        if gradients:
            self.attacking, self.gradients = self.attacking + attacking, self.gradients + gradients

    def end(self, seconds: float) -> None:
        """An epoch has ended, validated and saved, after so many seconds of this process."""
        self.between, self.ended = self.between + max(seconds - self._in_epoch, 0.0), self.ended + 1
        self._running = False

    def left(self, done: int, taken: float) -> float | None:
        """Seconds, when `done` examples of the epoch have taken `taken` gradients each; None before the first batch."""
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

    def _foreseen(self, moment: float, history: History) -> PGD | None:
        try:
            return self.strategy.attack_at(moment, history)
        except Exception:  # noqa: BLE001  it wants to see measures first, and a user's own says so in its own way
            attack: PGD | None = getattr(self.strategy, "attack", None)
            return attack and replace(attack, stop_at=0.0)


def expected_gradients(attack: PGD | None, now: PGD | None, taken: float) -> float:
    """Gradients an example of a coming epoch, when the present attack `now` takes `taken`.

    All steps are taken at a threshold of 0; from the present threshold to there they are drawn in a straight line.
    """
    if attack is None:
        return 0.0
    steps = float(attack.steps * attack.restarts)
    if attack.stop_at is None:
        return steps
    if now is None or now.stop_at is None:
        return _TAKEN * steps
    if now.stop_at == 0:
        return min(taken, steps)
    return steps - (steps - min(taken, steps)) * min(attack.stop_at / now.stop_at, 1.0)
