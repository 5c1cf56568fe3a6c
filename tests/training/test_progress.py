"""What a training says of its progress."""

import pytest

import innermax as im
from innermax.utils.console import clock_time
from tests.helpers.training import ATTACK, VALIDATION, train


def test_a_line_an_epoch_where_asked(capsys):
    train(strategy=im.Dynamic(ATTACK, 0.3), epochs=2, validation_set=VALIDATION, progress=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/2  loss ")
    assert "c_t 0.300" in lines[0]
    assert "c_t 0.120" in lines[1]
    assert all(word in lines[1] for word in ("FOSC", "gradients", "clean", "robust", "img/s"))
    train(epochs=1)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (-3, "0:00:00"), (155.4, "0:02:35"), (90_000, "1 day, 1:00:00")]
)
def test_clock_time(seconds, text):
    assert clock_time(seconds) == text


def test_a_function_is_called_after_each_batch(capsys):
    told = []
    train(epochs=2, progress=lambda *step: told.append(step))
    batches = told[-1][2]
    assert batches > 1
    assert told == [(f"epoch {epoch}/2", done, batches) for epoch in (1, 2) for done in range(1, batches + 1)]
    train(epochs=1, progress=None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("wrong", [1, "yes", []])
def test_what_progress_must_be(wrong, untyped):
    with pytest.raises(TypeError, match=r"progress must be True, False or a function \(name, done, in all\), got"):
        train(epochs=1, progress=wrong)
