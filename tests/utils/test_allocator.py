"""Memory that is kept: set in this process, or by a restart with the environment set."""

import os
import subprocess
import sys

import pytest

from innermax.utils import allocator

GLIBC = allocator._is_glibc()
pytestmark = pytest.mark.skipif(not GLIBC, reason="another libc than glibc")


def run(code, **environment):
    bare = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", code], env=bare | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


_FAULTS = """
import ctypes, resource
from innermax.utils.allocator import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = libc.malloc(64 << 20)
        ctypes.memset(block, 1, 64 << 20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


def test_memory_is_faulted_in_once():
    """64 MiB, more than glibc's thresholds ever adapt to, twenty times."""
    (default,) = run(_FAULTS + "print(faults())")
    told, kept = run(_FAULTS + "print(keep_freed_memory(), faults())")
    assert told == "True"
    assert int(kept) < int(default) / 5


_RESTART = """
import os, sys
from innermax.utils.allocator import restart_keeping_memory
sys.orig_argv[1:] = ["-c", "import os; print(os.environ.get('GLIBC_TUNABLES'), os.getpid())"]
print(os.getpid(), flush=True)
restart_keeping_memory()
print("stayed")
"""


def test_the_program_starts_anew_as_the_same_process():
    before, tunables, after = run(_RESTART)
    assert before == after
    assert tunables.count("glibc.malloc.") == 3


@pytest.mark.parametrize("environment", [{"GLIBC_TUNABLES": "glibc.malloc.check=0"}])
def test_what_the_user_set_is_left(environment):
    assert run(_RESTART, **environment)[1:] == ["stayed"]


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.os, "confstr", lambda name: None)
    monkeypatch.setattr(allocator.os, "execve", None)
    assert not allocator.keep_freed_memory()
    allocator.return_freed_memory()
    allocator.restart_keeping_memory()


@pytest.mark.parametrize(("arguments", "restarts"), [(None, True), (["evaluate", "nowhere"], False)])
def test_only_the_command_itself_restarts(arguments, restarts, monkeypatch, capsys):
    from innermax import cli

    asked = []
    monkeypatch.setattr(allocator, "restart_keeping_memory", lambda: asked.append(True))
    monkeypatch.setattr(sys, "argv", ["innermax", "evaluate", "nowhere"])
    assert cli.main(arguments) == 2
    assert asked == [True] * restarts
