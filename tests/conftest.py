"""What all tests share."""

import pytest

import innermax.evaluation


@pytest.fixture(autouse=True)
def _audits_only_where_they_are_tested(request, monkeypatch):
    """An audit's searches take longer than what most tests look at."""
    if request.module.__name__ not in ("test_audit", "test_docs"):
        monkeypatch.setattr(innermax.evaluation, "_audit", lambda *_: None)
