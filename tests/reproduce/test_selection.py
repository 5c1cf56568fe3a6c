"""Which experiments are run, and in what order."""

import pytest

from innermax.reproduce.experiments import Trained
from innermax.reproduce.run import ARTIFACTS
from innermax.reproduce.scales import SCALES
from innermax.reproduce.selection import select_experiments

CPU = SCALES["cpu"]


def experiments(*names):
    return list(dict.fromkeys(one for name in names for one in ARTIFACTS[name].experiments(CPU)))


def test_without_a_choice_everything_is_run_in_its_own_order():
    found = experiments("table1", "theorem1")
    assert select_experiments(found) == found


def test_only_what_is_trained_on_a_data_set():
    found = experiments("table1", "theorem1")
    chosen = select_experiments(found, "cifar10")
    assert chosen == [one for one in found if hasattr(one, "training") and one.training.setting.data == "cifar10"]
    assert 0 < len(chosen) < len(found)


def test_strategies_are_run_in_the_order_asked_for_and_others_are_not():
    found = experiments("table1", "best")
    chosen = select_experiments(found, "cifar10", ["warm-start", "dynamic", "standard"])
    kinds = [type(one.training.strategy).__name__ for one in chosen]
    assert list(dict.fromkeys(kinds)) == ["WarmStart", "Dynamic", "Standard"]
    assert kinds == sorted(kinds, key=["WarmStart", "Dynamic", "Standard"].index)
    expected = [one for one in found if one.training.setting.data == "cifar10"]
    assert set(chosen) == {one for one in expected if type(one.training.strategy).__name__ in set(kinds)}


def test_an_order_of_strategies_keeps_the_order_within_each():
    training = CPU.trainings("mnist", "dynamic")
    assert select_experiments([*map(Trained, training)], None, ["dynamic"]) == [*map(Trained, training)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "cifar"}, r"unknown data 'cifar'; did you mean 'cifar10'\? \(known: cifar10, mnist\)"),
        ({"strategies": ["dynamc"]}, "unknown strategy 'dynamc'; did you mean 'dynamic'?"),
    ],
)
def test_what_is_unknown_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        select_experiments(experiments("table1"), **options)
