"""Square: its patterns, its schedule, and what it changes."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from innermax.attacks.square import _HALVINGS, Square, _begin, _patterns, _repaint
from innermax.losses import margin
from innermax.threat import L2, Linf
from tests.helpers.attacks import NORMS, logits_of
from tests.helpers.data import images
from tests.helpers.networks import Logged


def naive_peak(height, width, power):
    """The paper's rings, one after the other."""
    delta, middle = np.zeros((height, width)), (height // 2, width // 2)
    for n in range(max(height, width) // 2 + 1):
        top, left = max(middle[0] - n, 0), max(middle[1] - n, 0)
        delta[top : middle[0] + n + 1, left : middle[1] + n + 1] += 1 / (n + 1) ** power
    return delta


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 12])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_pattern_of_a_square(side, sparse):
    def length(values):
        return np.abs(values).sum() if sparse else np.linalg.norm(values)

    lower = naive_peak(side - side // 2, side, 4 if sparse else 2)
    upper = naive_peak(side // 2, side, 4 if sparse else 2)
    expected = np.concatenate([upper / max(length(upper), 1e-9), -lower / length(lower)])
    expected /= length(expected)
    upright, turned = _patterns(sparse, side).numpy()
    np.testing.assert_allclose(upright, expected, rtol=1e-12)
    np.testing.assert_array_equal(turned, upright.T)


def test_the_schedule_of_squares():
    attack = Square(Linf(0.1), p_init=0.8)
    sides = [attack.side(query, 32, 32) for query in range(1, 5000)]
    shares = {1: 0.8, 11: 0.8, 12: 0.4, 51: 0.4, 52: 0.2, 4001: 0.8 / 64, 4002: 0.8 / 128}
    for query, share in shares.items():
        assert sides[query - 1] == round(math.sqrt(share * 1024))
    assert sides == sorted(sides, reverse=True)
    assert len(_HALVINGS) == 9
    assert Square(Linf(0.1), p_init=1e-9).side(1, 8, 8) == 1
    assert [Square(L2(1.0), p_init=p).side(1, 9, 9) for p in (1e-9, 0.2, 1.0)] == [3, 5, 9]
    assert Square(L2(1.0)).side(1, 2, 7) == 2


def test_square_changes_one_square_and_keeps_what_helps():
    x, y = images(3, shape=(2, 9, 9), dtype=torch.float64)
    torch.manual_seed(0)
    model = Logged(nn.Sequential(nn.Flatten(), nn.Linear(162, 3)).double())
    y = logits_of(model.model, x).argmax(1)
    attack = Square(Linf(0.01, bounds=None), queries=40)
    result = attack(model, x, y, final="loss")
    assert not result.misclassified.any()
    best, points = model.log.inputs[1], model.log.inputs[2:]
    assert len(points) == 39
    torch.testing.assert_close((best - x).abs(), torch.full_like(x, 0.01))
    assert torch.equal((best - x).sign(), (best - x).sign()[:, :, :1].expand_as(x))  # vertical stripes
    for query, point in enumerate(points, start=1):
        side = attack.side(query, 9, 9)
        for row in range(3):
            changed = (point[row] - best[row]).abs().amax(0) > 1e-12
            if changed.any():
                rows, columns = changed.nonzero().T
                assert rows.max() - rows.min() < side
                assert columns.max() - columns.min() < side
        better = margin(model.model(point), y) > margin(model.model(best), y)
        best = torch.where(better[:, None, None, None], point, best)
    assert torch.equal(result.x_adv, best)
    torch.testing.assert_close(result.loss, margin(model.model(best), y))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_square_uses_the_whole_ball(norm):
    x, y = images(3, shape=(2, 9, 9), dtype=torch.float64)
    model = Logged(nn.Sequential(nn.Flatten(), nn.Linear(162, 3)).double())
    y = logits_of(model.model, x).argmax(1)
    threat = NORMS[norm][0](0.01, bounds=None)
    result = Square(threat, queries=30)(model, x, y, final="loss")
    assert not result.misclassified.any()
    for point in model.log.inputs[1:]:
        torch.testing.assert_close(threat.norm((point - x).flatten(1)), torch.full((3,), 0.01).double())


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_square_begins_with_a_grid_of_patterns(norm):
    """Tiles of a fifth of the shorter edge, as many as there is room for, in the middle; each ± one of two patterns."""
    threat = NORMS[norm][0](1000.0, bounds=None)
    around = threat.around(torch.zeros(8, 2, 17, 20).double())
    tiles = _begin(around, torch.arange(8))
    edge = torch.ones(17, 20, dtype=torch.bool)
    edge[1:16, 1:19] = False
    assert (tiles[:, :, edge] == 0).all()
    patterns, seen = _patterns(norm == "l1", 3), set()
    for row, column in itertools.product(range(1, 16, 3), range(1, 19, 3)):
        for image in tiles[:, :, row : row + 3, column : column + 3]:
            image = image / threat.norm(image.flatten(1))[:, None, None]
            found = [
                next((t, s) for t in (0, 1) for s in (1, -1) if torch.allclose(one, s * patterns[t])) for one in image
            ]
            assert found[0][0] == found[1][0], "one pattern in all channels"
            seen.add(((row, column), *found))
    assert len(seen) > 100, "turned and signed by chance"
    assert len({first for _, first, _ in seen}) == 4, "one without relation to the other"
    tiny = threat.around(torch.zeros(1, 1, 4, 3).double())
    assert (_begin(tiny, torch.arange(1)) != 0).all(), "tiles of a single pixel"


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_square_replaces_one_square_and_empties_another_anywhere(norm):
    """In one square the pattern, on what was there, and nothing in the other; both at every place, without relation."""
    count, side, threat = 3000, 3, NORMS[norm][0](10.0, bounds=None)
    around, flat = threat.around(torch.zeros(count, 1, 9, 7).double()), torch.full((count, 1, 9, 7), 0.01).double()
    changed = _repaint(around, flat, torch.arange(count), side)[:, 0]
    changed = changed / changed.flatten(1).median(1).values[:, None, None]  # most lies outside of both
    patterns, third = _patterns(norm == "l1", side), 1 / (side if norm == "l2" else side**2)
    new = torch.stack([sign * pattern + third for sign in (1, -1) for pattern in patterns])
    places, kinds = set(), set()
    for image in changed:
        empty, here = image == 0, (image - 1).abs() > 1e-6
        here &= ~empty
        (down, across), (low, right) = here.nonzero().amin(0).tolist(), here.nonzero().amax(0).tolist()
        assert (low - down, right - across) == (side - 1, side - 1)
        square = image[down : down + side, across : across + side]
        kinds.add(next(k for k, one in enumerate(new) if torch.allclose(square / square[1, 1], one / one[1, 1])))
        if int(empty.sum()) == side**2:
            places.add((down, across, *empty.nonzero().amin(0).tolist()))
    assert kinds == {0, 1, 2, 3}
    for one, other in itertools.combinations(range(4), 2):
        pairs = {(place[one], place[other]) for place in places}
        assert pairs == set(itertools.product(*(range((7, 5, 7, 5)[axis]) for axis in (one, other))))


def test_square_draws_of_its_own_for_each_example():
    x, y = images(1, shape=(1, 9, 9))
    torch.manual_seed(0)
    model = Logged(nn.Sequential(nn.Flatten(), nn.Linear(81, 3)))
    Square(Linf(0.01), queries=3)(model, x.expand(4, -1, -1, -1), y.expand(4))
    assert all(len(torch.unique(points, dim=0)) == 4 for points in model.log.inputs[1:])
