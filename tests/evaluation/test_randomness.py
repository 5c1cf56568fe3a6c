"""Models that draw from the global generators of torch, NumPy and Python: what is measured of them repeats."""

import random

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn

import innermax as im
from innermax.losses import margin
from innermax.oracle.oracle import Oracle
from innermax.utils.generators import read_randomness

# ruff: noqa: NPY002  it is NumPy's global generator that models draw from

THREAT = im.Linf(0.1)
ATTACKS = {"fgsm": im.FGSM(THREAT), "pgd": im.PGD(THREAT, 3)}


class NumpyNoise(nn.Module):
    def forward(self, x):
        return x + torch.from_numpy(np.random.normal(0, 0.2, x.shape)).to(x)


class TorchNoise(nn.Module):
    def forward(self, x):
        return x + 0.2 * torch.randn_like(x)


class Turned(nn.Module):
    """Shows the network the picture or its mirror image, by Python's generator."""

    def forward(self, x):
        return x.flip(-1) if random.random() < 0.5 else x


@pytest.fixture(autouse=True)
def _nobody_else_draws():
    """The runtime type checker would: it takes from Python's generator which items it looks at."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


DRAWING = {"numpy": NumpyNoise, "torch": TorchNoise, "python": Turned}


def network(first, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(first(), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))


def examples(count=40):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 1, 6, 6), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def disturb():
    """Moves all generators on, as whatever a program does in between."""
    torch.rand(3), np.random.rand(5), random.random()


def told(evaluation):
    return evaluation.examples


@pytest.mark.parametrize("first", DRAWING.values(), ids=DRAWING)
def test_an_evaluation_repeats_and_leaves_the_generators_alone(first, tmp_path):
    model, options = network(first), {"batch_size": 15, "seed": 3}
    before = read_randomness()
    found = im.evaluate(model, examples(), ATTACKS, **options)
    assert read_randomness() == before
    disturb()
    assert told(im.evaluate(model, examples(), ATTACKS, **options)).equals(told(found))
    assert not told(im.evaluate(model, examples(), ATTACKS, batch_size=15, seed=4)).equals(told(found))

    def stop(name, done, total):
        if (name, done) == ("pgd", 15):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        im.evaluate(model, examples(), ATTACKS, **options, rows_dir=tmp_path / "rows", progress=stop)
    disturb()
    assert told(im.evaluate(model, examples(), ATTACKS, **options, rows_dir=tmp_path / "rows")).equals(told(found))


def test_several_processes_draw_the_same():
    model = nn.Sequential(Turned(), network(NumpyNoise))
    one, two = (im.evaluate(model, examples(), ATTACKS, batch_size=15, devices=n) for n in (1, 2))
    assert told(one).equals(told(two))


@pytest.mark.parametrize("first", DRAWING.values(), ids=DRAWING)
def test_a_transfer_repeats_whatever_other_targets_there_are(first):
    targets = {"more": network(first, 2), "noisy": network(first, 1)}
    both = im.transfer(network(TorchNoise), targets, examples(), ATTACKS)
    disturb()
    alone = im.transfer(network(TorchNoise), {"noisy": targets["noisy"]}, examples(), ATTACKS)
    for name in ATTACKS:
        assert np.array_equal(both.correct("surrogate", "noisy", name), alone.correct("surrogate", "noisy", name))


@pytest.mark.parametrize("attack", [*ATTACKS.values(), im.APGD(THREAT, 4), im.GuidedPGD(THREAT, 10)])
@pytest.mark.parametrize("first", DRAWING.values(), ids=DRAWING)
def test_an_attack_repeats_and_leaves_the_generators_alone(first, attack):
    model, (images, labels) = network(first), examples(20)
    before = read_randomness()
    found = attack(model, images / 255, labels)
    assert read_randomness() == before
    disturb()
    assert torch.equal(attack(model, images / 255, labels).x_adv, found.x_adv)


@pytest.mark.parametrize("first", DRAWING.values(), ids=DRAWING)
def test_a_training_repeats_and_leaves_the_generators_alone(first):
    weights = []
    for _ in range(2):
        model, before = network(first), read_randomness()
        options = {"epochs": 1, "batch_size": 20, "lr": 0.1, "progress": False}
        im.train(model, examples(), im.Standard(ATTACKS["pgd"]), **options, precision="float32")
        assert read_randomness() == before
        weights.append(model[-1].weight.detach().clone())
        disturb()
    assert torch.equal(*weights)


class Host(nn.Module):
    """Draws one number on the processor, which no proxy of a trace stands for."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x + self.draw()


DRAWS = {
    "torch": lambda: 0.5 * float(torch.rand(())),
    "numpy": lambda: 0.5 * np.random.rand(),
    "python": lambda: 0.5 * random.random(),
    "rarely": lambda: float(np.random.rand() > 0.9999),  # as no check of a few answers sees
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_while_tracing_does_not_become_a_constant(draw):
    (images, _), model = examples(8), network(lambda: Host(draw))
    oracle = Oracle.fast(model, images / 255, "float32")
    assert "it draws random numbers, which a trace keeps as constants" in oracle.plan
    if draw is not DRAWS["rarely"]:
        assert not torch.equal(oracle.logits(images / 255), oracle.logits(images / 255))
    oracle = Oracle.fast(network(nn.Identity), images / 255, "float32")
    assert oracle.plan.startswith("1 BatchNorm folded, ")


@pytest.mark.parametrize("first", DRAWING.values(), ids=DRAWING)
def test_a_network_that_draws_is_no_matter_for_threads(first):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        images, labels = examples(30)
        model, state = network(first), read_randomness()
        oracle = Oracle.fast(model, images / 255, "float32")
        assert read_randomness() == state
        assert "threads" not in oracle.plan
        jaxtyping.config.update("jaxtyping_disable", False)  # whose draws change no answer
        assert "threads" in Oracle.fast(network(nn.Identity), images / 255, "float32").plan
        attack = im.PGD(THREAT, 3)
        first_time, second = (attack(oracle, images / 255, labels).x_adv for _ in range(2))
        assert torch.equal(first_time, second)
    finally:
        torch.set_num_threads(before)


def test_private_randomness_is_the_seeds():
    oracle = Oracle(nn.Linear(2, 2))
    draws = []
    for seed in (3, 3, 4, -1, 2**70):
        before = read_randomness()
        with oracle.private_randomness(seed):
            draws.append((float(torch.rand(())), float(np.random.rand()), random.random()))
        assert read_randomness() == before
    assert draws[0] == draws[1]
    for one in range(3):
        assert len({draw[one] for draw in draws}) == 4
    with pytest.raises(KeyError), oracle.private_randomness(0):
        raise KeyError(random.random() + np.random.rand())
    assert read_randomness() == before


def test_the_margin_of_a_drawing_model_is_its_own():
    """The same draws in both: gradient and logits belong together."""
    (images, labels), oracle = examples(10), Oracle(network(NumpyNoise))
    answers = []
    for _ in range(2):
        with oracle.private_randomness(5):
            answers.append(oracle.gradient(images / 255, labels, margin))
    assert torch.equal(answers[0].gradient, answers[1].gradient)
    assert torch.equal(answers[0].loss, margin(answers[1].logits, labels))
