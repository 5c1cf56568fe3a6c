"""Data sets by name or from a folder, with their splits.

pyarrow, PIL and datasets are imported where they are used: digits, and training on tensors, need none of them.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from innermax.data.class_folders import from_class_folders, subfolders
from innermax.data.decoding import to_rgb
from innermax.data.image_set import Data, ImageSet
from innermax.data.readers import from_hugging_face, from_parquet, open_parquet, read_class_names
from innermax.utils.optional import MissingLibrary, extra, import_library
from innermax.utils.randomness import permutation
from innermax.utils.validation import unknown


class _Source(NamedTuple):
    hub_id: str
    configuration: str | None = None


_HUB = {
    "mnist": _Source("ylecun/mnist"),
    "fashion-mnist": _Source("zalando-datasets/fashion_mnist"),
    "cifar10": _Source("uoft-cs/cifar10"),
    "cifar100": _Source("uoft-cs/cifar100"),
    "svhn": _Source("ufldl-stanford/svhn", "cropped_digits"),
}
_NAMES = ("digits", *_HUB)
_SPLITS = {  # the pattern of a split's parquet files, and names of its folder
    "train": ("train*.parquet", "train"),
    "validation": ("val*.parquet", "valid", "val", "validation"),
    "test": ("test*.parquet", "test"),
}
_NAMED = 3  # labels in a warning
_SPLIT_SEED = 20190609  # of the held-out examples; never the training's seed, so that runs share their splits


def load_data(
    name_or_path: str | Path,
    *,
    validation: float | int | None = None,
    root: Path | None = None,
    label_column: str | None = None,
) -> Data:
    """A data set by name (digits, mnist, fashion-mnist, cifar10, cifar100, svhn) or from a folder.

    A folder holds `train*.parquet` and `test*.parquet` (columns image or img, label or fine_label), or train/ and test/
    with a folder of images per class, at any depth and in any format that Pillow decodes; `val*.parquet`, or
    validation/, val/ or valid/, are used where present. Names other than digits are looked for in the folder root/name,
    then on the Hugging Face Hub; NAME@REVISION, a branch, tag or commit, on the Hub alone.

    Images are upright, as their EXIF orientation says. They are decoded a few at a time; where a split has more than
    2 GiB of them, into a file (see ImageSet).

    Args:
        validation: held out of train, as a fraction in (0, 1) or a count; 0: none; None: 10 %, at most 5,000. Which
            examples are held out depends on nothing but their number.
        root: INNERMAX_DATA unless told.
        label_column: the column of labels, where it has another name or several could be meant.

    Raises:
        ValueError: something cannot be found or read; it is named.
    """
    name, splits = _read(name_or_path, root, label_column, ("train", "validation", "test"))
    train, held_out, test = splits.images["train"], splits.images.get("validation"), splits.images["test"]
    if held_out is None:
        train, held_out = _hold_out(train, validation)
    elif validation is not None:
        raise ValueError(f"{name} has a validation split of its own: leave validation out, got {validation!r}")
    largest = max(int(split.labels.max()) for split in (train, held_out, test) if split is not None)
    classes = len(splits.class_names) if splits.class_names else largest + 1
    _warn_of_gaps(name, splits.images["train"].labels, largest, splits.class_names)
    return Data(name, train, held_out, test, classes, splits.class_names)


def load_test_set(
    name_or_path: str | Path, *, root: Path | None = None, label_column: str | None = None
) -> tuple[ImageSet, tuple[str, ...] | None]:
    """The test split alone, and the names of its classes where they are known; the arguments are `load_data`'s.

    A folder needs no training split, and may hold nothing but a folder of images per class.
    """
    _, splits = _read(name_or_path, root, label_column, ("test",))
    return splits.images["test"], splits.class_names


def _read(
    name_or_path: str | Path, root: Path | None, label_column: str | None, wanted: Sequence[str]
) -> tuple[str, "_Splits"]:
    """A data set's name, and those of the wanted splits that are there."""
    name = str(name_or_path)
    known, _, revision = name.partition("@")
    if isinstance(name_or_path, str) and known in _HUB and revision:
        return name, _from_hub(known, revision, label_column, wanted)
    if isinstance(name_or_path, str) and name in _NAMES:
        local = None if name == "digits" else _root(root)
        if name == "digits":
            return name, _digits()
        if local is not None and (local / name).is_dir():
            return name, _folder(local / name, label_column, wanted)
        return name, _from_hub(name, None, label_column, wanted)
    if Path(name_or_path).is_dir():
        return Path(name_or_path).resolve().name, _folder(Path(name_or_path), label_column, wanted)
    if Path(name_or_path).exists():
        raise ValueError(f"a data set's path must be a folder, got the file {name}")
    raise unknown("data set or folder", name, _NAMES)


