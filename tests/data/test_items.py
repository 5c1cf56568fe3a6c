"""Data sets that are read item by item: what the user sees at ds[i] is learned from, drawn anew in each epoch."""

import random
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import innermax as im
from innermax.data.items import RedrawnItems
from innermax.data.readers import as_image_set
from innermax.data.streaming import as_training_set, batches
from tests.helpers.image_files import Items, as_tensor, hugging_face, pixels

COUNT = 20


def drawn(kind, number, value):
    if kind == "torch":
        return torch.full((1, 6, 5), number / 40) + 0.1 * value
    levels = np.full((6, 5), number + int(100 * value), np.uint8)
    return Image.fromarray(levels) if kind == "pictures" else levels


class Drawn(torch.utils.data.Dataset):
    """Each generator that transforms draw from."""

    def __init__(self, kind="torch", count=COUNT, generator=lambda: float(torch.rand(()))):
        self.kind, self.count, self.generator, self.read = kind, count, generator, 0

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        self.read += 1
        return drawn(self.kind, number, self.generator()), number % 3


def epochs(data, size=6, seed=0, count=3, share=lambda index: index):
    found = []
    for epoch in range(count):
        parts = list(batches(data, size, seed, epoch, 0, share))
        index = torch.cat([part.mine for part in parts])
        x, y = (torch.cat([getattr(part, name) for part in parts])[index.argsort()] for name in "xy")
        found.append((index.sort().values, x, y))
    return found


@pytest.mark.parametrize("kind", ["torch", "arrays", "pictures"])
def test_random_transforms_are_drawn_anew_in_each_epoch(kind):
    """Of every example, once an epoch; the same again from the same seed, whatever the batches are."""
    data = as_training_set(Drawn(kind))
    assert isinstance(data, RedrawnItems)
    found = epochs(data)
    for index, x, y in found:
        assert index.tolist() == list(range(COUNT))
        assert y.tolist() == [number % 3 for number in range(COUNT)]
        assert (x.dtype, x.shape) == (torch.float32, (COUNT, 1, 6, 5))
    assert all(not torch.equal(one[1][n], other[1][n]) for one, other in pairwise(found) for n in (0, 9))
    again = epochs(data, size=4)
    assert all(torch.equal(one[1], other[1]) for one, other in zip(found, again, strict=True))
    assert not torch.equal(found[0][1], epochs(data, seed=1)[0][1])


@pytest.mark.parametrize("generator", [lambda: random.random(), lambda: float(np.random.rand())])  # noqa: NPY002
def test_what_is_drawn_depends_on_the_example_and_leaves_the_generators(generator):
    data = as_training_set(Drawn(generator=generator))
    assert isinstance(data, RedrawnItems)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    found = epochs(data)
    assert np.random.get_state()[1].tolist() == before[0]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])
    second = epochs(data, share=lambda index: index[1::2])
    for (_, whole, _), (index, part, _) in zip(found, second, strict=True):
        assert torch.equal(whole[index], part)


def test_what_stays_as_it_is_is_read_once():
    source = Drawn(generator=lambda: 0.5)
    data = as_training_set(source)
    assert isinstance(data, im.ImageSet)
    assert source.read <= 3 * COUNT + 2


def test_a_training_sees_new_images_and_is_resumed_alike(tmp_path):
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.last, self.seen = nn.Linear(30, 3), []

        def forward(self, x):
            if self.training:
                self.seen.append(x.detach().flatten(1).sort(0).values.clone())
            return self.last(x.flatten(1))

    options = {"batch_size": COUNT, "progress": False, "precision": "float32", "epochs": 3}
    whole = Spy()
    im.train(whole, Drawn(), im.Unsecured(), **options)
    assert not any(torch.equal(whole.seen[0], other) for other in whole.seen[1:])
    stopped = Spy()

    def stop(name, done, total):
        if name == "epoch 2/3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        im.train(stopped, Drawn(), im.Unsecured(), **options | {"progress": stop}, run_dir=tmp_path / "run")
    resumed = Spy()
    im.train(resumed, Drawn(), im.Unsecured(), **options, run_dir=tmp_path / "run")
    assert torch.equal(resumed.last.weight, whole.last.weight)


