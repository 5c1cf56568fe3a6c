"""Data: what is read is what was written, in order; and augmentation depends on the example alone."""

import gc
import hashlib
import io
import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch.utils.data import Dataset, TensorDataset

from innermax.data import decoding
from innermax.data import load as module
from innermax.data.augmentation import augment
from innermax.data.image_set import Data, ImageSet
from innermax.data.load import hub_id, load_data
from innermax.data.readers import as_image_set, from_parquet
from innermax.utils.randomness import hash_keys, uniform

LOCAL = os.environ.get("INNERMAX_DATA")
needs_real_data = pytest.mark.skipif(not LOCAL, reason="INNERMAX_DATA names no folder with the real data sets")


@pytest.fixture(autouse=True)
def no_local_data(monkeypatch):
    monkeypatch.delenv("INNERMAX_DATA", raising=False)


def pixels(count, channels=3, height=5, width=6, seed=0):
    shape = (count, height, width, channels) if channels > 1 else (count, height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(array, kind="PNG", mode=None):
    image = Image.fromarray(array)
    buffer = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(
        buffer, kind, **({"lossless": True} if kind == "WEBP" else {})
    )
    return buffer.getvalue()


def parquet(path, blobs, labels, image="image", label="label", names=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array(
        [{"bytes": blob, "path": None} for blob in blobs], pa.struct({"bytes": "binary", "path": "string"})
    )
    table = pa.table({"extra": list(range(len(blobs))), image: column, label: pa.array(labels)})
    if names:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def as_tensor(array):
    """(N, H, W[, C]) → (N, C, H, W)."""
    array = array if array.ndim == 4 else array[..., None]
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def checksum(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def rows(image_set):
    """The examples as a set of bytes: what two splits may not share."""
    return {image.numpy().tobytes() for image in image_set.images}


# --- ImageSet and Data


def test_image_set_is_a_sequence_of_examples():
    images, labels = torch.randint(0, 256, (6, 1, 3, 4), dtype=torch.uint8), torch.arange(6)
    examples = ImageSet(images, labels)
    assert len(examples) == 6
    assert examples.shape == (1, 3, 4)
    assert torch.equal(examples[1:3].images, images[1:3])
    assert torch.equal(examples[torch.tensor([5, 0])].labels, torch.tensor([5, 0]))
    x, y = examples.batch(torch.tensor([4, 4, 1]))
    assert x.dtype == torch.float32
    assert torch.equal(x, images[[4, 4, 1]].float() / 255)
    assert y.tolist() == [4, 4, 1]
    assert torch.equal(examples.images, images)
    assert torch.equal(examples.to("cpu").images, images)


def test_every_byte_becomes_its_255th():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x, _ = ImageSet(images, torch.zeros(1, dtype=torch.int64)).batch(torch.tensor([0]))
    assert torch.equal(x.flatten(), torch.tensor([value / 255 for value in range(256)]))


def test_float_features_of_any_shape():
    features = torch.rand(4, 7)
    examples = ImageSet(features, torch.arange(4))
    assert examples.shape == (7,)
    assert torch.equal(examples.batch(torch.tensor([2]))[0], features[2:3])


BYTES = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (BYTES, LABELS[:1], ValueError, r"labels must have shape \(2,\), got \(1,\)"),
        (BYTES, LABELS - 1, ValueError, "labels must be ≥ 0, got values from -1"),
        (BYTES, LABELS.int(), TypeError, "labels must be int64, got torch.int32"),
        (BYTES[:0], LABELS[:0], ValueError, "N ≥ 1"),
        (BYTES[0], LABELS[:1], ValueError, r"\(N, C, H, W\)"),
        (BYTES.int(), LABELS, TypeError, "uint8 or float32, got torch.int32"),
        (BYTES.double(), LABELS, TypeError, "uint8 or float32, got torch.float64"),
        (BYTES / 0, LABELS, ValueError, "NaN or infinite"),
        (BYTES + 1.5, LABELS, ValueError, r"lie in \[0, 1\], got values from 1.5 to 1.5"),
        (BYTES - 0.5, LABELS, ValueError, r"lie in \[0, 1\]"),
        (torch.rand(0, 3), LABELS[:0], ValueError, "images must have shape"),
    ],
)
def test_image_set_errors(images, labels, error, message):
    with pytest.raises(error, match=message):
        ImageSet(images, labels)


def test_splits_must_agree():
    small, other = ImageSet(BYTES, LABELS), ImageSet(torch.rand(2, 1, 2, 3), LABELS)
    with pytest.raises(ValueError, match=r"test images are \(1, 2, 3\), train images \(1, 2, 2\)"):
        Data("made up", small, None, other, 2, None)
    with pytest.raises(ValueError, match="validation labels of made up must be in 0…1, got values from 2"):
        Data("made up", small, ImageSet(BYTES, LABELS + 2), small, 2, None)


# --- the digits and the held-out split


def test_digits():
    from sklearn.datasets import load_digits

    data = load_data("digits")
    assert (data.name, data.num_classes, data.class_names) == ("digits", 10, tuple("0123456789"))
    assert (len(data.train), len(data.validation), len(data.test)) == (1295, 143, 359)
    splits = (data.train, data.validation, data.test)
    together = torch.cat([split.images for split in splits]).flatten(1)
    original = load_digits().images.reshape(1797, 64)
    expected = torch.tensor([[int(value * 255 / 16 + 0.5) for value in row] for row in original], dtype=torch.uint8)
    pairs = sorted(zip(together.tolist(), torch.cat([split.labels for split in splits]).tolist(), strict=True))
    assert pairs == sorted(zip(expected.tolist(), load_digits().target.tolist(), strict=True))
    assert len(set(data.test.labels.tolist())) == 10


def test_digits_splits_are_fixed():
    """Pinned: a result is comparable only while its test examples stay the same."""
    data = load_data("digits")
    sums = [checksum(split.images) for split in (data.train, data.validation, data.test)]
    assert sums == ["6d5870c845aafb05", "2a94f2b2aaa28eca", "5785964c63ccb8b2"]


def test_held_out_examples():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    none, tenth, count = (load_data("digits", validation=value) for value in (0, 0.1, 100))
    assert torch.equal(torch.get_rng_state(), state)
    assert none.validation is None
    assert len(none.train) == 1438
    assert (len(tenth.train), len(tenth.validation)) == (1294, 144)
    assert (len(count.train), len(count.validation)) == (1338, 100)
    for data in (tenth, count):
        assert torch.equal(data.test.images, none.test.images)
        assert rows(data.train) | rows(data.validation) == rows(none.train)
        assert not rows(data.train) & rows(data.validation)
        places = [
            next(i for i, image in enumerate(none.train.images) if torch.equal(image, chosen))
            for chosen in data.validation.images[:20]
        ]
        assert places == sorted(places)
    assert rows(count.validation) <= rows(tenth.validation)


@pytest.mark.parametrize("validation", [-1, 1.0, 1.5, -0.1, float("nan"), True])
def test_held_out_errors(validation):
    with pytest.raises(ValueError, match=r"validation must be a fraction in \(0, 1\), a count ≥ 0 or None"):
        load_data("digits", validation=validation)


def test_held_out_must_leave_something():
    with pytest.raises(ValueError, match="leaves nothing of the 1438"):
        load_data("digits", validation=1438)


def test_default_holds_out_at_most_5000():
    train, validation = module._hold_out(ImageSet(torch.rand(60_000, 1), torch.zeros(60_000, dtype=torch.int64)), None)
    assert (len(train), len(validation)) == (55_000, 5_000)
    few = ImageSet(torch.rand(9, 1), torch.zeros(9, dtype=torch.int64))
    assert module._hold_out(few, None) == (few, None)


# --- parquet


@pytest.mark.parametrize(("kind", "columns"), [("PNG", ("image", "label")), ("WEBP", ("img", "fine_label"))])
def test_parquet_shards(tmp_path, kind, columns):
    """Three shards, rows and shards in order; the columns under either name; a grey set stays grey."""
    channels = 1 if kind == "PNG" else 3
    train, test, labels = pixels(700, channels), pixels(4, channels, seed=1), list(range(700))
    cuts = (0, 300, 301, 700)
    for shard in (2, 0, 1):
        chosen = slice(cuts[shard], cuts[shard + 1])
        blobs = [encoded(image, kind) for image in train[chosen]]
        parquet(tmp_path / "cifar10" / f"train-0000{shard}-of-00003.parquet", blobs, labels[chosen], *columns)
    parquet(tmp_path / "cifar10" / "test.parquet", [encoded(image, kind) for image in test], [3, 2, 1, 0], *columns)
    data = load_data("cifar10", root=tmp_path, validation=0)
    assert torch.equal(data.train.images, as_tensor(train))
    assert data.train.labels.tolist() == labels
    assert torch.equal(data.test.images, as_tensor(test))
    assert data.test.labels.tolist() == [3, 2, 1, 0]
    assert (data.name, data.num_classes, data.class_names) == ("cifar10", 700, None)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file())[0] == "test.parquet"
    assert len(list(tmp_path.rglob("*"))) == 5  # no caches beside the data


