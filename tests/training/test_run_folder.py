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
from innermax.objectives import cross_entropy
from innermax.training import run_folder
from innermax.utils.environment import _processor
from innermax.utils.files import read_config
from innermax.utils.serialization import describe, differences
from tests.helpers.networks import same
from tests.helpers.training import ATTACK, DATA, VALIDATION, contents, examples, mlp, train, weights

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


def test_differences_name_the_setting_and_both_values():
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


def turning(model, x, y, x_adv, epoch):
    """Learns for two epochs, then unlearns."""
    loss, logits = cross_entropy(model, x, y, x_adv, epoch)
    return (loss if epoch < 2 else -0.5 * loss), logits


BARE = {"lr": 0.3, "momentum": 0.0, "lr_schedule": "constant"}


@pytest.mark.filterwarnings("ignore:FOSC is")  # it turns away from a minimum: the loss has none
def test_a_run_folder(tmp_path):
    options = BARE | {"validation_set": VALIDATION, "validation_attack": ATTACK, "objective": turning}
    torch.manual_seed(0)  # from other weights it may turn away as far as numbers go
    model = im.build_model("digits-cnn", num_classes=3, input_shape=(1, 6, 6))
    start = weights(model)
    run = train(model, strategy=im.Standard(ATTACK), epochs=5, run_dir=str(tmp_path / "run"), **options)
    folder = tmp_path / "run"
    names = ("config.yaml", "environment.json", "metrics.jsonl", "model.safetensors", "best.safetensors", "config.json")
    kept = {f"checkpoints/epoch-00000{epoch}-batch-00000000.safetensors" for epoch in (4, 5)}
    assert set(contents(folder)) == {*names, *kept}
    assert run.run_dir == folder
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(run.history)
    assert [row["epoch"] for row in rows] == list(range(5))
    numbers = {"loss", "accuracy", "lr", "attack_steps", "threshold", "gradients", "fosc", "zero_gradients"}
    numbers |= {"fosc_percentiles", "relative_fosc_percentiles", "ball_fosc_percentiles"}
    numbers |= {"validation_clean", "validation_robust", "validation_fosc"}
    others = {"epoch", "attack_network", "validation_accuracy", "seconds", "images_per_second"}
    assert all(row.keys() == numbers | others for row in rows)
    for row in rows:
        assert row["attack_network"].startswith("3 BatchNorm folded, channels last, ")
        assert row["validation_accuracy"] == row["validation_robust"] <= row["validation_clean"]
        for name in ("fosc_percentiles", "relative_fosc_percentiles", "ball_fosc_percentiles"):
            assert len(row[name]) == 101
            assert row[name] == sorted(row[name])
        assert row["fosc_percentiles"][0] <= row["fosc"] <= row["fosc_percentiles"][-1]
        assert row["relative_fosc_percentiles"][-1] <= 1
        assert all(
            ball >= exact * (1 - 1e-4)
            for ball, exact in zip(row["ball_fosc_percentiles"], row["fosc_percentiles"], strict=True)
        )
    # The last model and the best, the first of equals.
    assert same(weights(im.load_model(folder)), weights(run.model))
    scores = [row["validation_robust"] for row in rows]
    best = scores.index(max(scores))
    assert best < 4
    assert run.best == rows[best]
    assert scores[4] < scores[best]
    other = im.build_model("digits-cnn", num_classes=3, input_shape=(1, 6, 6))
    other.load_state_dict(start)
    short = train(other, strategy=im.Standard(ATTACK), epochs=best + 1, **options)
    assert same(weights(im.load_model(folder / "best.safetensors")), weights(short.model))
    evaluated = im.evaluate(run.model, VALIDATION, {"attack": ATTACK}).accuracy
    assert (rows[4]["validation_clean"], rows[4]["validation_robust"]) == (
        evaluated["clean"].value,
        evaluated["attack"].value,
    )
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["training"]["strategy"]["attack"]["threat"]["eps"] == 0.2
    assert config["training"]["objective"] == "turning"
    assert config["training"]["lr"] == 0.3
    assert config["model"]["model"] == "digits-cnn"
    assert config["examples"] == {"train": 24, "validation": 16}


