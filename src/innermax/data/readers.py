"""Image sets from parquet files, Hugging Face data sets and tensors."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from innermax.data.decoding import Array, Row, decode
from innermax.data.image_set import ImageSet
from innermax.data.items import arrays_to_tensor, draws_anew, read_items
from innermax.utils.optional import extra, find_loaded
from innermax.utils.serialization import parse_json

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label")
_HUGGING_FACE = "the Hugging Face data set"
_INTEGERS = (torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32)
_ROWS = 256  # rows of a table that are read at a time


@contextmanager
def open_parquet(file: Path) -> Iterator[Any]:
    """Context manager: an open parquet file. Any failure becomes a ValueError that begins with its name."""
    with extra("data"):
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        if not file.is_file():
            raise OSError("it is not a file")
        with pq.ParquetFile(file) as opened:
            yield opened
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} cannot be read as parquet: {' '.join(str(error).split())[:300]}") from error


def from_parquet(files: Sequence[Path], label_column: str | None = None) -> ImageSet:
    """The rows of several shards, in order."""
    count = sum(map(_count_rows, files))
    return ImageSet(*decode(lambda: chain.from_iterable(_parquet_rows(file, label_column) for file in files), count))


def from_hugging_face(
    dataset: Any, count: int, where: str, *, follow_paths: bool, label_column: str | None = None
) -> ImageSet:
    """The first count rows. follow_paths: they may name image files instead of holding them."""
    if count == 0:
        raise ValueError(f"{where} holds no rows")
    tables = dataset.with_format("arrow")

    def rows() -> Iterator[Row]:
        for start in range(0, count, _ROWS):
            part = tables[start : min(start + _ROWS, count)]
            columns = find_columns(part.schema.names, where, label_column)
            yield from _rows(part, columns, where, start, follow_paths=follow_paths)

    return ImageSet(*decode(rows, count))


def read_class_names(schema: Any, label_column: str | None = None) -> tuple[str, ...] | None:
    """The class names that Hugging Face writes into an Arrow schema; None where there are none."""
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[find_columns(list(features), "", label_column)[1]]["names"]
        return tuple(map(str, names)) if isinstance(names, list) else None
    except (KeyError, TypeError, ValueError):
        return None


def as_image_set(dataset: Any, *, limit: int | None = None) -> ImageSet:
    """A data set as an ImageSet, or its first `limit` examples.

    dataset: an ImageSet; (images, labels) tensors or arrays, or a mapping with both under image or img, label or
    fine_label; a torch Dataset of (x, y) with x a uint8 or float tensor or array in [0, 1] or a PIL image; a DataLoader
    of batches (images, labels) or such mappings; a Hugging Face Dataset with those columns, through its own transform
    if it has one. Each image is read once, with a warning where it would come out otherwise another time. Raises
    TypeError for other types, ValueError for empty data, images of several shapes and values outside [0, 1].
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be ≥ 1, got {limit!r}")
    if isinstance(dataset, torch.utils.data.DataLoader):
        dataset = _from_loader(dataset, limit)
    if isinstance(dataset, Mapping) and any(isinstance(value, Tensor | np.ndarray) for value in dataset.values()):
        dataset = _split_batch(dataset, "the mapping")
    if isinstance(dataset, tuple) and len(dataset) == 2 and all(isinstance(p, Tensor | np.ndarray) for p in dataset):
        dataset = _from_pair(*dataset)
    if isinstance(dataset, ImageSet):
        return dataset if limit is None else dataset[:limit]
    items = find_items(dataset)
    if items is not None:
        source, columns = items
        rows = len(source) if limit is None else min(limit, len(source))
        if draws_anew(source, rows, columns):
            told = "the data set's images come out otherwise each time (random transforms?)"
            warnings.warn(f"{told}: each is read once, and stays as it came", stacklevel=3)
        return read_items(source, rows, columns)
    if _is_hugging_face(dataset):
        rows = len(dataset) if limit is None else min(limit, len(dataset))
        return from_hugging_face(dataset, rows, _HUGGING_FACE, follow_paths=True)
    raise TypeError(
        "a data set must be an ImageSet, a tuple of two tensors (images, labels), a mapping of image and label, a "
        "torch Dataset with length and items, a DataLoader or a Hugging Face Dataset (one split), got "
        f"{type(dataset).__name__}"
    )


def find_items(dataset: Any) -> tuple[Any, tuple[str, str] | None] | None:
    """What is read item by item, and the columns of image and label where its items are mappings; None for others.

    Raises ValueError where it is empty.
    """
    if _is_hugging_face(dataset):
        if dataset.format["type"] != "custom":  # its own transform
            return _find_arrays(dataset)
    elif not _has_items(dataset):
        return None
    if len(dataset) == 0:
        raise ValueError("the data set holds no examples")
    first = dataset[0]
    if not isinstance(first, Mapping):
        return dataset, None
    image, label = find_columns(list(first), "an item of the data set")
    return dataset, (image, label)


def _has_items(dataset: Any) -> bool:
    """Whether a torch data set gives its examples by number."""
    known = isinstance(dataset, torch.utils.data.Dataset) and hasattr(dataset, "__len__")
    return known and not isinstance(dataset, torch.utils.data.IterableDataset)


