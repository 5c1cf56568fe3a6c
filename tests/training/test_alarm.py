"""The alarm for catastrophic overfitting: when it is raised, what follows, and that a resumed run hears the same."""

import json
import math

import pytest

import innermax as im
from innermax.attacks.noisy_pgd import NoisyPGD
from innermax.training import alarm as module
from innermax.training.alarm import Alarm, Overfitting, Raised, is_alarm, strengthen
from tests.helpers.networks import same
from tests.helpers.training import ATTACK, LINF, Interrupting, cnn, saved, stop, timeless, train, weights

FGSM = im.Standard(im.FGSM(LINF))


def heard(*parts, alarm=None):
    """An alarm after parts of an epoch, each of which has one example of that value; one part without an example."""
    alarm = Alarm() if alarm is None else alarm
    for number, value in enumerate(parts):
        alarm = (alarm if value is None else alarm.hear([value])).end_part(0, number)
    return alarm


def raised_at(*parts):
    return [raised.batch for raised in heard(*parts).raised]


def test_it_is_raised_where_the_gauge_is_high_and_has_risen():
    level, rise = module.LEVEL, module.RISE
    calm = 0.9 * level / rise
    assert raised_at(calm, calm, 0.99 * level) == []
    assert raised_at(calm, calm, 1.01 * level) == [2]
    assert raised_at(0.99, 0.9, 0.99) == [], "high from the start, as in a network that has learned nothing"
    assert raised_at(level, 0.99 * rise * level) == []
    assert raised_at(level, 1.01 * rise * level) == [1]
    assert raised_at(calm, None, None, 1.01 * level) == [3]
    assert raised_at(1.01 * level, calm) == []


def test_a_part_is_judged_by_the_mean_of_its_examples():
    alarm = Alarm().hear([0.1, 0.3]).hear([0.2]).end_part(0, 3)
    assert (alarm.lowest, alarm.total, alarm.examples) == (pytest.approx(0.2), 0.0, 0)
    loud = alarm.hear([0.5, 0.9]).end_part(4, 7)
    assert loud.raised == (Raised(4, 7, pytest.approx(0.7)),)
    assert loud.row(4) == {"overfit_batch": 7, "overfit_relative_fosc": pytest.approx(0.7)}
    assert loud.row(3) == {}
    assert loud.explain().startswith("relative FOSC is 0.70 on average at batch 8 of epoch 5, after 0.20 at its lowest")


def test_after_it_was_raised_it_rests():
    assert raised_at(0.1, 0.5, 0.5, 0.5, 0.5, 0.1, 0.5) == [1, 4]
    assert module._REST == 2


def test_a_checkpoint_keeps_it():
    alarm = heard(0.1, 0.5, 0.123456789).hear([0.7, 0.1])
    position = json.loads(json.dumps(alarm.position()))
    assert is_alarm(position)
    assert Alarm.at(position) == alarm
    assert Alarm.at({}) == Alarm()
    for name, value in (
        ("total", math.nan),
        ("lowest", "0.1"),
        ("raised", [[1, 2]]),
        ("raised", 3),
        ("rest", None),
        ("another", 1),
    ):
        assert not is_alarm(position | {name: value})
    assert not is_alarm({})


@pytest.mark.parametrize(
    ("attack", "more", "steps", "size"),
    [
        (im.FGSM(LINF), 1, 2, LINF.eps / 2),
        (im.FGSMRS(ATTACK).attack_at(0.0), 1, 2, 1.25 * LINF.eps / 2),
        (im.NFGSM(ATTACK).attack_at(0.0), 2, 3, LINF.eps / 3),
        (ATTACK, 1, 5, LINF.eps / 5),
        (im.WarmStart(ATTACK).attack_at(0.0), 1, 3, LINF.eps / 4),
    ],
)
def test_a_strengthened_attack_goes_as_far_in_more_steps(attack, more, steps, size):
    strong = strengthen(attack, more)
    assert strong.step_sizes() == pytest.approx([size] * steps)
    assert (type(strong), strong.random_start, strong.loss) == (type(attack), attack.random_start, attack.loss)
    assert not isinstance(attack, NoisyPGD) or strong.noise == attack.noise
    assert strengthen(attack, 0) is attack


