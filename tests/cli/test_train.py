"""innermax train."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from innermax.cli.recipes import recipe_names
from innermax.cli.train import build_network
from innermax.models.registry import MODELS, wideresnet
from tests.helpers.commands import refused, said
from tests.helpers.recipes import FAST, SHAPES

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


def test_options_reach_the_training(folder, capsys):
    options = ["--threat.eps", "51/255", "--attack.steps", "3", "--attack.step_size", "[0.1,0.05,0.025]"]
    assert said(capsys, "train", "mnist", "--run-dir", "run", *FAST, *options, "--lr=1e-3", "--flip")[0] == 0
    training = yaml.safe_load(Path("run/config.yaml").read_text())["training"]
    assert training["strategy"]["attack"]["threat"]["eps"] == 0.2
    assert training["strategy"]["attack"]["step_size"] == [0.1, 0.05, 0.025]
    assert (training["lr"], training["flip"], training["shift"]) == (0.001, True, 0)


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
