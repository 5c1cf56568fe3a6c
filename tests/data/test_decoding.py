"""Pictures become numbers: in memory, in a file where they are many, and never by way of too much memory."""

import gc
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import TensorDataset

from innermax.data import decoding
from innermax.data.load import load_data
from innermax.data.readers import as_image_set
from tests.helpers.image_files import Items, as_tensor, encoded, hugging_face, parquet, pixels, rows, write_folder


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


def held(place):
    """The sizes in bytes of the temporary files in a folder that this process maps."""
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
    monkeypatch.setattr(decoding, "read_pixels", lambda *_, **__: pytest.fail("decoded"))
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
        for result in decoding.map_ahead(pool, lambda rows: rows[0].label, batches(), 4):
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


@pytest.mark.slow
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
