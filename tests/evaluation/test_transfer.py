"""Transfer: one model's images on other models, against closed forms and against `evaluate`."""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import innermax as im
from innermax.utils.intervals import accuracy, paired_difference
from tests.helpers.evaluation import Noise, Scripted, Watched, examples, network

PGD = im.PGD(im.Linf(0.1), steps=4)


ATTACKS = {"fgsm": im.FGSM(im.Linf(0.1)), "pgd": PGD}


def linear(weight, bias=0.0):
    """A model of two classes whose margin is ±(x·weight + bias)."""
    model = nn.Linear(len(weight), 2)
    with torch.no_grad():
        model.weight.copy_(torch.stack([-weight, weight]) / 2)
        model.bias.copy_(torch.tensor([-bias, bias]) / 2)
    return model


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
@pytest.mark.parametrize("threat", [im.Linf(0.1), im.L2(0.2)])
def test_linear_models_in_closed_form(threat, attack):
    """On images x − y·d of a linear surrogate, with d its threat's worst direction, a margin y·w·x loses w·d."""
    generator = torch.Generator().manual_seed(3)
    x = 0.35 + 0.3 * torch.rand(300, 12, generator=generator)
    y = torch.randint(0, 2, (300,), generator=generator)
    sign = 2.0 * y - 1
    source, other = torch.randn(2, 12, generator=generator)
    shift = threat.eps * (source.sign() if isinstance(threat, im.Linf) else source / source.norm())
    blind = other - shift * (other @ shift) / (shift @ shift)
    weights = {"itself": source, "other": other, "blind": blind, "opposed": -source}
    models = {name: linear(weight, -float(x.mean(0) @ weight)) for name, weight in weights.items()}
    made = {"fgsm": im.FGSM(threat), "pgd": im.PGD(threat, steps=4, random_start=False)}[attack]
    result = im.transfer(models["itself"], models, (x, y), {attack: made}, batch_size=70)
    for name, weight in weights.items():
        margin = sign * ((x - x.mean(0)) @ weight)
        attacked = margin - weight @ shift
        sure = (attacked.abs() > 1e-4).numpy()
        assert sure.sum() > 290 or name == "blind"
        assert np.array_equal(result.correct("surrogate", name, attack)[sure], (attacked > 0).numpy()[sure])
        assert result.clean_accuracy[name].correct == int((margin > 0).sum())
    cells = {name: cells[attack].correct for name, cells in result.accuracy["surrogate"].items()}
    assert cells["itself"] < result.clean_accuracy["itself"].correct
    assert cells["opposed"] > result.clean_accuracy["opposed"].correct, "the images of an opposite help"
    assert cells["blind"] == result.clean_accuracy["blind"].correct
    assert result.white_box == (("surrogate", "itself"),)


@pytest.mark.parametrize("options", [{}, {"quantize": 8, "seed": 3}, {"precision": "auto"}])
@pytest.mark.parametrize("make", [network, lambda: nn.Sequential(network(), Noise(1.0))])
def test_on_itself_a_surrogate_gets_evaluates_numbers(make, options):
    model = make()
    evaluation = im.evaluate(model, examples(), ATTACKS, batch_size=25, **options)
    targets = {"before": nn.Sequential(network(1), Noise(1.0)), "itself": model}
    result = im.transfer({"other": network(2), "itself": model}, targets, examples(), ATTACKS, batch_size=25, **options)
    assert np.array_equal(result.clean_correct["itself"], evaluation.correct("clean"))
    assert result.clean_accuracy["itself"] == evaluation.accuracy["clean"]
    for name in ATTACKS:
        assert np.array_equal(result.correct("itself", "itself", name), evaluation.correct(name))
        assert result.accuracy["itself"]["itself"][name] == evaluation.accuracy[name]
    assert result.white_box == (("itself", "itself"),)
    itself = f"itself: {evaluation.settings.attack_network}"
    assert result.settings.attack_network.endswith(itself)
    assert replace(result.settings, attack_network="") == replace(evaluation.settings, attack_network="")