def test_parquet_folder_by_path_and_by_environment(tmp_path, monkeypatch):
    folder = tmp_path / "mnist"
    for split in ("train", "validation", "test"):
        parquet(folder / f"{split}.parquet", [encoded(i) for i in pixels(3, 1)], [0, 1, 1], names=["cat", "dog", "owl"])
    by_path = load_data(folder)
    monkeypatch.setenv("INNERMAX_DATA", str(tmp_path))
    by_name = load_data("mnist")
    for data in (by_path, by_name, load_data(str(folder))):
        assert (data.num_classes, data.class_names, data.name) == (3, ("cat", "dog", "owl"), "mnist")
        assert [len(split) for split in (data.train, data.validation, data.test)] == [3, 3, 3]
    with pytest.raises(ValueError, match="validation split of its own"):
        load_data(folder, validation=1)


@pytest.fixture
def folder(tmp_path):
    """A parquet folder whose train split a test overwrites."""
    for split in ("train", "test"):
        parquet(tmp_path / f"{split}.parquet", [encoded(image) for image in pixels(2)], [0, 1])
    return tmp_path


def test_grey_and_coloured_images_become_coloured(folder):
    grey, colour = pixels(2, 1), pixels(2)
    parquet(folder / "train.parquet", [encoded(grey[0]), encoded(colour[1])], [0, 1])
    images = load_data(folder, validation=0).train.images
    assert torch.equal(images[0], as_tensor(grey)[0].expand(3, -1, -1))
    assert torch.equal(images[1], as_tensor(colour)[1])
    parquet(folder / "train.parquet", [encoded(image) for image in grey], [0, 1])  # and the test split has colour
    assert torch.equal(load_data(folder, validation=0).train.images, as_tensor(grey).expand(-1, 3, -1, -1))


