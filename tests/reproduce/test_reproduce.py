"""The paper reproduced: settings, cache, comparisons, and every artifact at the smallest scale."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import lightning_fabric  # noqa: F401  # before a clock runs that interrupts
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

import innermax as im
from innermax.attacks.pgd import PGD
from innermax.cli import main
from innermax.reproduce import cache, comparison, figures, unfinished
from innermax.reproduce.answers import Answers
from innermax.reproduce.cache import Cache, InUse, hash_name
from innermax.reproduce.comparison import TableRow, build_attacks
from innermax.reproduce.experiments import Followed, Gauged, Scored, Trained, unpack_correct
from innermax.reproduce.run import ARTIFACTS, reproduce
from innermax.reproduce.scales import SCALES, Training
from innermax.training.checkpoints import find_checkpoints
from innermax.utils.files import load_tensors

pytestmark = pytest.mark.timeout(900)  # the slow tests make every artifact, in minutes on a busy machine
SMOKE = SCALES["smoke"]
TINY = replace(SMOKE.mnist, epochs=1, train=100)


def make_cache(folder, **options):
    answers = Answers(folder / "results" / "smoke" / "answers.json.xz", [folder / "models" / "answers"])
    return Cache(answers, folder / "models", **options)


@pytest.fixture
def store(tmp_path):
    return make_cache(tmp_path)


def tiny(strategy="standard", seed=0, **changes):
    setting = replace(TINY, **changes)
    return Training(setting, setting.strategy(strategy), seed)


# Settings


def test_the_full_scale_is_the_papers():
    full = SCALES["full"]
    mnist, cifar, wide = full.mnist, full.cifar, full.wide
    assert (mnist.data, mnist.model, mnist.eps, mnist.epochs, mnist.steps) == ("mnist", "mnist-cnn", 0.3, 50, 10)
    assert (cifar.data, cifar.model, cifar.eps, cifar.epochs, cifar.steps) == ("cifar10", "cifar-cnn", 8 / 255, 120, 10)
    assert (wide.model, wide.options, wide.epochs, full.surrogate.model) == ("wideresnet", {}, 205, "resnet50")
    for setting, epochs in ((mnist, (20, 40)), (cifar, (60, 100))):
        assert [round(drop * setting.epochs) for drop in setting.lr_drops] == list(epochs)
        assert (setting.lr, setting.weight_decay, setting.batch_size, setting.train) == (0.01, 1e-4, 128, None)
    assert mnist.strategy("dynamic") == im.Dynamic(PGD(im.Linf(0.3), 10, gauge="ball"), c_max=0.5, zero_at=40 / 50)
    assert cifar.strategy("dynamic").zero_at == 100 / 120
    assert set(full.images.values()) == {None}


def test_without_matplotlib_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["reproduce", "table1", "figure5", "--scale", "smoke", "--out", str(tmp_path / "out")]
    assert main([*words, "--cache", str(tmp_path / "cache")]) == 2
    assert "innermax[report]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert reproduce(["table1"], scale="smoke", out=tmp_path / "out", cache=tmp_path / "cache", minutes=0)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown scale 'ful'; did you mean 'full'"):
        reproduce(["table1"], scale="ful")
    with pytest.raises(ValueError, match="unknown table or figure 'tabel1'; did you mean 'table1'"):
        reproduce(["tabel1"])
    with pytest.raises(ValueError, match="unknown strategy 'dynamik'; did you mean 'dynamic'"):
        TINY.strategy("dynamik")


# The cache


def test_an_experiment_is_run_once(store, monkeypatch):
    experiment = Trained(tiny())
    assert store.find(experiment) is None
    first = store.measure(experiment)
    assert len(first["history"]) == 1
    assert first["environment"]["versions"]["torch"] == torch.__version__
    assert store.measure(Trained(tiny(seed=3)))["environment"]["seed"] == 3
    monkeypatch.setattr(im, "train", None)
    assert store.measure(experiment) == store.find(experiment) == first


@pytest.mark.parametrize("largest", [10**6, 100])
def test_a_network_is_exported(tmp_path, monkeypatch, largest):
    monkeypatch.setattr(cache, "_LARGEST", largest)
    store = make_cache(tmp_path, exports=tmp_path / "exports")
    run = store.train(tiny())
    (folder,) = store.exports.iterdir()
    assert folder.name == hash_name(tiny())
    weights, _ = load_tensors(folder / "model.safetensors")
    lowered = {value.dtype for value in weights.values() if value.ndim > 1} == {torch.bfloat16}
    assert lowered == (largest < 1000)
    assert all(value.dtype != torch.bfloat16 for value in weights.values() if value.ndim < 2)
    found = im.load_model(folder).state_dict()
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=2**-8 if lowered else 0, atol=0)


@pytest.mark.parametrize("best", [False, True])
def test_a_network_that_is_not_in_the_cache_is_taken_from_the_shared_copy(tmp_path, monkeypatch, best):
    store = make_cache(tmp_path, exports=tmp_path / "exports")
    trained = store.network(tiny(), best=best).state_dict()
    monkeypatch.setattr(im, "train", lambda *arguments, **options: pytest.fail("trained a second time"))
    found = replace(store, models=tmp_path / "elsewhere").network(tiny(), best=best)
    assert not found.training
    assert all(torch.equal(value, trained[name]) for name, value in found.state_dict().items())


def test_a_shared_copy_in_bf16_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_LARGEST", 0)
    store = make_cache(tmp_path, exports=tmp_path / "exports")
    store.train(tiny())
    assert replace(store, models=tmp_path / "elsewhere")._find_export(hash_name(tiny())) is None


def test_the_best_epochs_network_is_exported_beside_the_last(tmp_path):
    store = make_cache(tmp_path, exports=tmp_path / "exports")
    best = store.network(tiny(epochs=2), best=True).state_dict()
    name = hash_name(tiny(epochs=2))
    assert {folder.name for folder in store.exports.iterdir()} == {name, f"{name}-best"}
    found = im.load_model(store.exports / f"{name}-best").state_dict()
    assert all(torch.equal(found[key], value) for key, value in best.items())


def test_an_experiment_has_the_same_name_in_another_process():
    experiment = Scored(tiny("dynamic"), build_attacks(0.15), 20)
    code = (
        "from dataclasses import replace; from innermax.reproduce.scales import SCALES, Training;"
        "from innermax.reproduce.experiments import Scored; from innermax.reproduce.comparison import build_attacks;"
        "from innermax.reproduce.cache import hash_name; s = replace(SCALES['smoke'].mnist, epochs=1, train=100);"
        "print(hash_name(Scored(Training(s, s.strategy('dynamic')), build_attacks(0.15), 20)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == hash_name(experiment)


def test_experiments_that_differ_have_names_that_differ():
    trainings = [
        tiny(),
        tiny(seed=1),
        tiny("dynamic"),
        tiny(epochs=2),
        tiny(eps=0.1),
        replace(tiny(), objective="loss_weighted"),
    ]
    experiments = [Trained(training) for training in trainings]
    experiments += [
        Scored(tiny(), build_attacks(0.15, names), images) for names in (("fgsm",), ("pgd-10",)) for images in (5, 6)
    ]
    experiments += [
        Scored(tiny(), build_attacks(0.15), 5, made_on=tiny(seed=1)),
        Scored(tiny(), build_attacks(0.15), 5, best=True),
    ]
    assert len({hash_name(experiment) for experiment in experiments}) == len(experiments)


def test_one_process_at_a_time(store):
    experiment = Trained(tiny())
    for name in (hash_name(experiment), hash_name(experiment.training)):
        with store._lock(name), pytest.raises(InUse):
            store.measure(experiment)
    assert store.measure(experiment)["history"]


# Questions


def test_scored_is_what_an_evaluation_says(store):
    training, attacks = tiny(), build_attacks(0.15, ("fgsm", "pgd-10"))
    answer = store.measure(Scored(training, attacks, 60))
    images = im.load_data("digits", validation=TINY.validation).test[:60]
    evaluation = im.evaluate(store.network(training), images, dict(attacks), audit=False)
    for name in ("clean", "fgsm", "pgd-10"):
        assert np.array_equal(unpack_correct(answer[name]), evaluation.correct(name))
        assert answer[name]["accuracy"] == evaluation.accuracy[name].value
    assert answer["pgd-10"]["gradients"] == pytest.approx(evaluation.convergence["pgd-10"].gradients, abs=1e-3)
    surrogate = tiny(seed=1)
    black_box = store.measure(Scored(training, attacks, 60, made_on=surrogate))
    transfer = im.transfer(store.network(surrogate), {"target": store.network(training)}, images, dict(attacks))
    assert set(black_box) == {"fgsm", "pgd-10", "environment", "seconds"}
    for name, _ in attacks:
        assert np.array_equal(unpack_correct(black_box[name]), transfer.correct("surrogate", "target", name))


def test_the_best_epoch_and_the_validation_split(store):
    training = tiny(epochs=3, lr=0.3)
    run = store.train(training)
    best, last = (store.measure(Scored(training, (), None, "validation", best=best)) for best in (True, False))
    scores = [row["validation_clean"] for row in run.history]
    assert best["clean"]["total"] == TINY.validation
    assert best["clean"]["accuracy"] == scores[comparison_best(run.history)]
    assert last["clean"]["accuracy"] == scores[-1]


def comparison_best(history):
    return max(range(len(history)), key=lambda epoch: history[epoch]["validation_accuracy"])


@pytest.mark.parametrize("random_start", [False, True])
def test_followed_iterates_are_those_of_shorter_attacks(store, random_start):
    training, attack = tiny(), PGD(im.Linf(0.15), 4, random_start=random_start)
    answer = store.measure(Followed(training, attack, 6))
    assert len(answer["fosc"]) == len(answer["loss"]) == 5
    x, y = im.load_data("digits", validation=TINY.validation).test.batch(torch.arange(6))
    for steps in range(1, 5):
        found = PGD(im.Linf(0.15), steps, attack.step_sizes()[0], random_start)(store.network(training), x, y)
        np.testing.assert_allclose(answer["fosc"][steps], found.fosc, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(answer["loss"][steps], found.loss, rtol=1e-3, atol=1e-5)


def test_gauged_is_a_number_an_example(store):
    training, attack = tiny(), PGD(im.Linf(0.15), 4)
    answer = store.measure(Gauged(training, attack, 30))
    x, y = im.load_data("digits", validation=TINY.validation).test.batch(torch.arange(30))
    found = attack(store.network(training), x, y)
    np.testing.assert_allclose(answer["fosc"], found.fosc, rtol=1e-3, atol=1e-5)
    assert answer["correct"] == (~found.misclassified).int().tolist()


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_packed_verdicts_come_back(correct):
    from innermax.reproduce.experiments import pack_correct

    answer = json.loads(json.dumps(pack_correct(np.array(correct))))
    assert unpack_correct(answer).tolist() == correct
    assert answer["accuracy"] == sum(correct) / len(correct)


# Comparisons


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=9).filter(lambda values: max(values) - min(values) > 1e-3))
def test_mean_over_seeds_is_students(values):
    mean, low, high = comparison.mean_over_seeds(values)
    interval = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((np.mean(values), interval.low, interval.high), rel=1e-6, abs=1e-9)


def test_two_seeds_say_little():
    assert comparison.mean_over_seeds([1.0, 2.0]) is None


def test_differences_are_paired(store):
    trainings = [tiny(seed=seed) for seed in range(3)]
    attacks = build_attacks(0.15, ("fgsm",))
    one = TableRow("Standard", trainings, [(attacks, 80)])
    other = TableRow("Unsecured", [tiny("unsecured", seed=seed) for seed in range(3)], [(attacks, 80)])
    assert comparison.compare(store.find, one, other, "fgsm") is None
    for experiment in (*one.seeds("fgsm"), *other.seeds("fgsm")):
        store.measure(experiment)
    found = comparison.compare(store.find, one, other, "fgsm")
    gains = []
    for first, second, seed in zip(one.seeds("fgsm"), other.seeds("fgsm"), found["seeds"], strict=True):
        mine, theirs = unpack_correct(store.find(first)["fgsm"]), unpack_correct(store.find(second)["fgsm"])
        gains.append(100 * (mine.mean() - theirs.mean()))
        assert seed["estimate"] == pytest.approx(gains[-1])
        assert seed["low"] <= seed["estimate"] <= seed["high"]
    assert found["over_seeds"]["mean"] == pytest.approx(np.mean(gains))


def test_a_table_says_what_was_not_run(store):
    attacks = build_attacks(0.15, ("fgsm",))
    rows = [
        TableRow("Measured", [tiny()], [(attacks, 20)], {"clean": 99.2, "fgsm": 14.04}),
        TableRow("Missing", [tiny(seed=5)], [(attacks, 20)], {"fgsm": 50.0}),
    ]
    for experiment in rows[0].experiments():
        store.measure(experiment)
    numbers = [row.numbers(store.find) for row in rows]
    lines = comparison.markdown_table(numbers, ("clean", "fgsm")).splitlines()
    assert lines[0] == "| defence | seeds | gradients | Clean | paper | FGSM | paper |"
    clean = 100 * numbers[0]["seeds"]["0"]["accuracy"]["clean"]["accuracy"]
    assert lines[2].startswith(f"| Measured | 1 | 10 | **{clean:.2f}** <sub>")
    assert "| *99.20* |" in lines[2]
    assert lines[3] == "| Missing | not run |  |  |  |  | *50.00* |"


def test_a_table_of_differences_leaves_out_what_was_not_run(store):
    attacks = build_attacks(0.15, ("fgsm",))
    rows = [
        TableRow(name, [tiny(seed=seed)], [(attacks, 20)]) for seed, name in enumerate(("Missing", "Base", "Measured"))
    ]

    def lines():
        found = comparison.compare_all(store.find, rows, rows[1], ("clean", "fgsm"))
        assert list(found) == ["Missing", "Measured"]
        return comparison.format_differences(found, "base", ("clean", "fgsm"))

    assert lines() == []
    for row in rows[1:]:
        for experiment in row.experiments():
            store.measure(experiment)
    found = comparison.compare(store.find, rows[2], rows[1], "fgsm")
    reading, table = lines()
    assert "interval over images" in reading
    head, _, *body = table.splitlines()
    assert head == "| minus base, points | Clean | FGSM |"
    assert [line.split(" | ")[0] for line in body] == ["| Measured"]
    assert body[0].endswith(f"| {comparison.format_points(found)} |")


@pytest.mark.parametrize(
    ("length", "epochs", "late"),
    [(120, (10, 60, 100), (60, 90, 120)), (10, (1, 5, 9), (5, 8, 10)), (3, (1, 2, 3), (2, 3)), (1, (1,), (1,))],
)
def test_fosc_is_shown_in_the_papers_epochs(length, epochs, late):
    """Epochs 10, 60 and 100 of 120; of Curriculum, which attacks late, 60, 90 and 120: its last."""
    history = [{"epoch": place, "ball_fosc_percentiles": [place + 1]} for place in range(length)]
    for asked, expected in ((figures._EPOCHS, epochs), (figures._LATE_EPOCHS, late)):
        assert figures._find_epochs(history, asked) == {f"epoch {epoch}": [epoch] for epoch in expected}


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.floats(0, 9)), min_size=1, max_size=50))
def test_bins_hold_every_example_up_to_the_last_edge_once(examples):
    fosc, correct, loss = zip(*examples, strict=True)
    bins = figures.bin_by_fosc(fosc, correct, loss)
    limit = float(np.quantile(fosc, 0.95))
    assert sum(row["examples"] for row in bins) == sum(value <= limit for value in fosc)
    for row in bins:
        inside = [i for i, value in enumerate(fosc) if row["low"] <= value <= row["high"] <= limit + 1e-12]
        assert row["examples"] <= len(inside)
        assert min(np.array(loss)[inside]) - 1e-9 <= row["loss"] <= max(np.array(loss)[inside]) + 1e-9


def test_bins_say_how_many_are_right():
    fosc, loss = [0.0, 0.1, 0.9, 1.0, 1.0, 1.0], [3.0, 2.0, 1.0, 1.0, 1.0, 4.0]
    bins = figures.bin_by_fosc(fosc, [0, 0, 1, 1, 1, 0], loss)
    assert [(row["examples"], row["accuracy"], row["loss"]) for row in bins] == [
        (1, 0.0, 3.0),
        (1, 0.0, 2.0),
        (1, 1.0, 1.0),
        (3, pytest.approx(2 / 3), 2.0),
    ]


# What artifacts need


@pytest.mark.parametrize("data", ["mnist", "cifar"])
def test_dynamic_is_taken_apart_on_both_data_sets(data):
    """One thing is changed in each variant; none is at equal gradients unless its epochs say so."""
    scale = SCALES["cpu"]
    setting = getattr(scale, data)
    trainings = [asked.training for asked in ARTIFACTS["dynamic"].experiments(scale) if isinstance(asked, Trained)]
    mine = [training for training in trainings if (training.setting.data, training.seed) == (setting.data, 0)]
    standard, fewer, weighted, published, exact, weighted_dynamic, chosen = mine
    assert standard == Training(setting, setting.strategy("standard"))
    assert fewer == replace(standard, setting=replace(setting, epochs={"mnist": 7, "cifar": 5}[data]))
    assert weighted == replace(standard, objective="loss_weighted")
    assert published == Training(setting, setting.strategy("dynamic"))
    assert exact == replace(published, strategy=replace(published.strategy, attack=setting.pgd(), c_max="auto"))
    assert weighted_dynamic == replace(published, objective="loss_weighted")
    assert chosen == replace(exact, strategy=replace(exact.strategy, c_max=0.15))
    tried = [
        asked.training.strategy for asked in ARTIFACTS["constants"].experiments(scale) if isinstance(asked, Trained)
    ]
    assert (chosen.strategy in tried) == (data == "mnist")


def test_seeds_come_one_after_another():
    """A half-run artifact is whole rows of fewer seeds."""
    for name in ("table1", "dynamic", "constants", "cheaper", "overfitting"):
        seeds = [experiment.training.seed for experiment in ARTIFACTS[name].experiments(SCALES["cpu"])]
        assert seeds == sorted(seeds)
        assert set(seeds) == {0, 1, 2}


# The pages

RESULTS = Path(__file__).parents[2] / "results" / "paper"


@pytest.mark.parametrize("scale", ["cpu", "full"])
def test_the_pages_of_the_repository_are_those_of_its_answers(scale, tmp_path):
    """Numbers, words and pictures of every artifact, measured in whole ("cpu") and in part ("full").

    Where the words of pages have changed: `innermax reproduce all their names --scale SCALE --minutes 0`.
    """
    if not RESULTS.exists():
        pytest.skip("the pages are not tested: the source distribution has no results")
    (tmp_path / scale).mkdir()
    for name in ("answers.json.xz", unfinished.FILE):
        if (RESULTS / scale / name).exists():
            shutil.copy2(RESULTS / scale / name, tmp_path / scale)
    options = {"scale": scale, "out": tmp_path, "cache": tmp_path / "models", "minutes": 0, "say": lambda line: None}
    for page in reproduce(list(ARTIFACTS), **options):
        kept = RESULTS / scale / page.name
        assert page.read_text() == kept.read_text(), page.name
        found, expected = (dict(leaves(json.loads(path.with_suffix(".json").read_text()))) for path in (page, kept))
        assert found.keys() == expected.keys(), page.name
        for place, value in expected.items():
            assert found[place] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), place
        assert page.with_suffix(".png").exists() == kept.with_suffix(".png").exists() == ("![" in page.read_text())


def leaves(value, place=""):
    """(place, value) of everything in a document that is neither a list nor a dictionary."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield place, value
    else:
        for key, part in inner:
            yield from leaves(part, f"{place}/{key}")


