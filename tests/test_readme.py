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
@pytest.mark.parametrize("number", range(2))
def test_examples_run_as_written(number, tmp_path, monkeypatch):
    """The first three blocks belong together, as do the other two."""
    monkeypatch.chdir(tmp_path)
    chosen = slice(0, 3) if number == 0 else slice(3, None)
    assert "Accuracy(" in run(README, chosen, changes=[("epochs=10", "epochs=1")])


def test_there_are_five_examples_and_the_first_has_ten_lines():
    assert len(EXAMPLES) == 5
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) == 10


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
