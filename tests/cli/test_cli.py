"""The command line: what a person types, what comes back, and what happens to bad input."""

import io
import json
import re
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

from innermax.cli.recipes import recipe_names
from innermax.cli.train import build_network, read_recipe, train_parser
from innermax.models.registry import MODELS, wideresnet
from tests.helpers.commands import refused, said

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


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_complete(name):
    """Nothing that identifies a training is left to a default that may change."""
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
    assert set(read_recipe(name)) == options - of_the_run


def test_the_papers_numbers():
    mnist, cifar = read_recipe("mnist"), read_recipe("cifar10")
    assert (mnist["threat.eps"], cifar["threat.eps"]) == (0.3, 8 / 255)
    assert (mnist["epochs"], mnist["lr_drops"], mnist["dynamic.zero_at"]) == (50, [20 / 50, 40 / 50], 40 / 50)
    assert (cifar["epochs"], cifar["lr_drops"], cifar["dynamic.zero_at"]) == (120, [60 / 120, 100 / 120], 100 / 120)
    for recipe in (mnist, cifar):
        assert (recipe["lr"], recipe["momentum"], recipe["weight_decay"]) == (0.01, 0.9, 1e-4)
        assert (recipe["attack.steps"], recipe["attack.step_size"]) == (10, None)
        assert (recipe["dynamic.c_max"], recipe["attack.gauge"]) == (0.5, "ball")


STRATEGY_NAMES = ["unsecured", "standard", "curriculum", "fgsm-pgd", "dynamic", "warm-start"]
# Every recipe, and every strategy, in a fast test; every pair in a slow one.
PAIRS = [
    pytest.param(name, strategy, marks=() if name == "mnist" or strategy == "dynamic" else pytest.mark.slow)
    for name in recipe_names()
    for strategy in STRATEGY_NAMES
]


@pytest.mark.parametrize(("name", "strategy"), PAIRS)
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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--threat.eps", "8/255"], {"threat.eps": 8 / 255}),
        (["--lr=1/4", "--ema", "99/100"], {"lr": 0.25, "ema": 0.99}),
        (["--lr-drops", "[1/2, 3/4]"], {"lr_drops": [0.5, 0.75]}),
        (["--attack.step-size", "1/8"], {"attack.step_size": 0.125}),
        (["--attack.step-size=[1/8,1/16]"], {"attack.step_size": [0.125, 0.0625]}),
        (["--attack.step-size", "annealed"], {"attack.step_size": "annealed"}),
        (["--dynamic.c_max", "1/2", "--switch", "1/3"], {"dynamic.c_max": 0.5, "switch": 1 / 3}),
        (["--validation", "1/10"], {"validation": 0.1}),
        (["--run-dir", "1/2", "--data", "10/20"], {"run_dir": "1/2", "data": "10/20"}),
        (["--run_dir=1/2", "--data=10/20"], {"run_dir": "1/2", "data": "10/20"}),
        (["--init", "1/2", "--model", "3/4"], {"init": "1/2", "model": "3/4"}),
        (["--lr", "1/2", "--run-dir", "1/2", "--lr", "1/4"], {"lr": 0.25, "run_dir": "1/2"}),
        (["--attack.random_start", "false", "--attack.random-start"], {"attack.random_start": True}),
        (["--flip", "--overwrite", "--seed", "-1"], {"flip": True, "overwrite": True, "seed": -1}),
        (["--seed", "3", "--flip"], {"seed": 3, "flip": True}),
    ],
)
def test_words_are_read_as_their_options_type(words, expected):
    """Fractions are numbers where a number is expected, and nowhere else; hyphens and underscores are one."""
    chosen = train_parser({}).parse_args(["--data=digits", "--model=digits-cnn", *words])
    assert {option: chosen[option] for option in expected} == expected


