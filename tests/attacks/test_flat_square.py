"""Square and AutoAttack on inputs that are no images: vectors and sequences."""

import pytest
import torch
from torch import nn

import innermax as im
from innermax.attacks import square
from innermax.threat import NORMS
from innermax.utils import randomness
from tests.helpers.attacks import logits_of

RADII = {"linf": 0.1, "l2": 0.25, "l1": 0.6}


def tabular(features=(12,), count=30, seed=0):
    """A network of tables, records near its boundaries, and its own labels."""
    torch.manual_seed(seed)
    d = int(torch.tensor(features).prod())
    model = nn.Sequential(nn.Flatten(), nn.Linear(d, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        model[1].weight *= 3
        model[3].bias -= model(torch.full((1, *features), 0.5).double())[0]
    x = torch.rand(count, *features).double()
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize(("norm", "features"), [("linf", (12,)), ("linf", (2, 3, 2, 1)), ("l2", (3, 4)), ("l1", (12,))])
def test_a_search_finds_what_gradients_find(norm, features):
    """It falls short of a thorough gradient search by little, and never of what it claims."""
    model, x, y = tabular(features)
    threat = NORMS[norm](RADII[norm])
    found = im.Square(threat, queries=300)(model, x, y)
    assert bool(threat.contains(found.x_adv, x).all())
    assert torch.equal(found.misclassified, logits_of(model, found.x_adv).argmax(1) != y)
    strong = im.APGD(threat, steps=30, loss="margin", targets=2)(model, x, y).misclassified
    assert 6 <= int(strong.sum()) <= 28
    assert int((found.misclassified & strong).sum()) >= 0.7 * int(strong.sum())
    one = im.Square(threat, queries=1)(model, x, y).misclassified
    assert one.sum() < found.misclassified.sum(), "later queries count"


@pytest.mark.parametrize("norm", RADII)
def test_autoattack_takes_tables(norm, monkeypatch):
    model, x, y = tabular(count=16)
    threat = NORMS[norm](RADII[norm])
    members = im.APGD(threat, steps=5), im.FAB(threat, steps=3), im.Square(threat, queries=20)
    monkeypatch.setattr(im.AutoAttack, "attacks", lambda attack: members)
    found = im.AutoAttack(threat)(model, x, y)
    assert bool(threat.contains(found.x_adv, x).all())
    assert bool((found.misclassified >= members[0](model, x, y, seed=randomness.derive_seed(0, 0)).misclassified).all())
    assert found.misclassified.any()


@pytest.mark.parametrize("norm", RADII)
def test_a_query_changes_a_block(norm):
    _, x, _ = tabular()
    feasible, key = NORMS[norm](RADII[norm]).around(x), randomness.hash_keys(4, torch.arange(len(x)))
    threat = feasible.threat
    start = square._begin_flat(feasible, key)
    assert bool(threat.contains(start, x).all())
    for size in (1, 3, 12):
        point = square._redraw(feasible, start, randomness.hash_keys(5, torch.arange(len(x)), size), size)
        assert bool(threat.contains(point, x).all())
        changed = (point != start).sum(1)
        if norm == "linf":
            assert bool((changed <= size).all())
            assert bool((((point - x).abs() > threat.eps - 1e-9) | (point == 0) | (point == 1)).all()), (
                "at ±ε or a bound"
            )
        assert bool((changed > 0).any())
    again = square._redraw(feasible, start, randomness.hash_keys(5, torch.arange(len(x)), 12), 12)
    assert torch.equal(again, point)


def test_every_coordinate_is_chosen_as_often():
    draws = randomness.uniform(randomness.hash_keys(0, torch.arange(6000)), 8)
    chosen = square._choose(draws, 3)
    assert (chosen.sum(1) == 3).all()
    assert ((chosen.sum(0) - 2250).abs() < 4 * (6000 * 3 / 8 * 5 / 8) ** 0.5).all()
    values = square._scatter(draws.flatten()[None])
    assert float(values.mean()) == pytest.approx(0, abs=0.03)
    assert float(values.abs().mean()) == pytest.approx(1, abs=0.03), "exponentially distributed"


def test_blocks_shrink_by_the_schedule():
    attack = im.Square(im.Linf(0.1))
    assert [attack.block(query, 100) for query in (1, 11, 12, 52, 9000)] == [80, 80, 40, 20, 1]
    assert attack.block(1, 1) == 1
    side = attack.side(1, 10, 10)
    assert side**2 == pytest.approx(attack.block(1, 100), abs=2 * side)


def test_an_evaluation_of_a_table():
    model, x, y = tabular(count=20)
    attacks = {"square": im.Square(im.Linf(0.1), queries=50), "pgd": im.PGD(im.Linf(0.1), steps=10)}
    found = im.evaluate(model.float(), (x.float(), y), attacks)
    assert found.accuracy["square"].correct < found.accuracy["clean"].correct
