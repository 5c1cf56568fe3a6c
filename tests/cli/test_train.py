"""innermax train."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from innermax.cli.recipes import recipe_names
from innermax.cli.settings import build_strategy
from innermax.cli.train import build_network, read_recipe, train_parser
from innermax.models.registry import MODELS, wideresnet
from tests.helpers.commands import refused, said
from tests.helpers.recipes import FAST, SHAPES

STRATEGY_NAMES = ["unsecured", "standard", "curriculum", "fgsm-pgd", "dynamic", "warm-start"]
STRATEGY_NAMES += ["fgsm-rs", "n-fgsm", "atta", "fat", "free", "fgsm-pgi"]
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
    assert [row["epoch"] for row in rows] == ([0] if strategy == "free" else [0, 1])  # eight updates with each batch
    found = [row["validation_accuracy"] for row in rows]
    assert f"Model of epoch {found.index(max(found)) + 1}, the best on the validation split" in out
    assert yaml.safe_load(Path("run/config.yaml").read_text())["settings"]["data"] in (*SHAPES, "digits")


def test_options_reach_the_training(folder, capsys):
    options = ["--threat.eps", "51/255", "--attack.steps", "3", "--attack.step_size", "[0.1,0.05,0.025]"]
    assert said(capsys, "train", "mnist", "--run-dir", "run", *FAST, *options, "--lr=1e-3", "--flip")[0] == 0
    training = yaml.safe_load(Path("run/config.yaml").read_text())["training"]
    assert training["strategy"]["attack"]["threat"]["eps"] == 0.2
    assert training["strategy"]["attack"]["step_size"] == [0.1, 0.05, 0.025]
    assert (training["lr"], training["flip"], training["shift"]) == (0.001, True, 0)


OBJECTIVES = [
    (["--objective", "trades"], "trades"),
    (["--objective", "trades", "--beta", "3"], {"name": "TRADES", "beta": 3.0, "label_smoothing": 0.0}),
    (["--objective=mart", "--label-smoothing=0.1"], {"name": "MART", "beta": 5.0, "label_smoothing": 0.1}),
    (["--label-smoothing", "1/10"], {"name": "CrossEntropy", "label_smoothing": 0.1}),
    (["--awp", "0.005"], {"name": "AWP", "objective": "cross_entropy", "gamma": 0.005}),
]


@pytest.mark.parametrize(("options", "objective"), OBJECTIVES, ids=[" ".join(words) for words, _ in OBJECTIVES])
def test_objectives_reach_the_training(folder, capsys, options, objective):
    assert said(capsys, "train", "mnist", "--strategy=standard", "--run-dir", "run", *FAST, *options)[0] == 0
    assert yaml.safe_load(Path("run/config.yaml").read_text())["training"]["objective"] == objective


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("typed", "known"), [([], None), (["--dynamic.c-max", "0.25"], 0.25)])
def test_a_recipes_threshold_belongs_to_the_cross_entropy(folder, capsys, typed, known):
    words = ["train", "mnist", "--objective", "trades", "--run-dir", "run", *FAST, *typed]
    status, _, err = said(capsys, *words)
    assert status == 0
    assert ("dynamic.c_max is in units of the cross-entropy" in err) == (known is None)
    assert yaml.safe_load(Path("run/config.yaml").read_text())["training"]["strategy"]["c_max"] == known
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["threshold"] == known
    assert ("halfway_gauge" in rows[0]) == (known is None)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--objective", "trade"],
            "--objective must be one of cross_entropy, loss_weighted, trades, mart, grad_align, ",
        ),
        (["--objective", "trades", "--beta", "-1"], "--beta must be a finite number ≥ 0, got -1"),
        (
            ["--beta", "6"],
            "--beta goes with objective trades, mart or grad_align, not with cross_entropy",
        ),
        (["--label-smoothing", "1"], "--label-smoothing must be a number ≥ 0 and < 1, got 1"),
        (["--awp", "0"], "--awp must be a finite number > 0, got 0"),
        (["--objective", "trades", "--strategy", "unsecured"], "--strategy must attack where the objective says what"),
        (
            ["--objective", "trades", "--strategy", "standard", "--attack.random_start", "false"],
            "--attack.random-start must be True with loss KLD",
        ),
    ],
)
def test_an_objective_that_does_not_go_is_refused_in_one_line(folder, capsys, options, told):
    assert told in refused(capsys, "train", "mnist", "--run-dir", "run", *FAST, *options)
    assert not Path("run").exists()


def test_a_folder_of_another_configuration_is_left_alone(folder, capsys):
    assert said(capsys, "train", "mnist", "--run-dir", "run", *FAST)[0] == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert "lr: 0.01 there, 0.5 here" in refused(capsys, "train", "mnist", "--run-dir", "run", *FAST, "--lr", "0.5")
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert said(capsys, "train", "mnist", "--run-dir", "run", *FAST, "--lr", "0.5", "--overwrite")[0] == 0


def test_the_same_seed_starts_from_the_same_weights(folder):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    one, two, other = (build_network("mnist-cnn", 10, (1, 28, 28), seed, None) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = list(zip(one.parameters(), two.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_the_commands_of_published_trainings_build_what_they_say():
    """Those in the documentation: each method, with its steps in units of its ε."""
    text = (Path(__file__).parents[2] / "docs" / "concepts" / "strategies.md").read_text()
    built = []
    for command in re.findall(r"`innermax train (.*?)`", text):
        recipe, *words = shlex.split(command)
        parser = train_parser(read_recipe(recipe))
        chosen = parser.instantiate(parser.parse_args(words))
        strategy = build_strategy(chosen.strategy, chosen.attack.build(chosen.threat.build()), chosen)
        attack = strategy.attack_at(0.0)
        built.append((type(strategy).__name__, chosen.data, attack.steps, round(attack.step_sizes()[0], 4)))
    assert built == [
        ("FGSMRS", "cifar10", 1, 0.0392),
        ("FGSMRS", "mnist", 1, 0.375),
        ("NFGSM", "cifar10", 1, 0.0314),
        ("ATTA", "cifar10", 1, 0.015),
        ("ATTA", "mnist", 1, 0.01),
        ("Free", "cifar10", 1, 0.0314),
        ("FGSMPGI", "cifar10", 1, 0.0314),
        ("Standard", "cifar10", 1, 0.0314),
        ("FAT", "cifar10", 10, 0.007),
    ]
