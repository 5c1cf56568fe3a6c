"""What version 0.1 named and wrote is still known: answers, run folders, folders of rows, checkpoints.

recorded/ holds the names and fields of that version, a hash of every answer that was kept, a run that was interrupted
in its second epoch, the same run as it ends without an interruption, and the rows of an evaluation.
"""

import hashlib
import json
import shutil
from dataclasses import field, fields, is_dataclass, make_dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import innermax as im
from innermax.objectives import cross_entropy
from innermax.reproduce.answers import Answers
from innermax.reproduce.cache import hash_name
from innermax.reproduce.run import ARTIFACTS
from innermax.reproduce.scales import SCALES, Training
from innermax.utils.files import load_tensors
from innermax.utils.serialization import ADDED_FIELD, describe
from innermax.utils.version import __version__

RECORDED = Path(__file__).parent / "recorded"
RESULTS = Path(__file__).parents[1] / "results"
NAMES = json.loads((RECORDED / "names.json").read_text())
THREAT = im.Linf(8 / 255)
ATTACK = im.PGD(THREAT, steps=10)
VALUES = {
    "Linf": THREAT,
    "L2": im.L2(0.5),
    "L1": im.L1(12.0),
    "L2 without bounds": im.L2(0.5, bounds=None),
    "PGD": ATTACK,
    "PGD shrinking": im.PGD(THREAT, steps=3, step_size=(0.1, 0.05, 0.02)),
    "FGSM": im.FGSM(THREAT),
    "CW": im.CW(THREAT, steps=30),
    "GuidedPGD": im.GuidedPGD(THREAT),
    "APGD": im.APGD(THREAT, steps=100, loss="dlr"),
    "FAB": im.FAB(THREAT),
    "Square": im.Square(THREAT),
    "AutoAttack": im.AutoAttack(THREAT),
    "AutoAttack rand": im.AutoAttack(THREAT, version="rand"),
    "Unsecured": im.Unsecured(),
    "Standard": im.Standard(ATTACK),
    "Curriculum": im.Curriculum(ATTACK),
    "FGSMThenPGD": im.FGSMThenPGD(ATTACK),
    "Dynamic": im.Dynamic(ATTACK),
    "Dynamic ball": im.Dynamic(im.PGD(THREAT, steps=10, gauge="ball"), 0.5, 0.8),
    "WarmStart": im.WarmStart(ATTACK),
}
HOMES = ("threat", "strategies", "losses", "attacks.pgd", "attacks.guided_pgd", "attacks.apgd", "attacks.fab")
HOMES += ("attacks.square", "attacks.autoattack", "evaluation.scoring", "reproduce.scales", "reproduce.experiments")
HOMES += ("reproduce.theorem",)


def parts(value):
    """A value and all values in it."""
    inner = value
    if is_dataclass(value):
        inner = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, dict):
        inner = list(value.values())
    yield value
    if isinstance(inner, list | tuple):
        for part in inner:
            yield from parts(part)


# Of innermax-best on CIFAR-10 at full scale, which got a schedule of its own before anything was measured.
REPLACED = {"scored-cc39d7ed13e3", "scored-f744a6671ce9", "trained-cc9fbfe90295", "training-2f801c833ead"}


@pytest.mark.parametrize("scale", SCALES)
def test_answers_and_trainings_keep_their_names(scale):
    experiments = [experiment for artifact in ARTIFACTS.values() for experiment in artifact.experiments(SCALES[scale])]
    trainings = {part for experiment in experiments for part in parts(experiment) if isinstance(part, Training)}
    assert set(NAMES["answers"][scale]) - REPLACED <= set(map(hash_name, experiments))
    assert set(NAMES["trainings"][scale]) - REPLACED <= set(map(hash_name, trainings))
    assert not REPLACED & json.loads((RECORDED / "answers.json").read_text()).keys()


