"""Options: the defaults and the order of im.train's signature, and one line for each that is wrong."""

import dataclasses
import inspect
import math

import jaxtyping
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import innermax as im
from innermax.training.options import TrainingOptions, describe_training, option_names
from tests.helpers.training import ATTACK, DATA, examples, train

STRATEGY = im.Standard(ATTACK)
DIGITS = im.load_data("digits").train[:8]
ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.floats(0, 1), max_size=3)
)
# What an option takes, and a value of another type.
ROWS = {
    "strategy": (STRATEGY, ATTACK),
    "objective": ("loss_weighted", 3),
    "validation_attack": (ATTACK, "pgd-10"),
    "epochs": (3, True),
    "batch_size": (3, 3.0),
    "optimizer": ("adamw", torch.optim.SGD),
    "lr": (1, "x"),
    "momentum": (0, "a"),
    "weight_decay": (np.float32(0.5), True),
    "lr_schedule": ("cosine", None),
    "lr_drops": (np.array([0.5]), 0.4),
    "clip": (math.inf, [1.0]),
    "ema": (0.5, "0.5"),
    "shift": (2, False),
    "flip": (True, 1),
    "precision": ("bf16", torch.bfloat16),
    "seed": (-1, True),
    "device": ("cpu", 0),
    "devices": (2, "2"),
    "nodes": (2, 2.0),
    "parallel": ("fsdp", 1),
    "sync_batch_norm": (True, "yes"),
    "on_nan": ("skip", False),
    "on_overfit": ("stop", True),
    "run_dir": ("runs/a", 5),
    "overwrite": (True, None),
    "checkpoint_every": ("10min", 1.5),
    "keep_checkpoints": (1, "2"),
    "logger": ("wandb", 7),
    "progress": (False, 1),
    "settings": ({"data": "digits"}, [("data", "digits")]),
}


