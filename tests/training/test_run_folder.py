"""Run folders: what they say of a run is plain YAML that comes back equal, and tells two runs apart."""

import functools
import json
import math
import platform
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import innermax as im
from innermax.losses import CappedMargin
from innermax.training import run_folder
from innermax.utils.environment import _processor
from innermax.utils.files import read_config
from innermax.utils.serialization import describe, differences

THREATS = [
    im.Linf(8 / 255),
    im.L2(0.5, bounds=None),
    im.L1(3.0),
    im.Linf(0.1, bounds=(torch.zeros(3, 1, 1), torch.ones(3, 1, 1))),
]
ATTACKS = [
    im.PGD(THREATS[0]),
    im.PGD(THREATS[1], steps=3, step_size=(0.5, 0.25, 1e-7), loss="margin", stop_at=0.1, gauge="relative"),
    im.PGD(THREATS[3], step_size="annealed", restarts=2),
    im.FGSM(THREATS[2]),
    im.CW(THREATS[0], confidence=0.5),
]
STRATEGIES = [
    im.Unsecured(),
    *(im.Standard(attack) for attack in ATTACKS),
    im.Curriculum(ATTACKS[0], patience=3),
    im.Curriculum(ATTACKS[0]),
    im.FGSMThenPGD(ATTACKS[0]),
    im.Dynamic(ATTACKS[0]),
    im.Dynamic(ATTACKS[0], "auto"),
    im.Dynamic(ATTACKS[1], 1 / 3, zero_at=0.7, shape="cosine"),
]


def through_yaml(value):
    return yaml.safe_load(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


@pytest.mark.parametrize("number", range(len(STRATEGIES)))
def test_strategies_come_back_equal(number):
    described = describe(STRATEGIES[number])
    again = through_yaml(described)
    assert again == described
    assert not differences({"strategy": again}, {"strategy": described})
    others = [through_yaml(describe(other)) for place, other in enumerate(STRATEGIES) if place != number]
    assert all(differences({"strategy": other}, {"strategy": described}) for other in others)


def test_what_a_description_says():
    described = describe(im.Standard(ATTACKS[0]))
    assert described["name"] == "Standard"
    assert described["attack"]["name"] == "PGD"
    assert described["attack"]["threat"] == {"name": "Linf", "eps": 8 / 255, "bounds": [0.0, 1.0]}
    assert described["attack"]["steps"] == 10
    assert described["attack"]["step_size"] is None
    assert describe(ATTACKS[3])["step_size"] == math.inf
    assert describe(ATTACKS[4])["loss"] == {"name": "CappedMargin", "confidence": 0.5}
    assert describe(ATTACKS[2])["threat"]["bounds"] == [[[[0.0]]] * 3, [[[1.0]]] * 3]


def function():
    """Something to be named."""


class Callable:
    def __call__(self):
        """Something to be named."""


@pytest.mark.parametrize(
    ("value", "described"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (1e-7, 1e-7),
        (1e22, 1e22),
        ("ε = ½", "ε = ½"),
        ((1, [2.0, "x"]), [1, [2.0, "x"]]),
        ({"a": {1: (2,)}}, {"a": {"1": [2]}}),
        (torch.tensor([1.5, 2.0]), [1.5, 2.0]),
        (torch.tensor(2), 2),
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.array([0.25, 0.5]), [0.25, 0.5]),
        (function, "function"),
        (CappedMargin, "CappedMargin"),
        (nn.Linear.forward, "Linear.forward"),
        (Callable(), "Callable"),
        (functools.partial(function, 6.0, beta=np.float64(2)), {"name": "function", "arguments": [6.0], "beta": 2.0}),
    ],
)
def test_plain_values(value, described):
    assert describe(value) == described
    assert type(describe(value)) is type(described)
    assert through_yaml(describe({"value": value})) == {"value": described}


def testdifferences_name_the_setting_and_both_values():
    before = {"training": {"lr": 0.01, "clip": None, "lr_drops": [0.4, 0.8]}, "model": {"name": "a"}, "gone": 1}
    now = {"training": {"lr": 0.1, "lr_drops": [0.4, 0.9]}, "model": "b"}
    assert differences(before, now) == [
        "training.lr: 0.01 there, 0.1 here",
        "training.lr_drops: [0.4, 0.8] there, [0.4, 0.9] here",
        "model: {'name': 'a'} there, b here",
        "gone: 1 there, None here",
    ]
    assert differences(before, before) == []
    assert differences({"new": None}, {}) == []


def configuration(**training):
    return {"training": {"seed": 3} | training, "model": "M", "examples": {"train": 5}, "settings": {}}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_folder(tmp_path):
    folder = run_folder.open_folder(tmp_path / "deep" / "run", configuration(note="ε"), False)
    assert read_config(folder) == configuration(note="ε")
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["versions"]["innermax"]
    assert environment["seed"] == 3
    assert {"device", "threads", "commit", "command", "date"} <= environment.keys()
    assert str(tmp_path) not in environment["command"][0]
    before = contents(folder)
    assert run_folder.open_folder(folder, configuration(note="ε"), False) == folder
    assert contents(folder) == before


