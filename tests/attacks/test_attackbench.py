"""Attacks as AttackBench calls them: by keyword, with what the signature asks for, on a model that counts."""

import inspect
from functools import partial

import pytest
import torch
from torch import nn

import innermax as im
from innermax.attacks.attackbench import adapt_to_attackbench
from tests.helpers.attacks import crowd

ORDER = {"linf": float("inf"), "l2": 2, "l1": 1}


class Counting(nn.Module):
    """A model that counts the forward and backward passes of each row, and cannot be copied."""

    def __init__(self, model):
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0
        model.register_full_backward_hook(self._count)

    def __deepcopy__(self, memo):
        raise AssertionError("a copy would not count")

    def _count(self, module, inwards, outwards):
        self.backwards += len(outwards[0])

    def forward(self, x):
        self.forwards += len(x)
        return self.model(x)


def call(attack, model, inputs, labels, norm, targets=None):
    """The call of attackbenchlib 2: what the attack's signature names is passed by keyword."""
    offered = {"targeted": targets is not None, "targets": targets, "threat_model": norm}
    asked = inspect.signature(attack).parameters
    chosen = {name: value for name, value in offered.items() if name in asked}
    return attack(model=model, inputs=inputs, labels=labels, **chosen)


@pytest.mark.parametrize(
    ("make", "norm"), [(im.FMN, "linf"), (im.FMN, "l2"), (im.FMN, "l1"), (im.DDN, "l2")], ids=lambda value: str(value)
)
def test_the_nearest_inputs_come_back_and_every_query_is_counted(make, norm):
    model, x, y = crowd(dtype=torch.float32)
    threat = {"linf": im.Linf, "l2": im.L2, "l1": im.L1}[norm](1.0)
    expected = make(threat, steps=30)(model, x, y, final="none")
    counting = Counting(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = call(adapt_to_attackbench(partial(make, steps=30)), counting, x.clone(), y, norm)
    assert torch.equal(found[0], x[0])  # misclassified already
    assert (model(found).argmax(1) != y).all()
    assert found.dtype == x.dtype
    assert found.min() >= 0
    assert found.max() <= 1
    assert (counting.forwards, counting.backwards) == (10 + 9 * (30 + 9), 9 * 30)
    assert torch.equal(found, expected.nearest)
    away = (found - x).double().flatten(1).norm(p=ORDER[norm], dim=1)
    torch.testing.assert_close(away, expected.distance)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_target():
    model, x, y = crowd(dtype=torch.float32)
    attack, target = adapt_to_attackbench(partial(im.FMN, steps=60)), (y + 2) % 4
    found = call(attack, Counting(model), x, y, "l2", target)
    fell = (found != x).flatten(1).any(1)
    assert fell.sum() > 5
    assert torch.equal(model(found[fell]).argmax(1), target[fell])
    with pytest.raises(ValueError, match="targets must be given"):
        attack(model, x, y, targeted=True)


def test_a_norm_that_is_not_there():
    model, x, y = crowd(dtype=torch.float32)
    with pytest.raises(ValueError, match="unknown norm 'l0'"):
        call(adapt_to_attackbench(im.FMN), Counting(model), x, y, "l0")
    with pytest.raises(TypeError, match="threat of DDN must be L2"):
        call(adapt_to_attackbench(im.DDN), Counting(model), x, y, "linf")
    with pytest.raises(TypeError, match="looks for the smallest perturbation"):
        call(adapt_to_attackbench(im.FGSM), Counting(model), x, y, "linf")


def test_attackbench_itself():
    attackbench = pytest.importorskip("attackbench")
    model, x, y = crowd(dtype=torch.float32)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    attack = adapt_to_attackbench(partial(im.FMN, steps=30))
    found = attackbench.run_attack(model, data, attack, "linf", torch.device("cpu"), debug=True)
    expected = im.FMN(im.Linf(1.0), steps=30)(model, x, y, final="none").distance
    torch.testing.assert_close(torch.tensor(found["distances"]["linf"]).double(), expected, rtol=1e-5, atol=1e-6)
    assert found["num_backwards"] == [0, *[30] * 9]