# The whole, at the smallest scale

FEW = ("figure1", "figure5", "overfitting")  # which ask for a gauge, iterates and histories
ALL = pytest.param(tuple(ARTIFACTS), marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[FEW, ALL], ids=["few", "all"])
def made(request, tmp_path_factory):
    """Artifacts, made once: folder and pages."""
    folder = tmp_path_factory.mktemp("paper")
    out, cache = folder / "results", folder / "models"
    return folder, reproduce(request.param, scale="smoke", out=out, cache=cache, say=lambda line: None)


def test_every_artifact_is_complete(made):
    _, pages = made
    for page in pages:
        text = page.read_text()
        document = json.loads(page.with_suffix(".json").read_text())
        assert document["missing"] == 0
        assert "not run" not in text
        assert f"innermax reproduce {page.stem} --scale smoke" in text
        assert (ARTIFACTS[page.stem].draw is not None) == page.with_suffix(".png").exists()


def test_nothing_is_measured_twice(made, monkeypatch):
    folder, pages = made
    before = [page.read_text() for page in pages]
    monkeypatch.setattr(cache.Cache, "train", None)
    names = [page.stem for page in pages]
    again = reproduce(names, scale="smoke", out=folder / "results", cache=folder / "other", say=print)
    assert [page.read_text() for page in again] == before


