"""What the README promises runs as written."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import innermax

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(2))
def test_examples_run_as_written(number, tmp_path, monkeypatch, capsys):
    """The first three blocks belong together, as do the other two."""
    monkeypatch.chdir(tmp_path)
    code = "".join(EXAMPLES[:3] if number == 0 else EXAMPLES[3:])
    code = code.replace("epochs=10", "epochs=1")
    exec(compile(code, "README.md", "exec"), {})
    assert "Accuracy(" in capsys.readouterr().out


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
    from innermax.cli import main
    from innermax.settings import recipe_names

    blocks = TEXT.split("```")[1::2]
    lines = re.findall(r"^innermax .*$", "".join(blocks), re.MULTILINE)
    assert lines
    for line in lines:
        command, *words = shlex.split(line, comments=True)[1:]
        assert command in ("recipes", "train", "evaluate", "transfer", "report", "export", "reproduce")
        if command == "train":
            assert words[0] in recipe_names()
        assert main([command, "--help"]) == 0
        options = capsys.readouterr().out.replace("_", "-")
        assert all(word in options for word in words if word.startswith("--"))
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"^make (\w+)", TEXT, re.MULTILINE))


def test_pictures_and_pages_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
