"""The robust models that come with innermax are those that their cards describe."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import innermax as im
from innermax.cli.models import format_models
from innermax.data.load import load_test_set
from innermax.models import pretrained
from innermax.models.files import hash_weights
from innermax.models.pretrained import HubFile, list_pretrained
from innermax.threat import build_threat
from tests.helpers.commands import refused, said
from tests.helpers.documented import ROOT

DIGITS = "innermax/digits-linf-0.15"
KNOWN = list_pretrained()
ROUNDING = 3  # images of 500 on which another processor may decide otherwise


def test_small_models_travel_with_the_package():
    assert set(KNOWN) >= {DIGITS, "innermax/mnist-linf-0.3"}
    assert sum(file.stat().st_size for file in pretrained.WEIGHTS.rglob("*") if file.is_file()) <= 6_000_000


@pytest.mark.parametrize("name", KNOWN)
def test_a_model_is_what_registry_and_card_say(name):
    entry, model = KNOWN[name], im.load_model(name)
    assert hash_weights(model.state_dict()) == entry.weights
    assert {value.dtype for value in model.state_dict().values()} <= {torch.float32, torch.int64}
    assert not model.training
    card = (entry.folder / "README.md").read_text(encoding="utf-8")
    for told in (
        f'im.load_model("{name}")',
        f"license: {entry.license}",
        f"weights: {entry.weights}",
        f"{100 * entry.clean.accuracy:.2f} % are classified correctly",
        f"| pgd-20 | {100 * entry.pgd_20.accuracy:.2f} |",
        f"{entry.gradients:,.1f} input gradients per training image",
        "Audit: ",
        "Not measured." if entry.autoattack is None else f"leaves {100 * entry.autoattack.accuracy:.2f} % of",
    ):
        assert told in card
    for heading in ("## Robustness", "## Training", "## How it was made", "- Command: `innermax ", "## Limits"):
        assert heading in card
    assert str(ROOT) not in card


def numbers(name, images):
    """How many of these images are right, clean and under PGD-20."""
    attack = im.PGD(build_threat(**KNOWN[name].threat), steps=20)
    found = im.evaluate(im.load_model(name), images, {"pgd-20": attack}, audit=False).accuracy
    return found["clean"].correct, found["pgd-20"].correct


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "cifar" in name else []) for name in KNOWN]
)
def test_a_model_is_as_accurate_and_as_robust_as_its_card_says(name):
    entry = KNOWN[name]
    if entry.data != "digits" and not os.environ.get("INNERMAX_DATA"):
        pytest.skip("INNERMAX_DATA names no folder with the real data sets")
    images = load_test_set(entry.data)[0]
    _, robust = numbers(name, images.sample(500, 0))
    assert entry.pgd_20.images == min(500, len(images))
    assert abs(robust - entry.pgd_20.accuracy * entry.pgd_20.images) <= ROUNDING
    clean = im.evaluate(im.load_model(name), images, {}).accuracy["clean"]
    assert clean.total == entry.clean.images
    assert abs(clean.correct - entry.clean.accuracy * clean.total) <= ROUNDING


def test_a_wrong_name_gets_the_nearest(capsys):
    for load in (im.load_model, im.from_pretrained):
        with pytest.raises(ValueError, match=r"unknown model 'innermax/mnist-0\.3'; did you mean 'innermax/mnist-linf"):
            load("innermax/mnist-0.3")
    told = refused(capsys, "evaluate", "innermax/digit-linf-0.15")
    assert f"did you mean '{DIGITS}'?" in told


def test_a_revision_is_refused():
    with pytest.raises(ValueError, match="leave revision out, got 'main'"):
        im.load_model(DIGITS, revision="main")


def test_a_folder_of_such_a_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    im.save_model("innermax/mine", im.build_model("digits-cnn", input_shape=(1, 8, 8)))
    assert im.load_model("innermax/mine").config["model"] == "digits-cnn"


def test_its_weights_go_into_a_network_of_ones_own():
    network = im.build_model("digits-cnn", input_shape=(1, 8, 8))
    assert im.load_model(DIGITS, network) is network
    assert hash_weights(network.state_dict()) == KNOWN[DIGITS].weights


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A copy of the digits' model and a registry with it alone, which may be damaged."""
    folder = tmp_path / "weights"
    shutil.copytree(KNOWN[DIGITS].folder, folder / KNOWN[DIGITS].name)
    monkeypatch.setattr(pretrained, "WEIGHTS", folder)
    write_registry(folder, KNOWN[DIGITS])
    return folder


def write_registry(folder, entry):
    (folder / "registry.json").write_text(json.dumps([asdict(entry)]))


def test_a_damaged_file_is_refused(weights):
    path = weights / KNOWN[DIGITS].name / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"safetensors is damaged or another file: .* be {KNOWN[DIGITS].sha256}, got "
    ):
        im.load_model(DIGITS)


def test_one_on_the_hub_is_pinned(weights, monkeypatch):
    at, asked = HubFile("somebody/digits", "0123456789abcdef" * 2 + "01234567"), []
    write_registry(weights, replace(KNOWN[DIGITS], hub=at))
    place = weights / KNOWN[DIGITS].name

    def download(repo, file, *, revision):
        asked.append((repo, file, revision))
        return str(place / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert hash_weights(im.load_model(DIGITS).state_dict()) == KNOWN[DIGITS].weights
    assert asked == [(at.repo, file, at.revision) for file in ("config.json", "model.safetensors")]
    assert "from the Hub" in format_models()
    (place / "model.safetensors").write_bytes(b"another")
    with pytest.raises(ValueError, match="is damaged or another file"):
        im.load_model(DIGITS)
    with pytest.raises(ValueError, match="revision must be a commit of 40 hexadecimal digits, got 'main'"):
        HubFile("somebody/digits", "main")


def test_the_table(capsys):
    told = said(capsys, "models").out
    head, *rows = told.splitlines()[: 1 + len(KNOWN)]
    assert head.split()[:2] == ["name", "network"]
    assert [row.split()[0] for row in rows] == list(KNOWN)
    assert "L∞ 0.15 on digits" in told
    assert "0.16 MB" in told
    page = (ROOT / "docs" / "how-to" / "robust-models.md").read_text(encoding="utf-8")
    assert f"```text\n{format_models()}```\n" in page
    assert refused(capsys, "models", "more") == "innermax: models takes no arguments, got more\n"


def test_the_command_line_knows_data_and_threat_model(capsys, tmp_path):
    scores = tmp_path / "scores.json"
    assert said(capsys, "evaluate", DIGITS, "--attacks", "fgsm", "--limit", "20", "--json", str(scores)).status == 0
    found = im.Evaluation.from_json(scores.read_text())
    assert found.weights == KNOWN[DIGITS].weights
    assert "Linf(eps=0.15" in found.settings.attacks["fgsm"]


def test_cards_lie_beside_the_weights():
    there = {path.relative_to(pretrained.WEIGHTS) for path in pretrained.WEIGHTS.rglob("*") if path.is_file()}
    files = ("README.md", "config.json", "model.safetensors")
    assert there == {Path("registry.json"), *(Path(entry.name, file) for entry in KNOWN.values() for file in files)}