@pytest.mark.parametrize(("mode", "channels"), [("P", 3), ("RGBA", 3), ("1", 1), ("LA", 1)])
def test_other_modes(folder, mode, channels):
    array = (pixels(1, 1) // 128 * 255)[0]  # black and white: representable in every mode
    for split in ("train", "test"):
        parquet(folder / f"{split}.parquet", [encoded(array, mode=mode)], [0])
    assert torch.equal(load_data(folder).train.images[0], torch.from_numpy(array).expand(channels, -1, -1))


def test_parquet_errors_name_the_file(folder):
    train = folder / "train.parquet"
    good = [encoded(image) for image in pixels(2)]

    def check(message):
        with pytest.raises(ValueError, match=message) as caught:
            load_data(folder)
        assert "train.parquet" in str(caught.value)

    parquet(train, good, [0, 1], image="picture")
    check(r"no column image or img \(its columns: extra, picture, label\)")
    parquet(train, good, [0, 1], label="class")
    check("no column label or fine_label")
    parquet(train, [], pa.array([], pa.int64()))
    check("holds no rows")
    parquet(train, good, ["a", "b"])
    check("must hold integers, none missing, got string")
    parquet(train, good, [0, None])
    check("must hold integers, none missing")
    parquet(train, [good[0], None], [0, 1])
    check("row 1 of .*: the image is missing")
    parquet(train, [good[0], b"no image"], [0, 1])
    check("row 1 of .*: not a readable PNG")
    parquet(train, [good[0], good[1][:-30]], [0, 1])
    check("row 1 of ")
    parquet(train, [good[0], encoded(pixels(1, height=4)[0])], [0, 1])
    check("row 1 of .*: 6×4 pixels, but the first image has 6×5")
    parquet(train, [encoded(pixels(1, 1)[0].astype(np.uint16) * 200)], [0])
    check("row 0 of .*: mode I;16 is not 8 bits a channel")
    pq.write_table(pa.table({"image": [[1, 2]], "label": [0]}), train)
    check("must hold encoded images")
    train.write_bytes(b"PAR1 and nothing else")
    check("cannot be read as parquet")
    parquet(train, good, [0, 1])
    train.write_bytes(train.read_bytes()[:200])
    check("cannot be read as parquet")


def test_negative_labels(folder):
    parquet(folder / "test.parquet", [encoded(image) for image in pixels(2)], [-1, -1])  # the Hub's "not labelled"
    with pytest.raises(ValueError, match="labels must be ≥ 0"):
        load_data(folder)


def test_bombs_are_refused_before_they_are_decoded(folder, monkeypatch):
    """Two bombs: one as large as PIL itself refuses, one between our limit and PIL's; decoding either would fail."""

    def refuse(*_):
        raise AssertionError("decoded")

    for width, height in ((30_000, 30_000), (4096, 4097)):
        blob = bytearray(encoded(pixels(1)[0]))
        blob[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        blob[29:33] = zlib.crc32(blob[12:29]).to_bytes(4, "big")
        parquet(folder / "train.parquet", [bytes(blob)], [0])
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", refuse)
            with pytest.raises(ValueError, match=r"row 0 of .*(decompression bomb|16,777,216 allowed)"):
                load_data(folder)


# --- image folders


def write_folder(root, counts, kind="png", channels=3):
    """{split: {class: count}} → the arrays written, in the order they should be read."""
    written = {}
    for number, (split, classes) in enumerate(counts.items()):
        written[split] = pixels(sum(classes.values()), channels, seed=number)
        place = 0
        for name in sorted(classes):
            (root / split / name).mkdir(parents=True)
            for file in range(classes[name]):
                Image.fromarray(written[split][place]).save(root / split / name / f"{file:03}.{kind}")
                place += 1
    return written


@pytest.mark.parametrize(("kind", "channels"), [("png", 3), ("bmp", 1), ("PNG", 1)])
def test_image_folder(tmp_path, kind, channels):
    counts = {"train": {"zebra": 2, "ant": 3, "owl": 1}, "test": {"owl": 2, "ant": 1}}
    written = write_folder(tmp_path / "zoo", counts, kind, channels)
    (tmp_path / "zoo" / "train" / ".hidden").mkdir()
    (tmp_path / "zoo" / "train" / "ant" / "notes.txt").write_text("not an image")
    data = load_data(tmp_path / "zoo", validation=0)
    assert (data.name, data.num_classes, data.class_names) == ("zoo", 3, ("ant", "owl", "zebra"))
    assert torch.equal(data.train.images, as_tensor(written["train"]))
    assert data.train.labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert torch.equal(data.test.images, as_tensor(written["test"]))
    assert data.test.labels.tolist() == [0, 1, 1]


def test_image_folder_formats_and_validation(tmp_path):
    write_folder(tmp_path, {split: {"a": 2, "b": 2} for split in ("train", "validation", "test")}, "jpg")
    Image.fromarray(pixels(1)[0]).save(tmp_path / "test" / "a" / "z.webp", lossless=True)
    data = load_data(str(tmp_path))
    assert len(data.validation) == 4
    assert torch.equal(data.test.images[2], as_tensor(pixels(1))[0])


def test_large_images_are_read_in_order(tmp_path):
    """Large enough for several threads, more than one chunk."""
    written = pixels(520, 1, 128, 128) // 128 * 255
    blobs = [encoded(image) for image in written]
    parquet(tmp_path / "train.parquet", blobs, list(range(520)))
    parquet(tmp_path / "test.parquet", blobs[:1], [0])
    assert torch.equal(load_data(tmp_path, validation=0).train.images, as_tensor(written))


def test_image_folder_errors(tmp_path):
    write_folder(tmp_path, {"train": {"ant": 1, "owl": 1}, "test": {"owk": 1}})
    with pytest.raises(ValueError, match=r"unknown class in .*test: 'owk'; did you mean 'owl'"):
        load_data(tmp_path)
    (tmp_path / "test" / "owk").rename(tmp_path / "test" / "owl")
    Image.fromarray(pixels(1, width=9)[0]).save(tmp_path / "train" / "owl" / "wide.png")
    with pytest.raises(ValueError, match=r"owl.wide.png: 9×5 pixels, but the first image has 6×5"):
        load_data(tmp_path)
    (tmp_path / "train" / "owl" / "wide.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"wide.png: not a readable PNG, JPEG, WEBP, BMP image"):
        load_data(tmp_path)
    (tmp_path / "train" / "owl" / "wide.png").unlink()
    (tmp_path / "test" / "owl" / "000.png").unlink()
    with pytest.raises(ValueError, match="test holds no images"):
        load_data(tmp_path)


# --- names


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="unknown data set or folder 'cifra10'; did you mean 'cifar10'"):
        load_data("cifra10")
    with pytest.raises(ValueError, match="neither train"):
        load_data(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder, got the file"):
        load_data(tmp_path / "file")
    parquet(tmp_path / "train.parquet", [encoded(pixels(1)[0])], [0])
    with pytest.raises(ValueError, match=r"but no test\*.parquet"):
        load_data(tmp_path)
    with pytest.raises(ValueError, match="root must name a folder"):
        load_data("mnist", root=tmp_path / "missing")


def test_wrong_environment(monkeypatch):
    monkeypatch.setenv("INNERMAX_DATA", "no such folder")
    with pytest.raises(ValueError, match="INNERMAX_DATA must name a folder, got 'no such folder'"):
        load_data("mnist")
    assert load_data("digits").name == "digits"  # which needs no folder


def test_heavy_packages_are_imported_where_used():
    heavy = "{'PIL', 'pyarrow', 'datasets', 'sklearn', 'torchvision'}"
    program = f"import sys, innermax.data; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_hub(monkeypatch):
    asked = []

    def hub(*arguments, split, revision):
        asked.append((*arguments, split, revision))
        return hugging_face(pixels(3), [2, 0, 1] if split == "train" else [0, 0, 1], label="fine_label")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    data = load_data("cifar100", validation=1)
    assert asked == [("uoft-cs/cifar100", None, "train", None), ("uoft-cs/cifar100", None, "test", None)]
    assert (data.name, data.num_classes, data.class_names) == ("cifar100", 3, ("a", "b", "c"))
    assert [len(data.train), len(data.validation)] == [2, 1]
    assert torch.equal(data.test.images, as_tensor(pixels(3)))


def test_a_revision_of_the_hub(monkeypatch, tmp_path):
    asked = []

    def hub(*arguments, split, revision):
        asked.append((*arguments, split, revision))
        return hugging_face(pixels(3), [2, 0, 1], label="label")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    (tmp_path / "cifar10").mkdir()  # what lies here is of no known revision
    assert load_data("cifar10@refs/pr/3", validation=1, root=tmp_path).name == "cifar10@refs/pr/3"
    assert asked == [("uoft-cs/cifar10", None, split, "refs/pr/3") for split in ("train", "test")]
    assert hub_id("cifar10@refs/pr/3") == "uoft-cs/cifar10"
    for name in ("digits@1", "cifar10@", "cifar-10@1"):
        with pytest.raises(ValueError, match="unknown data set or folder"):
            load_data(name)


def test_a_data_set_of_the_hub_names_no_file_of_this_machine(monkeypatch, tmp_path):
    Image.fromarray(pixels(1)[0]).save(tmp_path / "mine.png")
    features = datasets.Features({"img": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a", "b"])})
    row = {"img": [{"bytes": None, "path": str(tmp_path / "mine.png")}], "label": [0]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(row, features=features))
    with pytest.raises(ValueError, match=r"row 0 of uoft-cs/cifar10 train: the image is missing"):
        load_data("cifar10@main", validation=0)


def test_hub_without_a_connection(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"svhn .*ConnectionError: no route to host.*INNERMAX_DATA names"):
        load_data("svhn", root=tmp_path)


# --- other people's data sets


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def hugging_face(arrays, labels, image="img", label="label"):
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=["a", "b", "c"])})
    columns = {image: [Image.fromarray(array) for array in arrays], label: labels}
    return datasets.Dataset.from_dict(columns, features=features)


def test_as_image_set():
    array, labels = pixels(3), [2, 0, 1]
    expected = as_tensor(array)
    numbers = torch.tensor(labels)
    sources = {
        "itself": ImageSet(expected, numbers),
        "tensors": (expected, numbers),
        "tensor data set": TensorDataset(expected, numbers),
        "tensor items": Items([(x, y) for x, y in zip(expected, labels, strict=True)]),
        "pictures": Items([(Image.fromarray(x), np.int64(y)) for x, y in zip(array, labels, strict=True)]),
        "hugging face": hugging_face(array, labels),
        "hugging face, torch format": hugging_face(array, labels).with_format("torch"),
    }
    for name, source in sources.items():
        for limit in (None, 2, 9):
            images = as_image_set(source, limit=limit)
            assert torch.equal(images.images, expected[:limit]), name
            assert images.labels.tolist() == labels[:limit], name
    assert as_image_set(sources["itself"]) is sources["itself"]


def test_as_image_set_of_floats():
    x = torch.rand(3, 4, dtype=torch.float64)
    for source in ((x, torch.arange(3)), TensorDataset(x, torch.arange(3))):
        assert torch.equal(as_image_set(source).images, x.float())


def test_hugging_face_rows_after_select_and_by_path(tmp_path):
    array = pixels(4)
    chosen = hugging_face(array, [0, 1, 2, 0]).select([3, 1])
    assert torch.equal(as_image_set(chosen).images, as_tensor(array)[[3, 1]])
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path, image in zip(paths, array, strict=False):
        Image.fromarray(image).save(path)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int32")})
    by_path = datasets.Dataset.from_dict({"image": paths, "label": [1, 0]}, features=features)
    images = as_image_set(by_path)
    assert torch.equal(images.images, as_tensor(array)[:2])
    assert images.labels.tolist() == [1, 0]


X = torch.rand(3, 2, 2)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("mnist", TypeError, "a data set must be an ImageSet, .*, got str"),
        ([X, 0], TypeError, "got list"),
        (Items([]), ValueError, "holds no examples"),
        (Items([(X, 0), X]), TypeError, "item 1 of the data set must be"),
        (Items([("x", 0)]), TypeError, "item 0 of the data set must be"),
        (Items([(X, 0.5)]), TypeError, "y in item 0 of the data set must be an integer, got 0.5"),
        (Items([(X, "cat")]), TypeError, "got 'cat'"),
        (Items([(X, 0), (X[:2], 0)]), ValueError, "must have one shape and type"),
        (Items([(X, 0), (X.double(), 0)]), ValueError, "must have one shape and type"),
        (Items([(X, 0), (X * 255 + 1, 1)]), ValueError, r"must lie in \[0, 1\]"),
        (Items([(X / 0, 0)]), ValueError, "NaN or infinite"),
        (Items([(Image.new("L", (2, 2)), 0), (Image.new("L", (3, 2)), 0)]), ValueError, "item 1 .*3×2 pixels"),
        ((X, LABELS), ValueError, r"labels must have shape \(3,\), got \(2,\)"),
        ((X.int(), torch.arange(3)), TypeError, "uint8 or float32"),
        (datasets.Dataset.from_dict({"image": [1], "label": [0]}), ValueError, "must hold encoded images"),
        (datasets.Dataset.from_dict({"x": [1], "label": [0]}), ValueError, "no column image or img"),
        (datasets.DatasetDict(), TypeError, "got DatasetDict"),
    ],
)
def test_as_image_set_errors(source, error, message):
    with pytest.raises(error, match=message):
        as_image_set(source)


