"""Augmentation depends on the example alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from innermax.data.augmentation import augment
from innermax.utils.randomness import hash_keys, uniform


def naive(x, key, shift, flip):
    """One example and one pixel at a time."""
    out = torch.zeros_like(x)
    height, width = x.shape[2:]
    for example in range(len(x)):
        draws = uniform(key[example : example + 1], 3)[0].tolist()
        down, right = (int(draw * (2 * shift + 1)) - shift for draw in draws[:2])
        mirrored = flip and draws[2] < 0.5
        for row in range(height):
            for column in range(width):
                from_row, from_column = row + down, column + right
                if 0 <= from_row < height and 0 <= from_column < width:
                    source = width - 1 - from_column if mirrored else from_column
                    out[example, :, row, column] = x[example, :, from_row, source]
    return out


@settings(max_examples=30)
@given(st.data())
def test_augment_against_the_naive_way(data):
    batch, channels, height, width = (data.draw(st.integers(1, most)) for most in (3, 2, 5, 6))
    shift = data.draw(st.integers(0, min(height, width) - 1))
    flip = data.draw(st.booleans())
    seed = data.draw(st.integers(0, 2**63 - 1))
    x = torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(seed % 1000))
    before, key = x.clone(), hash_keys(seed, torch.arange(batch))
    assert torch.equal(augment(x, key, shift=shift, flip=flip), naive(x, key, shift, flip))
    assert torch.equal(x, before)


def test_augmentation_is_undone():
    x, key = torch.rand(64, 3, 9, 9), hash_keys(3, torch.arange(64))
    inside = torch.zeros(64, 3, 9, 9)
    inside[:, :, 2:7, 2:7] = x[:, :, 2:7, 2:7]  # what no shift by two pixels moves out
    for options in ({"shift": 2}, {"flip": True}, {"shift": 2, "flip": True}):
        moved = augment(inside, key, **options)
        assert (moved != inside).flatten(1).any(1).float().mean() > 0.3
        assert torch.equal(augment(moved, key, **options, back=True), inside)
    lost = augment(augment(x, key, shift=2), key, shift=2, back=True)
    assert ((lost == x) | (lost == 0)).all()
    assert (lost == 0).any()


def test_augment_depends_on_the_example_alone():
    x, key = torch.rand(40, 3, 6, 6), hash_keys(7, torch.arange(40))
    state = torch.get_rng_state()
    together = augment(x, key, shift=2, flip=True)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment(x[order], key[order], shift=2, flip=True), together[order])
    assert torch.equal(
        torch.cat([augment(x[i : i + 1], key[i : i + 1], shift=2, flip=True) for i in range(40)]), together
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(augment(x, hash_keys(8, torch.arange(40)), shift=2, flip=True), together)


def test_augment_draws_every_shift_equally_often():
    x = torch.zeros(9_000, 1, 5, 5)
    x[:, 0, 2, 2] = 1
    moved = augment(x, hash_keys(0, torch.arange(9_000)), shift=1)
    counts = moved.sum(0)[0, 1:4, 1:4]
    assert float(counts.sum()) == 9_000
    assert float((counts - 1_000).abs().max()) < 150  # 5 standard deviations
    x = torch.zeros(4_000, 1, 1, 2)
    x[..., 0] = 1
    assert abs(float(augment(x, hash_keys(0, torch.arange(4_000)), flip=True)[..., 0].mean()) - 0.5) < 0.04


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.rand(2, 1, 3, 3), {"shift": 3}, "shift must be in 0…2, got 3"),
        (torch.rand(2, 1, 3, 3), {"shift": -1}, "shift must be in 0…2, got -1"),
    ],
)
def test_augment_errors(x, arguments, message):
    with pytest.raises(ValueError, match=message):
        augment(x, hash_keys(0, torch.arange(2)), **arguments)
