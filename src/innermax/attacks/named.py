"""Attacks by the names that command lines, recipes, tables and reports use."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from innermax.attacks.apgd import APGD
from innermax.attacks.autoattack import AutoAttack
from innermax.attacks.base import BaseAttack
from innermax.attacks.ddn import DDN
from innermax.attacks.fab import FAB
from innermax.attacks.fmn import FMN
from innermax.attacks.guided_pgd import GuidedPGD
from innermax.attacks.pgd import CW, FGSM, PGD
from innermax.attacks.square import Square
from innermax.attacks.targeted import Rule, Targeted
from innermax.threat import Threat
from innermax.utils.validation import unknown

_AIMED = " to "  # between the name of an attack and the rule for its targets
_MOST = 10_000  # steps, queries or gradients that a name may ask for


@dataclass(frozen=True)
class NamedAttack:
    """What a name stands for.

    Attributes:
        build: the attack from a threat model and, where the name takes a number, the option that this sets.
        meaning: in a few words, where K is the number.
        number: the option that a number behind the name sets; None: the name takes none.
        optional: whether the name stands without its number, too.
        usual: numbers to suggest.
        title: how tables print the name; empty: as it is.
        unsaid: the number that the title leaves out.
    """

    build: Callable[..., BaseAttack]
    meaning: str = ""
    number: str | None = None
    optional: bool = False
    usual: tuple[int, ...] = ()
    title: str = ""
    unsaid: int | None = None


ATTACKS = {
    "fgsm": NamedAttack(FGSM, title="FGSM"),
    "pgd": NamedAttack(PGD, "K steps of ε/4", "steps", usual=(10, 20, 100), title="PGD"),
    "cw": NamedAttack(CW, "K steps of ε/4 on the margin", "steps", usual=(30,), title="C&W∞", unsaid=30),
    "apgd": NamedAttack(APGD, "K steps on the cross-entropy", "steps", usual=(100,)),
    "fab": NamedAttack(FAB, "K steps", "steps", usual=(100,)),
    "fmn": NamedAttack(FMN, "K steps for the smallest perturbation", "steps", usual=(200,)),
    "ddn": NamedAttack(DDN, "in L2, K steps for the smallest perturbation", "steps", usual=(200,)),
    "square": NamedAttack(Square, "K queries", "queries", usual=(5000,)),
    "guided": NamedAttack(GuidedPGD, "at most K gradients per example", "budget", optional=True),
    "autoattack": NamedAttack(AutoAttack, "the standard version"),
    "autoattack-rand": NamedAttack(partial(AutoAttack, version="rand"), "for models that draw random numbers"),
}


def build_attack(name: str, threat: Threat) -> BaseAttack:
    """The attack of a name: one of `ATTACKS`, with its number K behind a dash, where it takes one.

    The names are "fgsm", "pgd-K" and "cw-K" (K steps of ε/4), "apgd-K" (K steps on the cross-entropy), "fab-K" (K
    steps), "fmn-K" and, in L2, "ddn-K" (K steps for the smallest perturbation), "square-K" (K queries), "guided" and
    "guided-K" (at most K gradients per example), "autoattack" (the standard version) and "autoattack-rand" (for models
    that draw random numbers).

    Raises:
        ValueError: the name is none of these, or K is not in 1…10,000.
        TypeError: the attack does not support the threat model.
    """
    whole = ATTACKS.get(name)
    if whole is not None and (whole.number is None or whole.optional):
        return whole.build(threat)
    kind, _, number = name.rpartition("-")
    known = ATTACKS.get(kind)
    if known is None or known.number is None or not number.isdecimal() or not 1 <= int(number) <= _MOST:
        raise unknown("attack", name, _examples())
    return known.build(threat, **{known.number: int(number)})


def parse_attacks(names: str, threat: Threat) -> dict[str, BaseAttack]:
    """The attacks of a comma-separated list, by name."""
    return {name: build_attack(name, threat) for name in filter(None, map(str.strip, names.split(",")))}


def aim_attacks(attacks: Mapping[str, BaseAttack], rule: Rule) -> dict[str, Targeted]:
    """The attacks with a target for each example, by names such as "pgd-20 to next".

    Raises ValueError where one cannot head for targets; it names that.
    """
    aimed = {}
    for name, attack in attacks.items():
        try:
            aimed[f"{name}{_AIMED}{rule}"] = Targeted(attack, rule)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name} takes no targets: {error}") from error
    return aimed


def list_names() -> str:
    """The names of all attacks with what they mean, in one line, for the help of a command."""
    listed = []
    for name, attack in ATTACKS.items():
        forms = [name] if attack.number is None or attack.optional else []
        forms += [] if attack.number is None else [f"{name}-K"]
        listed.append(" or ".join(forms) + (f" ({attack.meaning})" if attack.meaning else ""))
    return ", ".join(listed)


def display_name(name: str) -> str:
    """A name as tables print it: FGSM, PGD-20, C&W∞ for "fgsm", "pgd-20", "cw-30"; others as they are."""
    name, aimed, rule = name.partition(_AIMED)
    if aimed:
        return f"{display_name(name)}{aimed}{rule}"
    kind, dash, rest = name.partition("-")
    attack = ATTACKS.get(kind)
    if attack is None or not attack.title or bool(dash) != (attack.number is not None):
        return name
    return attack.title if rest in ("", str(attack.unsaid)) else f"{attack.title}-{rest.upper()}"


def _examples() -> list[str]:
    """Names to choose from where one is unknown."""
    return [
        example
        for name, attack in ATTACKS.items()
        for example in [*([name] if not attack.usual else []), *(f"{name}-{number}" for number in attack.usual)]
    ]
