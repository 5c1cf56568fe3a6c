"""The table of fast methods: each takes the learning rate of its best trial, and is compared on the same images."""

import json
from dataclasses import replace

import numpy as np
import pytest

import innermax as im
from innermax.reproduce import methods
from innermax.reproduce.answers import Answers
from innermax.reproduce.cache import Cache
from innermax.reproduce.experiments import pack_correct
from innermax.reproduce.methods import Tuned, count_updates
from innermax.reproduce.scales import SCALES, Setting, Training

DIGITS = Setting("digits", "digits-cnn", 0.15, 5, 0.5, (0.5,), batch_size=64, train=100, validation=20)
STANDARD = Training(DIGITS, im.Standard(im.PGD(im.Linf(0.15), steps=1)), seed=3)


class Stub(Cache):
    """Trainings whose validation accuracy depends on the learning rate; notes what is asked for."""

    def __init__(self, folder, scores):
        super().__init__(Answers(folder / "answers.json.xz", (folder,)), folder)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "asked", [])

    def measure(self, experiment):
        training = experiment.training
        self.asked.append((training.setting.lr, training.setting.epochs, training.seed))
        if self.scores[training.setting.lr] is None:
            raise FloatingPointError("diverged")
        row = {"gradients": 1.0, "seconds": 2.0, "attack_steps": 1}
        return {"history": [row | {"validation_robust": self.scores[training.setting.lr]}] * training.setting.epochs}

    def network(self, training, best=False):
        return im.build_model("digits-cnn", input_shape=(1, 8, 8))


def tuned(**changes):
    return replace(Tuned(STANDARD, (0.01, 0.1, 1.0), 0.4, im.FGSM(im.Linf(0.15)), 12), **changes)


def test_the_rate_of_the_best_trial_is_taken(tmp_path):
    cache = Stub(tmp_path, {0.01: 0.2, 0.1: 0.5, 1.0: None})
    result = tuned().run(cache)
    assert result["lr"] == 0.1
    assert result["trials"] == {"0.01": 0.2, "0.1": 0.5, "1.0": 0.0}  # one diverged
    assert cache.asked == [(0.01, 2, 0), (0.1, 2, 0), (1.0, 2, 0), (0.1, 5, 3)]  # rate, epochs, seed
    assert len(result["history"]) == 5
    assert result["clean"]["total"] == result["autoattack"]["total"] == 12
    assert result["autoattack"]["gradients"] > 0
    json.dumps(result)


def test_a_single_rate_is_not_tried(tmp_path):
    cache = Stub(tmp_path, {0.3: 0.5})
    assert tuned(rates=(0.3,)).run(cache)["trials"] == {}
    assert cache.asked == [(0.3, 5, 3)]


@pytest.mark.parametrize(("strategy", "updates"), [("standard", 10), ("free", 80)])
def test_updates_are_counted(strategy, updates):
    assert count_updates(Training(DIGITS, DIGITS.strategy(strategy))) == updates


def test_every_method_has_its_row_at_every_scale():
    for name, count in (("cpu", 16 + 11), ("full", 16 + 11), ("smoke", 4)):
        found = methods._experiments(SCALES[name])
        assert len({one.training.strategy for one in found if one.training.seed == 0}) >= min(10, count)
        assert len(found) == count * (1 if name == "smoke" else 3)
        assert [one.training.seed for one in found] == sorted(one.training.seed for one in found)


def test_numbers_text_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    scale, random = SCALES["cpu"], np.random.default_rng(0)
    rows = {data: methods._rows(scale, data) for data in ("mnist", "cifar")}
    answers = {}
    for number, row in enumerate(rows["mnist"][:6]):
        for one in row.tuned[: 3 if number < 2 else 1]:
            correct = random.random(200) < 0.5 + 0.05 * number
            history = [{"gradients": 1.0 + number, "seconds": 2.0, "validation_robust": 0.5}] * 10
            scores = {name: pack_correct(correct) for name in ("clean", "autoattack")}
            answers[one] = {"lr": 0.03, "trials": {}, "history": history, "environment": {}} | scores
    numbers = json.loads(json.dumps(methods._numbers(scale, answers.get)))
    text = methods._text(numbers)
    assert "| Standard | 3 | 0.03 | 10 | 1,570 | 20 |" in text
    assert "| WarmStart | 3 | 0.03 | 20 |" in text
    assert "| Dynamic, TRADES | not run |" in text
    assert "minus Standard" in text
    figure = Figure()
    methods._draw(numbers, figure)
    figure.savefig(tmp_path / "methods.png")
    assert [axis.get_title() for axis in figure.axes] == ["MNIST", "CIFAR-10"]
