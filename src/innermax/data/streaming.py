"""Streams: images that fit neither into memory nor on the disk, read anew in every epoch.

The package datasets is imported by whoever makes the stream, not here.
"""

import copy
import math
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from innermax.data.decoding import Row, decode, map_ahead, read_pixels
from innermax.data.image_set import ImageSet
from innermax.data.items import RedrawnItems, draws_anew, read_items
from innermax.data.readers import as_image_set, find_columns, find_items
from innermax.utils import randomness
from innermax.utils.validation import check_count

_HEAD = 256  # first examples, which are read before the training and kept
_THREADS = 8  # that decode, at most
ORDER = 0  # the stream of random numbers that an epoch's order is drawn from

Share = Callable[[Int[Tensor, " b"]], Int[Tensor, " k"]]
_Part = tuple[Int[Tensor, " b"], Int[Tensor, " k"], list[Row]]


class Batch(NamedTuple):
    """The numbers of an update's examples (`whole`), and this process's share: numbers (`mine`), images and labels."""

    whole: Int[Tensor, " b"]
    mine: Int[Tensor, " k"]
    x: Float[Tensor, " k *features"]
    y: Int[Tensor, " k"]


@dataclass(frozen=True, eq=False)
class ImageStream:
    """A split that is never held as a whole: it is read, shuffled within a buffer and decoded during training.

    Every process reads the whole stream and decodes its share. An example's number, which decides its random start and
    its augmentation, is its place in the epoch's order; that depends on seed and epoch alone.

    Args:
        source: a Hugging Face `IterableDataset`, as `load_dataset(…, streaming=True)` makes of parquet files,
            WebDataset shards and more; encoded images, all of one size, in column image or img, integers in label or
            fine_label.
        examples: ≥ 1 of an epoch; if the stream ends sooner, that is an error.
        buffer: ≥ 1 encoded images in memory, of which the next one is drawn; the order of shards is drawn, too.

    Raises:
        TypeError: source is something else.
        ValueError: a column is missing, an image or label cannot be read, or a number is out of range.
    """

    source: Any
    examples: int
    buffer: int = 10_000
    head: ImageSet = field(init=False)  # the first examples, in the stream's own order
    classes: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_count(self.examples, "examples")
        check_count(self.buffer, "buffer")
        if not all(hasattr(self.source, name) for name in ("shuffle", "set_epoch", "decode")):
            raise TypeError(
                "source must be a Hugging Face IterableDataset, as load_dataset(…, streaming=True) gives, got "
                f"{type(self.source).__name__}"
            )
        rows = list(islice(_rows(self.source.decode(False)), min(_HEAD, self.examples)))
        if not rows:
            raise ValueError("the stream holds no examples")
        images, labels = decode(lambda: iter(rows), len(rows))
        object.__setattr__(self, "head", ImageSet(images, labels))

    def __len__(self) -> int:
        """Examples of an epoch."""
        return self.examples

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.head.shape

    def to(self, device: torch.device | str) -> "ImageStream":
        """The same stream, whose batches go to another device."""
        return self._with(head=self.head.to(device))

    def with_classes(self, classes: int) -> "ImageStream":
        """The same stream, which raises ValueError at a label ≥ classes."""
        return self._with(classes=classes)

    def _with(self, **changes: Any) -> "ImageStream":
        stream = copy.copy(self)
        vars(stream).update(changes)
        return stream

    def batches(self, size: int, seed: int, epoch: int, first: int, share: Share) -> Generator[Batch]:
        """The epoch's batches from number `first` on, read and decoded ahead of their use.

        The examples before are read but not decoded, so that a resumed epoch goes on with the same ones.
        """
        count = batch_count(self, size)
        sizes = [self.examples // count + (number < self.examples % count) for number in range(count)]
        threads = min(os.cpu_count() or 1, _THREADS)
        with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as reader:
            parts = self._parts(sizes[first:], sum(sizes[:first]), seed, epoch, share)
            made = map_ahead(pool, self._decode_part, parts, threads + 1)
            following = reader.submit(next, made, None)
            while (batch := following.result()) is not None:
                following = reader.submit(next, made, None)
                whole, mine, images, labels = (part.to(self.head.labels.device) for part in batch)
                yield Batch(whole, mine, images.to(torch.float32).div_(255), labels)

    def _parts(self, sizes: list[int], place: int, seed: int, epoch: int, share: Share) -> Iterator[_Part]:
        """For each size, from position `place` of the epoch on: the batch's numbers, this process's and its rows."""
        shuffled = self.source.decode(False).shuffle(seed=randomness.derive_seed(seed) % 2**32, buffer_size=self.buffer)
        shuffled.set_epoch(epoch)  # last: a stream made from another begins at epoch 0
        # Not with the stream's own skip: behind it the order of shards is the same in every epoch.
        rows = islice(_rows(shuffled), place, None)
        for size in sizes:
            part = list(islice(rows, size))
            if len(part) < size:
                raise ValueError(f"the stream ended after {place + len(part):,} of {self.examples:,} examples")
            index = torch.arange(place, place + size, device="cpu")
            mine = share(index)
            yield index, mine, [part[number] for number in (mine - place).tolist()]
            place += size

    def _decode_part(self, part: _Part) -> tuple[Tensor, ...]:
        """The batch with its images as uint8."""
        index, mine, rows = part
        channels, height, width = self.shape
        images = read_pixels(rows, (width, height), "L" if channels == 1 else "RGB")
        if images is None:
            raise ValueError(
                f"{rows[0].name} or one of the next {len(rows) - 1} has colour, the stream's first {len(self.head)} "
                "have none: make all alike, for example with source.map"
            )
        wrong = [row for row in rows if self.classes is not None and row.label >= self.classes]
        if wrong:
            raise ValueError(f"{wrong[0].name}: label {wrong[0].label}, but the model has {self.classes} classes")
        return (
            index,
            mine,
            torch.from_numpy(images),
            torch.tensor([row.label for row in rows], dtype=torch.int64, device="cpu"),
        )


TrainingSet = ImageSet | ImageStream | RedrawnItems


def as_training_set(dataset: Any) -> TrainingSet:
    """A training set as an ImageSet in memory; an ImageStream as it is; what its transforms draw anew, item by item."""
    if isinstance(dataset, ImageStream):
        return dataset
    items = find_items(dataset)
    if items is None:
        return as_image_set(dataset)
    source, columns = items
    redrawn = draws_anew(source, len(source), columns)
    return RedrawnItems(source, columns) if redrawn else read_items(source, len(source), columns)


def batch_count(data: TrainingSet, size: int) -> int:
    """How many batches an epoch has; they differ by at most one example."""
    return math.ceil(len(data) / size)


def batches(data: TrainingSet, size: int, seed: int, epoch: int, first: int, share: Share) -> Generator[Batch]:
    """An epoch's batches from number `first` on, in an order that seed and epoch alone decide."""
    if isinstance(data, ImageStream):
        yield from data.batches(size, seed, epoch, first, share)
        return
    order = randomness.permutation(seed, len(data), ORDER, epoch).to(data.head.labels.device)
    for index in order.tensor_split(batch_count(data, size))[first:]:
        mine = share(index)
        x, y = data.batch(mine) if isinstance(data, ImageSet) else data.draw(mine, seed, epoch)
        yield Batch(index, mine, x, y)


def _rows(source: Any) -> Iterator[Row]:
    """The rows of a stream of encoded images."""
    columns = None
    for number, row in enumerate(source):
        if columns is None:
            columns = find_columns(list(row), "the stream")
        name, (image, label) = f"example {number} of the stream", (row[column] for column in columns)
        if not isinstance(image, dict) or not {"bytes", "path"} <= image.keys():
            raise ValueError(f"{name}: column {columns[0]} must hold encoded images, got {type(image).__name__}")
        if not isinstance(label, int) or label < 0:
            raise ValueError(f"{name}: column {columns[1]} must hold integers ≥ 0, got {label!r}")
        encoded = image["bytes"] if image["bytes"] is not None else image["path"] and Path(image["path"])
        yield Row(name, encoded, label)
