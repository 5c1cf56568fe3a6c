"""Strategies: the paper's schedules at every epoch, and nothing but progress and history behind them."""

import copy
import math
import subprocess
import sys
import textwrap
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import innermax as im
from innermax.losses import KLDivergence, cross_entropy
from innermax.strategies import STRATEGIES, Strategy, build_strategy, search_for

ATTACK = im.PGD(im.Linf(0.1), steps=10)
PAPER = replace(ATTACK, gauge="ball")
KINDS = {
    "unsecured": im.Unsecured(),
    "standard": im.Standard(ATTACK),
    "curriculum": im.Curriculum(ATTACK),
    "patient": im.Curriculum(ATTACK, patience=2),
    "fgsm-then-pgd": im.FGSMThenPGD(ATTACK),
    "dynamic": im.Dynamic(PAPER),
    "automatic": im.Dynamic(ATTACK, "auto"),
    "warm": im.WarmStart(ATTACK),
    "fgsm-rs": im.FGSMRS(ATTACK),
    "n-fgsm": im.NFGSM(ATTACK),
    "atta": im.ATTA(ATTACK),
    "fat": im.FAT(ATTACK),
    "free": im.Free(ATTACK),
    "fgsm-pgi": im.FGSMPGI(ATTACK),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_strategy_is_a_value(kind):
    strategy = KINDS[kind]
    assert isinstance(strategy, Strategy)
    assert hash(strategy) == hash(copy.deepcopy(strategy))
    assert strategy == copy.deepcopy(strategy)
    with pytest.raises(FrozenInstanceError):
        strategy.attack = None


def is_fgsm(attack):
    return attack == im.FGSM(ATTACK.threat)


@pytest.mark.parametrize(("epochs", "zero_from"), [(50, 40), (120, 100)])
@pytest.mark.parametrize("c_max", [None, 0.5, 0.15])
def test_the_papers_threshold_at_every_epoch(epochs, zero_from, c_max):
    strategy = im.Dynamic(PAPER, c_max, zero_at=zero_from / epochs)
    start = 0.5 if c_max is None else c_max
    for epoch in range(epochs):
        attack = strategy.attack_at(epoch / epochs)
        assert attack.stop_at == pytest.approx(max(start - epoch * start / zero_from, 0), abs=1e-12)
        assert (attack.stop_at == 0) == (epoch >= zero_from)
        assert attack == replace(PAPER, stop_at=attack.stop_at)


def test_the_papers_cifar_schedule_is_the_default():
    assert im.Dynamic(PAPER).zero_at == 100 / 120


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: 0.5 + 0.5 * math.cos(math.pi * done)),
        ("constant", lambda done: 1),
    ],
)
def test_shapes_at_every_epoch(shape, share):
    strategy = im.Dynamic(PAPER, 0.3, zero_at=100 / 120, shape=shape)
    for epoch in range(120):
        expected = 0.3 * share(epoch / 100) if epoch < 100 else 0
        assert strategy.attack_at(epoch / 120).stop_at == pytest.approx(expected, abs=1e-12)
        assert (strategy.attack_at(epoch / 120).stop_at == 0) == (epoch >= 100)


@settings(max_examples=40)
@given(epochs=st.integers(1, 150), data=st.data(), shape=st.sampled_from(["linear", "cosine", "constant"]))
def test_the_threshold_falls_to_exactly_zero(epochs, data, shape):
    zero_from = data.draw(st.integers(1, epochs))
    strategy = im.Dynamic(PAPER, 0.5, zero_at=zero_from / epochs, shape=shape)
    thresholds = [strategy.attack_at(epoch / epochs).stop_at for epoch in range(epochs)]
    assert thresholds[0] == 0.5
    assert thresholds == sorted(thresholds, reverse=True)
    assert all((value == 0) == (epoch >= zero_from) for epoch, value in enumerate(thresholds))


