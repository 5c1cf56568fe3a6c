"""The command line: what a person types, what comes back, and what happens to bad input."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image

from innermax.cli import main
from innermax.cli.arguments import spelled_out
from innermax.cli.settings import read_yaml, recipe_names, recipe_text
from innermax.models.registry import MODELS, wideresnet

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
FAST = ["--epochs", "2", "--batch-size", "8", "--validation", "4", "--attacks", "fgsm", "--progress", "false"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, with made-up data under the names of the real sets."""
    for name, shape in SHAPES.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for split, count in (("train", 16), ("test", 4)):
            write_parquet(tmp_path / "data" / name / f"{split}.parquet", count, shape)
    monkeypatch.setenv("INNERMAX_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_parquet(path, count, shape):
    generator = np.random.default_rng(count)
    rows = []
    for _ in range(count):
        pixels = generator.integers(0, 256, (*shape[1:], shape[0]), dtype=np.uint8).squeeze()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    labels = [row % 10 for row in range(count)]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows, "label": labels}), path)


def said(capsys, *words):
    """Exit status, stdout and stderr of a command."""
    status = main(list(words))
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *words):
    """The one line with which a command is refused."""
    status, _, err = said(capsys, *words)
    assert status == 2
    assert err.count("\n") == 1
    assert err.startswith("innermax: ")
    return err


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_complete(name):
    """Nothing that identifies a training is left to a default that may change."""
    from innermax.cli.train import train_parser

    stated = read_yaml(recipe_text(name))
    flat = {f"{key}.{inner}" for key, value in stated.items() if isinstance(value, dict) for inner in value}
    flat |= {key for key, value in stated.items() if not isinstance(value, dict)}
    of_the_run = {"seed", "device", "run_dir", "overwrite", "logger", "progress", "init", "attacks"}
    of_the_run |= {"checkpoint_every", "keep_checkpoints", "on_nan", "devices", "nodes", "parallel", "sync_batch_norm"}
    options = {a.dest for a in train_parser({})._actions} - {
        "help",
        "threat",
        "attack",
        "dynamic",
        "curriculum",
        "warm",
    }
    assert flat == options - of_the_run


def test_the_papers_numbers():
    mnist, cifar = read_yaml(recipe_text("mnist")), read_yaml(recipe_text("cifar10"))
    assert (mnist["threat"]["eps"], cifar["threat"]["eps"]) == (0.3, 8 / 255)
    assert (mnist["epochs"], mnist["lr_drops"], mnist["dynamic"]["zero_at"]) == (50, [20 / 50, 40 / 50], 40 / 50)
    assert (cifar["epochs"], cifar["lr_drops"], cifar["dynamic"]["zero_at"]) == (120, [60 / 120, 100 / 120], 100 / 120)
    for recipe in (mnist, cifar):
        assert (recipe["lr"], recipe["momentum"], recipe["weight_decay"]) == (0.01, 0.9, 1e-4)
        assert (recipe["attack"]["steps"], recipe["attack"]["step_size"]) == (10, None)
        assert (recipe["dynamic"]["c_max"], recipe["attack"]["gauge"]) == (0.5, "ball")


@pytest.mark.parametrize("strategy", ["unsecured", "standard", "curriculum", "fgsm-pgd", "dynamic", "warm-start"])
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_trains_with_every_strategy(folder, capsys, monkeypatch, name, strategy):
    # One forward pass of WideResNet-34-10 costs as much as all the rest: its smallest sister stands in for it.
    monkeypatch.setitem(MODELS, "wideresnet", lambda classes, shape: wideresnet(classes, shape, depth=10, width=1))
    small = [*FAST, "--batch-size", "64"] if name == "digits" else FAST
    status, out, err = said(capsys, "train", name, "--strategy", strategy, "--run-dir", "run", *small)
    assert (status, err) == (0, "")
    assert "Clean" in out
    assert "run" in out
    names = {"config.yaml", "environment.json", "metrics.jsonl", "model.safetensors", "config.json", "evaluation.json"}
    names |= {"report.html"}
    assert names <= {path.name for path in Path("run").iterdir()}
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert yaml.safe_load(Path("run/config.yaml").read_text())["settings"]["data"] in (*SHAPES, "digits")


