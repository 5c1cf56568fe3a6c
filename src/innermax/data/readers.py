"""Image sets from folders, parquet files, Hugging Face data sets and tensors."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from innermax.data.decoding import Row, decode, stack
from innermax.data.image_set import ImageSet
from innermax.utils.optional import find_loaded
from innermax.utils.serialization import parse_json
from innermax.utils.validation import unknown

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_ROWS = 256  # rows of a table that are read at a time


def subfolders(path: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def from_class_folders(path: Path, class_names: tuple[str, ...]) -> ImageSet:
    """The images under path/class, sorted by class and file name."""
    for name in subfolders(path):
        if name not in class_names:
            raise unknown(f"class in {path}:", name, class_names)
    rows: list[Row] = []
    for label, name in enumerate(class_names):
        folder = path / name
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        images = [file for file in files if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")]
        if not all(file.is_file() for file in images):  # a pipe would be waited for
            raise ValueError(f"{folder} holds an entry with the name of an image that is no file")
        rows.extend(Row(str(file), file, label) for file in images)
    if not rows:
        raise ValueError(f"{path} holds no images (folders of {', '.join(sorted(_SUFFIXES))} files, one per class)")
    return ImageSet(*decode(lambda: iter(rows), len(rows)))


@contextmanager
def open_parquet(file: Path) -> Iterator[Any]:
    """Context manager: an open parquet file. Any failure becomes a ValueError that begins with its name."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        if not file.is_file():
            raise OSError("it is not a file")
        with pq.ParquetFile(file) as opened:
            yield opened
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} cannot be read as parquet: {' '.join(str(error).split())[:300]}") from error


def from_parquet(files: Sequence[Path]) -> ImageSet:
    """The rows of several shards, in order."""
    count = sum(map(_count_rows, files))
    return ImageSet(*decode(lambda: chain.from_iterable(map(_parquet_rows, files)), count))


def from_hugging_face(dataset: Any, count: int, where: str, *, follow_paths: bool) -> ImageSet:
    """The first count rows. follow_paths: they may name image files instead of holding them."""
    if count == 0:
        raise ValueError(f"{where} holds no rows")
    tables = dataset.with_format("arrow")

    def rows() -> Iterator[Row]:
        for start in range(0, count, _ROWS):
            yield from _rows(tables[start : min(start + _ROWS, count)], where, start, follow_paths=follow_paths)

    return ImageSet(*decode(rows, count))


def read_class_names(schema: Any) -> tuple[str, ...] | None:
    """The class names that Hugging Face writes into an Arrow schema; None where there are none."""
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[find_columns(list(features), "")[1]]["names"]
        return tuple(map(str, names)) if isinstance(names, list) else None
    except (KeyError, TypeError, ValueError):
        return None


def as_image_set(dataset: Any, *, limit: int | None = None) -> ImageSet:
    """A data set as an ImageSet, or its first `limit` examples.

    dataset: an ImageSet; (images, labels) tensors; a torch Dataset of (x, y) with x a uint8 or float tensor in [0, 1]
    or a PIL image; a Hugging Face Dataset with columns image or img, label or fine_label. Raises TypeError for other
    types, ValueError for empty data, images of several shapes and values outside [0, 1].
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be ≥ 1, got {limit!r}")
    if isinstance(dataset, tuple) and len(dataset) == 2 and all(isinstance(part, Tensor) for part in dataset):
        dataset = _from_tensors(*dataset)
    if isinstance(dataset, ImageSet):
        return dataset if limit is None else dataset[:limit]
    if _is_hugging_face(dataset):
        rows = len(dataset) if limit is None else min(limit, len(dataset))
        return from_hugging_face(dataset, rows, "the Hugging Face data set", follow_paths=True)
    if isinstance(dataset, torch.utils.data.Dataset) and hasattr(dataset, "__len__"):
        return _from_items(dataset, len(dataset) if limit is None else min(limit, len(dataset)))
    raise TypeError(
        "a data set must be an ImageSet, a tuple of two tensors (images, labels), a torch Dataset with a length "
        f"or a Hugging Face Dataset (one split), got {type(dataset).__name__}"
    )


def _is_hugging_face(dataset: Any) -> bool:
    kind = find_loaded("datasets", "Dataset")  # its objects cannot exist before it is imported
    return isinstance(kind, type) and isinstance(dataset, kind)


def _count_rows(file: Path) -> int:
    """How many rows a parquet file holds."""
    with open_parquet(file) as opened:
        count = int(opened.metadata.num_rows)
    if count == 0:
        raise ValueError(f"{file} holds no rows")
    return count


def _parquet_rows(file: Path) -> Iterator[Row]:
    """The rows of a parquet file, with one of its row groups in memory at a time."""
    start = 0
    with open_parquet(file) as opened:
        columns = find_columns(opened.schema_arrow.names, str(file))
        for batch in opened.iter_batches(_ROWS, columns=columns):
            yield from _rows(batch, str(file), start)
            start += batch.num_rows


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
        raise ValueError(f"column {label} of {where} must hold integers, none missing, got {table[label].type}")
    kind = table[image].type
    if not pa.types.is_struct(kind) or not {"bytes", "path"} <= {field.name for field in kind}:
        raise ValueError(f"column {image} of {where} must hold encoded images, struct<bytes, path>, got {kind}")
    images = pc.struct_field(table[image], "bytes").to_pylist()
    if follow_paths:
        paths = pc.struct_field(table[image], "path").to_pylist()
        images = [path and Path(path) if data is None else data for data, path in zip(images, paths, strict=True)]
    for number, (data, target) in enumerate(zip(images, table[label].to_pylist(), strict=True), start):
        yield Row(f"row {number} of {where}", data, target)


def _from_tensors(images: Tensor, labels: Tensor) -> ImageSet:
    return ImageSet(images.to(torch.float32) if images.is_floating_point() else images, labels)


def _from_items(dataset: Any, count: int) -> ImageSet:
    """The first count (x, y) of a torch Dataset."""
    if count == 0:
        raise ValueError("the data set holds no examples")
    rows = partial(_item_rows, dataset, count)
    if isinstance(next(rows()).image, Tensor):
        return ImageSet(*stack(rows(), count))
    return ImageSet(*decode(rows, count))


def _item_rows(dataset: Any, count: int) -> Iterator[Row]:
    from PIL import Image

    for number in range(count):
        name, item = f"item {number} of the data set", dataset[number]
        if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], (Tensor, Image.Image)):
            raise TypeError(f"{name} must be (x, y) with x a tensor or PIL image, got {type(item).__name__}")
        try:
            label = operator.index(item[1])
        except TypeError:
            raise TypeError(f"y in {name} must be an integer, got {item[1]!r}") from None
        yield Row(name, item[0], label)
