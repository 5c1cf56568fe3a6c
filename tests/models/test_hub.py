"""The Hub that cannot be reached is noticed within seconds, and what is in its cache is used."""

import contextlib
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from innermax.models.hub import find_fault, reach_hub


@pytest.fixture
def session(monkeypatch):
    """The Hub client's session: what was asked, and what comes of it."""
    asked = SimpleNamespace(calls=[], failure=None)

    def head(url, *, timeout):
        asked.calls.append((url, timeout))
        if asked.failure is not None:
            raise asked.failure

    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return asked


def test_one_short_question_tells_whether_it_is_there(session):
    assert find_fault() is None
    session.failure = OSError("no route\nto host")
    assert find_fault() == "OSError: no route"
    assert session.calls == [(constants.ENDPOINT, 5)] * 2


def test_nothing_is_asked_offline(session, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_fault() == "HF_HUB_OFFLINE is set"
    assert session.calls == []


@pytest.mark.parametrize("fault", [None, "OSError: no route"])
def test_its_client_does_not_try_again(session, monkeypatch, fault):
    monkeypatch.setattr("innermax.models.hub.find_fault", lambda: fault)
    with reach_hub() as found:
        assert (found, constants.HF_HUB_OFFLINE) == (fault, fault is not None)
    assert not constants.HF_HUB_OFFLINE
    with contextlib.suppress(KeyError), reach_hub():
        raise KeyError
    assert not constants.HF_HUB_OFFLINE
