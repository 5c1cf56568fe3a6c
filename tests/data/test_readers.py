"""What is read is what was written, in order: Parquet, folders, other people's data sets."""

import hashlib
import os
import struct
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from innermax.data.image_set import ImageSet
from innermax.data.load import load_data
from innermax.data.readers import as_image_set, from_parquet
from tests.helpers.data import BYTES, LABELS
from tests.helpers.image_files import Items, as_tensor, checksum, encoded, hugging_face, parquet, pixels, write_folder

LOCAL = os.environ.get("INNERMAX_DATA")


needs_real_data = pytest.mark.skipif(not LOCAL, reason="INNERMAX_DATA names no folder with the real data sets")


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
    check("must hold integers, got text")
    parquet(train, good, [0, None])
    check("must hold integers, none missing")
    parquet(train, [good[0], None], [0, 1])
    check("row 1 of .*: the image is missing")
    parquet(train, [good[0], b"no image"], [0, 1])
    check("row 1 of .*: not a readable image")
    parquet(train, [good[0], good[1][:-30]], [0, 1])
    check("row 1 of ")
    parquet(train, [good[0], encoded(pixels(1, height=4)[0])], [0, 1])
    check("row 1 of .*: 6×4 pixels, but the first image has 6×5")
    parquet(train, [encoded(pixels(1, 1)[0].astype(np.uint16) * 200)], [0])
    check("row 0 of .*: mode I;16 is not 8 bits per channel")
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


@pytest.mark.parametrize(("kind", "channels"), [("png", 3), ("bmp", 1), ("PNG", 1)])
def test_image_folder(tmp_path, kind, channels):
    counts = {"train": {"zebra": 2, "ant": 3, "owl": 1}, "test": {"owl": 2, "ant": 1}}
    written = write_folder(tmp_path / "zoo", counts, kind, channels)
    (tmp_path / "zoo" / "train" / ".hidden").mkdir()
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
    with pytest.raises(ValueError, match=r"wide.png: not a readable image"):
        load_data(tmp_path)
    (tmp_path / "train" / "owl" / "wide.png").unlink()
    (tmp_path / "test" / "owl" / "000.png").unlink()
    with pytest.raises(ValueError, match="test holds no images"):
        load_data(tmp_path)


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
        "a mapping": {"id": ["a", "b", "c"], "img": expected, "label": numbers},
        "a mapping of arrays": {"image": array, "label": np.array(labels)},
        "loader": DataLoader(TensorDataset(expected, numbers), batch_size=2),
        "loader of mappings": DataLoader([{"image": x, "label": y} for x, y in zip(expected, labels, strict=True)], 2),
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
        (
            DataLoader(TensorDataset(X)),
            TypeError,
            r"a batch of the DataLoader must be \(images, labels\) .*, got list of 1",
        ),
        (DataLoader([]), ValueError, "the DataLoader holds no examples"),
        ({"image": X, "y": LABELS}, ValueError, "the mapping has no column label or fine_label"),
    ],
)
def test_as_image_set_errors(source, error, message):
    with pytest.raises(error, match=message):
        as_image_set(source)


def test_a_loader_that_shuffles_is_told_of():
    loader = DataLoader(TensorDataset(X, torch.arange(3)), shuffle=True)
    with pytest.warns(UserWarning, match="the DataLoader shuffles"):
        found = as_image_set(loader)
    assert torch.equal(found.images, X[found.labels])


def test_limit_must_be_positive():
    with pytest.raises(ValueError, match="limit must be ≥ 1, got 0"):
        as_image_set((BYTES, LABELS), limit=0)


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