@pytest.mark.parametrize("made", [ALL], ids=["all"], indirect=True)
def test_the_pages_numbers_are_the_answers(made):
    folder, _ = made
    numbers = json.loads((folder / "results" / "smoke" / "table1.json").read_text())["numbers"]
    store = make_cache(folder)
    for training in SMOKE.trainings("mnist", "dynamic"):
        row = next(row for row in numbers["mnist"] if row["title"] == "Dynamic")
        answer = store.find(Scored(training, build_attacks(SMOKE.mnist.eps), SMOKE.images["mnist"]))
        assert row["seeds"][str(training.seed)]["accuracy"]["pgd-20"]["accuracy"] == answer["pgd-20"]["accuracy"]


def test_the_gauge_by_epoch_is_what_was_recorded(made):
    folder, _ = made
    numbers = json.loads((folder / "results" / "smoke" / "overfitting.json").read_text())["numbers"]
    store = make_cache(folder)
    for name in ("standard", "curriculum", "dynamic"):
        row = numbers[name.capitalize()]
        for training, fosc, validation in zip(
            SMOKE.trainings("mnist", name), row["fosc"], row["validation"], strict=True
        ):
            history = store.find(Trained(training))["history"]
            assert validation == [epoch["validation_accuracy"] for epoch in history]
            attacked = [None if epoch["attack_steps"] == 0 else epoch["fosc_percentiles"][90] for epoch in history]
            assert fosc == attacked
            assert (fosc[0] is None) == (name == "curriculum")


