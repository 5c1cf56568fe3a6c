"""Labelled images: from names, folders, parquet files and data set objects; and their augmentation.

pyarrow, PIL, scikit-learn and datasets are imported where they are used: training on tensors needs none of them.
"""

import operator
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from innermax.checks import check_inputs, check_labels, unknown
from innermax.decoding import Row, coloured, decoded, stacked, taken
from innermax.randomness import permutation, uniform
from innermax.reading import parsed_json


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
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_ROWS = 256  # of a table, read at a time
_SPLIT_SEED = 20190609  # of the held-out examples; never the training's seed, so that runs share their splits


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and labels, checked once.

    images: uint8 (N, C, H, W), or float32 (N, *features) in [0, 1]; labels: int64 (N,), ≥ 0; N ≥ 1. Images that
    innermax reads, more than 2 GiB of them, lie in a nameless file in the folder for temporary files (TMPDIR).
    Raises TypeError for another type, ValueError for another shape or range.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images = self.images
        if images.dtype == torch.uint8:
            if images.ndim != 4 or images.numel() == 0:
                raise ValueError(f"uint8 images must have shape (N, C, H, W) with N ≥ 1, came {tuple(images.shape)}")
        elif images.dtype == torch.float32:
            check_inputs(images, "images")
            low, high = (float(value) for value in images.aminmax())
            if low < 0 or high > 1:
                raise ValueError(f"float images must lie in [0, 1], came values from {low:g} to {high:g}")
        else:
            raise TypeError(f"images must be uint8 or float32, came {images.dtype}")
        check_labels(self.labels, len(images), name="labels")
        if images.device != self.labels.device:
            raise ValueError(f"images and labels must be on one device, came {images.device} and {self.labels.device}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice) -> "ImageSet":
        """The chosen examples, at least one."""
        images = self.images[index] if isinstance(index, slice) else taken(self.images, index)
        return ImageSet(images, self.labels[index])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return tuple(self.images.shape[1:])

    @property
    def head(self) -> "ImageSet":
        """The examples that can be looked at in any order: all."""
        return self

    def batch(self, index: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b *features"], Int[Tensor, " b"]]:
        """The chosen examples as float32 in [0, 1] and labels, on the set's device."""
        x = self.images[index]
        return (x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x), self.labels[index]

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set on another device."""
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Data:
    """A data set's splits. Raises ValueError where a label reaches num_classes or the splits' shapes differ."""

    name: str
    train: ImageSet
    validation: ImageSet | None
    test: ImageSet
    num_classes: int
    class_names: tuple[str, ...] | None

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            images: ImageSet | None = getattr(self, split)
            if images is None:
                continue
            check_labels(images.labels, len(images), self.num_classes, name=f"{split} labels of {self.name}")
            if images.shape != self.train.shape:
                raise ValueError(f"{self.name}: {split} images are {images.shape}, train images {self.train.shape}")


def load_data(name_or_path: str | Path, *, validation: float | int | None = None, root: Path | None = None) -> Data:
    """A data set by name (digits, mnist, fashion-mnist, cifar10, cifar100, svhn) or from a folder.

    A folder holds train*.parquet and test*.parquet (columns image or img, label or fine_label), or train/ and test/
    with one folder of images a class; validation*.parquet or validation/ are used where present. Names other than
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
        splits = _digits() if name == "digits" else _named(name, _root(root))
    elif Path(name_or_path).is_dir():
        name, splits = Path(name_or_path).resolve().name, _folder(Path(name_or_path))
    elif Path(name_or_path).exists():
        raise ValueError(f"a data set's path must be a folder, came the file {name}")
    else:
        raise unknown("data set or folder", name, _NAMES)
    train, held_out = splits.train, splits.validation
    if held_out is None:
        train, held_out = _hold_out(train, validation)
    elif validation is not None:
        raise ValueError(f"{name} has a validation split of its own: leave validation out, came {validation!r}")
    largest = max(int(split.labels.max()) for split in (train, held_out, splits.test) if split is not None)
    classes = len(splits.class_names) if splits.class_names else largest + 1
    return Data(name, train, held_out, splits.test, classes, splits.class_names)


def hub_id(name: str) -> str | None:
    """Where a data set of that name is on the Hugging Face Hub; None where it is not known to be."""
    known = name.partition("@")[0]
    return _HUB[known].hub_id if known in _HUB else None


def as_image_set(dataset: Any, *, limit: int | None = None) -> ImageSet:
    """Any of these as an ImageSet, its first `limit` examples where told.

    dataset: an ImageSet; (images, labels) tensors; a torch Dataset of (x, y) with x a uint8 or float tensor in [0, 1]
    or a PIL image; a Hugging Face Dataset with columns image or img, label or fine_label. Raises TypeError for other
    types, ValueError for empty data, images of several shapes and values outside [0, 1].
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be ≥ 1, came {limit!r}")
    if isinstance(dataset, tuple) and len(dataset) == 2 and all(isinstance(part, Tensor) for part in dataset):
        dataset = _from_tensors(*dataset)
    if isinstance(dataset, ImageSet):
        return dataset if limit is None else dataset[:limit]
    hugging_face = sys.modules.get("datasets")  # its objects cannot exist before it is imported
    if hugging_face is not None and isinstance(dataset, hugging_face.Dataset):
        rows = len(dataset) if limit is None else min(limit, len(dataset))
        return _from_hugging_face(dataset, rows, "the Hugging Face data set", follow_paths=True)
    if isinstance(dataset, torch.utils.data.Dataset) and hasattr(dataset, "__len__"):
        return _from_items(dataset, len(dataset) if limit is None else min(limit, len(dataset)))
    raise TypeError(
        "a data set must be an ImageSet, a tuple of two tensors (images, labels), a torch Dataset with a length "
        f"or a Hugging Face Dataset (one split), came {type(dataset).__name__}"
    )


def augment(
    x: Float[Tensor, "b c h w"],
    key: Int[Tensor, " b"],
    *,
    shift: int = 0,
    flip: bool = False,
    back: bool = False,
) -> Float[Tensor, "b c h w"]:
    """x, each example mirrored left to right (flip: half of them) and moved by up to ±shift pixels, zeros moving in.

    key: int64 (B,) from `randomness.keys`, the only thing an example's draws depend on; shift: 0…min(H, W) − 1;
    back: undoes it, but for what had moved out. Raises ValueError for other shapes and shifts.
    """
    if x.ndim != 4 or key.shape != x.shape[:1]:
        raise ValueError(f"augment takes x (B, C, H, W) and key (B,), came {tuple(x.shape)} and {tuple(key.shape)}")
    height, width = x.shape[2:]
    if not 0 <= shift < min(height, width):
        raise ValueError(f"shift must be in 0…{min(height, width) - 1}, came {shift!r}")
    draws = uniform(key, 3)
    mirrored = (draws[:, 2] < 0.5)[:, None, None, None]
    if flip and not back:
        x = torch.where(mirrored, x.flip(-1), x)
    if shift:
        offsets = (draws[:, :2] * (2 * shift + 1)).to(torch.int64)  # into the padded image
        rows, columns = (2 * shift - offsets if back else offsets).unbind(1)
        windows = functional.pad(x, (shift,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view: no copy a window
        x = windows[torch.arange(len(x), device=x.device), :, rows, columns]
    if flip and back:
        x = torch.where(mirrored, x.flip(-1), x)
    return x


class _Splits(NamedTuple):
    train: ImageSet
    validation: ImageSet | None
    test: ImageSet
    class_names: tuple[str, ...] | None


def _hold_out(train: ImageSet, validation: float | int | None) -> tuple[ImageSet, ImageSet | None]:
    """What is left of train and what is held out of it, both in their old order."""
    total = len(train)
    if validation is None:
        count = min(total // 10, 5000)
    elif isinstance(validation, float) and 0 < validation < 1:
        count = max(1, round(validation * total))
    elif validation == 0 or (isinstance(validation, int) and not isinstance(validation, bool) and validation > 0):
        count = int(validation)
    else:
        raise ValueError(f"validation must be a fraction in (0, 1), a count ≥ 0 or None, came {validation!r}")
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
    """The folder of local data sets: the one told, or the environment's; none is an answer, a wrong one is not."""
    told = os.environ.get("INNERMAX_DATA") if root is None else str(root)
    if told and not Path(told).is_dir():
        raise ValueError(f"{'INNERMAX_DATA' if root is None else 'root'} must name a folder, came {told!r}")
    return Path(told) if told else None


def _named(name: str, root: Path | None) -> _Splits:
    """A data set by its name: the local folder where there is one, else the Hub."""
    return _folder(root / name) if root is not None and (root / name).is_dir() else _from_hub(name, None)


def _from_hub(name: str, revision: str | None) -> _Splits:
    import datasets

    source = _HUB[name]
    try:
        parts = {
            split: datasets.load_dataset(source.hub_id, source.configuration, split=split, revision=revision)
            for split in ("train", "test")
        }
    except Exception as error:  # a lost connection comes as the Hub client's own, httpx's or the system's error
        raise ValueError(
            f"cannot get {name} ({source.hub_id}) from the Hugging Face Hub: {type(error).__name__}: {error}. Without "
            f"a connection, put {name}/train*.parquet and test*.parquet into a folder that INNERMAX_DATA names"
        ) from error
    # What comes from elsewhere names no file of this machine.
    train, test = (
        _from_hugging_face(part, len(part), f"{source.hub_id} {split}", follow_paths=False)
        for split, part in parts.items()
    )
    return _Splits(train, None, test, _class_names(parts["train"].features.arrow_schema))


def _folder(path: Path) -> _Splits:
    """A folder of parquet files or of image folders."""
    if any(path.glob("train*.parquet")):
        shards = {split: sorted(path.glob(f"{split}*.parquet")) for split in ("train", "validation", "test")}
        if not shards["test"]:
            raise ValueError(f"{path} holds train*.parquet but no test*.parquet")
        with _parquet(shards["train"][0]) as first:
            names = _class_names(first.schema_arrow)
        found = {split: _from_parquet(files) for split, files in shards.items() if files}
    elif (path / "train").is_dir() and (path / "test").is_dir():
        names = _subfolders(path / "train")
        present = [split for split in ("train", "validation", "test") if (path / split).is_dir()]
        found = {split: _from_class_folders(path / split, names) for split in present}
    else:
        raise ValueError(f"{path} holds neither train*.parquet and test*.parquet nor the folders train/ and test/")
    if len({images.shape[0] for images in found.values()}) > 1:  # one split grey throughout, another with colour
        found = {split: _in_colour(images) for split, images in found.items()}
    return _Splits(found["train"], found.get("validation"), found["test"], names)


def _in_colour(images: ImageSet) -> ImageSet:
    """Three channels, a grey image's the same."""
    return images if images.shape[0] == 3 else ImageSet(coloured(images.images), images.labels)


def _subfolders(path: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _from_class_folders(path: Path, class_names: tuple[str, ...]) -> ImageSet:
    """The images under path/class, sorted by class and file name."""
    for name in _subfolders(path):
        if name not in class_names:
            raise unknown(f"class in {path}:", name, class_names)
    rows: list[Row] = []
    for label, name in enumerate(class_names):
        folder = path / name
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        images = [file for file in files if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")]
        if not all(file.is_file() for file in images):  # a pipe would be waited for
            raise ValueError(f"{folder} holds something called as an image that is no file")
        rows.extend(Row(str(file), file, label) for file in images)
    if not rows:
        raise ValueError(f"{path} holds no images (folders of {', '.join(sorted(_SUFFIXES))} files, one a class)")
    return ImageSet(*decoded(lambda: iter(rows), len(rows)))


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    """A parquet file, opened; what is wrong with it becomes a ValueError that begins with its name."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        if not file.is_file():
            raise OSError("it is no file")
        with pq.ParquetFile(file) as opened:
            yield opened
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} cannot be read as parquet: {' '.join(str(error).split())[:300]}") from error


def _from_parquet(files: Sequence[Path]) -> ImageSet:
    """The rows of several shards, in order."""
    count = sum(map(_length, files))
    return ImageSet(*decoded(lambda: chain.from_iterable(map(_shard, files)), count))


def _length(file: Path) -> int:
    """How many rows a parquet file holds."""
    with _parquet(file) as opened:
        count = int(opened.metadata.num_rows)
    if count == 0:
        raise ValueError(f"{file} holds no rows")
    return count


def _shard(file: Path) -> Iterator[Row]:
    """The rows of a parquet file; no more of them are in memory than one of its row groups."""
    start = 0
    with _parquet(file) as opened:
        columns = find_columns(opened.schema_arrow.names, str(file))
        for batch in opened.iter_batches(_ROWS, columns=columns):
            yield from _rows(batch, str(file), start)
            start += batch.num_rows


def _from_hugging_face(dataset: Any, count: int, where: str, *, follow_paths: bool) -> ImageSet:
    """The first count rows. follow_paths: they may name image files instead of holding them."""
    if count == 0:
        raise ValueError(f"{where} holds no rows")
    tables = dataset.with_format("arrow")

    def rows() -> Iterator[Row]:
        for start in range(0, count, _ROWS):
            yield from _rows(tables[start : min(start + _ROWS, count)], where, start, follow_paths=follow_paths)

    return ImageSet(*decoded(rows, count))


def find_columns(names: Sequence[str], where: str) -> list[str]:
    """The image and the label column among the names."""
    found = []
    for known in (_IMAGE_COLUMNS, _LABEL_COLUMNS):
        present = [name for name in known if name in names]
        if not present:
            raise ValueError(f"{where} has no column {' or '.join(known)} (its columns: {', '.join(names)})")
        if list(names).count(present[0]) > 1:
            raise ValueError(f"{where} has more than one column {present[0]}")
        found.append(present[0])
    return found


def _rows(table: Any, where: str, start: int, *, follow_paths: bool = False) -> Iterator[Row]:
    """The encoded images and labels of a part of an Arrow table, from row `start` on."""
    import pyarrow as pa
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    image, label = find_columns(table.schema.names, where)
    if not pa.types.is_integer(table[label].type) or table[label].null_count:
        raise ValueError(f"column {label} of {where} must hold integers, none missing, came {table[label].type}")
    kind = table[image].type
    if not pa.types.is_struct(kind) or not {"bytes", "path"} <= {field.name for field in kind}:
        raise ValueError(f"column {image} of {where} must hold encoded images, struct<bytes, path>, came {kind}")
    images = pc.struct_field(table[image], "bytes").to_pylist()
    if follow_paths:
        paths = pc.struct_field(table[image], "path").to_pylist()
        images = [path and Path(path) if data is None else data for data, path in zip(images, paths, strict=True)]
    for number, (data, target) in enumerate(zip(images, table[label].to_pylist(), strict=True), start):
        yield Row(f"row {number} of {where}", data, target)


def _class_names(schema: Any) -> tuple[str, ...] | None:
    """The label column's class names, as Hugging Face writes them into an Arrow schema, where they are there."""
    try:
        features = parsed_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[find_columns(list(features), "")[1]]["names"]
        return tuple(map(str, names)) if isinstance(names, list) else None
    except (KeyError, TypeError, ValueError):
        return None


def _from_tensors(images: Tensor, labels: Tensor) -> ImageSet:
    return ImageSet(images.to(torch.float32) if images.is_floating_point() else images, labels)


def _from_items(dataset: Any, count: int) -> ImageSet:
    """The first count (x, y) of a torch Dataset."""
    if count == 0:
        raise ValueError("the data set holds no examples")
    rows = partial(_items, dataset, count)
    if isinstance(next(rows()).image, Tensor):
        return ImageSet(*stacked(rows(), count))
    return ImageSet(*decoded(rows, count))


def _items(dataset: Any, count: int) -> Iterator[Row]:
    from PIL import Image

    for number in range(count):
        name, item = f"item {number} of the data set", dataset[number]
        if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], (Tensor, Image.Image)):
            raise TypeError(f"{name} must be (x, y) with x a tensor or PIL image, came {type(item).__name__}")
        try:
            label = operator.index(item[1])
        except TypeError:
            raise TypeError(f"y in {name} must be an integer, came {item[1]!r}") from None
        yield Row(name, item[0], label)
