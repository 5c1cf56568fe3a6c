"""Where a training step and an attack wait for the device: here, and nowhere else.

Each wait lets a GPU run dry, and keeps Python from telling it what comes next while it is busy. A new one is either not
needed, or joins the list with its reason.
"""

import pytest
import torch

import innermax as im
from innermax.data.image_set import ImageSet
from innermax.data.streaming import Batch
from innermax.distributed.launch import Launch
from innermax.distributed.process_group import connect
from innermax.losses import KLDivergence
from innermax.objectives import AWP, TRADES, cross_entropy
from innermax.strategies import STRATEGIES, build_strategy
from innermax.training.arithmetic import Arithmetic
from innermax.training.loop import Loop
from innermax.training.options import TrainingOptions
from tests.helpers.training import cnn, examples
from tests.helpers.waits import spy_on_waits

CPU = torch.device("cpu")
STEPS = 10
ON_THE_PROCESSOR = {
    "utils/randomness.py: derive_seed",  # one number, from numbers in Python
    "attacks/search.py: _has_converged",  # whether a check is worth its time; a GPU makes it
    "threat.py: __post_init__",  # bounds, which are numbers
    "threat.py: <genexpr>",
    "attacks/pgd.py: start",  # whether random points are worth theirs; a GPU makes them
}
STEP = {
    "attacks/problem.py: of": 1,  # that images, labels and start suit, all together
    "training/loop.py: _read": 1,  # loss, right answers, gradients and norm: a finite one before the weights change
}
SEARCH = "attacks/search.py: search"  # how many examples leave, of which the next batch consists
SCALE = "threat.py: _scale"  # Newton's method: whether all have arrived, which takes another number of turns each time
AT_ITS_END = {
    "attacks/problem.py: of",
    "attacks/base.py: check_result",  # labels, NaN and probabilities, together
}
VERDICT = AT_ITS_END | {
    "utils/validation.py: check_labels",  # once the number of classes is known, at the start
    "attacks/base.py: search_survivors",  # who is searched again, once a search
    "attacks/problem.py: won",  # whose fall in bf16 is confirmed in float32
}
MINIMAL = {
    "attacks/minimal.py: search",  # who is searched, once
    "attacks/minimal.py: _confirm_nearer",  # in bf16: whose fall is confirmed in float32
}
CASES = {
    "pgd": (im.PGD(im.Linf(0.02), STEPS), AT_ITS_END),
    "pgd, leaving": (
        im.PGD(im.Linf(0.02), STEPS, restarts=2, stop_on_success=True),
        AT_ITS_END | {SEARCH, "attacks/pgd.py: best_of"},  # who is searched again, once a restart
    ),
    "guided": (
        im.GuidedPGD(im.Linf(0.02), budget=20),
        # Each turn: who leaves, who begins anew, who moves; and groups of the same step size.
        VERDICT | {f"attacks/guided_pgd.py: {name}" for name in ("learn", "_pursue", "move")} | {"threat.py: step"},
    ),
    "apgd": (im.APGD(im.Linf(0.02), steps=STEPS), VERDICT | {"attacks/apgd.py: _climb"}),
    "apgd, L1": (
        im.APGD(im.L1(0.2), steps=STEPS),
        VERDICT
        | {"attacks/apgd.py: _climb", "attacks/apgd.py: _direction"}  # how many coordinates are sorted out
        | {"threat.py: with_radius"},  # two larger balls, once each
    ),
    "fab": (
        im.FAB(im.Linf(0.02), steps=STEPS),
        VERDICT | {f"attacks/fab.py: {name}" for name in ("_level", "cross", "_once")},  # Newton's method, as above
    ),
    "fmn": (im.FMN(im.Linf(0.02), STEPS), VERDICT | MINIMAL),
    "ddn": (im.DDN(im.L2(0.2), STEPS), VERDICT | MINIMAL | {SCALE}),
    "square": (im.Square(im.Linf(0.02), queries=STEPS), VERDICT | {"attacks/square.py: _once"}),
    "square, L2": (im.Square(im.L2(0.2), queries=STEPS), VERDICT | {"attacks/square.py: _once", SCALE}),
}


def started(strategy, objective, **options):
    """A training before its second update, and all of its images as a batch."""
    images, labels = examples(16)
    told = TrainingOptions(strategy, batch_size=16, precision="float32", **options)
    loop = Loop.start(cnn(), ImageSet(images, labels), told, objective, connect(Launch(1, 1), CPU), Arithmetic())
    batch = Batch(torch.arange(16), torch.arange(16), *loop.data.batch(torch.arange(16)))
    loop.step(batch, strategy.attack_at(0.1), 0.0)
    return loop, batch


def waits(strategy, gauge=False, epoch=0, objective=cross_entropy, **options):
    """Of one step, without those of the processor."""
    loop, batch = started(strategy, objective, **options)
    loop.state.epoch = epoch
    with spy_on_waits() as places:
        loop.step(batch, strategy.attack_at(0.1), 0.0, gauge)
    return {place: times for place, times in places.items() if place not in ON_THE_PROCESSOR}


