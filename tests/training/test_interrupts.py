"""The same numbers: from one seed, and after any interruption."""

import contextlib
import functools
import itertools
import json
import os
import signal
import threading
from dataclasses import dataclass

import pytest
import torch

import innermax as im
from innermax.training import loop
from innermax.training import train as training
from tests.helpers.networks import same
from tests.helpers.training import (
    ATTACK,
    VALIDATION,
    Interrupting,
    cnn,
    contents,
    ctrl_c,
    ctrl_c_twice,
    distance,
    recipe,
    saved,
    stop,
    timeless,
    train,
    weights,
)

KINDS = ["float32", "bf16", "dynamic", "curriculum"]


@functools.cache
def straight(kind):
    """An uninterrupted run: its weights, its history."""
    model, options = recipe(kind)
    run = train(model(), objective=Interrupting(), **options)
    return weights(run.model), timeless(run.history)


def test_one_seed_one_result():
    model, options = recipe("float32")
    final, history = straight("float32")
    torch.manual_seed(99)
    again = train(model(), objective=Interrupting(), **options)
    assert same(weights(again.model), final)
    assert timeless(again.history) == history
    other = train(model(), objective=Interrupting(), **options | {"seed": 6})
    assert not same(weights(other.model), final)


def test_bf16_is_another_arithmetic():
    assert distance(straight("float32")[0], straight("bf16")[0]) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("at", "position"), [(3, (0, 3)), (5, (1, 2)), (7, (2, 1))])
def test_ctrl_c_in_an_epoch_and_the_same_call_again(tmp_path, kind, at, position):
    model, options = recipe(kind)
    final, history = straight(kind)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(model(), objective=Interrupting(at, ctrl_c), run_dir=tmp_path / "run", **options)
    assert signal.getsignal(signal.SIGINT) is before
    _, state = saved(tmp_path / "run")
    assert (state["epoch"], state["batch"]) == position  # the batch ended whole, and no other began
    resumed = train(model(9), objective=Interrupting(), run_dir=tmp_path / "run", **options)
    assert same(weights(resumed.model), final)
    assert timeless(resumed.history) == history
    assert resumed.history[position[0]]["seconds"] >= round(state["seconds"], 3) > 0
    assert [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == list(
        resumed.history
    )


@pytest.mark.parametrize("act", [stop, ctrl_c_twice])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [2, 5])
def test_an_update_that_is_torn_comes_again_whole(tmp_path, act, after, at):
    model, options = recipe("float32")
    final, history = straight("float32")
    learner = model()
    with pytest.raises(KeyboardInterrupt):
        train(learner, objective=Interrupting(at, act, after), run_dir=tmp_path / "run", **options)
    _, state = saved(tmp_path / "run")
    assert (state["epoch"], state["batch"]) == (at // 3, 0)  # nothing torn was saved
    # The same network goes on, as in a notebook: what the torn update left in it must not matter.
    resumed = train(learner, objective=Interrupting(), run_dir=tmp_path / "run", **options)
    assert same(weights(resumed.model), final)
    assert timeless(resumed.history) == history


@dataclass(frozen=True)
class Halting:
    """A strategy that stops the training when it is asked for the second time."""

    attack: im.PGD

    def attack_at(self, progress, history=()):
        if history and not halted:
            halted.append(progress)
            raise KeyboardInterrupt
        return self.attack


halted = []


def test_a_strategy_that_interrupts(tmp_path, untyped):
    model, options = recipe("float32")
    options["strategy"] = Halting(ATTACK)
    halted.append(0.0)
    whole = train(model(), **options)
    halted.clear()
    with pytest.raises(KeyboardInterrupt):
        train(model(), run_dir=tmp_path / "run", **options)
    assert halted == [1 / 3]
    resumed = train(model(), run_dir=tmp_path / "run", **options)
    assert same(weights(resumed.model), weights(whole.model))
    assert timeless(resumed.history) == timeless(whole.history)


def test_what_the_strategies_measured_survives(tmp_path):
    _, dynamic = straight("dynamic")
    assert dynamic[0]["halfway_gauge"] > 0
    assert [row["threshold"] for row in dynamic] == pytest.approx(
        [None, dynamic[0]["halfway_gauge"] * (1 - 1 / 2.7), dynamic[0]["halfway_gauge"] * (1 - 2 / 2.7)]
    )
    assert dynamic[0]["gradients"] == dynamic[0]["attack_steps"] > 1
    assert all("halfway_gauge" not in row for row in dynamic[1:])
    _, curriculum = straight("curriculum")
    levels = [row["attack_steps"] for row in curriculum]
    assert levels[0] == 0


def test_a_crash_at_any_write_loses_nothing(tmp_path, monkeypatch):
    options = {"epochs": 2, "validation_set": VALIDATION, "lr": 0.3, "momentum": 0.0}
    whole = train(run_dir=tmp_path / "whole", **options)
    written = []
    sync = os.fsync
    for crash in itertools.count():
        folder, left = tmp_path / str(crash), [crash]

        def fsync(number, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise OSError("disk full")
            sync(number)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                train(run_dir=folder, **options)
                break
            except OSError:
                pass
        run = train(run_dir=folder, **options)
        assert timeless(run.history) == timeless(whole.history)
        for name in ("model.safetensors", "best.safetensors", "config.yaml"):
            assert contents(folder)[name] == contents(tmp_path / "whole")[name], (crash, name)
        assert contents(folder).keys() == contents(tmp_path / "whole").keys()
        written.append(crash)
    assert len(written) >= 8


def test_ctrl_c_after_the_last_batch_is_not_forgotten(tmp_path, monkeypatch):
    validated = training._validate

    def interrupted(*arguments):
        ctrl_c()
        return validated(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(epochs=1, validation_set=VALIDATION, run_dir=tmp_path / "run")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert len(train(epochs=1, validation_set=VALIDATION, run_dir=tmp_path / "run").history) == 1


def test_outside_the_main_thread():
    found = []
    worker = threading.Thread(target=lambda: found.append(train(epochs=1)))
    worker.start()
    worker.join()
    assert same(weights(found[0].model), weights(train(epochs=1).model))


def test_interrupting_leaves_the_learner_in_training_mode():
    model = cnn()
    model.train()
    model[1].eval()
    with pytest.raises(KeyboardInterrupt):
        train(model, epochs=1, objective=Interrupting(2, stop), validation_set=VALIDATION)
    assert model.training
    assert not model[1].training


def test_an_interrupt_between_attack_and_update_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """By then the attack has written the batch's perturbations, from which the next epoch would start."""
    asked, measure = [], loop.measure_gauges

    def interrupt(*arguments):
        asked.append(1)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(loop, "measure_gauges", interrupt)
    strategy, found = im.WarmStart(ATTACK), []
    for interrupted in (False, True):
        asked[:] = [] if interrupted else [1] * 6
        with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
            run = train(strategy=strategy, epochs=3, run_dir=tmp_path / str(interrupted))
        if interrupted:
            run = train(strategy=strategy, epochs=3, run_dir=tmp_path / "True")
        found.append(weights(run.model))
    assert len(asked) > 6
    assert same(*found)