@pytest.mark.skipif(not RESULTS.exists(), reason="the source distribution leaves results out")
def test_every_answer_is_kept_as_it_was():
    recorded = json.loads((RECORDED / "answers.json").read_text())
    packs = {scale: Answers(RESULTS / "paper" / scale / "answers.json.xz", []) for scale in SCALES}
    found = set()
    for scale, names in NAMES["answers"].items():
        for name in recorded.keys() & set(names):
            record = packs[scale].find(name)
            assert record is not None, f"{name} is not in the answers of scale {scale}"
            file = json.dumps(record, indent=2) + "\n"
            assert hashlib.sha256(file.encode()).hexdigest().startswith(recorded[name])
            found.add(name)
    assert found == set(recorded)
    assert len(recorded) == 422


@pytest.mark.parametrize("name", NAMES["values"])
def test_values_are_described_as_they_were(name):
    assert json.loads(json.dumps(describe(VALUES[name]))) == NAMES["values"][name]


@pytest.mark.parametrize("name", NAMES["fields"])
def test_a_field_that_was_added_is_marked(name):
    """Else a value that leaves it at its default would get another name."""
    (kind,) = {
        vars(module)[name]
        for module in map(import_module, [f"innermax.{home}" for home in HOMES])
        if name in vars(module)
    }
    before = NAMES["fields"][name]
    assert [field.name for field in fields(kind) if field.name in before] == before
    unmarked = [field.name for field in fields(kind) if field.name not in before and not field.metadata.get("added")]
    assert unmarked == []


def test_an_added_field_is_told_where_it_is_not_at_its_default():
    added = field(default=0.0, metadata=ADDED_FIELD)
    grown = make_dataclass("Grown", [("steps", int), ("momentum", float, added)], frozen=True)
    assert describe(grown(3)) == {"name": "Grown", "steps": 3}
    assert describe(grown(3, 0.5)) == {"name": "Grown", "steps": 3, "momentum": 0.5}


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def objective(model, x, y, x_adv, epoch):
    return cross_entropy(model, x, y, x_adv, epoch)


def test_a_run_folder_goes_on(tmp_path):
    shutil.copytree(RECORDED / "run", tmp_path / "run")
    digits = im.load_data("digits")
    run = im.train(
        network(),
        digits.train[:128],
        im.WarmStart(im.PGD(im.Linf(0.1), steps=3)),
        objective=objective,
        epochs=2,
        batch_size=32,
        lr=0.05,
        shift=1,
        flip=True,
        ema=0.9,
        precision="float32",
        validation_set=digits.validation[:32],
        run_dir=tmp_path / "run",
        checkpoint_every=1,
        keep_checkpoints=1,
        progress=False,
        settings={"data": "digits", "threat": {"norm": "linf", "eps": 0.1}},
    )
    assert [row["epoch"] for row in run.history] == [0, 1]
    whole, _ = load_tensors(RECORDED / "whole.safetensors")
    for name, value in run.model.state_dict().items():  # another processor rounds in another way
        torch.testing.assert_close(value, whole[name], atol=1e-4, rtol=1e-3)
    for row, recorded in zip(run.history, json.loads((RECORDED / "history.json").read_text()), strict=True):
        assert recorded.keys() <= row.keys()
        assert row["loss"] == pytest.approx(recorded["loss"], rel=1e-3)


def test_a_folder_of_rows_goes_on(tmp_path, monkeypatch):
    shutil.copytree(RECORDED / "rows", tmp_path / "rows")
    path = tmp_path / "rows" / "config.yaml"
    config = yaml.safe_load(path.read_text())  # rows are of one version of torch and of innermax
    path.write_text(yaml.safe_dump(config | {"torch": str(torch.__version__), "innermax": __version__}))
    model = network()
    model.load_state_dict(load_tensors(RECORDED / "whole.safetensors")[0])
    threat = im.Linf(0.1)
    attacks = {"fgsm": im.FGSM(threat), "pgd": im.PGD(threat, steps=3)}
    attacks |= {"guided": im.GuidedPGD(threat, 20), "autoattack": im.AutoAttack(threat)}
    for kind in {type(attack) for attack in attacks.values()}:
        monkeypatch.setattr(kind, "__call__", lambda *_, **__: pytest.fail("attacked again"))
    options = {"batch_size": 16, "precision": "float32", "audit": False}
    found = im.evaluate(model.eval(), im.load_data("digits").train[:32], attacks, rows_dir=tmp_path / "rows", **options)
    assert found.accuracy.keys() >= {"clean", *attacks}