@pytest.mark.parametrize(
    ("gauge", "c_max", "stop_at", "loss"),
    [
        ("ball", None, 0.5, "cross_entropy"),
        ("ball", "auto", None, "cross_entropy"),
        ("exact", None, 0.15, "cross_entropy"),
        ("exact", None, 0.15, cross_entropy),
        ("relative", None, None, "cross_entropy"),
        ("exact", "auto", None, "cross_entropy"),
        ("exact", 0.4, 0.4, "cross_entropy"),
        ("exact", None, None, "margin"),  # 0.15 is in units of the cross-entropy
        ("ball", None, None, KLDivergence()),
        ("exact", 0.4, 0.4, KLDivergence()),
    ],
)
def test_whose_c_max_is_measured(gauge, c_max, stop_at, loss):
    strategy = im.Dynamic(replace(ATTACK, gauge=gauge, loss=loss), c_max)
    first = strategy.attack_at(0.0)
    assert strategy.measures == ({"halfway_gauge"} if stop_at is None else set())
    assert first.stop_at == stop_at
    assert first.steps == 10


def test_automatic_c_max_is_the_first_epochs_measure():
    strategy = im.Dynamic(ATTACK, "auto", zero_at=0.8)
    history = [{"halfway_gauge": 0.2, "accuracy": 0.1}, {"halfway_gauge": 0.7}, {"halfway_gauge": None}, {}]
    for epoch in range(1, 50):
        expected = max(0.2 - epoch * 0.2 / 40, 0)
        assert strategy.attack_at(epoch / 50, history).stop_at == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match=r"history must hold the first epoch's 'halfway_gauge', .* got none"):
        strategy.attack_at(0.02)
    for first in ({"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.5, "halfway_gauge": None, "loss": 1.0}):
        with pytest.raises(ValueError, match=r"history must hold 'halfway_gauge', .* got \['accuracy', .*'loss'\]"):
            strategy.attack_at(0.02, [first])


rows = st.fixed_dictionaries({"accuracy": st.floats(0, 1), "halfway_gauge": st.floats(0, 2)})


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40)
@given(progress=st.floats(0, 1, exclude_max=True), history=st.lists(rows, min_size=1, max_size=8), data=st.data())
def test_strategies_are_pure(name, progress, history, data):
    strategy, untouched = KINDS[name], copy.deepcopy(history)
    before = strategy.attack_at(progress, history)
    other = data.draw(st.floats(0, 1, exclude_max=True))
    strategy.attack_at(other, data.draw(st.lists(rows, min_size=1)))
    assert strategy.attack_at(progress, history) == before
    assert history == untouched
    if name != "patient":
        assert strategy.attack_at(progress, history[:1]) == before


@pytest.mark.parametrize(("epochs", "full_from", "steps"), [(120, 100, 10), (10, 10, 10), (50, 7, 40), (9, 8, 3)])
def test_curriculum_at_every_epoch(epochs, full_from, steps):
    strategy = im.Curriculum(replace(ATTACK, steps=steps), full_at=full_from / epochs)
    for epoch in range(epochs):
        attack = strategy.attack_at(epoch / epochs)
        expected = min(steps * epoch // full_from, steps)
        assert (0 if attack is None else attack.steps) == expected


@settings(max_examples=40)
@given(epochs=st.integers(1, 150), steps=st.integers(1, 50), data=st.data())
def test_curriculum_grows_from_nothing_to_everything(epochs, steps, data):
    full_from = data.draw(st.integers(1, epochs))
    strategy = im.Curriculum(replace(ATTACK, steps=steps), full_at=full_from / epochs)
    attacks = [strategy.attack_at(epoch / epochs) for epoch in range(epochs)]
    taken = [0 if attack is None else attack.steps for attack in attacks]
    assert taken[0] == 0
    assert taken == sorted(taken)
    assert all((count == steps) == (epoch >= full_from) for epoch, count in enumerate(taken) if steps == 1)
    assert all(count == steps for count in taken[full_from:])
    assert all(count <= steps for count in taken)


def test_a_curriculum_takes_the_attacks_own_first_steps():
    attack = im.PGD(im.L2(0.5), steps=8, step_size="annealed", random_start=False, loss="margin", stop_at=0.1)
    part = im.Curriculum(attack, full_at=1.0).attack_at(5 / 8)
    assert part == replace(attack, steps=5, step_size=(0.5, 0.5, 0.25, 0.25, 0.125))


@pytest.mark.parametrize(
    ("patience", "accuracies", "steps"),
    [
        (2, [], 0),
        (2, [0.5], 0),
        (2, [0.5, 0.5], 0),
        (2, [0.5, 0.5, 0.4], 1),  # twice no better than 0.5
        (2, [0.5, 0.4, 0.6, 0.5], 0),  # better in between: counted afresh
        (2, [0.5, 0.4, 0.6, 0.5, 0.6], 1),
        (2, [0.5, 0.5, 0.4, 0.1], 1),  # a harder attack: the first accuracy under it is the best so far
        (2, [0.5, 0.5, 0.4, 0.1, 0.2, 0.3], 1),
        (2, [0.5, 0.5, 0.4, 0.1, 0.1, 0.1], 2),
        (1, [0.5, 0.5, 0.5, 0.5], 2),
        (1, [0.5, 0.6, 0.7, 0.6], 1),
        (1, [0.5] * 40, 3),  # never more than the attack has
        (3, [0.9, 0.1, 0.2, 0.3], 1),
        (3, [0.9, 0.1, 0.2], 0),
    ],
)
@pytest.mark.parametrize("progress", [0.0, 0.99])
def test_patience(patience, accuracies, steps, progress):
    strategy = im.Curriculum(replace(ATTACK, steps=3), patience=patience)
    attack = strategy.attack_at(progress, [{"accuracy": accuracy} for accuracy in accuracies])
    assert (0 if attack is None else attack.steps) == steps


def test_patience_needs_accuracies():
    with pytest.raises(ValueError, match=r"history must hold 'accuracy', which this strategy needs, got \['loss'\]"):
        im.Curriculum(ATTACK, patience=1).attack_at(0.5, [{"loss": 1.0}])


def test_fgsm_first_then_pgd_from_epoch_20_of_120():
    strategy = im.FGSMThenPGD(ATTACK)
    attacks = [strategy.attack_at(epoch / 120) for epoch in range(120)]
    assert all(map(is_fgsm, attacks[:20]))
    assert attacks[20:] == [ATTACK] * 100
    fgsm = im.FGSMThenPGD(replace(ATTACK, loss="dlr"), switch=0.5).attack_at(0.49)
    assert fgsm == im.FGSM(ATTACK.threat, "dlr")


@settings(max_examples=40)
@given(epochs=st.integers(1, 150), data=st.data())
def test_the_switch_comes_at_its_epoch(epochs, data):
    switch = data.draw(st.integers(1, epochs))
    strategy = im.FGSMThenPGD(ATTACK, switch=switch / epochs)
    assert [is_fgsm(strategy.attack_at(epoch / epochs)) for epoch in range(epochs)] == [
        epoch < switch for epoch in range(epochs)
    ]


@given(progress=st.floats(0, 1, exclude_max=True))
def test_standard_and_unsecured_never_change(progress):
    assert im.Standard(ATTACK).attack_at(progress) is ATTACK
    assert im.Unsecured().attack_at(progress) is None


@pytest.mark.parametrize("name", ["unsecured", "standard", "curriculum", "patient", "fgsm-then-pgd", "dynamic"])
def test_only_an_automatic_c_max_asks_for_a_measure(name):
    assert KINDS[name].measures == set()


def test_a_warm_start_takes_few_steps_that_shrink():
    attack = im.WarmStart(im.PGD(im.L2(0.8), steps=10, loss="margin", stop_at=0.3), steps=3).attack_at(0.5)
    assert attack == im.PGD(im.L2(0.8), steps=3, step_size=(0.4, 0.2, 0.1), loss="margin")
    assert im.WarmStart(ATTACK).attack_at(0.0).steps == 2
    floored = im.WarmStart(ATTACK, floor=0.1).attack_at(0.0)
    assert (floored.stop_at, floored.gauge) == (0.1, "relative")


def test_one_step_as_published():
    attack = im.PGD(im.L2(0.8), steps=10, loss="margin", stop_at=0.3)
    assert im.FGSMRS(attack).attack_at(0.5) == im.PGD(im.L2(0.8), 1, 1.0, loss="margin")
    noisy = im.NFGSM(attack, step=0.5, noise=3.0).attack_at(0.5)
    assert (noisy.threat, noisy.steps, noisy.step_size, noisy.noise, noisy.loss) == (im.L2(0.8), 1, 0.4, 3, "margin")


def test_atta_starts_near_x_and_resets():
    strategy = im.ATTA(im.PGD(im.Linf(0.1), steps=10, loss="margin"), steps=3, step=0.25, reset_every=4)
    assert strategy.attack_at(0.5) == im.PGD(im.Linf(0.1), 3, 0.025, random_start=0.001, loss="margin")
    assert [epoch for epoch in range(13) if strategy.resets(epoch)] == [3, 7, 11]
    assert not any(im.ATTA(ATTACK, reset_every=None).resets(epoch) for epoch in range(20))


def test_free_and_prior_guided_steps_as_published():
    attack = im.PGD(im.Linf(0.1), steps=10, stop_at=0.3)
    assert im.Free(attack, step=0.5).attack_at(0.5) == im.PGD(im.Linf(0.1), 1, 0.05, random_start=False)
    assert im.FGSMPGI(attack, step=0.5).attack_at(0.5) == im.PGD(im.Linf(0.1), 1, 0.05)
    assert [epoch for epoch in range(100) if im.FGSMPGI(ATTACK).resets(epoch)] == [0, 40, 80]
    assert not any(im.FGSMPGI(ATTACK, reset_every=None).resets(epoch) for epoch in range(50))


def test_friendly_searches_go_on_longer_later():
    strategy = im.FAT(replace(ATTACK, stop_at=0.3))
    steps = [strategy.attack_at(epoch / 120).steps_after_success for epoch in range(120)]
    assert steps == [0] * 50 + [1] * 40 + [2] * 30  # as published, where epochs 50 and 90 are the last of their τ
    assert strategy.attack_at(0.5) == replace(ATTACK, stop_on_success=True, steps_after_success=1)
    assert im.FAT(ATTACK, rise_at=[0.5]) == im.FAT(ATTACK, rise_at=(0.5,))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("progress", [-0.1, 1.0, math.nan])
def test_progress_out_of_range(name, progress):
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\), got"):
        KINDS[name].attack_at(progress, [{"accuracy": 0.5, "halfway_gauge": 0.5}])


@pytest.mark.parametrize("kind", [type(one) for one in KINDS.values() if not isinstance(one, im.Unsecured)])
@pytest.mark.parametrize("attack", [None, "pgd", im.Linf(0.1), im.PGD])
def test_what_is_no_attack(untyped, kind, attack):
    with pytest.raises(TypeError, match=r"attack must be a PGD such as PGD\(Linf\(8 / 255\)\), got "):
        kind(attack)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: im.Curriculum(ATTACK, full_at=0.0), r"full_at must be in \(0, 1\], got 0\.0"),
        (lambda: im.Curriculum(ATTACK, full_at=1.1), r"full_at must be in \(0, 1\], got 1\.1"),
        (lambda: im.Curriculum(ATTACK, full_at=math.nan), r"full_at must be in \(0, 1\], got nan"),
        (lambda: im.Curriculum(ATTACK, patience=0), "patience must be an integer ≥ 1 or None, got 0"),
        (lambda: im.Curriculum(ATTACK, patience=1.5), r"patience must be an integer ≥ 1 or None, got 1\.5"),
        (lambda: im.FGSMThenPGD(ATTACK, switch=0.0), r"switch must be in \(0, 1\], got 0\.0"),
        (lambda: im.FGSMThenPGD(ATTACK, switch=20.0), r"switch must be in \(0, 1\], got 20\.0"),
        (lambda: im.Dynamic(ATTACK, zero_at=100.0), r"zero_at must be in \(0, 1\], got 100\.0"),
        (lambda: im.Dynamic(ATTACK, zero_at=0.0), r"zero_at must be in \(0, 1\], got 0\.0"),
        (lambda: im.Dynamic(ATTACK, 0.0), "c_max must be a finite number > 0, 'auto' or None, got 0"),
        (lambda: im.Dynamic(ATTACK, -0.5), "c_max must be a finite number > 0, 'auto' or None, got -0.5"),
        (lambda: im.Dynamic(ATTACK, math.nan), "c_max must be a finite number > 0, 'auto' or None, got nan"),
        (lambda: im.Dynamic(ATTACK, math.inf), "c_max must be a finite number > 0, 'auto' or None, got inf"),
        (lambda: im.Dynamic(ATTACK, "automatic"), "c_max must be a number > 0, 'auto' or None, got 'automatic'"),
        (lambda: im.WarmStart(ATTACK, steps=0), "steps must be at least 1, got 0"),
        (lambda: im.WarmStart(ATTACK, floor=-0.1), r"floor must be in \[0, 1\] or None, got -0\.1"),
        (lambda: im.WarmStart(ATTACK, floor=1.5), r"floor must be in \[0, 1\] or None, got 1\.5"),
        (lambda: im.WarmStart(ATTACK, floor=math.nan), r"floor must be in \[0, 1\] or None, got nan"),
        (lambda: im.FGSMRS(ATTACK, step=0.0), "step must be a finite number > 0, got 0"),
        (lambda: im.NFGSM(ATTACK, step=math.inf), "step must be a finite number > 0, got inf"),
        (lambda: im.NFGSM(ATTACK, noise=-1.0), "noise must be a finite number ≥ 0, got -1"),
        (lambda: im.ATTA(ATTACK, steps=0), "steps must be at least 1, got 0"),
        (lambda: im.ATTA(ATTACK, step=-1.0), "step must be a finite number > 0, got -1"),
        (lambda: im.ATTA(ATTACK, reset_every=0), "reset_every must be at least 1, got 0"),
        (lambda: im.FAT(ATTACK, rise_at=(0.5, 50.0)), r"rise_at must be in \(0, 1\], got 50"),
        (lambda: im.Free(ATTACK, replays=0), "replays must be at least 1, got 0"),
        (lambda: im.Free(ATTACK, step=0.0), "step must be a finite number > 0, got 0"),
        (lambda: im.FGSMPGI(ATTACK, momentum=-0.1), "momentum must be a finite number ≥ 0, got -0.1"),
        (lambda: im.FGSMPGI(ATTACK, weight=math.inf), "weight must be a finite number ≥ 0, got inf"),
        (lambda: im.FGSMPGI(ATTACK, reset_every=0), "reset_every must be at least 1, got 0"),
        (lambda: im.Dynamic(ATTACK, shape="line"), r"unknown shape 'line'; did you mean 'linear'\?"),
    ],
)
def test_bad_arguments(untyped, make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_strategy_is_built_by_its_name():
    options = {"curriculum": {"patience": 2}, "fgsm-pgd": {"switch": 0.5}, "dynamic": {"c_max": 0.3, "shape": "cosine"}}
    assert {name: build_strategy(name, ATTACK, **options.get(name, {})) for name in STRATEGIES} == {
        "unsecured": im.Unsecured(),
        "standard": im.Standard(ATTACK),
        "curriculum": im.Curriculum(ATTACK, patience=2),
        "fgsm-pgd": im.FGSMThenPGD(ATTACK, switch=0.5),
        "dynamic": im.Dynamic(ATTACK, c_max=0.3, shape="cosine"),
        "warm-start": im.WarmStart(ATTACK),
        "fgsm-rs": im.FGSMRS(ATTACK),
        "n-fgsm": im.NFGSM(ATTACK),
        "atta": im.ATTA(ATTACK),
        "fat": im.FAT(ATTACK),
        "free": im.Free(ATTACK),
        "fgsm-pgi": im.FGSMPGI(ATTACK),
    }


def test_a_strategy_that_is_not_there():
    with pytest.raises(ValueError, match="unknown strategy 'dynamik'; did you mean 'dynamic'"):
        build_strategy("dynamik", ATTACK)
    with pytest.raises(TypeError, match="c_max"):
        build_strategy("standard", ATTACK, c_max=0.5)


def test_every_strategy_has_its_place_in_the_documentation():
    docs = Path(__file__).parents[1] / "docs"
    for page in ("concepts/strategies.md", "reference/strategies.md"):
        told = (docs / page).read_text()
        assert all(kind.__name__ in told for kind in STRATEGIES.values()), page


def test_a_strategy_that_is_added_is_on_the_command_line(tmp_path):
    """An entry in the registry is all that it takes."""
    code = """
        import dataclasses, sys
        import innermax as im
        from innermax.cli import main
        from innermax.strategies import STRATEGIES

        @dataclasses.dataclass(frozen=True)
        class Mine(im.Standard):
            pass

        STRATEGIES["mine"] = Mine
        words = ["--strategy", "mine", "--epochs", "1", "--attacks="]
        assert main(["train", "digits", *words, "--run-dir", "run"]) == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=True, capture_output=True)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["training"]["strategy"]["name"] == "Mine"


@pytest.mark.parametrize("build", {type(one) for one in KINDS.values()} - {im.Unsecured})
def test_attacks_maximise_what_the_objective_says(build):
    own = build(ATTACK)
    other = search_for(own, KLDivergence())
    assert type(other) is build
    assert other.attack == replace(ATTACK, loss=KLDivergence())
    for progress in (0.0, 0.5, 0.9):
        attack = other.attack_at(progress, [{"halfway_gauge": 0.1, "accuracy": 0.5}] if progress else ())
        assert attack is None or (attack.loss == KLDivergence() and attack.random_start)
    assert search_for(own, None) is own
    assert search_for(other, KLDivergence()) == other


def test_a_strategy_of_ones_own_searches_as_the_objective_says():
    class Own:
        warm_start = True
        measures = frozenset({"halfway_gauge"})
        attack = ATTACK

        def attack_at(self, progress, history=()):
            return None if progress < 0.5 else replace(ATTACK, steps=2)

    other = search_for(Own(), KLDivergence())
    assert other.attack_at(0.1) is None
    assert other.attack_at(0.6) == replace(ATTACK, steps=2, loss=KLDivergence())
    assert other.attack == replace(ATTACK, loss=KLDivergence())
    assert (other.warm_start, other.measures) == (True, {"halfway_gauge"})
    assert not hasattr(other, "patience")


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            im.Unsecured(),
            r"strategy must attack where the objective says .* got Unsecured; use objective cross_entropy",
        ),
        (
            im.Standard(replace(ATTACK, loss="margin")),
            r"loss of the strategy's attack must be left out .* got 'margin'",
        ),
        (im.Standard(im.FGSM(ATTACK.threat)), r"random_start must be True with loss KLDivergence\(\)"),
    ],
)
def test_what_a_strategy_cannot_serve(strategy, message):
    with pytest.raises(ValueError, match=message):
        search_for(strategy, KLDivergence())