@pytest.mark.parametrize("strategy", [im.Free(ATTACK), im.FGSMPGI(ATTACK)])
def test_a_strategy_of_one_step_cannot_be_strengthened(strategy):
    with pytest.raises(
        ValueError, match=f"on_overfit must not be 'strengthen' with strategy {type(strategy).__name__}"
    ):
        train(strategy=strategy, on_overfit="strengthen")


@pytest.fixture
def nervous(monkeypatch):
    """An alarm that is raised at every part but those in which it rests."""
    monkeypatch.setattr(module, "LEVEL", 0.0)
    monkeypatch.setattr(module, "RISE", 0.0)


@pytest.mark.usefixtures("nervous")
def test_it_warns_once(tmp_path):
    with pytest.warns(UserWarning, match="overfit catastrophically; on_overfit strengthen would add a step") as caught:
        run = train(strategy=FGSM, epochs=3, run_dir=tmp_path / "run", on_overfit="warn")
    assert len(caught) == 1
    assert [row["attack_steps"] for row in run.history] == [1, 1, 1]
    (first, *_) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["overfit_batch"] == 0
    assert 0 < first["overfit_relative_fosc"] < 1
    assert f"is {first['overfit_relative_fosc']:.2f} on average at batch 1 of epoch 1" in str(caught[0].message)


@pytest.mark.usefixtures("nervous")
def test_it_stops():
    with pytest.raises(Overfitting, match=r"at batch 1 of epoch 1, .*; on_overfit strengthen adds steps"):
        train(strategy=FGSM, epochs=3, on_overfit="stop")


@pytest.mark.usefixtures("nervous")
def test_it_strengthens_from_the_next_batch_on():
    run = train(strategy=FGSM, epochs=3, on_overfit="strengthen")
    # Three batches an epoch, each the end of a part: raised at batch 0, 3 and 6 of the training.
    assert [row["attack_steps"] for row in run.history] == [2, 3, 4]
    assert [row["gradients"] for row in run.history] == pytest.approx([5 / 3, 8 / 3, 11 / 3])
    assert [row["overfit_batch"] for row in run.history] == [0, 0, 0]


def test_looking_changes_nothing():
    runs = [train(cnn(), strategy=FGSM, epochs=2, on_overfit=how) for how in ("ignore", "warn", "strengthen")]
    assert all(same(weights(runs[0].model), weights(run.model)) for run in runs[1:])
    assert all("overfit_batch" not in row for run in runs for row in run.history)


@pytest.mark.usefixtures("nervous")
@pytest.mark.parametrize("strategy", [im.Unsecured(), im.Free(ATTACK, replays=2)])
def test_where_no_search_has_ended_there_is_nothing_to_hear(strategy):
    run = train(strategy=strategy, epochs=2, on_overfit="warn")
    assert all("overfit_batch" not in row for row in run.history)


@pytest.mark.usefixtures("nervous")
@pytest.mark.parametrize("at", [1, 2, 3, 5, 8])
def test_a_resumed_run_hears_the_same(tmp_path, at):
    options = {"strategy": im.Standard(im.FGSM(LINF)), "epochs": 3, "on_overfit": "strengthen", "lr": 0.05}
    whole = train(cnn(), objective=Interrupting(), **options)
    kept = options | {"run_dir": tmp_path / "run", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        train(cnn(), objective=Interrupting(at, stop), **kept)
    again = train(cnn(), objective=Interrupting(), **kept)
    assert same(weights(again.model), weights(whole.model))
    assert timeless(again.history) == timeless(whole.history)
    assert Alarm.at(saved(tmp_path / "run")[1]["alarm"]).raised[0].batch == 0