@pytest.mark.parametrize("kind", ["torch", "arrays", "pictures"])
def test_an_example_is_drawn_alone_as_in_a_batch(kind):
    data = as_training_set(Drawn(kind))
    together, labels = data.draw(torch.arange(6), 3, 1)
    for number in range(6):
        x, y = data.draw(torch.tensor([number]), 3, 1)
        assert torch.equal(x[0], together[number])
        assert y.item() == labels[number]


def test_labels_of_items_are_integers():
    with pytest.raises(TypeError, match="y in item 1 of the data set must be an integer, got 'cat'"):
        as_image_set(Items([(torch.rand(1, 4, 4), 0), (torch.rand(1, 4, 4), "cat")]))


def test_an_evaluation_says_that_it_reads_once():
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 3))
    with pytest.warns(UserWarning, match=r"come out otherwise each time .*each is read once, and stays as it came"):
        im.evaluate(model, Drawn(), {})


def test_errors_of_what_is_drawn():
    with pytest.raises(ValueError, match=r"strategy WarmStart keeps .*random transforms draw anew"):
        im.train(nn.Flatten(), Drawn(), im.WarmStart(im.PGD(im.Linf(0.1))))
    labels = as_training_set(Drawn()).with_classes(2)
    with pytest.raises(ValueError, match="item 2 of the data set: label 2, but the model has 2 classes"):
        labels.draw(torch.arange(6), 0, 0)
    with pytest.raises(ValueError, match="item 5 of the data set: label 2"):
        labels.draw(torch.tensor([5]), 0, 0)
    grown = as_training_set(Drawn())
    object.__setattr__(grown, "source", Items([(torch.rand(1, 7, 7), 0)] * COUNT))
    with pytest.raises(ValueError, match="must have one shape"):
        grown.draw(torch.arange(6), 0, 0)


# --- Hugging Face's own transforms and forms