def test_every_cell_is_the_attacks_images_on_the_target():
    images, labels = examples()
    surrogates, targets = {"a": network(0), "b": network(1)}, {"c": network(2), "d": network(3)}
    result = im.transfer(surrogates, targets, (images, labels), ATTACKS)
    assert result.white_box == ()
    for surrogate, source in surrogates.items():
        for target, model in targets.items():
            for name, attack in ATTACKS.items():
                image = attack(source, images.float() / 255, labels).x_adv
                with torch.no_grad():
                    expected = (model.eval()(image).argmax(1) == labels).numpy()
                assert np.array_equal(result.correct(surrogate, target, name), expected)
                assert result.accuracy[surrogate][target][name] == accuracy(int(expected.sum()), 40)
    assert list(result.accuracy) == ["a", "b"]
    assert list(result.accuracy["a"]) == ["c", "d"]
    assert list(result.accuracy["a"]["c"]) == list(ATTACKS)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_the_batch_size_changes_nothing(batch_size):
    attack = replace(PGD, restarts=2, stop_at=0.05, gauge="relative")
    models = {"a": network(0), "b": network(1)}
    whole, parts = (im.transfer(models, models, examples(9), {"pgd": attack}, batch_size=n) for n in (9, batch_size))
    assert whole.white_box == (("a", "a"), ("b", "b"))
    for surrogate in models:
        for target in models:
            found = parts.correct(surrogate, target, "pgd")
            assert np.array_equal(whole.correct(surrogate, target, "pgd"), found)


def test_the_seed_decides_random_starts():
    one, two = network(0), network(1)
    attack = {"pgd": im.PGD(im.Linf(0.5), steps=1, step_size=1e-6)}
    found = [im.transfer(one, {"two": two}, examples(), attack, seed=seed) for seed in (0, 0, 1)]
    columns = [result.correct("surrogate", "two", "pgd") for result in found]
    assert np.array_equal(columns[0], columns[1])
    assert not np.array_equal(columns[0], columns[2])


def test_images_are_made_once_and_scored_before_the_next():
    told = []

    def point(x, y, index):
        told.append(("made", len(x)))
        return x + 0.01

    targets = {name: Watched(lambda x, name=name: told.append((name, len(x)))) for name in ("one", "two")}
    surrogate = Watched(lambda x: None)
    images, labels = examples(25, classes=2)
    im.transfer(surrogate, targets, (images, labels), {"a": Scripted(im.Linf(0.1), point)}, batch_size=10)
    attacked = told[told.index(("made", 10)) :]
    assert attacked == [(who, size) for size in (10, 10, 5) for who in ("made", "one", "two")]


@pytest.mark.parametrize("quantize", [None, 8])
def test_every_target_sees_the_same_admitted_images(quantize):
    one, two = [], []
    targets = {"one": Watched(one.append), "two": Watched(two.append)}
    far = Scripted(im.L2(0.3), lambda x, y, index: x + 10)
    images, labels = examples(20, classes=2)
    im.transfer(Watched(lambda x: None), targets, (images, labels), {"far": far}, quantize=quantize)
    x = images.float() / 255
    assert torch.equal(one[-1], two[-1])
    assert not torch.equal(one[-1], x)
    assert far.threat.contains(one[-1], x).all()
    assert (quantize is None) != bool((one[-1] * 255 - (one[-1] * 255).round()).abs().max() < 1e-3)


def test_targets_that_draw_do_not_hang_on_each_other():
    noisy = nn.Sequential(network(1), Noise(1.0))
    alone = im.transfer(network(0), {"noisy": noisy}, examples(), ATTACKS)
    beside = im.transfer(
        network(0), {"more": nn.Sequential(network(2), Noise(1.0)), "noisy": noisy}, examples(), ATTACKS
    )
    assert np.array_equal(alone.clean_correct["noisy"], beside.clean_correct["noisy"])
    for name in ATTACKS:
        assert np.array_equal(alone.correct("surrogate", "noisy", name), beside.correct("surrogate", "noisy", name))


