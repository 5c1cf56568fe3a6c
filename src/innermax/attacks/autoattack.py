"""AutoAttack: four attacks, one after the other, on the examples that have survived so far."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, cast, get_args

from jaxtyping import Float, Int
from torch import Tensor

from innermax.attacks.apgd import APGD
from innermax.attacks.base import VerdictAttack, build_result, search_survivors
from innermax.attacks.fab import FAB
from innermax.attacks.problem import Problem
from innermax.attacks.search import AttackResult, choose_better
from innermax.attacks.square import Square
from innermax.losses import margin
from innermax.threat import L1, L2, Linf, Threat
from innermax.utils import randomness
from innermax.utils.validation import unknown

Version = Literal["standard", "rand"]


@dataclass(frozen=True)
class AutoAttack(VerdictAttack):
    """AutoAttack (Croce & Hein 2020a; for L1: Croce & Hein 2021). Survivors are returned at their highest margin.

    The name stands for a fixed ensemble, so no member is left out: a threat model that FAB and Square do not support is
    refused.

    Args:
        threat: Linf, L2 or L1.
        version: "standard": APGD on the cross-entropy (L1: 5 restarts), targeted APGD on DLR (9 classes; L1: 5),
            targeted FAB (9 classes) and Square (5,000 queries). "rand", for models that draw random numbers: APGD on
            the cross-entropy and on DLR, each gradient the mean of 20.

    On inputs that are no images (B, C, H, W), such as vectors and sequences, Square is its analogue with blocks of
    random coordinates, which is our own; the other members are the published ones.

    Raises:
        ValueError, TypeError: an argument is not as described above.
    """

    norms: ClassVar[tuple[type[Threat], ...]] = (Linf, L2, L1)
    version: Version = "standard"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in get_args(Version):
            raise unknown("version", self.version, get_args(Version))

    @property
    def cost(self) -> float:
        """About how many gradients per example it takes."""
        return sum(attack.cost for attack in self.attacks())

    @property
    def samples(self) -> int:
        """How many answers of the network are averaged each time it is asked."""
        return self.attacks()[0].samples

    def attacks(self) -> tuple[VerdictAttack, ...]:
        """The attacks in order."""
        if self.version == "rand":
            return APGD(self.threat, eot=20), APGD(self.threat, loss="dlr", eot=20)
        restarts, targets = (5, 5) if isinstance(self.threat, L1) else (1, 9)
        return (
            APGD(self.threat, restarts=restarts),
            APGD(self.threat, loss="dlr", targets=targets),
            FAB(self.threat),
            Square(self.threat),
        )

    def check(self, problem: Problem) -> None:
        """Raises ValueError where one of the attacks cannot take the problem on."""
        super().check(problem)
        for attack in self.attacks():
            attack.check(problem)

    def search(self, problem: Problem, clean: Float[Tensor, "b classes"]) -> AttackResult:
        """What was found, without FOSC, given the clean inputs' logits."""
        found = build_result(problem, problem.feasible.x, margin(clean, problem.y), clean)
        for number, attack in enumerate(self.attacks()):
            own = replace(problem, seed=randomness.derive_seed(problem.seed, number))
            found = search_survivors(found, partial(_search_with, attack, own, clean))
        return self._search_precisely(problem, clean, found) if problem.oracle.lowered else found

    def _search_precisely(
        self, problem: Problem, clean: Float[Tensor, "b classes"], found: AttackResult
    ) -> AttackResult:
        """What was found in bf16, searched again in float32 for survivors whose margin is within bf16's rounding."""
        close = ~cast(Tensor, found.misclassified) & (cast(Tensor, found.loss) >= -problem.oracle.doubt)
        rows = close.nonzero()[:, 0]
        if len(rows) == 0:
            return found
        exact = replace(problem[rows], oracle=problem.oracle.precise)
        return found.with_rows(rows, choose_better(found[rows], self.search(exact, clean[rows])))


def _search_with(
    attack: VerdictAttack, problem: Problem, clean: Float[Tensor, "b classes"], rows: Int[Tensor, " k"]
) -> AttackResult:
    """What one attack finds on some of the examples, with the margin as its loss, like the others."""
    found = attack.search(problem[rows], clean[rows])
    return replace(found, loss=margin(cast(Tensor, found.logits), problem.y[rows]))
