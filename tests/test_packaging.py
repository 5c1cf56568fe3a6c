"""What is installed: a wheel that is whole, an import that is light, and what the project's own files say of it."""

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import innermax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = (
    "matplotlib pandas lightning pytorch_lightning lightning_fabric tensorboard wandb mlflow onnx onnxruntime timm"
)
HEAVY = "torchvision datasets sklearn pyarrow PIL scipy huggingface_hub jsonargparse rich"


def built(target, folder):
    """The one file that the build backend makes, as it is here: nothing is installed for it."""
    pytest.importorskip("hatchling", reason="hatchling builds what is distributed")
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel as `pip wheel` builds it."""
    return built("wheel", tmp_path_factory.mktemp("wheel"))


def sources():
    """The package's files, below src/."""
    files = [path for path in (ROOT / "src" / "innermax").rglob("*") if path.is_file()]
    return {path.relative_to(ROOT / "src").as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_is_whole(wheel):
    """Every file of the package, and the marks by which type checkers and lawyers know it."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(archive.read(metadata))
    assert {name for name in names if ".dist-info/" not in name} == sources()
    assert {"innermax/py.typed", "innermax/recipes/digits.yaml"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert (told["Name"], told["Version"]) == ("innermax", innermax.__version__)
    assert {"bench", "dev", "lightning", "loggers", "onnx", "timm"} <= set(told.get_all("Provides-Extra"))
    needed = [line for line in told.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0].replace("_", "-") for line in needed} == {
        re.split(r"[^\w-]", line)[0].replace("_", "-") for line in PROJECT["dependencies"]
    }


def test_the_source_distribution_is_whole_and_light(tmp_path):
    """The package with its tests and docs, without what was measured and what measures it."""
    archive = built("sdist", tmp_path)
    assert archive.stat().st_size < 8e6
    with tarfile.open(archive) as opened:
        names = {member.name.partition("/")[2] for member in opened.getmembers()}
    assert {f"src/{name}" for name in sources()} <= names
    assert {"pyproject.toml", "LICENSE", "README.md", "constraints.txt"} <= names
    assert Path(__file__).relative_to(ROOT).as_posix() in names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert not folders & {"results", "bench", "checks"}, folders


def test_the_wheel_runs_in_an_empty_environment(wheel, tmp_path):
    """Installed beside the packages that are here, but not beside this source: the demo, shorten, from elsewhere.

    `make wheel-test` does the same with nothing but what pip installs for the wheel.
    """
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "here.pth").write_text("\n".join(packages))
    code = "import innermax, sys; print(innermax.__file__); from innermax.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["train", "digits", "--epochs", "1", "--attack.steps", "2", "--attacks", "fgsm", "--run-dir", "run"]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    command = [str(environment / "bin" / "python"), "-c", code, *words]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(str(site))
    assert "Worst case" in done.stdout
    assert (folder / "run" / "model.safetensors").exists()


def loaded(code):
    """The modules that a fresh interpreter has loaded after some code."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_importing_it_loads_nothing():
    """Not even torch: names load what they need when they are first used."""
    assert not loaded("import innermax; innermax.__version__, dir(innermax)") & {
        "torch",
        "numpy",
        *OPTIONAL.split(),
        *HEAVY.split(),
    }


def test_a_misspelled_name_suggests_the_nearest():
    with pytest.raises(AttributeError, match="no attribute 'evalute'; did you mean 'evaluate'"):
        innermax.evalute  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'xyzzy'$"):
        innermax.xyzzy  # noqa: B018


def test_an_attack_loads_torch_and_nothing_optional():
    code = (
        "import innermax as im, torch\n"
        "model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))\n"
        "im.PGD(im.Linf(0.1), steps=2)(model, torch.rand(2, 1, 2, 2), torch.arange(2))"
    )
    found = loaded(code)
    assert "torch" in found
    assert not found & {*OPTIONAL.split(), *HEAVY.split()}


def test_tensors_of_several_processes_are_loaded_where_they_are_used():
    """They would make up a quarter of the time that the import takes."""
    found = loaded("import innermax as im; im.train, im.evaluate, im.PGD")
    assert "innermax.distributed.fsdp" in found
    assert "torch.distributed.tensor" not in found


def test_every_optional_import_is_an_extra():
    """What a test or a person may lack is named by an extra; what the library needs is not."""
    extras = {re.split(r"[^\w-]", name)[0] for names in PROJECT["optional-dependencies"].values() for name in names}
    assert {"pytorch-lightning", "tensorboard", "wandb", "mlflow-skinny", "onnx", "onnxruntime", "timm"} <= extras


def test_the_version_is_one():
    assert PROJECT["version"] == innermax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", innermax.__version__)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == innermax.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["references"][0]["year"] == 2019
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\](?: - \d{4}-\d\d-\d\d)?$", text, re.MULTILINE)
    assert headings[0] in ("Unreleased", innermax.__version__)
    assert innermax.__version__ in headings or f"this will be {innermax.__version__}." in text


def test_pages_that_people_look_for():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    for page in ("CONTRIBUTING.md", "docs/contributing.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.filterwarnings("default")
def test_core_is_whole_without_what_the_extras_bring(tmp_path):
    """Attack, train, evaluate with the audit, save and load; each missing library is told in a line."""
    script = Path(__file__).parent / "helpers" / "core_alone.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "core is whole without any extra\n"


def test_core_asks_for_little():
    assert len(PROJECT["dependencies"]) <= 7
    extras = PROJECT["optional-dependencies"]
    assert extras["all"] == ["innermax[cli,data,report]"]
    assert extras["dev"][0].startswith("innermax[all,")


def test_workflows_run_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    found = [
        target
        for workflow in (ROOT / ".github" / "workflows").glob("*.yml")
        for target in re.findall(r"run: make ([a-z][\w-]*)", workflow.read_text())
    ]
    assert {"unit", "release"} <= set(found)
    assert all(f"\n{target}:" in makefile for target in found)