def test_limit_must_be_positive():
    with pytest.raises(ValueError, match="limit must be ≥ 1, got 0"):
        as_image_set((BYTES, LABELS), limit=0)


# --- more than memory should hold


def held(place):
    """The sizes in bytes of the nameless files in a folder that this process maps."""
    sizes = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(place) in line:
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            sizes.append(end - begin)
    return sizes


@pytest.fixture
def small_memory(monkeypatch, tmp_path):
    """Images of more than 300 bytes go into a file, a few at a time; the folder of such files."""
    monkeypatch.setattr(decoding, "IN_MEMORY", 300)
    monkeypatch.setattr(decoding, "_PART", 500)
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    gc.collect()
    assert not held(place), "the files go with the tensors"
    assert not list(place.iterdir())


def filed(images, place):
    """Whether the images lie in a file, which nobody sees."""
    assert not list(place.iterdir())
    return images.images.data_ptr() % mmap.PAGESIZE == 0 and sum(held(place)) >= images.images.numel()


def test_files_hold_what_memory_would(tmp_path, small_memory):
    colour, grey = pixels(20), pixels(20, 1, seed=1)
    mixed = [encoded(image) for image in (*grey[:7], *colour[7:])]
    parquet(tmp_path / "set" / "train-0.parquet", mixed[:8], list(range(8)))
    parquet(tmp_path / "set" / "train-1.parquet", mixed[8:], list(range(8, 20)))
    parquet(tmp_path / "set" / "test.parquet", [encoded(image) for image in grey], list(range(20)))
    written = write_folder(tmp_path / "zoo", {"train": {"a": 9, "b": 9}, "test": {"a": 1}})
    parts = load_data(tmp_path / "set", validation=4)
    whole = load_data(tmp_path / "set", validation=0)
    expected = torch.cat([as_tensor(grey)[:7].expand(-1, 3, -1, -1), as_tensor(colour)[7:]])
    floats = torch.rand(20, 3, 2, 2, dtype=torch.float64)
    found = {
        "shards, grey at first": (whole.train, expected),
        "grey beside colour": (whole.test, as_tensor(grey).expand(-1, 3, -1, -1)),
        "folders": (load_data(tmp_path / "zoo", validation=0).train, as_tensor(written["train"])),
        "hugging face": (as_image_set(hugging_face(colour, [0] * 20)), as_tensor(colour)),
        "pictures": (as_image_set(Items([(Image.fromarray(x), 0) for x in grey])), as_tensor(grey)),
        "tensors": (as_image_set(TensorDataset(as_tensor(colour), torch.arange(20))), as_tensor(colour)),
        "floats": (as_image_set(TensorDataset(floats, torch.arange(20))), floats.float()),
        "chosen": (whole.train[torch.arange(19, -1, -1)], expected.flip(0)),
        "a mask": (whole.train[torch.arange(20) % 5 > 0], expected[torch.arange(20) % 5 > 0]),
    }
    for name, (images, pixel_values) in found.items():
        assert torch.equal(images.images, pixel_values), name
        assert filed(images, small_memory), name
    assert whole.train.labels.tolist() == list(range(20))
    assert rows(parts.train) | rows(parts.validation) == rows(whole.train)
    whole.train.images[3] = 7  # as one may write into any tensor
    assert (whole.train[2:5].images[1] == 7).all()


