"""Recurrent layers on cuDNN, which passes gradients back in training mode alone: a stand-in raises as it does."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

from innermax import PGD, Linf, Standard, train
from innermax.losses import cross_entropy
from innermax.oracle import recurrent
from innermax.oracle.oracle import Oracle
from innermax.oracle.recurrent import NOTE, uses_cudnn
from innermax.training.arithmetic import choose_arithmetic
from tests.helpers.oracles import Net

KINDS = [nn.RNN, nn.LSTM, nn.GRU]
REFUSAL = "cudnn RNN backward can only be called in training mode"


class Refusing(torch.autograd.Function):
    """The identity, through which no gradient passes."""

    @staticmethod
    def forward(_context, value):
        return value.clone()

    @staticmethod
    def backward(_context, _gradient):
        raise RuntimeError(REFUSAL)


class CuDNN(TorchFunctionMode):
    """Computes recurrent layers as torch does on the processor, and refuses as cuDNN does.

    asked: (dropout, training) of each call.
    """

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        if func in recurrent._LAYERS:
            place = next(place for place, value in enumerate(args) if isinstance(value, bool))
            _, _, dropout, training, *_ = args[place:]
            self.asked.append((dropout, training))
            if not training:
                return tuple(map(Refusing.apply, answer))
        return answer


@pytest.fixture
def cudnn(monkeypatch):
    monkeypatch.setattr(recurrent, "_DEVICES", frozenset({"cpu"}))
    with CuDNN() as stub:
        yield stub


def network(kind=nn.LSTM, own=False, packed=False):
    """A recurrent layer with dropout between its own two layers, over the rows of an image."""
    torch.manual_seed(0)

    def forward(net, x):
        rows = x.flatten(2).transpose(1, 2)
        if packed:
            rows = pack_padded_sequence(rows, torch.full((len(x),), rows.shape[1]), batch_first=True)
        state = net.cells(rows)[1]
        return net.head((state[0] if isinstance(state, tuple) else state)[-1])

    layer = type("Own", (kind,), {"forward": lambda self, x: super(type(self), self).forward(x)}) if own else kind
    return Net(forward, cells=layer(2, 8, 2, batch_first=True, dropout=0.9), head=nn.Linear(8, 4))


def batch(count=6):
    return torch.rand(count, 2, 3, 3, generator=torch.Generator().manual_seed(count)), torch.arange(count) % 4


def truth(model, x, y):
    """The gradient in evaluation mode on the processor, where it may be asked for."""
    point = x.clone().requires_grad_()
    return torch.autograd.grad(nn.functional.cross_entropy(model.eval()(point), y, reduction="sum"), point)[0]


def test_the_stand_in_refuses(cudnn):
    x, y = batch()
    with pytest.raises(RuntimeError, match=REFUSAL):
        truth(network(), x, y)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_evaluation_mode(monkeypatch, kind, own, packed):
    x, y = batch()
    expected = truth(network(kind, own, packed), x, y)
    monkeypatch.setattr(recurrent, "_DEVICES", frozenset({"cpu"}))
    model = network(kind, own, packed)
    with CuDNN() as cudnn:
        for oracle in (Oracle(model), Oracle.fast(model, x, "float32")):
            for _ in range(2):
                torch.testing.assert_close(oracle.gradient(x, y, cross_entropy).gradient, expected)
            assert oracle.plan.endswith(NOTE)
            assert NOTE not in oracle.scheme  # which a run keeps that goes on elsewhere
            cudnn.asked.clear()
            oracle.gradient(x, y, cross_entropy)
            assert set(cudnn.asked) == {(0.0, True)}
            cudnn.asked.clear()
            oracle.logits(x)  # exactly as the model computes them
            assert set(cudnn.asked) == {(0.9, False)}
    assert model.cells.training
    assert model.cells.dropout == 0.9


def test_a_layer_that_drops_in_any_mode_still_does(cudnn):
    """A user's choice, as in Monte-Carlo dropout."""
    model = network()
    model.cells.train = lambda mode=True: nn.LSTM.train(model.cells, True)
    x, y = batch()
    Oracle(model).gradient(x, y, cross_entropy)
    assert set(cudnn.asked) == {(0.9, True)}


def test_training(cudnn, caplog):
    """The trial of the update's arithmetic, the attack and the update."""
    model, (x, y) = network(), batch(12)
    with caplog.at_level("WARNING"):
        arithmetic = choose_arithmetic(model, x, "float32", torch.device("cpu"))
        run = train(model, (x, y), Standard(PGD(Linf(0.1), steps=2)), epochs=1, batch_size=6, progress=False)
    assert arithmetic.channels_last
    assert not caplog.records
    assert run.history[0]["gradients"] == 2
    assert (0.9, True) in cudnn.asked  # the update, with its dropout


def test_which_networks_it_concerns(monkeypatch):
    x, _ = batch()
    assert not uses_cudnn(network())
    assert NOTE not in Oracle(network()).plan
    with CuDNN() as cudnn:
        Oracle(network()).logits(x)
    assert set(cudnn.asked) == {(0.9, False)}
    monkeypatch.setattr(recurrent, "_DEVICES", frozenset({"cpu"}))
    assert uses_cudnn(network())
    assert not uses_cudnn(nn.Linear(3, 2))