def _find_arrays(dataset: Any) -> tuple[Any, tuple[str, str]] | None:
    """A Hugging Face Dataset whose images are arrays, not files, in the arrays' own type; None for others."""
    image, label = find_columns(list(dataset.features), _HUGGING_FACE)
    feature = dataset.features[image]
    if not (hasattr(feature, "shape") and hasattr(feature, "dtype")):
        return None
    return _Typed(dataset.with_format("numpy"), image, feature.dtype), (image, label)


@dataclass(frozen=True)
class _Typed:
    """Rows whose arrays in one column have the type that a Hugging Face Dataset declares; it gives int64 for all."""

    rows: Any
    column: str
    dtype: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[number]
        return row | {self.column: np.asarray(row[self.column]).astype(self.dtype)}


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


def _parquet_rows(file: Path, label_column: str | None) -> Iterator[Row]:
    """The rows of a parquet file, with one of its row groups in memory at a time."""
    start = 0
    with open_parquet(file) as opened:
        columns = find_columns(opened.schema_arrow.names, str(file), label_column)
        for batch in opened.iter_batches(_ROWS, columns=columns):
            yield from _rows(batch, columns, str(file), start)
            start += batch.num_rows


def find_columns(names: Sequence[str], where: str, label_column: str | None = None) -> list[str]:
    """The image and the label column among the names.

    label_column: the one to take, whatever it is called.

    Raises:
        ValueError: there is none, or more than one.
    """
    labels = _LABEL_COLUMNS if label_column is None else (label_column,)
    choose = "choose one with label_column (--label-column), or leave the other out with remove_columns"
    found = []
    for known, remedy in ((_IMAGE_COLUMNS, "leave one out with remove_columns"), (labels, choose)):
        present = [name for name in known if name in names]
        if not present:
            raise ValueError(
                f"{where} has no column {' or '.join(known)} (its columns: {', '.join(names)}): give it that name with "
                f'rename_columns({{"…": "{known[0]}"}})'
            )
        if len(present) > 1:
            raise ValueError(f"{where} has the columns {' and '.join(present)}: {remedy}")
        if list(names).count(present[0]) > 1:
            raise ValueError(f"{where} has more than one column {present[0]}")
        found.append(present[0])
    return found


def _rows(table: Any, columns: Sequence[str], where: str, start: int, *, follow_paths: bool = False) -> Iterator[Row]:
    """The encoded images and labels of a part of an Arrow table, from row `start` on."""
    import pyarrow as pa
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    image, label = columns
    if pa.types.is_string(table[label].type) or pa.types.is_large_string(table[label].type):
        raise ValueError(
            f"column {label} of {where} must hold integers, got text: number its values with "
            f'class_encode_column("{label}")'
        )
    if not pa.types.is_integer(table[label].type) or table[label].null_count:
        raise ValueError(f"column {label} of {where} must hold integers, none missing, got {table[label].type}")
    kind = table[image].type
    if not pa.types.is_struct(kind) or not {"bytes", "path"} <= {field.name for field in kind}:
        raise ValueError(
            f"column {image} of {where} must hold encoded images, struct<bytes, path>, got {kind}: "
            + (
                f'read the files with cast_column("{image}", datasets.Image())'
                if pa.types.is_string(kind) or pa.types.is_large_string(kind)
                else f'arrays need cast_column("{image}", datasets.Array3D(…))'
            )
        )
    images = pc.struct_field(table[image], "bytes").to_pylist()
    if follow_paths:
        paths = pc.struct_field(table[image], "path").to_pylist()
        images = [path and Path(path) if data is None else data for data, path in zip(images, paths, strict=True)]
    for number, (data, target) in enumerate(zip(images, table[label].to_pylist(), strict=True), start):
        yield Row(f"row {number} of {where}", data, target)


def _from_loader(loader: "torch.utils.data.DataLoader[Any]", limit: int | None) -> tuple[Tensor, Tensor]:
    """The images and labels of a loader's batches, as many as are needed."""
    if isinstance(loader.sampler, torch.utils.data.RandomSampler):
        warnings.warn("the DataLoader shuffles: examples are numbered as they come this time", stacklevel=4)
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in loader:
        x, y = map(torch.as_tensor, _split_batch(batch, "a batch of the DataLoader"))
        images.append(x)
        labels.append(y.reshape(-1))
        if limit is not None and sum(map(len, images)) >= limit:
            break
    if not images:
        raise ValueError("the DataLoader holds no examples")
    return torch.cat(images), torch.cat(labels)


def _split_batch(batch: Any, where: str) -> tuple[Any, Any]:
    """Images and labels of a batch. Raises TypeError where it is neither a pair nor a mapping."""
    if isinstance(batch, Mapping):
        image, label = find_columns(list(batch), where)
        return batch[image], batch[label]
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        kind = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
        raise TypeError(f"{where} must be (images, labels) or a mapping of image and label, got {kind}")
    return batch[0], batch[1]


def _from_pair(images: Tensor | Array, labels: Tensor | Array) -> ImageSet:
    """Images and labels; arrays of images (N, H, W, C) and, of uint8, (N, H, W) become (N, C, H, W)."""
    if isinstance(images, np.ndarray):
        images = arrays_to_tensor(images, "images")
    if isinstance(labels, np.ndarray):
        if labels.dtype.kind not in "iu":
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        labels = torch.from_numpy(labels.astype(np.int64))
    elif labels.dtype in _INTEGERS:
        labels = labels.long()
    return ImageSet(images.to(torch.float32) if images.is_floating_point() else images, labels)