@pytest.mark.parametrize(
    "items",
    [
        [*((Image.new("L", (20, 20)), 0) for _ in range(9)), (Image.new("L", (3, 2)), 0)],
        [*((torch.zeros(1, 20, 20), 0) for _ in range(9)), (torch.zeros(1, 20, 21), 0)],
        [*((torch.zeros(1, 20, 20), 0) for _ in range(9)), (torch.zeros(1, 20, 20), "cat")],
        [*((torch.zeros(1, 20, 20), 0) for _ in range(9)), (torch.full((1, 20, 20), 2.0), 0)],
        [*((torch.zeros(1, 20, 20), 0) for _ in range(9)), (torch.full((1, 20, 20), torch.nan), 0)],
    ],
)
def test_nothing_is_left_of_a_file_that_was_not_finished(small_memory, items):
    with pytest.raises((ValueError, TypeError)):
        as_image_set(Items(items))


def test_a_disk_without_room_is_said_before_anything_is_decoded(small_memory, monkeypatch):
    monkeypatch.setattr(decoding, "pixels", lambda *_, **__: pytest.fail("decoded"))
    usage = shutil.disk_usage(small_memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1799))
    with pytest.raises(ValueError, match=r"take 0\.0 GiB as numbers, and .*temporary has room for .*with TMPDIR"):
        as_image_set(hugging_face(pixels(20), [0] * 20))