def test_the_processor_is_named(monkeypatch):
    capability = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(run_folder.Path, "read_text", lambda path, encoding: "flags\t: fpu\nmodel name\t: A: 1\n" * 2)
    assert _processor() == f"A: 1 ({capability})"

    def absent(path, encoding):
        raise FileNotFoundError(path)

    monkeypatch.setattr(run_folder.Path, "read_text", absent)
    assert _processor() == f"{platform.processor() or platform.machine()} ({capability})"


def test_another_configuration_is_refused(tmp_path):
    folder = run_folder.open_folder(tmp_path / "run", configuration(lr=0.1), False)
    before = contents(folder)
    with pytest.raises(
        ValueError, match=r"run_dir .*run belongs to another configuration \(training.lr: 0.1 there, 0.2"
    ):
        run_folder.open_folder(folder, configuration(lr=0.2), False)
    assert contents(folder) == before


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists and holds no run of innermax"):
            run_folder.open_folder(tmp_path, configuration(), overwrite)
    with pytest.raises(ValueError, match="exists and holds no run of innermax"):
        run_folder.open_folder(tmp_path / "thesis.tex", configuration(), False)
    # Other programs write a config.yaml, too.
    (tmp_path / "config.yaml").write_text("model: {layers: 3}\n")
    (tmp_path / "model.safetensors").write_text("dear")
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="belongs to another configuration"):
            run_folder.open_folder(tmp_path, configuration(), overwrite)
    assert contents(tmp_path) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from innermax.training import run_folder
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
configuration = {"training": {"seed": 3, "lr": 0.1}, "settings": {}}
run_folder.open_folder(Path(sys.argv[1]), configuration, sys.argv[2] == "overwrite")
"""


def killed(folder, *words):
    """A process that dies as it puts the folder's configuration into its place."""
    command = [sys.executable, "-c", KILLED, str(folder), *words]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (folder / "config.yaml.part").exists()


def test_a_run_killed_in_its_first_moment_can_begin_again(tmp_path):
    folder = tmp_path / "run"
    killed(folder, "resume")
    assert [path.name for path in folder.iterdir()] == ["config.yaml.part"]
    now = {"training": {"seed": 3, "lr": 0.2}, "settings": {}}
    run_folder.open_folder(folder, now, False)
    assert read_config(folder) == now
    assert set(map(str, contents(folder))) == {"config.yaml", "environment.json"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml.part").write_text("trai")
    (tmp_path / "other" / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match="exists and holds no run of innermax"):
        run_folder.open_folder(tmp_path / "other", now, False)


def test_a_run_killed_as_it_overwrites_another_is_still_a_run(tmp_path):
    before = {"training": {"seed": 3, "lr": 0.3}, "settings": {}}
    folder = run_folder.open_folder(tmp_path / "run", before, False)
    (folder / "evaluation.json").write_text("{}")
    killed(folder, "overwrite")
    assert read_config(folder) == before
    now = {"training": {"seed": 3, "lr": 0.2}, "settings": {}}
    run_folder.open_folder(folder, now, True)
    assert read_config(folder) == now
    assert set(map(str, contents(folder))) == {"config.yaml", "environment.json"}


def test_overwrite_removes_what_innermax_wrote_of_the_run_and_nothing_else(tmp_path):
    folder = run_folder.open_folder(tmp_path / "run", configuration(lr=0.1), False)
    written = [
        *("metrics.jsonl", "model.safetensors", "best.safetensors", "config.json"),
        "checkpoints/epoch-000001-batch-00000000.safetensors",
        *("evaluation.json", "report.html", "rows/a/rows.parquet", "model.onnx", "model.pt2", "tensorboard/events"),
        *("hub/model.safetensors", "hub/config.json", "hub/README.md"),
    ]
    for name in [*written, "notes/diary.md"]:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)
    run_folder.open_folder(folder, configuration(lr=0.2), True)
    assert read_config(folder) == configuration(lr=0.2)
    assert set(map(str, contents(folder))) == {"config.yaml", "environment.json", "notes/diary.md"}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"checkpoints", "notes"}
    assert (folder / "notes" / "diary.md").read_text() == "notes/diary.md"


def test_overwrite_leaves_what_is_not_innermaxs_beside_a_model_for_the_hub(tmp_path):
    folder = run_folder.open_folder(tmp_path / "run", configuration(lr=0.1), False)
    (folder / "hub").mkdir()
    for name in ("model.safetensors", "paper.pdf"):
        (folder / "hub" / name).write_text(name)
    run_folder.open_folder(folder, configuration(lr=0.2), True)
    assert [path.name for path in (folder / "hub").iterdir()] == ["paper.pdf"]
    shutil.rmtree(folder / "hub")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_text("another's")
    (folder / "hub").symlink_to(tmp_path / "other")
    run_folder.open_folder(folder, configuration(lr=0.2), True)
    assert (tmp_path / "other" / "model.safetensors").read_text() == "another's"


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe\x00x", b"- 1", b"", b"!!python/object:os.system {}"])
def test_a_damaged_configuration(tmp_path, content):
    folder = run_folder.open_folder(tmp_path / "run", configuration(), False)
    (folder / "config.yaml").write_bytes(content)
    for read in (lambda: read_config(folder), lambda: run_folder.open_folder(folder, configuration(), False)):
        with pytest.raises(ValueError, match=r"config\.yaml is not a (readable )?configuration") as error:
            read()
        assert "\n" not in str(error.value)
