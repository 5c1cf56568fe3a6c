"""What all tests share."""

import os
import signal

import hypothesis
import jaxtyping
import pytest
import torch

from innermax.oracle import oracle

# The same examples in every run, in whatever order, and on a busy machine.
hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True)
hypothesis.settings.load_profile("reproducible")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job would ignore it


def pytest_configure():
    """One thread, as `make unit` has it, unless it is told otherwise: here and in the processes that tests start."""
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def _draws_do_not_depend_on_the_tests_before():
    """What a test draws from torch's generator is the same in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _caches_of_its_own(tmp_path_factory, monkeypatch):
    """No test finds the rows that another has left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))


_AUDITING = ("test_audit", "test_audit_probes", "test_bounds", "test_docs", "test_readme", "test_zero_eps")


@pytest.fixture(autouse=True)
def _audits_only_where_they_are_tested(request, monkeypatch):
    """An audit's searches take longer than what most tests look at."""
    if request.module.__name__.rpartition(".")[2] not in _AUDITING:
        monkeypatch.setattr("innermax.evaluation.evaluate._audit", lambda *_: None)


@pytest.fixture(autouse=True, scope="session")
def _clock():
    """The clock does not decide which network a test looks at: the small ones of tests are often slower compiled.

    Nor which one a fixture of a whole module looks at, which is made before a test's own fixtures.
    """
    with pytest.MonkeyPatch.context() as patch:
        own = oracle.times_as_long
        patch.setattr(oracle, "times_as_long", lambda *_: 0.5)
        yield own


@pytest.fixture(autouse=True)
def _the_clock_decides_where_it_is_tested(request, monkeypatch, _clock):
    if "timing" in request.keywords:
        monkeypatch.setattr(oracle, "times_as_long", _clock)


@pytest.fixture
def untyped():
    """Without runtime type checking, whose errors would come before the library's own."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(autouse=True)
def _the_hub_is_taken_for_reachable(monkeypatch):
    """No test asks the network whether it is there."""
    monkeypatch.setattr("innermax.models.hub.find_fault", lambda: None)
