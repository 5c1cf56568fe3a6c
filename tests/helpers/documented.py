"""What pages promise: their code blocks, run in order, and the commands they show."""

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from innermax.cli import main
from innermax.cli.recipes import recipe_names

ROOT = Path(__file__).parents[2]
COMMANDS = ("recipes", "models", "train", "sweep", "evaluate", "transfer", "verify", "reproduce", "report", "export")
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


def run(page, chosen=slice(None), changes=()):
    """Runs the Python blocks of a page in one namespace; returns what they print, all together.

    A block of text after a Python block is what that prints. chosen: which of the Python blocks, and what follows them;
    changes: (old, new) pairs, where a test cannot wait for what the page does.
    """
    told = blocks(page.read_text())
    python = [block for block in told if block.language == "python"][chosen]
    namespace, everything = {}, ""
    for block in python:
        code = block.text
        for old, new in changes:
            code = code.replace(old, new)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), namespace)
        everything += output.getvalue()
        after = told[told.index(block) + 1 :][:1]
        if after and after[0].language == "text":
            assert_alike(output.getvalue(), after[0].text, f"{page.name}:{after[0].line}")
    return everything


def assert_alike(printed, promised, where):
    """The same words, and numbers as near as another processor's roundings let them be: within 6, or 15 %."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", promised).split(), f"{where}: {printed}"
    for came, said in zip(_numbers(printed), _numbers(promised), strict=True):
        assert abs(came - said) <= max(6, 0.15 * abs(said)), f"{where}: {came} instead of {said} in {printed}"


def commands(text):
    """The words of every `innermax …` line in a page's blocks, without the first."""
    shown = "".join(block.text for block in blocks(text) if block.language == "")
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"\binnermax .*$", shown, re.MULTILINE)]


def check_commands(lines, capsys):
    """Each is a command, of a recipe that exists, with options that it has."""
    for command, *words in lines:
        if command == "COMMAND":  # a placeholder
            continue
        assert command in COMMANDS
        if command in ("train", "sweep"):
            assert words[0] in (*recipe_names(), "RECIPE", "mine.yaml")
        assert main([command, "--help"]) == 0
        known = re.findall(r"--[\w.-]+", capsys.readouterr().out.replace("_", "-"))
        # What is behind --submitit. is submitit's.
        options = [re.sub(r"=.*|(?<=^--submitit)\..*", "", word) for word in words if word.startswith("--")]
        assert set(options) <= set(known), (command, words)


def _numbers(text):
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]
