"""Models that return more than logits, or fewer."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import innermax as im

THREAT = im.Linf(0.1)
Pair = namedtuple("Pair", ["loss", "scores"])


class Returns(nn.Module):
    """A network whose answer stands in something else."""

    def __init__(self, wrap, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.wrap = nn.Linear(6, classes), wrap

    def forward(self, x):
        return self.wrap(self.layer(x))


KINDS = {
    "an object": (lambda z: SimpleNamespace(logits=z), "logits"),
    "a mapping": (lambda z: {"features": z[:, :2], "logits": z}, "logits"),
    "a mapping by number": (lambda z: {7: z}, 7),
    "a tuple": (lambda z: (z.sum(), z), 1),
    "a named tuple": (lambda z: Pair(z.sum(), z), "scores"),
    "itself": (lambda z: z, None),
    "itself, as in evaluation mode": (lambda z: z, 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_taken_from(kind):
    wrap, output = KINDS[kind]
    model, plain = im.LogitsOnly(Returns(wrap), output), Returns(lambda z: z)
    x, y = torch.rand(20, 6), torch.randint(0, 3, (20,))
    attack = im.PGD(THREAT, steps=3)
    assert torch.equal(attack(model, x, y).x_adv, attack(plain, x, y).x_adv)
    one, other = (im.evaluate(net, (x, y), {"pgd": attack}, audit=False) for net in (model, plain))
    assert one.accuracy == other.accuracy
    run = im.train(model, (x, y), im.Standard(attack), epochs=1, batch_size=5, lr=0.1, progress=False)
    assert len(run.history) == 1


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_one_logit_becomes_two(shape):
    model = im.LogitsOnly(Returns(lambda z: z.reshape(shape), classes=1), output=None, binary=True)
    x = torch.rand(20, 6)
    logits, z = model(x), model.model.layer(x)[:, 0]
    assert torch.equal(logits.argmax(1), (z > 0).long())
    torch.testing.assert_close(logits.softmax(1)[:, 1], z.sigmoid())
    y = (z > 0).long()
    worst = 0.1 * model.model.layer.weight.abs().sum()
    fell = im.FGSM(im.Linf(0.1, bounds=(-9, 9)))(model, x, y).misclassified
    assert torch.equal(fell, z.abs() < worst)


@pytest.mark.parametrize(
    ("wrap", "output", "message"),
    [
        (lambda z: {"scores": z}, "logits", "output 'logits' is not in what the model returns, dict with scores"),
        (lambda z: (z,), 3, "output 3 is not in what the model returns, tuple"),
    ],
)
def test_what_is_not_there_is_said(wrap, output, message):
    with pytest.raises(ValueError, match=message):
        im.LogitsOnly(Returns(wrap), output)(torch.rand(2, 6))


@pytest.mark.parametrize(
    ("wrap", "hint"),
    [
        (lambda z: SimpleNamespace(logits=z), r"take innermax.LogitsOnly\(model, output='logits'\)"),
        (lambda z: {"scores": z}, r"take innermax.LogitsOnly\(model, output='scores'\)"),
        (lambda z: z[:, 0], r"one logit for two classes: innermax.LogitsOnly\(model, output=None, binary=True\)"),
    ],
)
def test_the_error_names_the_way_out(wrap, hint):
    with pytest.raises(ValueError, match=hint):
        im.FGSM(THREAT)(Returns(wrap), torch.rand(4, 6), torch.zeros(4, dtype=torch.int64))
