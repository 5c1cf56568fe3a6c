"""What the tests of attacks share."""

import pytest

from innermax.attacks.autoattack import AutoAttack
from tests.helpers.attacks import SMALL


@pytest.fixture
def short(monkeypatch):
    """AutoAttack with fewer steps."""
    monkeypatch.setattr(AutoAttack, "attacks", lambda self: tuple(make(self.threat) for make in SMALL.values()))
