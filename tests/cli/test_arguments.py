"""Words and files that a person gives: how they are read, what they are told, and how bad ones are refused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import innermax as im
from innermax.cli.arguments import leave_out
from innermax.cli.train import train_parser
from tests.helpers.commands import refused, said
from tests.helpers.recipes import FAST


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


def test_the_version(capsys):
    assert said(capsys, "--version") == (0, f"innermax {im.__version__}\n", "")


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
        (["train", "mnist", "--threat.eps", "-1"], "innermax: --threat.eps must be a finite number of at least 0"),
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
            ["evaluate", "nowhere", "--normalize", "twelve"],
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


def test_options_are_left_out_with_their_values():
    words = [
        "--attacks",
        "fgsm",
        "--limit=5",
        "--save-images",
        "out",
        "--best",
        "--threat.eps",
        "[0.1, 0.2]",
        "--json=a",
    ]
    assert leave_out({"attacks", "json", "save_images"}, words) == ["--limit=5", "--best", "--threat.eps", "[0.1, 0.2]"]


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


@pytest.mark.parametrize("words", [["--help"], ["train", "-h"], ["transfer", "--help"]])
def test_help_is_help(words, capsys):
    status, out, err = said(capsys, *words)
    assert (status, err) == (0, "")
    assert "innermax" in out


@pytest.mark.parametrize("words", [[], ["evaluate", "-h"]])
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
    shown = " ".join(said(capsys, "train", "cifar10", "--help")[1].lower().split())
    assert "passes over the training set. the strategy free makes as many updates in fewer (default: 120)" in shown
