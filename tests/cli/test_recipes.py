"""The recipes."""

from pathlib import Path

import pytest

from innermax.cli.recipes import recipe_names
from innermax.cli.settings import ADDED, GROUPS
from innermax.cli.train import read_recipe, train_parser
from tests.helpers.commands import said


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_complete(name):
    """Nothing that identifies a training is left to a default that may change."""
    of_the_run = {"label_column", "seed", "device", "run_dir", "overwrite", "logger", "progress", "init", "attacks"}
    of_the_run |= {"checkpoint_every", "keep_checkpoints", "on_nan", "devices", "nodes", "parallel", "sync_batch_norm"}
    of_the_run |= {"on_overfit"}
    options = {a.dest for a in train_parser({})._actions} - {"help", *GROUPS}
    added = {option for option in options if option.partition(".")[0] in ADDED}  # their defaults stay
    assert set(read_recipe(name)) == options - of_the_run - added


def test_the_papers_numbers():
    mnist, cifar = read_recipe("mnist"), read_recipe("cifar10")
    assert (mnist["threat.eps"], cifar["threat.eps"]) == (0.3, 8 / 255)
    assert (mnist["epochs"], mnist["lr_drops"], mnist["dynamic.zero_at"]) == (50, [20 / 50, 40 / 50], 40 / 50)
    assert (cifar["epochs"], cifar["lr_drops"], cifar["dynamic.zero_at"]) == (120, [60 / 120, 100 / 120], 100 / 120)
    for recipe in (mnist, cifar):
        assert (recipe["lr"], recipe["momentum"], recipe["weight_decay"]) == (0.01, 0.9, 1e-4)
        assert (recipe["attack.steps"], recipe["attack.step_size"]) == (10, None)
        assert (recipe["dynamic.c_max"], recipe["attack.gauge"]) == (0.5, "ball")


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


def test_recipes_are_listed(capsys):
    status, out, _ = said(capsys, "recipes")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == recipe_names()
    assert max(map(len, out.splitlines())) <= 120
