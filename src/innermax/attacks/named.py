"""Attacks by the names that tables and command lines use."""

from innermax.attacks.gradient import CW, FGSM, PGD
from innermax.checks import unknown
from innermax.threat import Threat

_EXAMPLES = ("fgsm", "pgd-10", "pgd-20", "pgd-100", "cw-30")


def named_attack(name: str, threat: Threat) -> PGD:
    """The attack called "fgsm", "pgd-K" or "cw-K" (K steps of ε/4); raises ValueError for any other name."""
    kind, _, steps = name.partition("-")
    if name == "fgsm":
        return FGSM(threat)
    if kind in ("pgd", "cw") and steps.isdecimal() and 1 <= int(steps) <= 10_000:
        return PGD(threat, steps=int(steps)) if kind == "pgd" else CW(threat, steps=int(steps))
    raise unknown("attack", name, _EXAMPLES)


def named_attacks(names: str, threat: Threat) -> dict[str, PGD]:
    """The attacks of a comma-separated list."""
    return {name: named_attack(name, threat) for name in filter(None, map(str.strip, names.split(",")))}