def test_train_then_evaluate(folder, capsys):
    assert said(capsys, "train", "mnist", "--run-dir", "run", *FAST)[0] == 0
    before = Path("run/metrics.jsonl").read_text()
    assert said(capsys, "train", "mnist", "--run-dir", "run", *FAST)[0] == 0, "a finished run is only evaluated again"
    assert Path("run/metrics.jsonl").read_text() == before
    status, out, err = said(capsys, "evaluate", "run", "--attacks", "fgsm,pgd-2", "--limit", "3", "--json", "s.json")
    assert (status, err) == (0, "")
    assert all(name in out for name in ("Clean", "FGSM", "PGD-2", "Worst case"))
    scores = json.loads(Path("s.json").read_text())
    assert scores["settings"]["count"] == 3
    assert "eps=0.3" in scores["settings"]["attacks"]["pgd-2"]
    assert said(capsys, "evaluate", "run", "--threat.norm", "l2", "--threat.eps", "1/2", "--json", "t.json")[0] == 0
    assert "L2(eps=0.5" in json.loads(Path("t.json").read_text())["settings"]["attacks"]["fgsm"]
    assert "give --threat.eps" in refused(capsys, "evaluate", "run", "--threat.norm", "l2")
    assert "folder does not exist" in refused(capsys, "evaluate", "run", "--json", "no/where.json")
    best = said(capsys, "evaluate", "run", "--best", "--attacks", "fgsm", "--quantize", "8")
    assert best[0] == 0
    assert said(capsys, "train", "mnist", "--run-dir", "next", "--init", "run", *FAST)[0] == 0


def test_rows_are_kept_and_named(folder, capsys, monkeypatch):
    assert said(capsys, "train", "mnist", "--run-dir", "run", *FAST)[0] == 0
    words = ["evaluate", "run", "--attacks", "fgsm,pgd-2"]
    assert said(capsys, *words)[0] == 0
    (own,) = Path("run/rows").iterdir()
    assert f"{own}/rows.parquet" in said(capsys, *words)[1]
    assert pyarrow.parquet.read_table(own / "rows.parquet").num_rows == 4
    assert said(capsys, *words, "--seed", "1")[0] == 0
    assert len(list(Path("run/rows").iterdir())) == 2
    assert said(capsys, *words, "--rows-dir", "mine")[0] == 0
    assert "seed: 0 there, 1 here" in refused(capsys, *words, "--rows-dir", "mine", "--seed", "1")
    assert "devices must be at least 1" in refused(capsys, *words, "--devices", "0")

    def broken(error):
        def call(*_, **__):
            raise error

        return call

    monkeypatch.setattr("innermax.attacks.pgd.PGD.__call__", broken(ValueError("it\nbroke")))
    assert "it broke Rows that are finished are kept in part:" in refused(capsys, *words, "--rows-dir", "part")
    monkeypatch.setattr("innermax.attacks.pgd.PGD.__call__", broken(KeyboardInterrupt()))
    status, _, err = said(capsys, *words, "--rows-dir", "part")
    assert (status, err.count("\n")) == (130, 1)
    assert "kept in part" in err


def test_options_reach_the_training(folder, capsys):
    options = ["--threat.eps", "51/255", "--attack.steps", "3", "--attack.step_size", "[0.1,0.05,0.025]"]
    assert said(capsys, "train", "mnist", "--run-dir", "run", *FAST, *options, "--lr=1e-3", "--flip")[0] == 0
    training = yaml.safe_load(Path("run/config.yaml").read_text())["training"]
    assert training["strategy"]["attack"]["threat"]["eps"] == 0.2
    assert training["strategy"]["attack"]["step_size"] == [0.1, 0.05, 0.025]
    assert (training["lr"], training["flip"], training["shift"]) == (0.001, True, 0)


