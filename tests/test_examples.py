"""Every example runs as it stands, from a folder of its own."""

import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest

import innermax

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"lightning_trainer": "pytorch_lightning", "timm_model": "timm"}
SOURCE = str(Path(innermax.__file__).parents[1])  # what these tests are about, whatever is installed
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def needs(package):
    """Skips, loudly, where a package is missing or does not fit the torch that is here."""
    try:
        __import__(package)
    except Exception as error:  # noqa: BLE001  timm's torchvision, built for another torch, raises what it likes
        pytest.skip(f"{package} cannot be imported: {error}")


def test_all_are_here():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        "hugging_face.py",
        "lightning_trainer.py",
        "plain_loop.py",
        "robust_digits.ipynb",
        "timm_model.py",
    }


@pytest.mark.usefixtures("untyped")  # as its readers run it
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script(name, tmp_path, monkeypatch, capsys):
    if name in NEEDS:
        needs(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # Lightning's, which is then put back
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    clean, robust = map(float, re.findall(r"([\d.]+)%", out.splitlines()[-1]))
    floor = 0 if name == "timm_model" else 30  # two epochs of a network made for pictures
    assert 100 >= clean >= robust >= floor, out
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


def test_a_plain_loop_takes_ten_lines_more_at_most():
    text = (EXAMPLES / "plain_loop.py").read_text()
    ours = [line for line in text.split("epochs, threat")[1].splitlines() if re.search(r"strategy|oracle|attack", line)]
    loop = [line for line in ours if not line.lstrip().startswith(("#", "print", "evaluation"))]
    assert 5 <= len(loop) <= 10


@pytest.mark.timeout(900)  # AutoAttack takes minutes on a busy machine
@pytest.mark.filterwarnings("default")
def test_the_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", SOURCE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on a GPU it asks the Hub for MNIST
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "robust_digits.ipynb", as_version=nbformat.NO_CONVERT)
    assert notebook.nbformat == 4
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    fosc = [float(value) for value in re.findall(r"^PGD-.*FOSC ([\d.]+)$", printed, re.MULTILINE)]
    assert len(fosc) == 4, printed
    assert max(fosc[2:]) < min(fosc[:2]), printed
    rates = {name: float(rate) for name, rate in re.findall(r"^(\S.*?) +([\d.]+)%  \[", printed, re.MULTILINE)}
    assert rates.keys() == {"clean", "pgd-20", "guided", "worst case", "autoattack"}, printed
    assert rates["clean"] > 90, printed
    assert rates["pgd-20"] > 50, printed  # without adversarial training it is below 30
    assert "Audit: " in printed
    assert not re.search(r"\bpip\b", printed), "what is installed is used"
    shown = [out for cell in notebook.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]
    assert len(shown) == 1


def test_the_notebook_asks_for_extras_that_there_are():
    """Its first code cell; the other tests find innermax installed."""
    cells = json.loads((EXAMPLES / "robust_digits.ipynb").read_text(encoding="utf-8"))["cells"]
    install = "".join(next(cell["source"] for cell in cells if cell["cell_type"] == "code"))
    (asked,) = re.findall(r"%pip install [^\n]*\{SOURCE\}\[([\w,]+)\]", install)
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    assert set(asked.split(",")) <= project["optional-dependencies"].keys()
    assert f"innermax-{project['version']}-py3-none-any.whl" in install