def test_paths_that_look_like_fractions_are_paths(folder, capsys):
    Path("1").mkdir()
    assert said(capsys, "train", "mnist", "--run-dir", "1/2", *FAST)[0] == 0
    assert said(capsys, "train", "mnist", "--run-dir", "3/4", "--init", "1/2", *FAST)[0] == 0
    words = ["--attacks", "fgsm", "--json", "1/5", "--html", "1/6", "--rows-dir", "1/7", "--surrogate", "3/4"]
    assert said(capsys, "evaluate", "1/2", *words)[0] == 0
    assert {"2", "5", "6", "7"} == {path.name for path in Path("1").iterdir()}
    assert said(capsys, "transfer", "3/4", "1/2", "--attacks", "fgsm", "--json", "1/8")[0] == 0
    assert said(capsys, "export", "1/2", "--to", "1/9")[0] == 0
    assert said(capsys, "report", "1/2", "--pictures", "0", "-o", "1/10")[0] == 0
    assert {"8", "9", "10"} <= {path.name for path in Path("1").iterdir()}


def test_recipes_hold_fractions_where_numbers_are_expected(folder):
    Path("mine.yaml").write_text(
        "data: 10/20\nmodel: mnist-cnn\nlr: 1/8\nlr_drops: [1/2, 0.75]\nweight_decay: 1e-4\n"
        'threat: {norm: linf, eps: "8/255"}\nattack: {step_size: [1/4, 1/8]}\ninit: 1/2\n'
    )
    assert read_recipe("mine.yaml") == {
        "data": "10/20",
        "model": "mnist-cnn",
        "lr": 0.125,
        "lr_drops": [0.5, 0.75],
        "weight_decay": 1e-4,
        "threat.norm": "linf",
        "threat.eps": 8 / 255,
        "attack.step_size": [0.25, 0.125],
        "init": "1/2",
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian", "mnist"], "did you mean 'train'"),
        (["train", "minst"], "did you mean 'mnist'"),
        (["train", "--epochs", "3"], "train takes the name of a recipe first, got --epochs: for example innermax"),
        (["train", "mnist", "digits"], "unexpected 'digits': train takes the name of a recipe, then options: for"),
        (["train", "nowhere.yaml"], "nowhere.yaml is not readable"),
        (["train", "mnist", "--data", "mnits"], "did you mean 'mnist'"),
        (["train", "mnist", "--model", "mnist-cn"], "did you mean 'mnist-cnn'"),
        (["train", "mnist", "--strategy", "dynamik"], "--strategy must be one of unsecured, standard, curriculum"),
        (["train", "mnist", "--strategy", "dynamik"], "got dynamik; did you mean 'dynamic'?"),
        (["train", "mnist", "--attacks", "pgd10"], "did you mean 'pgd-10'"),
        (["train", "mnist", "--attacks", "autoatack"], "unknown attack"),
        (["train", "mnist", "--epocs", "3"], "unknown option '--epocs'; did you mean '--epochs'?"),
        (["train", "mnist", "--run-dri", "3"], "unknown option '--run-dri'; did you mean '--run-dir'?"),
        (["train", "mnist", "--xyz", "3"], "unknown option '--xyz'; innermax train --help lists them"),
        (["train", "mnist", "--run-dir"], "--run-dir needs a value"),
        (["train", "mnist", "--run-dir", "--overwrite"], "--run-dir needs a value"),
        (["train", "mnist", "-x"], "unknown option '-x'"),
        (["train", "mnist", "--seed", "0", "1"], "unexpected '1': an option such as --seed takes one value"),
        (["train", "mnist", "--epochs", "many"], "--epochs must be an integer, got many"),
        (["train", "mnist", "--epochs", "1/2"], "--epochs must be an integer, got 1/2"),
        (["train", "mnist", "--batch_size", "1.5"], "--batch-size must be an integer, got 1.5"),
        (["train", "mnist", "--flip", "maybe"], "--flip must be true or false, got maybe"),
        (
            ["train", "mnist", "--attack.step-size", "[1/2,x]"],
            "--attack.step-size must be a number or a list of numbers",
        ),
        (["train", "mnist", "--dynamic.c-max", "autom"], "--dynamic.c-max must be a number or auto, got autom"),
        (["train", "mnist", "--logger", "wnb"], "--logger must be one of tensorboard, wandb, mlflow, got wnb; did you"),
        (["train", "mnist", "--threat.eps", "1/0"], "--threat.eps: 1/0 divides by zero"),
        (["train", "mnist", "--epochs", "0"], "innermax: --epochs must be"),
        (["train", "mnist", "--batch_size=0"], "innermax: --batch-size must be at least 1, got 0"),
        (["train", "mnist", "--lr-drops", "[2]"], "innermax: --lr-drops must be"),
        (["train", "mnist", "--threat.eps", "0"], "innermax: --threat.eps must be a positive finite number"),
        (["train", "mnist", "--threat.eps", "nan"], "threat.eps"),
        (["train", "mnist", "--threat.eps", "3"], "eps must be at most 1"),
        (["train", "mnist", "--threat.norm", "l3"], "norm"),
        (["train", "mnist", "--attack.gauge", "exactly"], "gauge"),
        (["train", "mnist", "--attack.steps", "0"], "steps must be at least 1"),
        (["train", "mnist", "--dynamic.c_max", "-1"], "innermax: --dynamic.c-max must be"),
        (["train", "mnist", "--lr", "nan"], "lr"),
        (["train", "mnist", "--lr", "-1"], "lr must be"),
        (["train", "mnist", "--device", "gpu"], "device"),
        (["train", "mnist", "--init", "nowhere"], "nowhere"),
        (["train", "mnist", "--validation", "99999"], "validation"),
        (["train", "cifar10", "--model", "mnist-cnn", "--data", "nowhere/at-all"], "nowhere/at-all"),
        (["evaluate", "nowhere"], "nowhere"),
        (
            ["evaluate", "nowhere", "--normalize", "[1]"],
            "--normalize must be a list of lists such as [[0.5],[0.25]] or",
        ),
        (["evaluate", "nowhere", "--data", "mnist", "--threat.eps", "0.1"], "nowhere"),
        (["evaluate", "--data", "mnist"], "evaluate takes a run folder or a model first, got --data"),
        (["transfer", "one"], "transfer takes a surrogate and then its targets first, got one: for example"),
        (["report", "--device", "cpu"], "report takes run folders first"),
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
    Path("mine.yaml").write_text("data: mnist\nmodel: mnist-cnn\nthreat: {eps: 1/0}\n")
    assert "recipe mine.yaml: 1/0 divides by zero" in refused(capsys, "train", "mine.yaml")
    Path("mine.yaml").write_text("data: mnist\nmodel: mnist-cnn\nepochs: 1/2\n")
    assert "recipe mine.yaml: --epochs must be an integer, got 1/2" in refused(capsys, "train", "mine.yaml")
    Path("mine.yaml").write_text("model: mnist-cnn\n")
    assert "--data must be given" in refused(capsys, "train", "mine.yaml")
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


@pytest.mark.parametrize("command", ["train", "sweep", "evaluate", "transfer", "report", "export", "reproduce"])
def test_help_shows_options_as_they_are_typed(command, capsys):
    status, out, err = said(capsys, command, "--help")
    assert (status, err) == (0, "")
    shown = re.findall(r"--[\w.-]+", out)
    assert len(shown) > 2
    assert [option for option in shown if "_" in option] == []
    assert "None" not in out
    if command in ("train", "sweep"):
        assert {"--run-dir", "--attack.step-size", "--lr-drops"} <= set(shown)
        assert not re.search(r"(?<!-)\blr_drops\b", out)
        assert "CONFIG" not in out


def test_help_of_a_recipe_shows_its_values(capsys):
    assert "passes over the training set (default: 120)" in said(capsys, "train", "cifar10", "--help")[1].lower()


def test_recipes_are_listed(capsys):
    status, out, _ = said(capsys, "recipes")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == recipe_names()
    assert max(map(len, out.splitlines())) <= 120


def test_the_same_seed_starts_from_the_same_weights(folder):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    one, two, other = (build_network("mnist-cnn", 10, (1, 28, 28), seed, None) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = list(zip(one.parameters(), two.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
