"""What the README promises runs as written."""

import ast
import re

import pytest

import innermax
from tests.helpers.documented import ROOT, blocks, check_commands, commands, run

README = ROOT / "README.md"
TEXT = README.read_text()
EXAMPLES = [block.text for block in blocks(TEXT) if block.language == "python"]


@pytest.mark.usefixtures("untyped")  # as its readers run it
def test_the_example_runs_and_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Audit: " in run(README)


def test_it_is_read_in_a_minute():
    assert len(TEXT.splitlines()) <= 120
    (example,) = EXAMPLES
    assert len([line for line in example.splitlines() if line.strip()]) == 10


def test_every_public_name_the_examples_use_exists():
    used = {
        node.attr
        for example in EXAMPLES
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "im"
    }
    assert used <= set(innermax.__all__)
    assert all(hasattr(innermax, name) for name in innermax.__all__)


def test_the_commands_are_known(capsys):
    """Every `innermax …` line of the README parses; the make targets exist."""
    lines = commands(TEXT)
    assert lines
    check_commands(lines, capsys)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"^make (\w+)", TEXT, re.MULTILINE))


def test_pictures_and_pages_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
