"""Streams: the same examples in the same order for every process and after every interruption, and a flat memory."""

import io
import resource
import subprocess
import sys
import tarfile
import textwrap

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pictures

import innermax as im
from innermax.data.streaming import batches

COUNT = 60


def picture(number, mode="L", size=(6, 5), kind="PNG"):
    """An encoded image that tells its number in every pixel."""
    file = io.BytesIO()
    Pictures.new(mode, size, number if mode == "L" else (number, 0, 255 - number)).save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def source(count=COUNT, shards=4, labels=None, **picture_options):
    rows = {
        "image": [picture(number, **picture_options) for number in range(count)],
        "label": [number % 3 for number in range(count)] if labels is None else labels,
    }
    return Dataset.from_dict(rows, Features({"image": Image(), "label": Value("int64")})).to_iterable_dataset(shards)


STREAM = im.ImageStream(source(), COUNT, buffer=10)


def told(stream, size, seed=0, epoch=0, first=0, share=lambda index: index):
    """The numbers that the pictures tell, batch by batch."""
    return [
        (batch.mine.tolist(), (batch.x[:, 0, 0, 0] * 255).round().int().tolist(), batch.y.tolist())
        for batch in batches(stream, size, seed, epoch, first, share)
    ]


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(30, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def weights(model):
    return torch.cat([value.flatten() for value in model.state_dict().values()])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, COUNT), st.integers(0, 3), st.integers(0, 2), st.data())
def test_an_epoch_holds_every_example_once_and_goes_on_where_it_was_interrupted(size, seed, epoch, data):
    whole = told(STREAM, size, seed, epoch)
    assert [place for index, _, _ in whole for place in index] == list(range(COUNT))
    shown = [number for _, numbers, _ in whole for number in numbers]
    assert sorted(shown) == list(range(COUNT))
    assert [label for _, _, labels in whole for label in labels] == [number % 3 for number in shown]
    sizes = {len(index) for index, _, _ in whole}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= size
    first = data.draw(st.integers(0, len(whole)))
    assert told(STREAM, size, seed, epoch, first) == whole[first:]