def test_what_time_does_not_allow_is_named(tmp_path):
    folder, cache = tmp_path / "results", tmp_path / "models"
    (page,) = reproduce(["table1"], scale="smoke", out=folder, cache=cache, minutes=0, say=lambda line: None)
    assert "**not run.**" in page.read_text()
    assert "| Dynamic | not run |" in page.read_text()
    assert not list(folder.glob("*/answers*"))
    assert not list(cache.glob("answers/*"))


def test_time_that_is_up_interrupts_and_the_next_call_goes_on(tmp_path, monkeypatch):
    folder, cache, lines = tmp_path / "results", tmp_path / "models", []
    long = replace(SMOKE, mnist=replace(TINY, epochs=400), seeds={**SMOKE.seeds, "mnist": 1})
    monkeypatch.setitem(SCALES, "smoke", long)

    def reached():
        reproduce(["overfitting"], scale="smoke", out=folder, cache=cache, minutes=0.1, say=lines.append)
        assert lines[-1] == "The time is up. The same command resumes from here."
        (run,) = cache.glob("training-*/checkpoints")
        position = load_tensors(find_checkpoints(run.parent)[0])[1]["position"]
        return position["epoch"], position["batch"]

    began = time.perf_counter()
    first = reached()
    assert time.perf_counter() - began < 60
    assert (0, 0) < first < reached() < (400, 0)