def test_no_more_than_so_many_batches_are_under_way():
    begun, ended = [], []

    def batches():
        for number in range(20):
            begun.append(number)
            yield [decoding.Row(str(number), None, number)]

    with ThreadPoolExecutor(2) as pool:
        for result in decoding.ahead(pool, lambda rows: rows[0].label, batches(), 4):
            ended.append(result)
            assert len(begun) <= len(ended) + 4
    assert ended == list(range(20))


STREAMED = """
import ctypes
import sys
from pathlib import Path
import innermax as im
from innermax.data import decoding
import torch

def told(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def held(*_):  # what no file backs, which cannot leave memory, less what was freed and the allocator keeps
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    return told("RssAnon")

def evaluated(images, watch=None):
    return im.evaluate(model, images, {"fgsm": im.FGSM(im.Linf(0.01))}, batch_size=25, progress=watch, audit=False)

decoding.IN_MEMORY = 16 * 2**20
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, 10))
evaluated(im.load_data(sys.argv[2], validation=0).train)  # everything is imported
before = told("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
images = im.load_data(sys.argv[1], validation=0).train
decoding_took = told("VmHWM") - before
# While it is read: what is kept is still there in the last tenth's smallest; what is only passing by is chance.
before, later = held(), []
scores = evaluated(images, lambda *_: later.append(held()))
assert len(scores.label) == len(images)
print(images.images.nbytes, decoding_took, min(later[-len(later) // 10 :]) - before)
"""


