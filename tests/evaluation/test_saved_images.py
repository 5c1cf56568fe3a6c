"""Adversarial images that an evaluation keeps: what was scored, whole on disk, and good enough for `verify`."""

import errno
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import innermax as im
from innermax.evaluation import saved_images, store
from innermax.evaluation.store import IMAGE
from tests.helpers.evaluation import Scripted, examples, linear_problem, network

THREAT = im.Linf(0.1)
ATTACKS = {"fgsm": im.FGSM(THREAT), "pgd/3": im.PGD(THREAT, steps=3)}
OPTIONS = {"batch_size": 16, "audit": False}


@pytest.fixture(scope="module")
def model():
    return network().eval()


@pytest.fixture(scope="module")
def kept(model):
    return im.evaluate(model, examples(), ATTACKS, keep_images=True, **OPTIONS)


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_images_are_those_that_were_scored(model, kept):
    images, labels = examples()
    x = images / 255
    assert list(kept.images) == list(ATTACKS)
    for name, found in kept.images.items():
        assert found.dtype == np.float32
        x_adv = torch.from_numpy(found)
        assert bool(THREAT.contains(x_adv, x).all())
        assert np.array_equal(model(x_adv).argmax(1).numpy(), kept.rows[name].prediction)
        assert np.allclose(
            nn.functional.cross_entropy(model(x_adv), labels, reduction="none").detach(),
            kept.rows[name].loss,
            atol=1e-5,
        )
    assert not np.array_equal(kept.images["fgsm"], kept.images["pgd/3"])


def test_images_are_kept_only_where_they_are_asked_for(model, kept):
    plain = im.evaluate(model, examples(), ATTACKS, **OPTIONS)
    assert plain.images is None
    assert same(plain.columns(), kept.columns())
    assert "images" not in kept.to_json()
    assert im.Evaluation.from_json(kept.to_json()).images is None
    for without in (plain, im.evaluate(model, examples(), {}, keep_images=True)):
        with pytest.raises(ValueError, match="no images to save: evaluate at least one attack with keep_images=True"):
            without.save_images("out")


@pytest.mark.usefixtures("untyped")
def test_the_flag_is_checked(model):
    with pytest.raises(TypeError, match="keep_images must be True or False, got 'out'"):
        im.evaluate(model, examples(), ATTACKS, keep_images="out")


def forbid(monkeypatch):
    for kind in {type(attack) for attack in ATTACKS.values()}:
        monkeypatch.setattr(kind, "__call__", lambda *_, **__: pytest.fail("attacked again"))


@pytest.mark.parametrize("interrupted", [False, True])
def test_rows_keep_images_too(model, kept, tmp_path, monkeypatch, interrupted):
    options = OPTIONS | {"rows_dir": tmp_path / "rows"}
    im.evaluate(model, examples(), ATTACKS, keep_images=True, **options)
    if interrupted:
        next((tmp_path / "rows" / "parts").glob("*pgd*/000000016.parquet")).unlink()
    else:
        forbid(monkeypatch)
    again = im.evaluate(model, examples(), ATTACKS, keep_images=True, **options)
    assert same(again.images, kept.images)
    assert same(again.columns(), kept.columns())


def test_rows_without_images_are_computed_again_and_rows_with_images_serve_both(model, kept, tmp_path, monkeypatch):
    options = OPTIONS | {"rows_dir": tmp_path / "rows"}
    im.evaluate(model, examples(), ATTACKS, **options)
    again = im.evaluate(model, examples(), ATTACKS, keep_images=True, **options)
    assert same(again.images, kept.images)
    forbid(monkeypatch)
    plain = im.evaluate(model, examples(), ATTACKS, **options)
    assert plain.images is None
    assert same(plain.columns(), kept.columns())


def test_images_of_another_shape_are_damage(model, kept, tmp_path, monkeypatch):
    options = OPTIONS | {"rows_dir": tmp_path / "rows", "keep_images": True}
    encode = store._encode_column
    with monkeypatch.context() as patched:
        patched.setattr(store, "_encode_column", lambda column: encode(column[..., :5] if column.ndim > 1 else column))
        im.evaluate(model, examples(), ATTACKS, **options)
    with pytest.warns(UserWarning, match=r"is damaged \(column image must hold (576|288) numbers"):
        again = im.evaluate(model, examples(), ATTACKS, **options)
    assert same(again.images, kept.images)


def test_processes_return_the_same_images(model, kept):
    shared = im.evaluate(model, examples(), ATTACKS, keep_images=True, devices=2, **OPTIONS)
    assert same(shared.images, kept.images)


