"""What an attack costs: about how many gradients an example."""

from innermax.attacks.apgd import APGD
from innermax.attacks.autoattack import AutoAttack
from innermax.attacks.base import Attack
from innermax.attacks.fab import FAB
from innermax.attacks.guided_pgd import GuidedPGD
from innermax.attacks.pgd import PGD
from innermax.attacks.square import Square

FORWARD = 0.45  # of a gradient's time, a forward pass's
SURVIVING = 0.5  # of the examples, those that a search of survivors is for
UNKNOWN = 20.0  # gradients of an attack that tells nothing of its cost


def search_cost(attack: Attack) -> float:
    """About how many gradients an example an evaluation with the attack takes."""
    match attack:
        case PGD():
            return attack.steps * attack.restarts + 1 + FORWARD
        case APGD():
            return SURVIVING * attack.steps * attack.restarts * (attack.targets or 1) * attack.eot
        case FAB():
            return SURVIVING * attack.steps * attack.restarts * attack.targets
        case Square():
            return SURVIVING * attack.queries * attack.restarts * FORWARD
        case GuidedPGD():
            return SURVIVING * SURVIVING * attack.budget
        case AutoAttack():
            return sum(map(search_cost, attack.attacks()))
    return UNKNOWN
