"""Recorded computations answer what the computation answers, whatever the batch size."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

from innermax import PGD, Linf
from innermax.losses import CappedMargin, cross_entropy, make_reaching, margin
from innermax.oracle import cuda_graphs
from innermax.oracle.cuda_graphs import Replayed, bucket
from innermax.oracle.oracle import Oracle


class Tape:
    """Stands in for CUDA graphs: fixed places for input and output, overwritten by every replay."""

    def __init__(self):
        self.recorded = []

    def __call__(self, compute, *inputs):
        self.recorded.append(len(inputs[0]))
        answer = compute(*inputs)

        def play(*fresh):
            for place, value in zip(inputs, fresh, strict=True):
                place.copy_(value)
            fresh = compute(*inputs)
            for mine, theirs in zip(vars(answer).values(), vars(fresh).values(), strict=True):
                mine.copy_(theirs)
            return answer

        return play


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3))


def oracle():
    return Oracle(network())


def batch(count):
    return torch.rand(count, 3, 2, 2), torch.arange(count) % 3


@pytest.mark.parametrize("largest", [1, 3, 7, 8, 100, 128])
def test_buckets(largest):
    sizes = [bucket(count, largest) for count in range(1, largest + 1)]
    assert len(set(sizes)) <= 8
    assert sizes == sorted(sizes)
    assert sizes[-1] == largest
    assert all(count <= size < count + largest / 8 + 1 for count, size in enumerate(sizes, 1))


def test_replays_answer_what_the_computation_answers():
    exact, tape = oracle(), Tape()
    replayed = Replayed(exact.gradient, tape)
    answers = []
    for count in (16, 5, 6, 16, 1, 15):
        x, y = batch(count)
        truth, answer = exact.gradient(x, y, cross_entropy), replayed(x, y, cross_entropy)
        torch.testing.assert_close(vars(answer), vars(truth))
        answers.append((answer, truth))
    for answer, truth in answers:  # no replay overwrites what an earlier one returned
        torch.testing.assert_close(vars(answer), vars(truth))
    assert tape.recorded == [16, 6, 2]  # 5 and 6 share a bucket, as do 15 and 16


def test_each_loss_and_shape_has_its_recordings():
    exact, tape = oracle(), Tape()
    replayed = Replayed(exact.gradient, tape)
    for loss in (margin, cross_entropy, margin, CappedMargin(0.5), CappedMargin(0.5), make_reaching(margin)):
        x, y = batch(4)
        torch.testing.assert_close(vars(replayed(x, y, loss)), vars(exact.gradient(x, y, loss)))
    assert tape.recorded == [4] * 4
    replayed(torch.rand(4, 12), y, margin)
    assert len(tape.recorded) == 5


def test_recordings_do_not_pile_up():
    exact, tape = oracle(), Tape()
    replayed = Replayed(exact.gradient, tape)
    for confidence in range(3 * cuda_graphs._KEPT):
        replayed(*batch(4), CappedMargin(float(confidence)))
    assert len(replayed._recordings) <= cuda_graphs._KEPT


def test_what_cannot_be_recorded_is_computed(caplog):
    def refuse(*_):
        raise RuntimeError("operation not permitted\nwhen capturing")

    exact = oracle()
    replayed = Replayed(exact.gradient, refuse)
    x, y = batch(4)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(vars(replayed(x, y, margin)), vars(exact.gradient(x, y, margin)))
    assert [record.message for record in caplog.records] == ["attack network: not recorded (operation not permitted)"]
    unhashable = type("Loss", (), {"__hash__": None, "__call__": lambda self, *given: margin(*given)})()
    torch.testing.assert_close(vars(replayed(x, y, unhashable)), vars(exact.gradient(x, y, margin)))
    backwards = make_reaching(unhashable)  # a value around it, as attacks make
    torch.testing.assert_close(vars(replayed(x, y, backwards)), vars(exact.gradient(x, y, make_reaching(margin))))


@pytest.mark.parametrize("target", [None, torch.arange(24) % 3])
def test_an_attack_on_recordings_is_the_attack(target):
    """Examples leave at different steps, so the attack goes through several buckets."""
    tape, (x, y) = Tape(), batch(24)
    exact = Oracle.fast(network(), x, "float32")
    attack = PGD(Linf(0.2), steps=8, restarts=2, stop_on_success=True)
    truth = attack(exact, x, y, target=target)
    exact._replayed = Replayed(partial(Oracle._gradient, exact), tape)
    for _ in range(2):
        torch.testing.assert_close(vars(attack(exact, x, y, target=target)), vars(truth))
    assert 1 < len(tape.recorded) == len(set(tape.recorded)) <= 8


@pytest.mark.parametrize("target", [None, "next"])
def test_batches_of_many_classes_are_recorded_once(target):
    """Whatever labels a batch has."""
    torch.manual_seed(0)
    model, tape = nn.Sequential(nn.Flatten(), nn.Linear(12, 1000)), Tape()
    x = torch.rand(16, 3, 2, 2)
    exact = Oracle.fast(model, x, "float32")
    exact._replayed = Replayed(partial(Oracle._gradient, exact), tape)
    for seed in range(20):
        y = torch.randint(1000, (16,), generator=torch.Generator().manual_seed(seed))
        PGD(Linf(0.2), steps=2)(exact, x, y, target=None if target is None else (y + 1) % 1000)
    assert tape.recorded == [16]
    for labels in ({"y": y + 1000}, {"y": y, "target": y + 1000}):
        with pytest.raises(ValueError, match="must be"):
            PGD(Linf(0.2), steps=2)(exact, x, **labels)
