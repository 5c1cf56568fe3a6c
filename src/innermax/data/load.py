"""Data sets by name or from a folder, with their splits.

pyarrow, PIL, scikit-learn and datasets are imported where they are used: training on tensors needs none of them.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from innermax.data.class_folders import from_class_folders, subfolders
from innermax.data.decoding import to_rgb
from innermax.data.image_set import Data, ImageSet
from innermax.data.readers import from_hugging_face, from_parquet, open_parquet, read_class_names
from innermax.utils.optional import import_library
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
_SPLIT_SEED = 20190609  # of the held-out examples; never the training's seed, so that runs share their splits


def load_data(name_or_path: str | Path, *, validation: float | int | None = None, root: Path | None = None) -> Data:
    """A data set by name (digits, mnist, fashion-mnist, cifar10, cifar100, svhn) or from a folder.

    A folder holds train*.parquet and test*.parquet (columns image or img, label or fine_label), or train/ and test/
    with one folder of images per class; validation*.parquet or validation/ are used where present. Names other than
    digits are looked for in the folder root/name, then on the Hugging Face Hub; NAME@REVISION, a branch, tag or commit,
    on the Hub alone. root: INNERMAX_DATA unless told.
    validation: held out of train, as a fraction in (0, 1) or a count; 0: none; None: 10 %, at most 5,000. Which
    examples are held out depends on nothing but their number. Images are decoded a few at a time; where a split has
    more than 2 GiB of them, into a file (see ImageSet). Raises ValueError, naming what cannot be found or read.
    """
    name = str(name_or_path)
    known, _, revision = name.partition("@")
    if isinstance(name_or_path, str) and known in _HUB and revision:
        splits = _from_hub(known, revision)
    elif isinstance(name_or_path, str) and name in _NAMES:
        splits = _digits() if name == "digits" else _load_named(name, _root(root))
    elif Path(name_or_path).is_dir():
        name, splits = Path(name_or_path).resolve().name, _folder(Path(name_or_path))
    elif Path(name_or_path).exists():
        raise ValueError(f"a data set's path must be a folder, got the file {name}")
    else:
        raise unknown("data set or folder", name, _NAMES)
    train, held_out = splits.train, splits.validation
    if held_out is None:
        train, held_out = _hold_out(train, validation)
    elif validation is not None:
        raise ValueError(f"{name} has a validation split of its own: leave validation out, got {validation!r}")
    largest = max(int(split.labels.max()) for split in (train, held_out, splits.test) if split is not None)
    classes = len(splits.class_names) if splits.class_names else largest + 1
    return Data(name, train, held_out, splits.test, classes, splits.class_names)


def hub_id(name: str) -> str | None:
    """Where a data set of that name is on the Hugging Face Hub; None where it is not known to be."""
    known = name.partition("@")[0]
    return _HUB[known].hub_id if known in _HUB else None


class _Splits(NamedTuple):
    train: ImageSet
    validation: ImageSet | None
    test: ImageSet
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
    """scikit-learn's 1,797 digits of 8×8 pixels, values 0…16 scaled to 0…255; a fixed fifth is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    everything = ImageSet(torch.from_numpy(pixels)[:, None], torch.from_numpy(digits.target.astype(np.int64)))
    order = permutation(_SPLIT_SEED, len(everything), 0)
    cut = len(everything) // 5
    train, test = everything[order[cut:].sort().values], everything[order[:cut].sort().values]
    return _Splits(train, None, test, tuple(str(digit) for digit in range(10)))


def _root(root: Path | None) -> Path | None:
    """The folder of local data sets: `root`, else INNERMAX_DATA; None where neither is given."""
    told = os.environ.get("INNERMAX_DATA") if root is None else str(root)
    if told and not Path(told).is_dir():
        raise ValueError(f"{'INNERMAX_DATA' if root is None else 'root'} must name a folder, got {told!r}")
    return Path(told) if told else None


def _load_named(name: str, root: Path | None) -> _Splits:
    """A data set by its name: the local folder where there is one, else the Hub."""
    return _folder(root / name) if root is not None and (root / name).is_dir() else _from_hub(name, None)


def _from_hub(name: str, revision: str | None) -> _Splits:
    source = _HUB[name]
    try:
        datasets = import_library("datasets", "load_dataset")
        parts = {
            split: datasets.load_dataset(source.hub_id, source.configuration, split=split, revision=revision)
            for split in ("train", "test")
        }
    except ImportError as error:
        raise ValueError(f"{name} from the Hugging Face Hub needs the library datasets: {error}") from error
    except Exception as error:  # a lost connection comes as the Hub client's own, httpx's or the system's error
        raise ValueError(
            f"cannot get {name} ({source.hub_id}) from the Hugging Face Hub: {type(error).__name__}: {error}. Without "
            f"a connection, put {name}/train*.parquet and test*.parquet into a folder that INNERMAX_DATA names"
        ) from error
    # What comes from elsewhere names no file of this machine.
    train, test = (
        from_hugging_face(part, len(part), f"{source.hub_id} {split}", follow_paths=False)
        for split, part in parts.items()
    )
    return _Splits(train, None, test, read_class_names(parts["train"].features.arrow_schema))


def _folder(path: Path) -> _Splits:
    """A folder of parquet files or of image folders."""
    if any(path.glob("train*.parquet")):
        shards = {split: sorted(path.glob(f"{split}*.parquet")) for split in ("train", "validation", "test")}
        if not shards["test"]:
            raise ValueError(f"{path} holds train*.parquet but no test*.parquet")
        with open_parquet(shards["train"][0]) as first:
            names = read_class_names(first.schema_arrow)
        found = {split: from_parquet(files) for split, files in shards.items() if files}
    elif (path / "train").is_dir() and (path / "test").is_dir():
        names = subfolders(path / "train")
        present = [split for split in ("train", "validation", "test") if (path / split).is_dir()]
        found = {split: from_class_folders(path / split, names) for split in present}
    else:
        raise ValueError(f"{path} holds neither train*.parquet and test*.parquet nor the folders train/ and test/")
    if len({images.shape[0] for images in found.values()}) > 1:  # one split grey throughout, another with colour
        found = {split: _in_colour(images) for split, images in found.items()}
    return _Splits(found["train"], found.get("validation"), found["test"], names)


def _in_colour(images: ImageSet) -> ImageSet:
    """Three channels, a grey image's the same."""
    return images if images.shape[0] == 3 else ImageSet(to_rgb(images.images), images.labels)