def test_models_and_the_random_state_are_left_as_found():
    models = [network(0), network(1).eval()]
    models[0][0].bias.requires_grad_(False)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        im.transfer(models[0], {"b": models[1]}, examples(), ATTACKS)
    assert torch.equal(torch.get_rng_state(), state)
    assert [model.training for model in models] == [True, False]
    assert not models[0][0].bias.requires_grad
    assert all(parameter.grad is None for model in models for parameter in model.parameters())
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_a_wrapped_model_is_the_model():
    model = network(0)
    result = im.transfer({"a": nn.DataParallel(model)}, {"b": model, "c": network(0)}, examples(), ATTACKS)
    assert result.white_box == (("a", "b"),), "a copy is another model, whatever its weights"
    assert result.accuracy["a"]["b"] == result.accuracy["a"]["c"]


def test_differences_are_paired():
    result = im.transfer({"a": network(0), "b": network(1)}, {"c": network(2), "d": network(3)}, examples(), ATTACKS)
    one, other = ("a", "c", "pgd"), ("b", "d", "fgsm")
    mine, theirs = result.correct(*one), result.correct(*other)
    found = result.difference(one, other)
    assert found == paired_difference(int((mine & ~theirs).sum()), int((theirs & ~mine).sum()), 40)
    assert found.estimate == pytest.approx(mine.mean() - theirs.mean())
    assert result.difference(one, one).estimate == 0
    for wrong, words in [
        (("aa", "c", "pgd"), "unknown surrogate 'aa'; did you mean 'a'"),
        (("a", "cc", "pgd"), "unknown target 'cc'; did you mean 'c'"),
        (("a", "c", "pdg"), "unknown attack 'pdg'; did you mean 'pgd'"),
    ]:
        with pytest.raises(ValueError, match=words):
            result.difference(one, wrong)


def test_json_round_trip(tmp_path):
    model = network(0)
    models = {"ä": model, "b": network(1)}
    result = im.transfer(models, {"ä": model, "c": network(2)}, examples(), ATTACKS, seed=3, quantize=8)
    text = result.to_json(tmp_path / "transfer.json")
    assert (tmp_path / "transfer.json").read_text(encoding="utf-8") == text + "\n"
    document = json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))
    assert document["accuracy"]["b"]["c"]["pgd"]["correct"] == result.accuracy["b"]["c"]["pgd"].correct
    assert document["clean_accuracy"]["c"]["low"] == result.clean_accuracy["c"].low
    again = im.Transfer.from_json(text)
    assert again.to_json() == text
    assert again.settings == result.settings
    assert again.white_box == result.white_box == (("ä", "ä"),)
    assert again.accuracy == result.accuracy
    assert again.difference(("b", "c", "pgd"), ("ä", "c", "pgd")) == result.difference(
        ("b", "c", "pgd"), ("ä", "c", "pgd")
    )
    with pytest.raises(OSError, match="nowhere"):
        result.to_json(tmp_path / "nowhere" / "transfer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["transfer.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"examples": {"clean_correct": 3}, "settings": {}}', "null"])
def test_other_texts_are_no_transfer(text):
    with pytest.raises(ValueError, match="text must be a transfer's JSON"):
        im.Transfer.from_json(text)


def test_progress():
    told = []
    im.transfer(
        network(), {"b": network(1)}, examples(), {"pgd": PGD}, batch_size=25, progress=lambda *s: told.append(s)
    )
    assert told == [(name, done, 40) for name in ("clean", "surrogate: pgd") for done in (25, 40)]


def evaluated(**changed):
    arguments = {
        "surrogates": {"a": network(0), "b": nn.Sequential(network(1), Noise(1.0))},
        "targets": {"index": network(2), "noisy": nn.Sequential(network(3), Noise(1.0))},
        "test_set": examples(),
        "attacks": ATTACKS,
        "batch_size": 15,
        "seed": 3,
    }
    return im.transfer(**arguments | changed)


