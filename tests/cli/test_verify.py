"""`innermax verify`: what it prints and writes, and its exit status."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import innermax as im
from tests.helpers.commands import refused, said

FAST = ("--attacks", "pgd-5", "--limit", "60")


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    torch.manual_seed(0)
    im.save_model("mine", im.build_model("digits-cnn", input_shape=(1, 8, 8)))
    return ("verify", "mine", "--data", "digits", "--threat.eps", "0.1")


def test_the_exit_status_tells(model, capsys):
    status, out, err = said(capsys, *model, *FAST, "--claims", "0", "--json", "v.json")
    assert (status, err) == (0, "")
    assert "ok  claimed robust accuracy: " in out
    assert "Not refuted. That is no proof" in out
    document = json.loads(Path("v.json").read_text())
    assert document["verdict"] == "not refuted"
    assert document["accuracy"]["total"] == document["evaluation"]["settings"]["count"] == 60
    status, out, err = said(capsys, *model, *FAST, "--claims", "0.9")
    assert (status, err) == (1, "")
    assert "NO  claimed robust accuracy: " in out
    assert "\nRefuted.\n" in out
    kept = out.rpartition("Example by example: ")[2].strip()
    assert Path(kept).is_file(), "resumable"


def test_all_images(model, capsys):
    status, out, _ = said(capsys, *model, "--attacks", "fgsm", "--limit", "null", "--claims", "0")
    assert status == 0
    total = len(im.load_data("digits").test)
    assert f" of {total:,} survive every attack" in out


def test_images_from_a_file(model, capsys):
    data = im.load_data("digits").test
    x, y = data.batch(torch.arange(12))
    np.savez("clean.npz", images=(x * 255).round().byte().numpy())
    status, out, _ = said(capsys, *model, *FAST, "--images", "clean.npz")
    wrong = int((im.load_model("mine")(x).argmax(1) != y).sum())
    assert status == 1
    assert "ok  handed images inside the threat model: 12 of 12" in out
    assert f"NO  handed images misclassified alone and in a batch, twice: {wrong} of 12" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--claims", "54"], "claim must be a share in [0, 1], such as 0.54, got 54"),
        (["--limit", "first:5"], "--limit must be a number, as claims are checked on a random sample, got first:5"),
        (["--images", "none.npz"], "none.npz cannot be read as .npz"),
        (["--attacks", ""], "attacks must hold at least one attack"),
    ],
)
def test_bad_input_is_one_line(model, capsys, words, message):
    assert message in refused(capsys, *model, *FAST, *words)