def test_a_finished_run_returns_at_once(tmp_path):
    run = train(epochs=2, run_dir=tmp_path / "run", ema=0.5)
    before = contents(tmp_path / "run")

    again = train(mlp(9), epochs=2, run_dir=tmp_path / "run", ema=0.5)
    assert same(weights(again.model), weights(run.model))
    assert again.history == run.history
    assert contents(tmp_path / "run") == before
    assert not again.model.training
    assert again.best is None
    assert "best.safetensors" not in before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.02}, r"training\.lr: 0\.01 there, 0\.02 here"),
        ({"epochs": 3}, r"training\.epochs: 2 there, 3 here"),
        ({"seed": 1}, r"training\.seed: 0 there, 1 here"),
        ({"ema": 0.9}, r"training\.ema: None there, 0\.9 here"),
        ({"strategy": im.Standard(ATTACK)}, r"training\.strategy\.name: Unsecured there, Standard here"),
        ({"objective": "loss_weighted"}, r"training\.objective: cross_entropy there, loss_weighted here"),
        ({"validation_set": VALIDATION}, r"examples\.validation: 0 there, 16 here"),
        ({"data": examples(23)}, r"examples\.train: 24 there, 23 here"),
        ({"settings": {"data": "mnist"}}, r"settings\.data: None there, mnist here"),
        ({"model": im.build_model("digits-cnn", num_classes=3, input_shape=(1, 6, 6))}, "model: Sequential there"),
    ],
)
def test_a_training_of_another_configuration_is_refused(tmp_path, change, words):
    folder = run_folder.open_folder(tmp_path / "run", first_configuration(), False)
    (folder / "notes.txt").write_text("dear")
    before = contents(folder)
    with pytest.raises(ValueError, match=rf"run_dir .*run belongs to another configuration \(.*{words}"):
        train(**{"epochs": 2, "run_dir": folder} | change)
    assert contents(folder) == before


@functools.cache
def first_configuration():
    """The configuration of `train(epochs=2)`."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as name:
        train(epochs=2, run_dir=Path(name) / "run")
        return read_config(Path(name) / "run")


def test_a_foreign_folder_is_refused_and_overwrite_keeps_what_is_not_the_runs(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists and holds no run of innermax"):
            train(epochs=1, run_dir=tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {"thesis.tex": b"dear"}
    folder = tmp_path / "run"
    train(epochs=2, run_dir=folder, validation_set=VALIDATION)
    (folder / "thesis.tex").write_text("dear")
    (folder / "evaluation.json").write_text("{}")
    run = train(epochs=1, run_dir=folder, overwrite=True)
    assert len(run.history) == 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert (folder / "thesis.tex").read_text() == "dear"
    assert not any((folder / name).exists() for name in ("best.safetensors", "evaluation.json"))
    assert same(weights(run.model), weights(train(epochs=1).model))


def test_bad_arguments_never_cost_the_old_run(tmp_path):
    train(epochs=1, run_dir=tmp_path / "run")
    before = contents(tmp_path / "run")
    bad = [
        {"data": (DATA[0], DATA[1] + 1)},
        {"validation_set": (DATA[0], DATA[1] + 1)},
        {"validation_set": (DATA[0][..., :5], DATA[1])},
        {"shift": 6},
        {"device": "cuda:99"},
        {"lr": -1.0},
    ]
    for options in bad:
        for folder in (tmp_path / "run", tmp_path / "new"):
            with pytest.raises(ValueError):
                train(**{"epochs": 2, "run_dir": folder, "overwrite": True} | options)
    assert contents(tmp_path / "run") == before
    assert not (tmp_path / "new").exists()


def test_tensorboard_in_the_run_folder(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(epochs=2, run_dir=tmp_path / "run", logger="tensorboard", validation_set=VALIDATION)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"loss", "accuracy", "lr", "gradients", "validation_clean"} <= set(events.Tags()["scalars"])
    for name in ("loss", "validation_clean"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(row["epoch"], pytest.approx(row[name])) for row in run.history]
    train(epochs=1, run_dir=tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "tensorboard").exists()
    with pytest.raises(ValueError, match="logger 'tensorboard' writes into the run folder: give run_dir"):
        train(epochs=1, logger="tensorboard")