@pytest.fixture(scope="module", autouse=True)
def _untyped():
    """Without runtime type checking, whose errors would come before the library's own; also for all of a property."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def made(**options):
    return TrainingOptions(**{"strategy": STRATEGY} | options)


def test_the_signature_of_train_and_the_options_are_the_same():
    told = {
        name: parameter.default
        for name, parameter in inspect.signature(im.train).parameters.items()
        if name not in ("model", "train_set", "validation_set")
    }
    here = {field.name: field.default for field in dataclasses.fields(TrainingOptions)}
    assert list(told) == list(here) == list(ROWS)
    del told["strategy"], here["strategy"]
    assert told == here


@pytest.mark.parametrize("name", ROWS)
def test_train_hands_every_option_on(monkeypatch, name):
    """Each under its own name."""

    class Seen(Exception):
        pass

    def noted(**options):
        raise Seen(options)

    monkeypatch.setattr("innermax.training.train.TrainingOptions", noted)
    value = ROWS[name][0]
    with pytest.raises(Seen) as caught:
        im.train(None, None, **{"strategy": STRATEGY, name: value})
    (options,) = caught.value.args
    assert options[name] is value
    assert options == {field.name: field.default for field in dataclasses.fields(made())} | {
        "strategy": STRATEGY,
        name: value,
    }


@pytest.mark.parametrize("name", ROWS)
def test_an_option_keeps_a_value_and_refuses_another_type_in_one_line(name):
    good, bad = ROWS[name]
    assert getattr(made(**{name: good}), name) is good
    with pytest.raises(TypeError, match=rf"^{name} must .*, got ") as caught:
        made(**{name: bad})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("objective", "cross-entropy", r"unknown objective 'cross-entropy'; did you mean 'cross_entropy'\?"),
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("batch_size", -1, "batch_size must be at least 1, got -1"),
        ("optimizer", "sdg", r"unknown optimizer 'sdg'; did you mean 'sgd'\?"),
        ("lr", 0, "lr must be a finite number > 0, got 0"),
        ("lr", math.nan, "lr must be a finite number > 0, got nan"),
        ("lr", math.inf, "lr must be a finite number > 0, got inf"),
        pytest.param("lr", 10**400, "lr must be a finite number > 0, got 1000", id="lr-beyond-all-floats"),
        ("momentum", -0.1, "momentum must be a finite number ≥ 0, got -0.1"),
        ("weight_decay", math.inf, "weight_decay must be a finite number ≥ 0, got inf"),
        ("lr_schedule", "drop", r"unknown lr_schedule 'drop'; did you mean 'drops'\?"),
        ("lr_drops", (2,), r"lr_drops must be a sequence of numbers in \(0, 1\), got \(2,\)"),
        ("lr_drops", [math.nan], r"lr_drops must be a sequence of numbers in \(0, 1\), got \[nan\]"),
        ("clip", math.nan, "clip must be a number > 0 or None, got nan"),
        ("clip", 0.0, "clip must be a number > 0 or None, got 0.0"),
        ("ema", 1.0, r"ema must be a number in \(0, 1\) or None, got 1.0"),
        ("shift", -1, "shift must be at least 0, got -1"),
        ("precision", "float16", r"unknown precision 'float16'; did you mean 'float32'\?"),
        ("device", "cdua", r"unknown device 'cdua'; did you mean 'cuda'\?"),
        ("devices", 0, "devices must be at least 1, got 0"),
        ("nodes", 0, "nodes must be at least 1, got 0"),
        ("parallel", "dpp", r"unknown parallel 'dpp'; did you mean 'ddp'\?"),
        ("on_nan", "skp", r"unknown on_nan 'skp'; did you mean 'skip'\?"),
        ("on_overfit", "warm", r"unknown on_overfit 'warm'; did you mean 'warn'\?"),
        ("checkpoint_every", "ten", "checkpoint_every must be a number of updates or a time such as 10min, 90s or 2h"),
        ("checkpoint_every", 0, "checkpoint_every must be a number of updates or a time"),
        ("keep_checkpoints", 0, "keep_checkpoints must be at least 1, got 0"),
        ("logger", "tensorbord", r"unknown logger 'tensorbord'; did you mean 'tensorboard'\?"),
    ],
)
def test_an_option_out_of_range(name, value, words):
    with pytest.raises(ValueError, match=words):
        made(**{name: value})


@pytest.mark.parametrize("value", [["a"], [0.5, None], "0.4", b"", "", [True], np.array([[0.5]]), iter([0.5])])
def test_learning_rate_drops_are_numbers(value):
    with pytest.raises(TypeError, match=r"lr_drops must be a sequence of numbers in \(0, 1\), got "):
        made(lr_drops=value)


@pytest.mark.parametrize("name", ROWS)
@given(value=ANYTHING)
def test_whatever_comes_is_kept_or_refused(name, value):
    """No other exception, no silent change."""
    try:
        options = made(**{name: value})
    except (ValueError, TypeError) as error:
        assert name in str(error)  # noqa: PT017  most values are refused, some are not
    else:
        assert getattr(options, name) is value


def test_options_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        made().lr = 1.0
    assert dataclasses.replace(made(), lr=0.5).lr == 0.5
    with pytest.raises(ValueError, match="lr must be"):
        dataclasses.replace(made(), lr=-0.5)


def test_the_papers_learning_rates():
    options = TrainingOptions(im.Unsecured(), lr_drops=(20 / 50, 40 / 50))
    rates = [options.lr_at(epoch / 50) for epoch in range(50)]
    assert rates == pytest.approx([0.01] * 20 + [0.001] * 20 + [0.0001] * 10)


def test_what_identifies_a_run_is_told_in_the_order_of_the_signature():
    model = im.build_model("digits-cnn", input_shape=DIGITS.shape)
    told = describe_training(made(lr=1, lr_drops=(0.5,), settings={"a": (1,)}), model, DIGITS, None)
    assert list(told) == ["training", "model", "examples", "settings"]
    assert list(told["training"]) == [
        *("strategy", "objective", "validation_attack", "epochs", "batch_size", "optimizer", "lr", "momentum"),
        *("weight_decay", "lr_schedule", "lr_drops", "clip", "ema", "shift", "flip", "precision", "seed", "on_nan"),
    ]
    assert (told["training"]["lr"], type(told["training"]["lr"])) == (1, int)
    assert (told["training"]["lr_drops"], told["settings"]) == ([0.5], {"a": [1]})
    assert yaml.safe_load(yaml.safe_dump(told)) == told
    told = describe_training(made(sync_batch_norm=True), model, DIGITS, DIGITS)
    assert list(told["training"])[-2:] == ["sync_batch_norm", "on_nan"]
    assert told["examples"] == {"train": 8, "validation": 8}


def test_what_a_run_may_go_on_with():
    how = {"device", "devices", "nodes", "parallel", "run_dir", "overwrite", "checkpoint_every", "keep_checkpoints"}
    assert set(ROWS) - option_names("identifies") == how | {"logger", "progress", "settings"}


def test_what_the_command_line_says_in_its_own_way():
    own = {"strategy", "objective", "validation_attack", "logger", "progress", "settings"}
    assert set(ROWS) - option_names("on_command_line") == own


@pytest.mark.parametrize("name", ["data", "validation_set"])
def test_labels_outside_the_classes(tmp_path, name):
    told = {"data": "train_set", "validation_set": "validation_set"}[name]
    with pytest.raises(ValueError, match=rf"{told} labels must be in 0…2, got values from 1 to 3"):
        train(**{name: (DATA[0], DATA[1] + 1)}, epochs=1, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"lr": "x"}, TypeError, "lr must be a finite number > 0, got 'x'"),
        ({"device": "meta"}, ValueError, "unknown device 'meta'"),
        ({"device": "cuda:99"}, ValueError, "device must be cpu or one of the . CUDA devices .*, got 'cuda:99'"),
        ({"shift": 6}, ValueError, "shift must be in 0…5, got 6"),
        ({"data": [1, 2]}, TypeError, "a data set must be"),
        ({"data": examples(4, classes=2)[0]}, TypeError, "a data set must be"),
        ({"model": "mlp"}, TypeError, r"model must be a torch\.nn\.Module, got str"),
        ({"data": (DATA[0][..., :5], DATA[1])}, ValueError, r"the model fails on x of shape \(2, 1, 6, 5\)"),
    ],
)
def test_train_refuses_what_does_not_fit(options, kind, words):
    with pytest.raises(kind, match=words):
        train(**{"epochs": 1} | options)
