"""What attacks cost is about what they report."""

import math

import pytest
import torch

import innermax as im
from innermax.attacks.cost import search_cost

THREAT = im.Linf(0.1)


@pytest.fixture(scope="module")
def half_robust():
    """A model, and examples of which half fall to PGD: attacks of survivors have work with the others."""
    data = im.load_data("digits")
    torch.manual_seed(0)
    model = im.build_model("digits-cnn", input_shape=data.train.shape)
    im.train(model, data.train[:300], im.Unsecured(), epochs=4, lr=0.05, batch_size=32, progress=False)
    x, y = data.test.batch(torch.arange(200))
    fell = im.PGD(THREAT, steps=20, restarts=2)(model, x, y).misclassified
    rows = torch.cat([fell.nonzero()[:20, 0], (~fell).nonzero()[:20, 0]])
    assert len(rows) == 40
    return model, x[rows], y[rows]


COSTLY = [
    im.APGD(THREAT, steps=20),
    im.APGD(THREAT, steps=10, targets=5, loss="dlr"),
    im.FAB(THREAT, steps=10, targets=5),
    im.Square(THREAT, queries=200),
    im.GuidedPGD(THREAT, budget=100),
]


@pytest.mark.parametrize("attack", COSTLY, ids=lambda attack: type(attack).__name__)
def test_costs_are_about_the_calls_that_attacks_report(half_robust, attack):
    result = attack(*half_robust, final="none")
    taken = float((result.gradient_calls + 0.45 * result.forward_calls).mean())
    assert 0.4 < search_cost(attack) / taken < 1.25


def test_the_cost_of_pgd_is_exact(half_robust):
    result = im.PGD(THREAT, steps=7, restarts=2)(*half_robust)
    assert search_cost(im.PGD(THREAT, steps=7, restarts=2)) == pytest.approx(
        float(result.gradient_calls.float().mean()), abs=1.5
    )


class Own:
    """A user's own attack, as far as its cost is concerned."""

    threat = THREAT


@pytest.mark.parametrize(
    ("told", "cost"),
    [(7, 7.0), (0.5, 0.5), (0, 0.0), (-1.0, 20.0), (math.nan, 20.0), (math.inf, 20.0), ("many", 20.0), (None, 20.0)],
)
def test_an_own_attack_may_tell_its_cost(told, cost):
    attack = Own()
    attack.cost = told
    assert search_cost(attack) == cost
    assert search_cost(Own()) == 20.0


def test_autoattack_costs_what_its_attacks_cost():
    assert search_cost(im.AutoAttack(THREAT)) == sum(map(search_cost, im.AutoAttack(THREAT).attacks()))