def test_words_are_spelled_out():
    words = ["--threat.eps", "8/255", "--run-dir=a-b/c", "--overwrite", "--lr-drops=[1/2]", "--a=1/4", "--seed", "-1"]
    assert spelled_out(words) == [
        *("--threat.eps", repr(8 / 255), "--run_dir=a-b/c", "--overwrite=true", "--lr_drops=[1/2]", "--a=0.25"),
        *("--seed", "-1"),
    ]
    assert spelled_out(["--x", "1/0"]) == ["--x", "1/0"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian", "mnist"], "did you mean 'train'"),
        (["train", "minst"], "did you mean 'mnist'"),
        (["train", "--epochs", "3"], "name of a recipe"),
        (["train", "nowhere.yaml"], "nowhere.yaml is not readable"),
        (["train", "mnist", "--data", "mnits"], "did you mean 'mnist'"),
        (["train", "mnist", "--model", "mnist-cn"], "did you mean 'mnist-cnn'"),
        (["train", "mnist", "--strategy", "dynamik"], "dynamic"),
        (["train", "mnist", "--attacks", "pgd10"], "did you mean 'pgd-10'"),
        (["train", "mnist", "--attacks", "autoatack"], "unknown attack"),
        (["train", "mnist", "--epocs", "3"], "--epocs"),
        (["train", "mnist", "--epochs", "many"], "epochs"),
        (["train", "mnist", "--epochs", "0"], "epochs must be"),
        (["train", "mnist", "--threat.eps", "0"], "eps must be a positive finite number"),
        (["train", "mnist", "--threat.eps", "nan"], "threat.eps"),
        (["train", "mnist", "--threat.eps", "3"], "eps must be at most 1"),
        (["train", "mnist", "--threat.norm", "l3"], "norm"),
        (["train", "mnist", "--attack.gauge", "exactly"], "gauge"),
        (["train", "mnist", "--attack.steps", "0"], "steps must be at least 1"),
        (["train", "mnist", "--dynamic.c_max", "-1"], "c_max"),
        (["train", "mnist", "--lr", "nan"], "lr"),
        (["train", "mnist", "--lr", "-1"], "lr must be"),
        (["train", "mnist", "--device", "gpu"], "device"),
        (["train", "mnist", "--init", "nowhere"], "nowhere"),
        (["train", "mnist", "--validation", "99999"], "validation"),
        (["train", "cifar10", "--model", "mnist-cnn", "--data", "nowhere/at-all"], "nowhere/at-all"),
        (["evaluate", "nowhere"], "nowhere"),
        (["evaluate", "nowhere", "--data", "mnist", "--threat.eps", "0.1"], "nowhere"),
        (["evaluate", "--data", "mnist"], "run folder or a model first"),
        (["recipes", "all"], "takes no arguments"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(folder, capsys, words, expected):
    if words[0] == "train" and "--validation" not in words:
        words = [*words, "--validation", "4"]
    assert expected in refused(capsys, *words)
    assert not Path("runs").exists()


def test_broken_files(folder, capsys):
    Path("mine.yaml").write_text("data: mnist\nmodel: mnist-cnn\nepocs: 3\n")
    assert "did you mean 'epochs'" in refused(capsys, "train", "mine.yaml")
    Path("mine.yaml").write_text("- a list\n")
    assert "mine.yaml" in refused(capsys, "train", "mine.yaml")
    Path("mine.yaml").write_text("data: !!python/object/apply:os.system ['touch owned']\n")
    refused(capsys, "train", "mine.yaml")
    assert not Path("owned").exists()
    Path("data/mnist/train.parquet").write_bytes(b"no parquet")
    assert "train.parquet" in refused(capsys, "train", "mnist")
    Path("model").mkdir()
    Path("model/model.safetensors").write_bytes(b"\x00" * 5)
    assert "model.safetensors" in refused(capsys, "evaluate", "model", "--data", "digits", "--threat.eps", "0.1")
    Path("model.pt").write_bytes(b"\x80\x02.")
    assert "never loaded" in refused(capsys, "evaluate", "model.pt", "--data", "digits", "--threat.eps", "0.1")


def test_a_folder_of_another_configuration_is_left_alone(folder, capsys):
    assert said(capsys, "train", "mnist", "--run-dir", "run", *FAST)[0] == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert "lr: 0.01 there, 0.5 here" in refused(capsys, "train", "mnist", "--run-dir", "run", *FAST, "--lr", "0.5")
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert said(capsys, "train", "mnist", "--run-dir", "run", *FAST, "--lr", "0.5", "--overwrite")[0] == 0


@pytest.mark.parametrize("words", [[], ["--help"], ["train", "--help"], ["evaluate", "-h"], ["transfer", "--help"]])
def test_help_needs_nothing_and_reads_well(words):
    result = subprocess.run(
        [sys.executable, "-m", "innermax.cli", *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "innermax" in result.stdout
    if words[:1] == ["train"]:
        assert "--run-dir" in result.stdout or "--run_dir" in result.stdout
        assert "of PGD, at most" in result.stdout


def test_recipes_are_listed(capsys):
    status, out, _ = said(capsys, "recipes")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == recipe_names()
    assert max(map(len, out.splitlines())) <= 120


def test_the_same_seed_starts_from_the_same_weights(folder):
    from innermax.cli.train import _model

    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    one, two, other = (_model("mnist-cnn", 10, (1, 28, 28), seed, None) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = list(zip(one.parameters(), two.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