def test_the_folder_holds_arrays_and_pictures(kept, tmp_path):
    kept.save_images(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fgsm", "fgsm.npz", "pgd_3", "pgd_3.npz"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing of its making is left"
    for name, stem in {"fgsm": "fgsm", "pgd/3": "pgd_3"}.items():
        with np.load(tmp_path / "out" / f"{stem}.npz") as file:
            assert set(file.files) == {"images", "labels", "predictions", "index"}
            assert np.array_equal(file["images"], kept.images[name])
            assert np.array_equal(file["labels"], kept.label)
            assert np.array_equal(file["predictions"], kept.rows[name].prediction)
            assert np.array_equal(file["index"], np.arange(len(kept.label)))
        wrong = np.flatnonzero(~kept.rows[name].correct)
        assert 0 < len(wrong) < len(kept.label)
        pictures = sorted((tmp_path / "out" / stem).iterdir())
        prediction = kept.rows[name].prediction
        expected = [f"{row:05d}-label{kept.label[row]}-predicted{prediction[row]}.png" for row in wrong]
        assert [path.name for path in pictures] == expected
        for row, path in zip(wrong, pictures, strict=True):
            levels = np.asarray(Image.open(path))
            assert levels.shape == (6, 6)
            assert np.abs(levels / 255 - kept.images[name][row, 0]).max() <= 0.5 / 255 + 1e-6


def test_images_on_the_grid_are_bytes_without_loss(model, tmp_path):
    found = im.evaluate(model, examples(), {"pgd": ATTACKS["pgd/3"]}, keep_images=True, quantize=8, **OPTIONS)
    found.save_images(tmp_path / "out")
    with np.load(tmp_path / "out" / "pgd.npz") as file:
        images = file["images"]
    assert images.dtype == np.uint8
    assert np.array_equal(images.astype(np.float32) / 255, found.images["pgd"])
    for path in (tmp_path / "out" / "pgd").iterdir():
        row, predicted = map(int, re.fullmatch(r"(\d+)-label\d+-predicted(\d+)\.png", path.name).groups())
        picture = np.asarray(Image.open(path))
        assert np.array_equal(picture, images[row, 0])
        assert int(model(torch.from_numpy(picture / 255).float()[None, None]).argmax()) == predicted


def test_colours_keep_their_places(tmp_path):
    images = np.random.default_rng(0).random((2, 3, 4, 5)).astype(np.float32)
    arrays = {"images": images, "labels": np.array([0, 1]), "predictions": np.array([1, 1]), "index": np.array([7, 9])}
    saved_images.write_images(tmp_path / "out", {"a": arrays})
    (path,) = (tmp_path / "out" / "a").iterdir()
    assert path.name == "00007-label0-predicted1.png"
    assert np.abs(np.asarray(Image.open(path)) / 255 - images[0].transpose(1, 2, 0)).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("images", [np.zeros((2, 5)), np.zeros((2, 4, 3, 3)), np.full((2, 1, 3, 3), 1.5)])
def test_what_is_no_image_has_no_pictures(tmp_path, images):
    arrays = {"images": images, "labels": np.zeros(2, int), "predictions": np.ones(2, int), "index": np.arange(2)}
    saved_images.write_images(tmp_path / "out", {"a": arrays})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.npz"]


def test_names_that_look_alike_keep_apart():
    names = ["pgd/3", "pgd?3", "PGD_3", "..", "a" * 80, "a" * 81, "ε"]
    stems = saved_images._name_files(names)
    assert len({stem.lower() for stem in stems}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", stem) for stem in stems)


def test_nothing_is_left_half_written(kept, tmp_path, monkeypatch):
    calls, save = [], np.savez

    def full_disk(file, **arrays):
        calls.append(file)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="out cannot be written: No space left on device"):
        kept.save_images(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused(kept, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    kept.save_images(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match="out exists and is no empty folder: choose another, or remove it"):
        kept.save_images(folder)
    assert sorted(folder.rglob("*")) == before
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(ValueError, match=f"{name} exists and is no empty folder"):
            kept.save_images(tmp_path / name)
    with pytest.raises(ValueError, match="its parent folder does not exist"):
        kept.save_images(tmp_path / "no" / "where")


def test_what_is_saved_can_be_verified(tmp_path):
    model, x, y, margin, weight = linear_problem()
    fallen = margin < 0.1 * weight.abs().sum()
    data = im.ImageSet(x, y).sample(50, 1)
    attack = {"fgsm": im.FGSM(THREAT)}
    found = im.evaluate(model, data, attack, keep_images=True, audit=False)
    found.save_images(tmp_path / "out")
    handed = im.HandedImages.read(tmp_path / "out" / "fgsm.npz")
    expected = data.index[fallen[data.index]]
    assert handed.index.tolist() == expected.tolist()
    assert handed.others == 50 - len(expected) > 0
    verified = im.verify(model, (x, y), THREAT, images=handed, attacks=attack, limit=None)
    told = {check.name: check for check in verified.checks}
    assert not verified.refuted
    assert told["handed images whose own prediction is wrong"].evidence.startswith(f"{len(expected)} of 50; ")
    assert told["handed images inside the threat model"].passed
    count = len(expected)
    assert told["handed images misclassified alone and in a batch, twice"].evidence == f"{count} of {count}"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"predictions": np.zeros(3, int)}, "must be 2 integers each, as it holds so many images"),
        ({"labels": np.zeros(2)}, "must be 2 integers each"),
        ({"predictions": np.zeros(2, int)}, "holds no image whose prediction is not its label"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path, changed, message):
    arrays = {"images": np.zeros((2, 3)), "labels": np.zeros(2, int), "predictions": np.ones(2, int)} | changed
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        im.HandedImages.read(tmp_path / "a.npz")


def test_the_images_are_projected_ones(model):
    outside = {"far": Scripted(THREAT, lambda x, y, index: x + 1)}
    found = im.evaluate(model, examples(), outside, keep_images=True, **OPTIONS)
    x = examples()[0] / 255
    assert np.allclose(found.images["far"], (x + 0.1).clamp(max=1), atol=1e-6)
    assert IMAGE not in found.columns()
