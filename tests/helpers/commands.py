"""The command line, as tests call it."""

from typing import NamedTuple

from innermax.cli import main


class Said(NamedTuple):
    status: int
    out: str
    err: str


def said(capsys, *words):
    """Exit status, stdout and stderr of a command."""
    capsys.readouterr()
    status = main(list(words))
    return Said(status, *capsys.readouterr())


def refused(capsys, *words):
    """The one line with which a command is refused."""
    status, _, err = said(capsys, *words)
    assert status == 2
    assert err.count("\n") == 1
    assert err.startswith("innermax: ")
    return err
