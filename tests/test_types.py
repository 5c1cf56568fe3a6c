"""Type checkers as users run them: no error in what the README shows, and one where a name is misspelled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.documented import blocks

ROOT = Path(__file__).parents[1]
OWN = '''
"""What users write, with a type for every name."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import innermax as im


class Steps:
    """A strategy of one's own."""

    def __init__(self, attack: im.PGD) -> None:
        self.attack = attack

    def attack_at(self, progress: float, history: Sequence[object] = ()) -> im.PGD | None:
        return self.attack if progress > 0.5 else None


def attacks(threat: im.Threat) -> dict[str, im.Attack]:
    return {"pgd": im.PGD(threat, steps=3), "aa": im.AutoAttack(threat)}


def strategies(attack: im.PGD) -> list[im.Strategy]:
    return [im.Unsecured(), im.Standard(attack), im.Dynamic(attack), im.WarmStart(attack), Steps(attack)]


def run(model: nn.Module, x: Tensor, y: Tensor) -> float:
    threat = im.Linf(8 / 255)
    kinds = {"pgd": im.PGD(threat), "aa": im.AutoAttack(threat)}
    for strategy in strategies(im.PGD(threat)):
        im.train(model, (x, y), strategy, epochs=1)
    im.train(model, (x, y), im.Standard(im.PGD(threat)), epochs=1)
    oracle = im.Oracle.fast(model, x)
    adversarial: Tensor = kinds["pgd"](oracle, x, y).x_adv
    torch.testing.assert_close(adversarial, x)
    im.evaluate(model, (x, y), attacks(threat))
    return im.evaluate(model, (x, y), kinds).accuracy["pgd"].value
'''
WRONG = """
import innermax as im

im.evalute
im.PDG
im.Linf(eps="large")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The code of the README and of the tour, the examples, and what else users write."""
    folder = tmp_path_factory.mktemp("types")
    for page in ("README.md", "docs/tour.md"):
        code = [block.text for block in blocks((ROOT / page).read_text()) if block.language == "python"]
        (folder / f"{Path(page).stem.lower()}.py").write_text(_WITH_NAMES + "\n".join(code))
    for example in (ROOT / "examples").glob("*.py"):
        (folder / f"example_{example.name}").write_text(example.read_text())
    (folder / "own.py").write_text(OWN)
    (folder / "wrong.py").write_text(WRONG)
    return folder


# What later examples take for given.
_WITH_NAMES = """
import torch
from torch import Tensor, nn

images: Tensor
labels: Tensor
"""


def test_mypy_strictly(folder):
    # As `make types` checks the library, whose results it keeps.
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    command = [sys.executable, "-m", "mypy", *options, *sorted(folder.glob("*.py"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # Of torch's own methods some have no types; optional libraries may not be here.
    others = ("no-untyped-call", "import-not-found", "LightningModule")
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    told = [line for line in errors if not any(other in line for other in others)]
    assert [Path(line.partition(":")[0]).name for line in told] == ["wrong.py"] * 3, done.stdout
    for name, line in zip(("evalute", "PDG", "Linf"), told, strict=True):
        assert name in line


def test_pyright(folder):
    pytest.importorskip("basedpyright", reason="Pyright is not here: pip install basedpyright")
    settings = {"typeCheckingMode": "standard", "reportMissingImports": "none", "extraPaths": [str(ROOT / "src")]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = [one for one in json.loads(done.stdout)["generalDiagnostics"] if one["severity"] == "error"]
    told = [(Path(one["file"]).name, one["range"]["start"]["line"]) for one in found]
    assert told == [("wrong.py", 3), ("wrong.py", 4), ("wrong.py", 5)], [one["message"] for one in found]
