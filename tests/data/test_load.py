"""Data by name, by path and from the Hub; what is held out of them."""

import subprocess
import sys
import warnings

import datasets
import pytest
import torch
from PIL import Image

from innermax.data import load as module
from innermax.data.image_set import ImageSet
from innermax.data.load import hub_id, load_data
from tests.helpers.image_files import as_tensor, checksum, encoded, hugging_face, parquet, pixels, rows


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


@pytest.mark.parametrize(
    ("labels", "names", "told"),
    [
        ([1, 2, 3], None, "no training example has the label 0, but labels go to 3: number the classes from 0"),
        ([0, 2, 2], ["a", "b", "c"], r"no training example has the label 1 \(b\), but labels go to 2"),
        ([9, 9, 9], None, r"the label 0, 1, 2, … \(9 in all\), but labels go to 9"),
        ([0, 1, 0], ["a", "b", "c"], None),  # names that no label reaches were declared
        ([0, 1, 2], None, None),
    ],
)
def test_classes_without_a_training_example_are_told(tmp_path, labels, names, told):
    for split in ("train", "test"):
        parquet(tmp_path / f"{split}.parquet", [encoded(i) for i in pixels(3, 1)], labels, names=names)
    with warnings.catch_warnings() if told is None else pytest.warns(UserWarning, match=told):
        warnings.simplefilter("error" if told is None else "always")
        load_data(tmp_path, validation=0)


def test_classes_that_the_test_split_alone_has_are_told(tmp_path):
    for split, labels in (("train", [0, 1, 0]), ("test", [0, 1, 3])):
        parquet(tmp_path / f"{split}.parquet", [encoded(i) for i in pixels(3, 1)], labels)
    with pytest.warns(UserWarning, match="no training example has the label 2, 3, but labels go to 3"):
        load_data(tmp_path, validation=0)


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
    with pytest.raises(ValueError, match=r"but neither test\*.parquet"):
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
