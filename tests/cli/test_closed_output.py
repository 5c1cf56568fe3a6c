"""Outputs that nobody reads any more, or that cannot be written: no command prints a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from innermax.cli import models
from tests.helpers.commands import refused

COMMAND = (sys.executable, "-m", "innermax.cli")
CLOSED = 141
EVALUATE = ("evaluate", "innermax/digits-linf-0.15", "--attacks", "fgsm", "--limit", "8")


def run_unread(closed, *words, unbuffered=False):
    """Exit status of a command one of whose outputs, "stdout" or "stderr", nobody reads, and what is on the other."""
    reader, writer = os.pipe()
    os.close(reader)
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {closed: writer}
    done = subprocess.run([*COMMAND, *words], env=os.environ | {"PYTHONUNBUFFERED": "1" * unbuffered}, **outputs)
    os.close(writer)
    return done.returncode, done.stderr if closed == "stdout" else done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="pipes there tell it otherwise")
@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [
        (["--help"], False),
        (["models"], False),
        (["models"], True),
        (["verify", "--help"], False),
        (EVALUATE, False),
        (EVALUATE, True),
    ],
)
def test_a_closed_output_ends_a_command_quietly(words, unbuffered, tmp_path, monkeypatch):
    """Where print writes and where rich does, whose own way out is the status of a refuted claim."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run_unread("stdout", *words, unbuffered=unbuffered) == (CLOSED, b"")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes there tell it otherwise")
def test_a_closed_standard_error_does_so_too():
    assert run_unread("stderr", "modles") == (CLOSED, b"")


def test_an_output_that_is_closed_from_the_start():
    code = "import sys; sys.stdout = None; from innermax.cli import main; sys.exit(main(['models']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file that is always full")
@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_full_disk_is_told_in_one_line(unbuffered):
    with open("/dev/full", "wb") as full:
        environment = os.environ | {"PYTHONUNBUFFERED": "1" * unbuffered}
        done = subprocess.run([*COMMAND, "models"], stdout=full, stderr=subprocess.PIPE, env=environment)
    assert done.returncode == 2
    assert done.stderr.decode().count("\n") == 1
    assert done.stderr.startswith(b"innermax: [Errno 28]")


def test_another_broken_pipe_is_told(capsys, monkeypatch):
    """One that is no output of the command, such as that of a server."""

    def fail(words):
        raise BrokenPipeError(32, "Broken pipe", "a server")

    monkeypatch.setattr(models, "run", fail)
    assert "a server" in refused(capsys, "models")
