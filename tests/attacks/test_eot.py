"""PGD on models that draw random numbers: the mean gradient of several answers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import innermax as im
from innermax.attacks.trace import trace_search
from innermax.losses import KLDivergence, cross_entropy
from innermax.utils.serialization import describe
from tests.helpers.data import images
from tests.helpers.networks import Logged, mlp

THREAT = im.Linf(0.1)
SAMPLES = 5


class Shaken(nn.Module):
    """A network of inputs with noise, which it draws anew each time."""

    def __init__(self, scale=0.3):
        super().__init__()
        self.network, self.scale = mlp(torch.float32, 50).eval(), scale

    def forward(self, x):
        return self.network(x + self.scale * torch.randn_like(x))


def by_hand(model, x, y, seed, steps, samples=SAMPLES):
    """The plain loop; returns its end with the means there."""
    torch.manual_seed(seed)
    x_adv = x
    for step in range(steps + 1):
        total, logits = 0, 0
        for _ in range(samples):
            point = x_adv.clone().requires_grad_()
            answer = model(point)
            total = total + torch.autograd.grad(cross_entropy(answer, y).sum(), point)[0]
            logits = logits + answer.detach()
        if step < steps:
            x_adv = (x_adv + THREAT.eps / 4 * total.sign()).clamp(x - THREAT.eps, x + THREAT.eps).clamp(0, 1)
    return x_adv, total / samples, logits / samples


@pytest.fixture(scope="module")
def problem():
    model, (x, y) = Shaken(), images()
    return model, x, y


def test_steps_and_fosc_are_those_of_the_mean_gradient(problem):
    model, x, y = problem
    attack = im.PGD(THREAT, steps=4, random_start=False, eot=SAMPLES)
    result = attack(model, x, y, seed=3)
    x_adv, gradient, logits = by_hand(model, x, y, 3, 4)
    torch.testing.assert_close(result.x_adv, x_adv, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.logits, logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.fosc, THREAT.gap(gradient, x_adv, x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        result.relative_fosc, THREAT.gap(gradient, x_adv, x, relative=True), rtol=1e-4, atol=1e-6
    )
    assert torch.equal(result.misclassified, result.logits.argmax(1) != y)
    one, _, _ = by_hand(model, x, y, 3, 4, samples=1)
    assert not torch.equal(one, x_adv)
    torch.testing.assert_close(replace(attack, eot=1)(model, x, y, seed=3).x_adv, one, rtol=0, atol=1e-6)
    trace = trace_search(attack, model, x, y, seed=3)
    torch.testing.assert_close(trace.fosc[-1], result.fosc)


def test_draws_repeat_with_the_seed_and_leave_the_generators_alone(problem):
    model, x, y = problem
    attack = im.PGD(THREAT, steps=3, eot=SAMPLES, restarts=2)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = attack(model, x, y, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    again, other = attack(model, x, y, seed=1), attack(model, x, y, seed=2)
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(again, name)), name
    assert not torch.equal(first.x_adv, other.x_adv)


def test_the_mean_has_less_noise(problem):
    """Of gradients at one point: the mean of n is √n times as near to the expectation."""
    model, x, y = problem
    spread = {}
    for samples in (1, 16):
        found = torch.stack(
            [im.PGD(THREAT, eot=samples).gradient_at(im.Oracle(model), x, y, x, seed).gradient for seed in range(60)]
        )
        spread[samples] = float(found.std(0).norm())
    assert spread[1] / spread[16] == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("final", ["gradient", "loss", "none"])
@pytest.mark.parametrize("options", [{}, {"loss": KLDivergence()}, {"restarts": 2}])
def test_every_answer_is_counted(problem, final, options):
    model, x, y = problem
    logged = Logged(model)
    result = im.PGD(THREAT, steps=3, eot=SAMPLES, **options)(logged, x, y, final=final)
    assert logged.log.gradients == int(result.gradient_calls.sum())
    assert sum(logged.log.rows) == int((result.gradient_calls + result.forward_calls).sum())
    assert (result.gradient_calls % SAMPLES == 0).all()
    assert (result.forward_calls % SAMPLES == 0).all()


def test_examples_stop_where_the_mean_says_so(problem):
    model, x, y = problem
    attack = im.PGD(THREAT, steps=6, eot=SAMPLES, stop_on_success=True, stop_at=0.01, gauge="relative")
    result = attack(model, x, y)
    assert (result.gradient_calls == SAMPLES * (result.steps + 1)).all()
    assert len(result.steps.unique()) > 1


def test_it_is_a_value_whose_name_is_that_of_before():
    plain, averaged = im.PGD(THREAT), im.PGD(THREAT, eot=SAMPLES)
    assert "eot" not in describe(plain)
    assert describe(averaged)["eot"] == SAMPLES
    assert averaged.cost == SAMPLES * plain.cost
    assert averaged.samples == SAMPLES
    with pytest.raises(ValueError, match="eot must be at least 1, got 0"):
        im.PGD(THREAT, eot=0)
    two = im.Targeted(averaged, "next")
    assert two.samples == SAMPLES


def test_the_audit_knows_that_it_averages(problem):
    model, x, y = problem
    found = im.evaluate(model, (x, y), {"pgd": im.PGD(THREAT, steps=3, eot=SAMPLES)})
    assert found.convergence["pgd"].gradients == SAMPLES * 4
    assert found.audit is None or found.audit.evidence.averaged
