"""Folders of images: every file is read, or named as left out, or refused."""

import shutil

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from innermax.data.load import load_data
from tests.helpers.image_files import as_tensor, write_folder

FORMATS = ["tif", "tiff", "gif", "ppm", "pgm", "webp", "jfif", "TGA", "pcx", "avif", "jp2", "qoi", "ico"]


def both_splits(root):
    shutil.copytree(root / "train", root / "test", symlinks=True)
    return load_data(root, validation=0)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_pillow_decodes_is_read(tmp_path, kind):
    Image.init()
    if Image.EXTENSION.get(f".{kind.lower()}") not in Image.SAVE:
        pytest.skip(f"Pillow {PIL.__version__} writes no {kind}")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "dog").mkdir()
    for name, value in (("cat/1.png", 200), (f"dog/1.{kind}", 40)):
        Image.new("RGB", (16, 16), (value, value, value)).save(tmp_path / "train" / name)
    data = both_splits(tmp_path)
    assert data.train.labels.tolist() == [0, 1]
    assert (data.train.images[0].int() - 200).abs().max() == 0
    assert (data.train.images[1].int() - 40).abs().max() <= 3


def test_nested_folders_in_torchvisions_order(tmp_path_factory):
    tmp_path, elsewhere = tmp_path_factory.mktemp("set"), tmp_path_factory.mktemp("elsewhere")
    names = ["b/0.png", "a/z.png", "a/day1/9.png", "a/day1/x/3.png", "a/day1-b/1.png", "b/.trash/5.png"]
    for number, name in enumerate(names):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(path)
    (tmp_path / "train" / "a" / "loop").symlink_to(tmp_path / "train" / "a", target_is_directory=True)
    Image.new("L", (4, 4), 9).save(elsewhere / "0.png")
    (tmp_path / "train" / "b" / "linked").symlink_to(elsewhere, target_is_directory=True)
    data = both_splits(tmp_path)
    assert data.train.images[:, 0, 0, 0].tolist() == [1, 2, 4, 3, 0, 9]
    assert data.train.labels.tolist() == [0, 0, 0, 0, 1, 1]


def test_what_is_left_out_is_named(tmp_path):
    write_folder(tmp_path, {"train": {"ant": 1, "owl": 1}})
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "ant" / ".DS_Store").write_text("hidden")
    Image.new("L", (6, 5)).save(tmp_path / "train" / "stray.png")
    with pytest.warns(UserWarning, match="left out") as told:
        both_splits(tmp_path)
    first, second = (str(warning.message) for warning in told)
    assert first.endswith("train: 2 files are no images of a class, and left out: stray.png, ant/notes.txt")
    assert "test: 2 files" in second


def test_classes_without_an_image_are_refused(tmp_path):
    write_folder(tmp_path, {"train": {"ant": 1, "owl": 1}})
    (tmp_path / "train" / "bee").mkdir()
    (tmp_path / "train" / "fly").mkdir()
    (tmp_path / "train" / "fly" / "eggs.txt").write_text("not yet")
    with pytest.raises(ValueError, match=r"classes without an image in .*train: bee, fly; remove their folders"):
        both_splits(tmp_path)
    shutil.rmtree(tmp_path / "train" / "bee")
    shutil.rmtree(tmp_path / "train" / "fly")
    shutil.rmtree(tmp_path / "test" / "bee")
    shutil.rmtree(tmp_path / "test" / "fly")
    shutil.rmtree(tmp_path / "test" / "ant")  # of which there is nothing to test
    assert load_data(tmp_path, validation=0).test.labels.tolist() == [1]


def test_several_frames(tmp_path):
    frames = [Image.new("L", (6, 5), 60 * number) for number in range(3)]
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        frames[0].save(tmp_path / split / "cat" / "1.tif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"several frames .* of each the first is taken"):
        assert load_data(tmp_path, validation=0).train.images.max() == 0


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, kind, orientation):
    """As ImageOps.exif_transpose turns them; a first image that lies on its side decides the size as it stands."""
    array = np.zeros((10, 14, 3), np.uint8)
    array[:4, :6] = 255
    exif = Image.Exif()
    exif[274] = orientation
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / split / "cat" / f"1.{kind}", exif=exif, quality=95)
    turned = {
        1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: array.transpose(1, 0, 2),
        6: array[::-1].transpose(1, 0, 2), 7: array[::-1, ::-1].transpose(1, 0, 2),
        8: array[:, ::-1].transpose(1, 0, 2),
    }[orientation]  # fmt: skip
    upright = Image.fromarray(np.ascontiguousarray(turned))
    upright.save(tmp_path / "train" / "cat" / "2.png")
    images = load_data(tmp_path, validation=0).train.images
    expected = as_tensor(np.stack([turned, turned]))
    assert torch.equal(images[1], expected[1])
    assert (images[0].int() - expected[0].int()).abs().max() <= 40


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_names_of_a_validation_split(tmp_path, name):
    write_folder(tmp_path, {split: {"ant": 2, "owl": 3} for split in ("train", name, "test")})
    assert len(load_data(tmp_path).validation) == 5
    write_folder(tmp_path, {"more": {"ant": 1}})
    with pytest.warns(UserWarning, match="folders that are no split are left out: more"):
        load_data(tmp_path)