def test_a_page_tells_how_far_a_training_is(tmp_path, monkeypatch):
    """Also from elsewhere, where its run folder is not, until it has finished."""
    short = replace(SMOKE, mnist=replace(TINY, epochs=3), cifar=replace(TINY, epochs=3, eps=0.1))
    monkeypatch.setitem(SCALES, "smoke", short)
    (training,) = short.trainings("mnist", "dynamic")
    store = make_cache(tmp_path)

    def stop(name, done, of):
        if name == "epoch 3/3":
            raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        train = partial(im.train, progress=stop)
        interrupted.setattr(im, "train", lambda *args, progress, **options: train(*args, **options))
        with pytest.raises(KeyboardInterrupt):
            store.train(training)
    rows = (store.models / hash_name(training) / "metrics.jsonl").read_text().splitlines()

    def table(models, minutes=0):
        options = {"scale": "smoke", "out": tmp_path / "results", "cache": models, "minutes": minutes}
        (page,) = reproduce(["table1"], data="digits", strategies=["dynamic"], say=lambda line: None, **options)
        return page.read_text()

    robust = 100 * json.loads(rows[1])["validation_robust"]
    for models in (store.models, tmp_path / "elsewhere"):
        told = table(models)
        assert "| Dynamic | 2 of 3 epochs |  |" in told
        assert "Dynamic has 2 of 3 epochs behind it (" in told
        assert (
            f"% clean and {robust:.1f} % under the training attack. At its pace so far it needs 0.0 more hours." in told
        )
    assert "of 3 epochs" not in table(store.models, minutes=5)
    assert not (tmp_path / "results" / "smoke" / unfinished.FILE).exists()