def test_memory_holds_a_few_images_at_a_time(tmp_path):
    count, place = 8_000, tmp_path / "temporary"
    place.mkdir()
    blobs = [encoded(np.full((64, 64, 3), value, np.uint8)) for value in range(10)]
    for name, size in (("large", count), ("small", 50)):
        parquet(tmp_path / name / "train.parquet", (blobs * count)[:size], list(range(10)) * (size // 10))
        parquet(tmp_path / name / "test.parquet", blobs[:1], [0])
    command = [sys.executable, "-c", STREAMED, *(str(tmp_path / name) for name in ("large", "small"))]
    environment = {**os.environ, "TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size, decoding_took, evaluation_kept = map(int, done.stdout.split())
    assert size == count * 3 * 64 * 64
    assert decoding_took < size / 2.5
    assert evaluation_kept < size / 2.5
    assert not list(place.iterdir())


# --- augmentation


def naive(x, key, shift, flip):
    """One example and one pixel at a time."""
    out = torch.zeros_like(x)
    height, width = x.shape[2:]
    for example in range(len(x)):
        draws = uniform(key[example : example + 1], 3)[0].tolist()
        down, right = (int(draw * (2 * shift + 1)) - shift for draw in draws[:2])
        mirrored = flip and draws[2] < 0.5
        for row in range(height):
            for column in range(width):
                from_row, from_column = row + down, column + right
                if 0 <= from_row < height and 0 <= from_column < width:
                    source = width - 1 - from_column if mirrored else from_column
                    out[example, :, row, column] = x[example, :, from_row, source]
    return out


@settings(max_examples=30)
@given(st.data())
def test_augment_against_the_naive_way(data):
    batch, channels, height, width = (data.draw(st.integers(1, most)) for most in (3, 2, 5, 6))
    shift = data.draw(st.integers(0, min(height, width) - 1))
    flip = data.draw(st.booleans())
    seed = data.draw(st.integers(0, 2**63 - 1))
    x = torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(seed % 1000))
    before, key = x.clone(), hash_keys(seed, torch.arange(batch))
    assert torch.equal(augment(x, key, shift=shift, flip=flip), naive(x, key, shift, flip))
    assert torch.equal(x, before)


def test_augmentation_is_undone():
    x, key = torch.rand(64, 3, 9, 9), hash_keys(3, torch.arange(64))
    inside = torch.zeros(64, 3, 9, 9)
    inside[:, :, 2:7, 2:7] = x[:, :, 2:7, 2:7]  # what no shift by two pixels moves out
    for options in ({"shift": 2}, {"flip": True}, {"shift": 2, "flip": True}):
        moved = augment(inside, key, **options)
        assert (moved != inside).flatten(1).any(1).float().mean() > 0.3
        assert torch.equal(augment(moved, key, **options, back=True), inside)
    lost = augment(augment(x, key, shift=2), key, shift=2, back=True)
    assert ((lost == x) | (lost == 0)).all()
    assert (lost == 0).any()


def test_augment_depends_on_the_example_alone():
    x, key = torch.rand(40, 3, 6, 6), hash_keys(7, torch.arange(40))
    state = torch.get_rng_state()
    together = augment(x, key, shift=2, flip=True)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment(x[order], key[order], shift=2, flip=True), together[order])
    assert torch.equal(
        torch.cat([augment(x[i : i + 1], key[i : i + 1], shift=2, flip=True) for i in range(40)]), together
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(augment(x, hash_keys(8, torch.arange(40)), shift=2, flip=True), together)


def test_augment_draws_every_shift_equally_often():
    x = torch.zeros(9_000, 1, 5, 5)
    x[:, 0, 2, 2] = 1
    moved = augment(x, hash_keys(0, torch.arange(9_000)), shift=1)
    counts = moved.sum(0)[0, 1:4, 1:4]
    assert float(counts.sum()) == 9_000
    assert float((counts - 1_000).abs().max()) < 150  # 5 standard deviations
    x = torch.zeros(4_000, 1, 1, 2)
    x[..., 0] = 1
    assert abs(float(augment(x, hash_keys(0, torch.arange(4_000)), flip=True)[..., 0].mean()) - 0.5) < 0.04


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.rand(2, 1, 3, 3), {"shift": 3}, "shift must be in 0…2, got 3"),
        (torch.rand(2, 1, 3, 3), {"shift": -1}, "shift must be in 0…2, got -1"),
    ],
)
def test_augment_errors(x, arguments, message):
    with pytest.raises(ValueError, match=message):
        augment(x, hash_keys(0, torch.arange(2)), **arguments)


# --- the real data sets


@needs_real_data
def test_mnist():
    """Written as IDX files, the four have the official MD5 sums."""
    data = load_data("mnist", root=Path(LOCAL), validation=0)
    assert (data.train.shape, data.num_classes, data.class_names) == ((1, 28, 28), 10, tuple("0123456789"))
    assert data.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    sums = []
    for split, count in ((data.train, 60_000), (data.test, 10_000)):
        images = struct.pack(">4i", 0x803, count, 28, 28) + split.images.numpy().tobytes()
        labels = struct.pack(">2i", 0x801, count) + split.labels.to(torch.uint8).numpy().tobytes()
        sums += [hashlib.md5(images).hexdigest(), hashlib.md5(labels).hexdigest()]
    assert sums == [
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ]


@needs_real_data
def test_cifar10():
    """The test file alone: the whole takes several seconds more and is the same code."""
    test = from_parquet(sorted((Path(LOCAL) / "cifar10").glob("test*.parquet")))
    assert (len(test), test.shape) == (10_000, (3, 32, 32))
    assert test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert test.labels.bincount().tolist() == [1_000] * 10
    assert checksum(test.images) == "88a673e96421bdd7"
