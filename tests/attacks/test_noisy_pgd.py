"""Steps from noise beyond the ball: the formula, and what is measured at the projection."""

import pytest
import torch

from innermax.attacks.noisy_pgd import NoisyPGD
from innermax.attacks.pgd import PGD
from innermax.threat import L1, L2, Linf
from innermax.utils import randomness
from tests.helpers.attacks import gradient_of, logits_of
from tests.helpers.data import images
from tests.helpers.networks import mlp


@pytest.mark.parametrize("noise", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.4), Linf(0.7), Linf(0.2, bounds=None)])
def test_one_step_that_only_the_bounds_cut(threat, noise):
    x, y = images(12, shape=(6,), dtype=torch.float64)
    attack = NoisyPGD(threat, 1, 0.6 * threat.eps, noise=noise)
    low, high = threat.bounds or (-9.0, 9.0)
    draw = threat._draw(randomness.hash_keys(3, torch.arange(12), 0), 6)
    start = (x + noise * threat.eps * draw).clamp(low, high)
    slope = gradient_of(mlp(), start, y)
    direction = slope.sign() if isinstance(threat, Linf) else slope / slope.norm(dim=1, keepdim=True)
    expected = (start + 0.6 * threat.eps * direction).clamp(low, high)
    found = attack(mlp(), x, y, seed=3)
    torch.testing.assert_close(found.x_adv, expected)
    projected = threat.project(expected, x)
    torch.testing.assert_close(found.fosc, threat.gap(gradient_of(mlp(), projected, y), projected, x))
    torch.testing.assert_close(found.logits, logits_of(mlp(), expected))
    assert (found.gradient_calls == 2).all()
    assert threat.contains(found.x_adv, x).all() == (noise == 0)
    quick = attack(mlp(), x, y, seed=3, final="none")
    assert torch.equal(quick.x_adv, found.x_adv)
    assert (quick.gradient_calls == 1).all()


def test_without_noise_a_short_step_is_fgsms():
    x, y = images(12, shape=(6,), dtype=torch.float64)
    for threat in (Linf(0.2), L2(0.4), L1(0.5)):
        plain = PGD(threat, 1, threat.eps / 2, random_start=False)(mlp(), x, y)
        noisy = NoisyPGD(threat, 1, threat.eps / 2, noise=0.0)(mlp(), x, y)
        torch.testing.assert_close(noisy.x_adv, plain.x_adv)
        torch.testing.assert_close(noisy.fosc, plain.fosc)


def test_arguments():
    with pytest.raises(ValueError, match="noise must be a finite number ≥ 0, got -1"):
        NoisyPGD(Linf(0.1), noise=-1.0)
    with pytest.raises(ValueError, match="random_start must be True, as noise says where it starts, got False"):
        NoisyPGD(Linf(0.1), random_start=False)