def hub_id(name: str) -> str | None:
    """Where a data set of that name is on the Hugging Face Hub; None where it is not known to be."""
    known = name.partition("@")[0]
    return _HUB[known].hub_id if known in _HUB else None


def _warn_of_gaps(name: str, labels: Tensor, largest: int, class_names: Sequence[str] | None) -> None:
    """Warns where a class up to the largest label has no training example: the model gets a logit for nothing."""
    there = torch.bincount(labels, minlength=largest + 1) > 0
    missing = (~there).nonzero()[:, 0].tolist()
    if missing:
        named = [f"{label} ({class_names[label]})" if class_names else str(label) for label in missing[:_NAMED]]
        more = f", … ({len(missing)} in all)" if len(missing) > _NAMED else ""
        told = f"{name}: no training example has the label {', '.join(named)}{more}, but labels go to {largest}"
        warnings.warn(f"{told}: number the classes from 0, without gaps", stacklevel=3)


class _Splits(NamedTuple):
    images: Mapping[str, ImageSet]  # by split
    class_names: tuple[str, ...] | None


def _hold_out(train: ImageSet, validation: float | int | None) -> tuple[ImageSet, ImageSet | None]:
    """The training set without the held-out examples, and those; both keep their order."""
    total = len(train)
    if validation is None:
        count = min(total // 10, 5000)
    elif isinstance(validation, float) and 0 < validation < 1:
        count = max(1, round(validation * total))
    elif validation == 0 or (isinstance(validation, int) and not isinstance(validation, bool) and validation > 0):
        count = int(validation)
    else:
        raise ValueError(f"validation must be a fraction in (0, 1), a count ≥ 0 or None, got {validation!r}")
    if count >= total:
        raise ValueError(f"validation = {validation!r} leaves nothing of the {total} training examples")
    if count == 0:
        return train, None
    order = permutation(_SPLIT_SEED, total, 1)
    return train[order[count:].sort().values], train[order[:count].sort().values]


def _digits() -> _Splits:
    """The 1,797 digits of 8×8 pixels, values 0…16 scaled to 0…255; a fixed fifth is the test split.

    They are the test set of Optical Recognition of Handwritten Digits (Alpaydin & Kaynak 1998, UCI Machine Learning
    Repository, CC BY 4.0), which scikit-learn has as load_digits.
    """
    with (resources.files("innermax") / "data" / "digits.npz").open("rb") as file, np.load(file) as digits:
        pixels = np.rint(digits["images"] * (255 / 16)).astype(np.uint8)
        labels = digits["labels"].astype(np.int64)
    everything = ImageSet(torch.from_numpy(pixels)[:, None], torch.from_numpy(labels))
    order = permutation(_SPLIT_SEED, len(everything), 0)
    cut = len(everything) // 5
    train, test = everything[order[cut:].sort().values], everything[order[:cut].sort().values]
    return _Splits({"train": train, "test": test}, tuple(str(digit) for digit in range(10)))


def _root(root: Path | None) -> Path | None:
    """The folder of local data sets: `root`, else INNERMAX_DATA; None where neither is given."""
    told = os.environ.get("INNERMAX_DATA") if root is None else str(root)
    if told and not Path(told).is_dir():
        raise ValueError(f"{'INNERMAX_DATA' if root is None else 'root'} must name a folder, got {told!r}")
    return Path(told) if told else None


def _from_hub(name: str, revision: str | None, label_column: str | None, wanted: Sequence[str]) -> _Splits:
    source = _HUB[name]
    try:
        with extra("data"):
            datasets = import_library("datasets", "load_dataset")
        parts = {
            split: datasets.load_dataset(source.hub_id, source.configuration, split=split, revision=revision)
            for split in ("train", "test")
            if split in wanted
        }
    except MissingLibrary:
        raise
    except ImportError as error:
        raise ValueError(f"{name} from the Hugging Face Hub needs the library datasets: {error}") from error
    except Exception as error:  # a lost connection comes as the Hub client's own, httpx's or the system's error
        raise ValueError(
            f"cannot get {name} ({source.hub_id}) from the Hugging Face Hub: {type(error).__name__}: {error}. Without "
            f"a connection, put {name}/train*.parquet and test*.parquet into a folder that INNERMAX_DATA names"
        ) from error
    found = {}
    for split, part in parts.items():  # what comes from elsewhere names no file of this machine
        where = f"{source.hub_id} {split}"
        found[split] = from_hugging_face(part, len(part), where, follow_paths=False, label_column=label_column)
    return _Splits(found, read_class_names(parts["test"].features.arrow_schema, label_column))


def _folder(path: Path, label_column: str | None, wanted: Sequence[str]) -> _Splits:
    """A folder of parquet files or of image folders."""
    shards = {split: sorted(path.glob(pattern)) for split, (pattern, *_) in _SPLITS.items()}
    folders = {split: path / name for split, (_, *names) in _SPLITS.items() for name in names if (path / name).is_dir()}
    readers: dict[str, Callable[[], ImageSet]]
    if any(shards.values()):
        readers = {split: partial(from_parquet, files, label_column) for split, files in shards.items() if files}
        with open_parquet(next(files for files in shards.values() if files)[0]) as first:
            names = read_class_names(first.schema_arrow, label_column)
    else:
        if not folders and "train" not in wanted and subfolders(path):
            folders = {"test": path}
        names = subfolders(next(iter(folders.values()))) if folders else ()
        readers = {split: partial(from_class_folders, folder, names) for split, folder in folders.items()}
        others = sorted(set(subfolders(path)) - {folder.name for folder in folders.values()})
        if others and path not in folders.values():
            warnings.warn(f"{path}: folders that are no split are left out: {', '.join(others)}", stacklevel=4)
    missing = [split for split in ("train", "test") if split in wanted and split not in readers]
    if missing:
        files, places = (" and ".join(f"{split}{end}" for split in missing) for end in ("*.parquet", "/"))
        there = ", ".join(f"{split}*.parquet" if any(shards.values()) else f"{split}/" for split in readers)
        raise ValueError(
            f"{path} holds {f'{there}, but ' if there else ''}neither {files} nor {places} with a folder of images per "
            "class"
        )
    found = {split: read() for split, read in readers.items() if split in wanted}
    if list(found) == ["test"] and found["test"].shape[0] == 1 and "train" in readers:
        found["train"] = readers["train"]()  # a model that learned from images with colour takes grey ones in colour
    if len({images.shape[0] for images in found.values()}) > 1:  # one split grey throughout, another with colour
        found = {split: _in_colour(images) for split, images in found.items()}
    return _Splits(found, names)


def _in_colour(images: ImageSet) -> ImageSet:
    """Three channels, a grey image's the same."""
    return images if images.shape[0] == 3 else ImageSet(to_rgb(images.images), images.labels)