def test_orders_differ_by_seed_and_epoch():
    orders = {tuple(told(STREAM, COUNT, seed, epoch)[0][1]) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_each_batch(processes):
    whole = told(STREAM, 16)
    shares = [
        told(STREAM, 16, share=lambda index, rank=rank: index.tensor_split(processes)[rank])
        for rank in range(processes)
    ]
    for number, batch in enumerate(whole):
        for part in range(3):
            assert [value for share in shares for value in share[number][part]] == batch[part]


def test_colour_and_grey():
    assert STREAM.shape == (1, 5, 6)
    colour = im.ImageStream(source(9, mode="RGB"), 9)
    assert colour.shape == (3, 5, 6)
    assert len(colour) == 9
    ((_, numbers, _),) = told(colour, 9)
    assert sorted(numbers) == list(range(9))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_training_goes_on_within_an_epoch_to_the_bit(tmp_path, precision):
    def trained(folder, stop=None):
        updates = [0]

        def objective(model, x, y, x_adv, epoch):
            if stop is not None and updates[0] == stop:
                raise Stopped
            updates[0] += 1
            logits = model(x_adv)
            return torch.nn.functional.cross_entropy(logits, y), logits

        model = network()
        run = im.train(
            model,
            STREAM,
            im.Dynamic(im.PGD(im.Linf(0.1), steps=3)),
            objective=objective,
            epochs=2,
            batch_size=8,
            shift=1,
            flip=True,
            precision=precision,
            run_dir=tmp_path / folder,
            checkpoint_every=2,
            progress=False,
        )
        return weights(model), run

    with pytest.raises(Stopped):
        trained("stopped", stop=5)
    with pytest.raises(Stopped):
        trained("stopped", stop=6)  # of a new process's updates: in the second epoch
    (again, run), (whole, once) = trained("stopped"), trained("whole")
    assert torch.equal(again, whole)
    assert [row["loss"] for row in run.history] == [row["loss"] for row in once.history]
    assert run.history[0]["gradients"] > 0


def test_it_learns_as_from_a_set():
    """A stream trains a network as well as the same images in memory do; the order alone differs."""
    data = im.load_data("digits", validation=0)
    rows = {"image": [], "label": data.train.labels.tolist()}
    for image in data.train.images:
        file = io.BytesIO()
        Pictures.fromarray(image[0].numpy()).save(file, "PNG")
        rows["image"].append({"bytes": file.getvalue(), "path": None})
    features = Features({"image": Image(), "label": ClassLabel(10)})
    stream = im.ImageStream(Dataset.from_dict(rows, features).to_iterable_dataset(8), len(data.train))
    scores = {}
    for name, images in (("stream", stream), ("set", data.train)):
        torch.manual_seed(0)
        model = im.build_model("digits-cnn", input_shape=data.train.shape)
        im.train(
            model, images, im.Unsecured(), epochs=3, batch_size=64, lr=0.05, progress=False, validation_set=data.test
        )
        scores[name] = im.evaluate(model, data.test, {}, audit=False).accuracy["clean"].value
    assert abs(scores["stream"] - scores["set"]) < 0.06, scores
    assert scores["stream"] > 0.8


def test_webdataset_shards(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as archive:
            for number in range(10):
                for suffix, content in (
                    ("png", picture(10 * shard + number)["bytes"]),
                    ("cls", str(number % 3).encode()),
                ):
                    member = tarfile.TarInfo(f"{shard}-{number}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    files = sorted(map(str, tmp_path.glob("*.tar")))
    shards = load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
    stream = im.ImageStream(shards.rename_columns({"png": "image", "cls": "label"}), 20, buffer=5)
    assert sorted(number for _, numbers, _ in told(stream, 8) for number in numbers) == list(range(20))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": [0] * 50 + [3] + [0] * 9}, r"label 3, but the model has 3 classes"),
        ({"labels": [0] * 50 + [-1] + [0] * 9}, r"label must hold integers ≥ 0, got -1"),
        ({"count": 50}, r"ended after 50 of 60 examples"),
    ],
)
def test_what_comes_late_is_refused(changes, said, monkeypatch):
    monkeypatch.setattr("innermax.data.streaming._HEAD", 4)
    stream = im.ImageStream(source(**changes), COUNT)
    with pytest.raises(ValueError, match=said):
        im.train(network(), stream, im.Unsecured(), epochs=1, batch_size=16, progress=False)


def test_colour_that_comes_late_is_refused(monkeypatch):
    monkeypatch.setattr("innermax.data.streaming._HEAD", 4)
    rows = {"image": [picture(1)] * 9 + [picture(1, "RGB")], "label": [0] * 10}
    late = Dataset.from_dict(rows, Features({"image": Image(), "label": Value("int64")})).to_iterable_dataset()
    with pytest.raises(ValueError, match="has colour, the stream's first 4 have none"):
        told(im.ImageStream(late, 10), 5)


def test_what_is_no_stream_is_refused():
    with pytest.raises(TypeError, match=r"IterableDataset, as load_dataset\(…, streaming=True\) gives, got list"):
        im.ImageStream([], 5)
    with pytest.raises(ValueError, match="examples must be at least 1"):
        im.ImageStream(source(), 0)
    with pytest.raises(ValueError, match="the stream has no column image or img"):
        im.ImageStream(source().rename_column("image", "picture"), 5)
    with pytest.raises(ValueError, match="WarmStart keeps every example's perturbation"):
        im.train(network(), STREAM, im.WarmStart(im.PGD(im.Linf(0.1), steps=2)), epochs=2, progress=False)


LARGE = """
    import resource, sys
    import pyarrow.parquet, torch
    from datasets import load_dataset
    import innermax as im

    folder, room = sys.argv[1], int(sys.argv[2])
    source = load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", streaming=True)
    model = torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten(), torch.nn.Linear(3 * 16, 3))
    strategy = im.Standard(im.PGD(im.Linf(0.1), steps=1))

    def train(examples, buffer=300):
        stream = im.ImageStream(source, examples, buffer)
        im.train(model, stream, strategy, epochs=1, batch_size=8, precision="float32", progress=False)

    train(300)  # all that is loaded once is loaded
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    used = int(status["VmData"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))
    train(int(sys.argv[3]))
    print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_a_set_larger_than_the_memory_allowed(tmp_path):
    """2,500 images of 224 × 224 are 376 MB as bytes, 1.5 GB as numbers; the process may take 250 MB more."""
    size, count = (224, 224), 2500
    pictures = [picture(number, "RGB", size, "JPEG") for number in range(50)]
    rows = {"image": [pictures[number % 50] for number in range(count)], "label": [n % 3 for n in range(count)]}
    large = Dataset.from_dict(rows, Features({"image": Image(), "label": Value("int64")}))
    for shard in range(4):
        large.shard(4, shard).to_parquet(str(tmp_path / f"{shard}.parquet"))

    def run(room, examples=count, code=LARGE):
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(room), str(examples)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    room = 250 * 2**20
    flat = run(room)
    assert flat.stdout == "done\n", flat.stderr
    held = run(room, code=LARGE.replace("stream = im.ImageStream(source, examples, buffer)", HELD))
    assert held.returncode != 0, "the limit does not bind"
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


HELD = "stream = (torch.rand(examples, 3, 224, 224), torch.zeros(examples, dtype=torch.int64))"
