"""What the pages about loggers, loops of one's own and model files promise runs as written."""

import re
import shlex
from pathlib import Path

import pytest

from innermax.cli import main

DOCS = Path(__file__).parents[1] / "docs"
NEEDS = {"loggers": ("tensorboard",), "own_loop": ("pytorch_lightning",), "model_files": ()}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", NEEDS)
def test_code_runs_as_written(page, tmp_path, monkeypatch):
    for package in NEEDS[page]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    exec(compile("\n".join(blocks), f"{page}.md", "exec"), {"__name__": page})


@pytest.mark.parametrize("page", NEEDS)
def test_commands_are_known(page, capsys):
    lines = re.findall(r"^innermax .*$", (DOCS / f"{page}.md").read_text(), re.MULTILINE)
    for line in lines:
        command, *words = shlex.split(line, comments=True)[1:]
        assert main([command, "--help"]) == 0
        options = capsys.readouterr().out.replace("_", "-")
        assert all(word in options for word in words if word.startswith("--")), line