@pytest.mark.parametrize("threat", [im.Linf(0.1), im.L1(2.0)])
@pytest.mark.parametrize("options", [{}, {"clip": 1.0, "on_nan": "skip"}, {"shift": 1, "flip": True}])
def test_a_step_against_a_whole_attack(threat, options):
    assert waits(im.Standard(im.PGD(threat, STEPS)), **options) == STEP
    assert waits(im.WarmStart(im.PGD(threat, STEPS)), epoch=1, **options) == STEP


def test_a_step_on_clean_images():
    assert waits(im.Unsecured()) == {"training/loop.py: _read": 1}


def test_a_step_with_another_objective():
    """One that asks the network twice, and whose attack has to know the clean answer; and one that passes back twice.

    WarmStart's second epoch starts where the search for the divergence has no slope.
    """
    divergence = im.PGD(im.Linf(0.1), STEPS, loss=KLDivergence())
    for strategy in (im.Standard(divergence), im.WarmStart(divergence)):
        assert waits(strategy, epoch=1, objective=AWP(TRADES())) == STEP


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_of_each_strategy(name):
    found = waits(build_strategy(name, im.PGD(im.Linf(0.1), STEPS)), epoch=1)
    assert found.pop(SEARCH, 0) <= STEPS
    assert found.pop("threat.py: with_radius", 0) <= (name == "n-fgsm")  # how large the bounds are
    found.pop("attacks/base.py: check_result", None)
    if name in ("free", "fgsm-pgi"):  # which build X(x) themselves; the first updates several times with a batch
        built = ("utils/validation.py: check_inputs", "threat.py: around")
        assert [found.pop(place, 0) for place in built] == [1, 1]
        found["training/loop.py: _read"] //= 8 if name == "free" else 1
    assert found in (STEP, {"training/loop.py: _read": 1})


def test_averaged_weights():
    """torch looks at their count, which is on the processor, and copies it to the device once for each data type."""
    assert waits(im.Standard(im.PGD(im.Linf(0.1), 2)), ema=0.9) == STEP | {"training/state.py: update": 2}


def test_a_step_whose_gauges_are_measured():
    """One batch of about twenty in an epoch."""
    gauged = {"utils/validation.py: check_inputs": 1, "threat.py: around": 1, "training/metrics.py: measure_gauges": 1}
    assert waits(im.Standard(im.PGD(im.Linf(0.1), 2)), gauge=True) == STEP | gauged | {"attacks/problem.py: of": 2}


@pytest.mark.parametrize("strategy", [im.Dynamic, im.WarmStart])
def test_a_step_whose_examples_leave(strategy):
    """At most once for each step of the attack."""
    attack = im.PGD(im.Linf(0.1), STEPS)
    built = im.WarmStart(attack, STEPS, floor=0.1) if strategy is im.WarmStart else im.Dynamic(attack, 0.3)
    found = waits(built, epoch=1)
    assert 1 <= found.pop(SEARCH) <= STEPS
    found.pop("attacks/base.py: check_result", None)  # where all have left before the end, which is then scored
    assert found == STEP


def test_euclidean_projections():
    found = waits(im.Standard(im.PGD(im.L2(0.5), STEPS)))
    assert found.pop(SCALE) < 5 * STEPS
    assert found == STEP


@pytest.mark.parametrize("name", CASES)
def test_an_evaluations_attack(name):
    attack, expected = CASES[name]
    torch.manual_seed(0)
    images, labels = examples(16)
    x = images / 255
    oracle = im.Oracle.fast(cnn(), x, "bf16")
    oracle.logits(x)
    with spy_on_waits() as places:
        attack(oracle, x, labels)
    assert set(places) - ON_THE_PROCESSOR <= expected
    assert places["attacks/problem.py: of"] == 1
    assert max(places.values()) <= 15 * STEPS


LOOKS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "condition": lambda x: 1 if x[0] > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "mask set": lambda x: x.clone().__setitem__(x > 0, 1.0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "one argument": lambda x: torch.where(x > 0),
    "equal": lambda x: torch.equal(x, x + 1),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "tensor": lambda x: torch.tensor([1.0, 2.0]),
    "as_tensor": lambda x: torch.as_tensor(1.0),
    "unique": lambda x: x.unique(),
}
HARMLESS = {
    "arithmetic": lambda x: (x * 2 + 1).clamp(min=0).masked_fill(x > 1, 0.0),
    "rows": lambda x: x[torch.arange(2)],
    "where": lambda x: torch.where(x > 0, x, -x),
    "full": lambda x: torch.full((), 2.0),
    "as_tensor": lambda x: torch.as_tensor(x),
    "sort": lambda x: (x > 0).byte().argsort(stable=True),
}


@pytest.mark.parametrize("name", LOOKS)
def test_the_spy_sees(name):
    x = torch.tensor([1.0, -1.0, 2.0])
    with spy_on_waits() as places:
        LOOKS[name](x)
    assert places == {"elsewhere": 1}


@pytest.mark.parametrize("name", HARMLESS)
def test_the_spy_lets_pass(name):
    x = torch.tensor([1.0, -1.0, 2.0])
    with spy_on_waits() as places:
        HARMLESS[name](x)
    assert not places