def test_a_transform_of_the_set_is_honoured():
    array = pixels(4)
    plain = hugging_face(array, [0, 1, 2, 0])
    larger = plain.with_transform(lambda rows: rows | {"img": [image.resize((12, 10)) for image in rows["img"]]})
    assert as_image_set(larger).shape == (3, 10, 12)
    dark = plain.with_transform(lambda rows: rows | {"img": [np.asarray(image) // 2 for image in rows["img"]]})
    assert torch.equal(as_image_set(dark).images, as_tensor(array // 2))
    assert as_image_set(dark).labels.tolist() == [0, 1, 2, 0]
    random_ones = plain.with_transform(lambda rows: rows | {"img": [torch.rand(3, 4, 4) for _ in rows["img"]]})
    assert isinstance(as_training_set(random_ones), RedrawnItems)


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_arrays_in_a_set(form):
    features = datasets.Features({"image": datasets.Array3D((3, 4, 5), "uint8"), "label": datasets.Value("int64")})
    array = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 5), dtype=np.uint8)
    plain = datasets.Dataset.from_dict({"image": list(array), "label": [0, 1, 300]}, features)
    found = as_image_set(plain.with_format(form))
    assert torch.equal(found.images, torch.from_numpy(array))
    assert found.labels.tolist() == [0, 1, 300]
    with pytest.raises(ValueError, match=r'must hold encoded images.*cast_column\("image", datasets.Array3D'):
        as_image_set(datasets.Dataset.from_dict({"image": array.tolist(), "label": [0, 1, 2]}))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": ["a.png"], "label": [0]}, r'rename_columns\(\{"…": "image"\}\)'),
        ({"image": ["a.png"], "label": [0]}, r'cast_column\("image", datasets.Image\(\)\)'),
        ({"image": ["a.png"], "target": [0]}, r'rename_columns\(\{"…": "label"\}\)'),
        (
            {"image": ["a.png"], "label": [0], "fine_label": [7]},
            r"columns label and fine_label: choose .*--label-column",
        ),
        ({"image": ["a.png"], "img": ["a.png"], "label": [0]}, r"columns image and img: leave one out"),
    ],
)
def test_the_way_out_is_named(columns, message):
    with pytest.raises(ValueError, match=message):
        as_image_set(datasets.Dataset.from_dict(columns))


def test_labels_that_are_text():
    named = hugging_face(pixels(2), [0, 1]).cast_column("label", datasets.Value("string"))
    with pytest.raises(ValueError, match=r'got text: number its values with class_encode_column\("label"\)'):
        as_image_set(named)


# --- arrays


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_labels_are_numbers_of_any_integer_type(dtype):
    images = torch.rand(5, 1, 4, 4)
    labels = as_image_set((images, torch.arange(5).to(dtype))).labels
    assert (labels.dtype, labels.tolist()) == (torch.int64, [0, 1, 2, 3, 4])
    for refused in (torch.bool, torch.float32):
        with pytest.raises(TypeError, match="labels must be int64"):
            as_image_set((images, torch.arange(5).to(refused)))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 6, 7, 3), (5, 3, 6, 7)),
        ((5, 3, 6, 7), (5, 3, 6, 7)),
        ((5, 6, 7), (5, 1, 6, 7)),
        ((5, 6, 7, 1), (5, 1, 6, 7)),
    ],
)
def test_pairs_of_arrays(shape, expected):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = as_image_set((array, np.arange(5, dtype=np.int32)))
    assert images.images.shape == expected
    assert images.labels.dtype == torch.int64
    assert images.images.flatten().sort().values.tolist() == sorted(array.flatten().tolist())
    items = as_image_set(Items([(one, number) for number, one in enumerate(array)]))
    assert torch.equal(items.images, images.images)


def test_arrays_that_do_not_tell():
    with pytest.raises(ValueError, match=r"images: which axis of \(3, 6, 3\) holds the channels\? Pass a tensor"):
        as_image_set((np.zeros((5, 3, 6, 3), np.uint8), np.arange(5)))
    with pytest.raises(TypeError, match="labels must be integers, got float64"):
        as_image_set((np.zeros((5, 3, 6, 7), np.uint8), np.zeros(5)))
    floats = np.random.default_rng(0).random((5, 4))
    assert torch.equal(as_image_set((floats, np.arange(5))).images, torch.from_numpy(floats).float())


@pytest.mark.parametrize("kind", [">f4", ">f8", np.longdouble, "<f2"])
def test_arrays_of_any_byte_order(kind):
    array = np.random.default_rng(0).random((5, 3, 6, 7)).astype(np.float16)
    found = as_image_set((array.astype(kind), np.arange(5, dtype=">i4")))
    assert torch.equal(found.images, torch.from_numpy(array).float())
    assert found.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", [object, str, complex])
def test_arrays_that_hold_no_numbers(kind):
    told = r"images must be uint8 or floating-point numbers, got an array of (object|<U32|complex128)$"
    with pytest.raises(TypeError, match=told):
        as_image_set((np.zeros((5, 4)).astype(kind), np.arange(5)))


def test_items_that_are_mappings():
    items = [{"image": torch.rand(1, 2, 2), "label": number} for number in range(3)]
    assert as_image_set(Items(items)).labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="an item of the data set has no column image or img"):
        as_image_set(Items([{"x": torch.rand(1, 2, 2), "label": 0}]))


def test_a_stream_of_torchs_is_refused():
    class Endless(torch.utils.data.IterableDataset):
        def __len__(self):
            return 3

        def __iter__(self):
            return iter([])

    with pytest.raises(TypeError, match="a torch Dataset with length and items"):
        as_image_set(Endless())
