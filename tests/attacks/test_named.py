"""Attacks by name."""

from dataclasses import replace

import pytest

import innermax as im
from innermax.attacks.apgd import APGD
from innermax.attacks.autoattack import AutoAttack
from innermax.attacks.base import BaseAttack
from innermax.attacks.named import ATTACKS, build_attack, display_name, list_names, parse_attacks
from innermax.attacks.noisy_pgd import NoisyPGD
from innermax.cli import main
from innermax.threat import Linf
from tests.helpers.documented import ROOT
from tests.helpers.threats import WeightedLinf

THREAT = Linf(0.1)
IN_L2 = {"ddn-200": im.DDN(im.L2(0.5))}
NAMES = {
    "fgsm": im.FGSM(THREAT),
    "pgd-20": im.PGD(THREAT, steps=20),
    "cw-30": im.CW(THREAT, steps=30),
    "apgd-100": im.APGD(THREAT),
    "fab-7": im.FAB(THREAT, steps=7),
    "fmn-200": im.FMN(THREAT),
    "square-5000": im.Square(THREAT),
    "guided": im.GuidedPGD(THREAT),
    "guided-40": im.GuidedPGD(THREAT, budget=40),
    "autoattack": im.AutoAttack(THREAT),
    "autoattack-rand": im.AutoAttack(THREAT, version="rand"),
}


def test_names():
    assert parse_attacks(" ,".join(NAMES), THREAT) == NAMES
    assert parse_attacks(",".join(IN_L2), im.L2(0.5)) == IN_L2
    for name in ("autoattack-5", "apgd", "apgd-0", "fab-x", "square-10001", "aa", "fgsm-3", "pgd-", "-", "guided-"):
        with pytest.raises(ValueError, match=f"unknown attack '{name}'"):
            build_attack(name, THREAT)
    with pytest.raises(
        ValueError, match=r"did you mean 'cw-30'.*known: apgd-100, autoattack, autoattack-rand, cw-30, "
    ):
        build_attack("cw-3O", THREAT)
    assert hash(AutoAttack(THREAT)) == hash(AutoAttack(THREAT))
    assert replace(APGD(THREAT), steps=7) == APGD(THREAT, steps=7)


def kinds(base=BaseAttack):
    """The attacks of the library."""
    for kind in base.__subclasses__():
        yield from kinds(kind)
        if kind.__module__.startswith("innermax.") and not kind.__abstractmethods__:
            yield kind


def test_every_attack_has_a_name():
    every = NAMES | IN_L2
    assert {type(attack) for attack in every.values()} == set(kinds()) - {NoisyPGD}  # it is for training alone
    assert {name if name in ATTACKS else name.partition("-")[0] for name in every} == ATTACKS.keys()


def test_every_attack_tells_its_cost():
    assert all(type(attack).cost is not BaseAttack.cost for attack in (NAMES | IN_L2).values())


def test_names_are_told_wherever_they_are_typed(capsys):
    """On the command line, in the reference, and on the page that helps to choose."""
    assert main(["evaluate", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    choose = (ROOT / "docs" / "how-to" / "choose-an-attack.md").read_text()
    for name, attack in ATTACKS.items():
        form = name if attack.number is None else f"{name}-K"
        assert form in list_names()
        assert f'"{form}"' in build_attack.__doc__
        assert f"{form}" in told, f"innermax evaluate --help does not list {form}"
        assert name in choose
        assert attack.meaning in told


def test_titles():
    titles = {"fgsm": "FGSM", "pgd-20": "PGD-20", "cw-30": "C&W∞", "cw-7": "C&W∞-7", "fab-7": "fab-7", "mine": "mine"}
    titles |= {"guided": "guided", "pgd": "pgd", "fgsm-2": "fgsm-2", "pgd-l2": "PGD-L2", "autoattack": "autoattack"}
    assert {name: display_name(name) for name in titles} == titles


def test_a_threat_model_that_an_attack_does_not_serve():
    assert build_attack("guided", WeightedLinf(0.1)) == im.GuidedPGD(WeightedLinf(0.1))
    with pytest.raises(TypeError, match="threat of FAB must be"):
        build_attack("fab-7", WeightedLinf(0.1))
