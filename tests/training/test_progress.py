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
