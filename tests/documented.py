"""What pages promise: their code blocks, run in order, and the commands they show."""

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Block(NamedTuple):
    """A fenced block of a page: its language, its text and the line it begins at."""

    language: str
    text: str
    line: int


def blocks(text):
    """The fenced blocks of a page."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(match[1], match[2], text[: match.start()].count("\n") + 2) for match in found]


def run(page, namespace, chosen=None, changes=()):
    """Runs the Python blocks of a page in one namespace; a block of text right after one is what it prints.

    changes: (old, new) pairs of code that a test replaces, to be done sooner.
    """
    told = blocks(page.read_text()) if chosen is None else chosen
    printed = ""
    for block in told:
        if block.language == "text":
            assert_alike(printed, block.text, f"{page.name}:{block.line}")
        if block.language != "python":
            continue
        code = block.text
        for old, new in changes:
            code = code.replace(old, new)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), namespace)
        printed = output.getvalue()
    return namespace


def assert_alike(printed, promised, where):
    """The same words, and numbers as near as another processor's roundings let them be: 6 or 15 %."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", promised).split(), f"{where}: {printed}"
    for came, said in zip(numbers(printed), numbers(promised), strict=True):
        assert abs(came - said) <= max(6, 0.15 * abs(said)), f"{where}: {came} instead of {said} in {printed}"


def numbers(text):
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def commands(text):
    """The words of every `innermax …` line in a page's blocks."""
    shown = "".join(block.text for block in blocks(text) if block.language in ("", "sh", "bash"))
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"^innermax .*$", shown, re.MULTILINE)]