TITLES = [f"{surrogate}: {attack}" for surrogate in "ab" for attack in ATTACKS]


def test_rows_are_kept_and_a_stopped_transfer_goes_on(tmp_path, monkeypatch):
    expected, folder = evaluated(), tmp_path / "rows"

    def stop(name, done, total):
        if (name, done) == ("b: fgsm", 30):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        evaluated(rows_dir=folder, progress=stop)
    assert str(folder) in caught.value.__notes__[0]
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("parts/*/*.parquet")}
    assert len(kept) == 3 * 3 + 2  # clean, and of surrogate a, three parts each; and two more
    assert not (folder / "rows.parquet").exists()
    told = []
    result = evaluated(rows_dir=folder, progress=lambda *step: told.append(step))
    assert result.to_json() == expected.to_json()
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in folder.rglob("parts/*/*.parquet")}.items()
    assert told == [(name, done, 40) for name in ("clean", *TITLES) for done in (15, 30, 40)]
    monkeypatch.setattr(im.PGD, "__call__", lambda *_, **__: pytest.fail("attacked again"))
    assert evaluated(rows_dir=folder).to_json() == expected.to_json()
    table = pq.read_table(folder / "rows.parquet").to_pandas()
    assert list(table) == ["surrogate", "target", "attack", "index", "clean_correct", "correct"]
    assert len(table) == 2 * 2 * 2 * 40
    for (surrogate, target, attack), rows in table.groupby(["surrogate", "target", "attack"]):
        assert rows["index"].tolist() == list(range(40))
        assert np.array_equal(rows.correct, expected.correct(surrogate, target, attack))
        assert np.array_equal(rows.clean_correct, expected.clean_correct[target])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 4}, "seed: 3 there, 4 here"),
        ({"targets": {"index": network(2), "noisy": network(7)}}, "model.target noisy: Sequential there"),
        ({"targets": {"index": network(2)}}, "model.target noisy: Sequential there, None here"),
        ({"surrogates": {"a": network(0)}}, "model.surrogate b: Sequential there, None here"),
        ({"attacks": {"fgsm": PGD, "pgd": PGD}}, "attacks.fgsm.steps: 1 there, 4 here"),
    ],
)
def test_the_rows_of_another_transfer_are_refused(tmp_path_factory, changed, words):
    folder = tmp_path_factory.getbasetemp() / "another"
    evaluated(rows_dir=folder)
    with pytest.raises(ValueError, match=f"belongs to another evaluation .*{words}|weights.target noisy"):
        evaluated(rows_dir=folder, **changed)


def test_a_part_of_other_targets_is_not_taken(tmp_path):
    folder = tmp_path / "rows"
    expected = evaluated(rows_dir=folder)
    one, other = sorted((folder / "parts").rglob("*.parquet"))[:2]
    one.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match="is damaged .*its rows are computed again"):
        assert evaluated(rows_dir=folder).to_json() == expected.to_json()


def test_two_processes_find_the_same(tmp_path):
    told = []
    found = evaluated(devices=2, rows_dir=tmp_path / "rows", progress=lambda *step: told.append(step))
    assert found.to_json() == evaluated().to_json()
    assert {step for step in told if step[1] == 40} == {(name, 40, 40) for name in ("clean", *TITLES)}


@pytest.mark.slow
def test_two_processes_find_the_same_of_one_model_and_refuse_a_broken_one():
    model = network(0)
    once, twice = (evaluated(surrogates={"a": model}, targets={"a": model}, devices=n) for n in (1, 2))
    assert once.to_json() == twice.to_json()
    with pytest.raises(ValueError, match="surrogate 'a': target 'b': the model returns NaN logits for"):
        evaluated(surrogates={"a": network()}, targets={"b": Broken()}, devices=2)


def test_names_that_cannot_be_told_apart_are_refused():
    surrogates = {"a": network(0), "a: b": network(1)}
    with pytest.raises(ValueError, match="must have names that tell them apart, got 'a: b: c' twice"):
        evaluated(surrogates=surrogates, attacks={"b: c": PGD, "c": PGD})


