"""Attacks by the names that tables and command lines use."""

from innermax.attacks.apgd import APGD
from innermax.attacks.autoattack import AutoAttack
from innermax.attacks.base import VerdictAttack
from innermax.attacks.fab import FAB
from innermax.attacks.guided_pgd import GuidedPGD
from innermax.attacks.pgd import CW, FGSM, PGD
from innermax.attacks.square import Square
from innermax.threat import Threat
from innermax.utils.validation import unknown

_EXAMPLES = (
    "fgsm",
    "pgd-10",
    "pgd-20",
    "pgd-100",
    "cw-30",
    "apgd-100",
    "fab-100",
    "square-5000",
    "autoattack",
    "autoattack-rand",
    "guided",
)


def named_attack(name: str, threat: Threat) -> PGD | VerdictAttack:
    """The attack called by a name, where K and Q are at most 10,000; raises ValueError for any other name.

    "fgsm", "pgd-K" and "cw-K" (K steps of ε/4), "apgd-K" (on the cross-entropy) and "fab-K" (K steps), "square-Q" (Q
    queries), "autoattack" (its standard version), "autoattack-rand" (for models that draw random numbers), "guided" and
    "guided-K" (at most K gradients an example).
    """
    if name == "fgsm":
        return FGSM(threat)
    if name == "autoattack":
        return AutoAttack(threat)
    if name == "guided":
        return GuidedPGD(threat)
    if name == "autoattack-rand":
        return AutoAttack(threat, version="rand")
    kind, _, number = name.partition("-")
    if number.isdecimal() and 1 <= int(number) <= 10_000:
        match kind:
            case "pgd":
                return PGD(threat, steps=int(number))
            case "cw":
                return CW(threat, steps=int(number))
            case "apgd":
                return APGD(threat, steps=int(number))
            case "fab":
                return FAB(threat, steps=int(number))
            case "guided":
                return GuidedPGD(threat, budget=int(number))
            case "square":
                return Square(threat, queries=int(number))
    raise unknown("attack", name, _EXAMPLES)


def named_attacks(names: str, threat: Threat) -> dict[str, PGD | VerdictAttack]:
    """The attacks of a comma-separated list."""
    return {name: named_attack(name, threat) for name in filter(None, map(str.strip, names.split(",")))}