@dataclass(frozen=True)
class _Endless:
    """An experiment that never ends."""

    def run(self, cache):
        while True:
            time.sleep(0.01)


def test_time_that_is_up_interrupts_a_scripts_background_job(tmp_path, monkeypatch):
    """Which ignores Ctrl-C."""
    monkeypatch.setitem(ARTIFACTS, "theorem1", replace(ARTIFACTS["theorem1"], experiments=lambda scale: [_Endless()]))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    began = time.perf_counter()
    reproduce(["theorem1"], scale="smoke", out=tmp_path, cache=tmp_path / "models", minutes=0.02)
    assert signal.signal(signal.SIGINT, before) == signal.SIG_IGN
    assert time.perf_counter() - began < 60


def test_time_that_is_up_while_another_process_works(tmp_path):
    folder, cache = tmp_path / "results", tmp_path / "models"
    (experiment,) = ARTIFACTS["theorem1"].experiments(SMOKE)
    with make_cache(tmp_path)._lock(hash_name(experiment)):
        (page,) = reproduce(["theorem1"], scale="smoke", out=folder, cache=cache, minutes=0.02, say=lambda line: None)
    assert "**not run.**" in page.read_text()


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "figure5", "--scale", "smoke", "--minutes", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "results/paper/smoke/figure5.md"
    for words, said in {
        ("figure9",): "innermax: unknown table or figure 'figure9'; did you mean 'figure",
        ("--scale", "smoke"): "innermax: reproduce takes what to reproduce first, got --scale",
        ("table1", "--scale", "huge"): "innermax: unknown scale 'huge'",
        ("table1", "--minutes", "-1"): "innermax: --minutes must be ≥ 0",
        ("table1", "--data", "cifar"): "innermax: unknown data 'cifar'; did you mean 'cifar10'?",
        ("table1", "--strategies", "[dynamc]"): "innermax: unknown strategy 'dynamc'; did you mean 'dynamic'?",
    }.items():
        assert main(["reproduce", *words]) == 2
        told = capsys.readouterr().err
        assert told.startswith(said)
        assert told.count("\n") == 1
    assert main(["reproduce", "--help"]) == 0
    assert "table1, table2" in capsys.readouterr().out
