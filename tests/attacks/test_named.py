"""Attacks by name."""

from dataclasses import replace

import pytest

import innermax as im
from innermax.attacks.apgd import APGD
from innermax.attacks.autoattack import AutoAttack
from innermax.attacks.named import named_attack
from innermax.threat import Linf


def test_names():
    threat = Linf(0.1)
    assert named_attack("autoattack", threat) == im.AutoAttack(threat)
    assert named_attack("apgd-100", threat) == im.APGD(threat)
    assert named_attack("fab-7", threat) == im.FAB(threat, steps=7)
    assert named_attack("square-5000", threat) == im.Square(threat)
    for name in ("autoattack-5", "apgd", "apgd-0", "fab-x", "square-10001", "aa"):
        with pytest.raises(ValueError, match=f"unknown attack '{name}'"):
            named_attack(name, threat)
    assert hash(AutoAttack(threat)) == hash(AutoAttack(threat))
    assert replace(APGD(threat), steps=7) == APGD(threat, steps=7)
