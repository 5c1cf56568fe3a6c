"""Output whose encoding is no UTF-8: nothing is lost, what does not fit is printed in plainer signs."""

import os
import subprocess
import sys
from functools import cache

import pytest

COMMAND = (sys.executable, "-m", "innermax.cli")


def printed(*words, cwd=None, **environment):
    """Exit status, and what stands on both outputs, as bytes."""
    done = subprocess.run([*COMMAND, *words], env={**os.environ, **environment}, capture_output=True, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


@cache
def count_words(*words):
    """How many words a command prints where every sign can be printed."""
    return len(printed(*words, PYTHONIOENCODING="utf-8")[1].decode().split())


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["cp1252", "latin-1", "locale C"],
)
@pytest.mark.parametrize("words", [["--help"], ["recipes"], ["models"], ["train", "--help"], ["evaluate", "--help"]])
def test_help(words, environment):
    status, out, err = printed(*words, **environment)
    assert (status, err) == (0, b"")
    assert len(out.split()) >= count_words(*words) * 0.9
    assert b"?" not in out.replace(b"??", b"")


def test_a_result_and_an_error(tmp_path):
    """A whole evaluation, and a file's name that is no text."""
    train = ["train", "digits", "--epochs", "1", "--attacks", "fgsm", "--run-dir", "run"]
    assert printed(*train, cwd=tmp_path, PYTHONIOENCODING="ascii")[0] == 0
    words = ["evaluate", "run", "--attacks", "fgsm", "--limit", "40"]
    status, out, err = printed(*words, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (status, err) == (0, b"")
    assert b"Worst case" in out
    assert b"40 examples" in out
    status, _, err = printed(
        "evaluate", os.fsdecode(b"caf\xe9"), "--data", "\u03b5", cwd=tmp_path, PYTHONIOENCODING="ascii"
    )
    assert status == 2
    assert err.startswith(b"innermax: ")


def test_the_users_own_choice_stays():
    assert printed("--help", PYTHONIOENCODING="ascii:replace")[1].startswith(b"usage: innermax COMMAND ?\n")
    assert printed("--help", PYTHONIOENCODING="ascii")[1].startswith(b"usage: innermax COMMAND ...\n")


def test_names_that_the_locale_does_not_hold(tmp_path):
    """They come as bytes, and go into pages and files as they came."""
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    train = ["train", "digits", "--epochs", "1", "--attacks", "fgsm", "--run-dir", "ε-run"]
    status, out, _ = printed(*train, cwd=tmp_path, **locale)
    assert status == 0
    assert "Run folder: ε-run." in out.decode()
    assert "ε-run" in (tmp_path / "ε-run" / "report.html").read_text(encoding="utf-8")
    words = ["evaluate", "ε-run", "--attacks", "fgsm", "--limit", "40", "--json", "ε.json"]
    status, out, err = printed(*words, cwd=tmp_path, **locale)
    assert (status, err) == (0, b"")
    assert "Example by example: ε-run/rows/" in out.decode()
    assert (tmp_path / "ε.json").is_file()