def test_probabilities_are_warned_of_once():
    model = nn.Sequential(network(0), nn.Softmax(1))
    with pytest.warns(UserWarning, match="surrogate 'a' seems to return probabilities") as caught:
        im.transfer({"a": model}, {"b": model}, examples(), ATTACKS, batch_size=8)
    assert len(caught) == 1


class Broken(nn.Module):
    """NaN for every image that is not on the 8-bit grid: for images that have been attacked, in practice."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        off = ((x * 255).round() - x * 255).abs().flatten(1).amax(1) > 1e-3
        return torch.where(off[:, None], math.nan, self.inner(x))


def test_nan_is_refused_and_said_where():
    with pytest.raises(ValueError, match="surrogate 'surrogate': target 'b': the model returns NaN logits for"):
        im.transfer(network(), {"b": Broken()}, examples(), {"pgd": PGD})
    with pytest.raises(ValueError, match="surrogate 'a': the model returns NaN logits for"):
        im.transfer({"a": Broken()}, {"b": network()}, examples(), {"pgd": PGD})


def never(x, y, index):
    pytest.fail("attacked before everything was known to fit")


IDLE = Scripted(im.Linf(0.1), never)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"surrogates": {}}, ValueError, "surrogates must hold at least one model, got none"),
        ({"targets": {}}, ValueError, "targets must hold at least one model, got none"),
        ({"attacks": {}}, ValueError, "attacks must hold at least one attack, got none"),
        ({"attacks": {"clean": PGD}}, ValueError, "a text other than clean, worst_case, got 'clean'"),
        ({"targets": {"": network()}}, ValueError, "a model's name must be a text, got '' in targets"),
        ({"targets": network()}, TypeError, None),
        ({"surrogates": [network()]}, TypeError, None),
        ({"targets": {"b": print}}, TypeError, None),
        ({"targets": {"surrogate": network()}}, ValueError, "'surrogate' names two models"),
        (
            {"targets": {"b": network(classes=5)}},
            ValueError,
            "same classes: surrogate 'surrogate' has 4, target 'b' has 5",
        ),
        (
            {"targets": {"b": network(), "c": network(classes=3)}},
            ValueError,
            "surrogate 'surrogate' has 4, target 'c' has 3",
        ),
        (
            {"targets": {"b": nn.Sequential(nn.Flatten(), nn.Linear(9, 4))}},
            ValueError,
            r"target 'b': the model fails on x of shape \(32, 1, 6, 6\)",
        ),
        ({"surrogates": nn.Flatten(0)}, ValueError, "surrogate 'surrogate': the model must return logits of shape"),
        ({"test_set": examples(classes=9)}, ValueError, r"target 'b': the labels of test_set must be in 0…3"),
        (
            {"targets": {"b": nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), network())}},
            ValueError,
            "target 'b': model layer '0'",
        ),
        (
            {"attacks": {"a": replace(IDLE, threat=im.Linf(0.1, bounds=(0, 0.5)))}},
            ValueError,
            "attack 'a' does not fit",
        ),
        (
            {"attacks": {"a": Scripted(im.Linf(0.1), lambda x, y, index: x * math.nan)}},
            ValueError,
            "'a' must return finite",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"quantize": 17}, ValueError, "quantize must be in 1…16 or None"),
        ({"precision": "half"}, (ValueError, TypeError), None),
        ({"seed": 1.5}, TypeError, None),
        ({"test_set": 3}, TypeError, None),
        ({"device": "cud"}, ValueError, "or one that torch has here, got 'cud'"),
        ({"devices": 0}, ValueError, "devices must be at least 1"),
        ({"devices": 1.5}, TypeError, None),
        ({"progress": "yes"}, TypeError, None),
    ],
)
def test_wrong_arguments(changed, error, words):
    arguments = {"surrogates": network(), "targets": {"b": network(1)}, "test_set": examples(), "attacks": {"a": IDLE}}
    with pytest.raises(error, match=words):
        im.transfer(**arguments | changed)
