"""Data sets that are read item by item: torch's, and Hugging Face's with a transform of their own.

One whose images come out otherwise each time, as random transforms make them, is read anew in every epoch.
"""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from innermax.data.decoding import Array, Row, decode, read_pixels, stack
from innermax.data.image_set import ImageSet
from innermax.utils.generators import restore_randomness, seed_randomness
from innermax.utils.optional import find_loaded
from innermax.utils.randomness import derive_seed
from innermax.utils.validation import shorten

_HEAD = 256  # first examples, which are read before the training and kept
_TRIED = 64  # examples that are read twice
_CHANNELS = (1, 3, 4)
_DRAWN = 4  # the stream of random numbers that transforms draw from


@dataclass(frozen=True, eq=False)
class RedrawnItems:
    """A training set that is never held: each example is read anew in every epoch.

    What its transforms draw from the global generators of torch, NumPy and Python depends on seed, epoch and example.

    Args:
        source: (x, y) by number, x a tensor, array or PIL image.
        columns: of x and y, where an item is a mapping.
    """

    source: Any
    columns: tuple[str, str] | None = None
    head: ImageSet = field(init=False)  # the first examples, drawn once
    classes: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        with restore_randomness():
            head = self._read(torch.arange(min(_HEAD, len(self)), device="cpu"), 0, 0)
        object.__setattr__(self, "head", head)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.head.shape

    def to(self, device: torch.device | str) -> "RedrawnItems":
        """The same set, whose batches go to another device."""
        return self._with(head=self.head.to(device))

    def with_classes(self, classes: int) -> "RedrawnItems":
        """The same set, which raises ValueError at a label ≥ classes."""
        return self._with(classes=classes)

    def draw(
        self, index: Int[Tensor, " b"], seed: int, epoch: int
    ) -> tuple[Float[Tensor, " b *features"], Int[Tensor, " b"]]:
        """The chosen examples as an epoch sees them: float32 in [0, 1], and labels, on the set's device."""
        with restore_randomness():
            images = self._read(index, seed, epoch)
        wrong = (images.labels >= (self.classes or torch.inf)).nonzero()
        if len(wrong) > 0:
            number = int(index[wrong[0, 0]])
            raise ValueError(
                f"item {number} of the data set: label {int(images.labels[wrong[0, 0]])}, but the model has "
                f"{self.classes} classes"
            )
        if images.shape != self.shape:
            raise ValueError(f"the data set's images must have one shape, got {images.shape} and {self.shape}")
        return images.to(self.head.labels.device).batch(torch.arange(len(index), device=self.head.labels.device))

    def _read(self, index: Tensor, seed: int, epoch: int) -> ImageSet:
        rows = []
        for number in index.tolist():
            seed_randomness(derive_seed(seed, _DRAWN, epoch, number))
            rows.append(_read_item(self.source, number, self.columns))
        if isinstance(rows[0].image, Tensor):
            return ImageSet(*stack(iter(rows), len(rows)))
        if not hasattr(self, "head"):
            return ImageSet(*decode(lambda: iter(rows), len(rows)))
        channels, height, width = self.shape
        pixels = read_pixels(rows, (width, height), "L" if channels == 1 else "RGB")
        if pixels is None:
            raise ValueError("some images of the data set have colour, its first ones have none: make all alike")
        return ImageSet(torch.from_numpy(pixels), torch.tensor([row.label for row in rows], device="cpu"))

    def _with(self, **changes: Any) -> "RedrawnItems":
        other = object.__new__(RedrawnItems)
        vars(other).update(vars(self) | changes)
        return other


def read_items(source: Any, count: int, columns: tuple[str, str] | None = None) -> ImageSet:
    """The first count examples, each read once.

    columns: of x and y, where an item is a mapping.
    """
    rows = partial(_rows, source, count, columns)
    if isinstance(next(rows()).image, Tensor):
        return ImageSet(*stack(rows(), count))
    return ImageSet(*decode(rows, count))


def draws_anew(source: Any, count: int, columns: tuple[str, str] | None = None) -> bool:
    """Whether an example comes out otherwise when it is read again; of count ≥ 1 a few are tried."""
    chosen = torch.linspace(0, count - 1, min(_TRIED, count), device="cpu").round().long().tolist()
    with restore_randomness():
        for number in chosen:
            found = []
            for attempt in range(2):
                seed_randomness(derive_seed(attempt, _DRAWN, number))
                image = _read_item(source, number, columns).image
                found.append(image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image))
            first, second = found
            if first.shape != second.shape or not np.array_equal(first, second, equal_nan=True):
                return True
    return False


def _rows(source: Any, count: int, columns: tuple[str, str] | None) -> Iterator[Row]:
    return (_read_item(source, number, columns) for number in range(count))


def _read_item(source: Any, number: int, columns: tuple[str, str] | None) -> Row:
    """An example, its image a tensor or a PIL image."""
    name, item = f"item {number} of the data set", source[number]
    if columns is not None and isinstance(item, Mapping):
        item = tuple(item[column] for column in columns)
    if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], np.ndarray):
        item = (array_to_tensor(item[0], name), item[1])
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not _is_image(item[0]):
        raise TypeError(f"{name} must be (x, y) with x a tensor, array or PIL image, got {_describe(item)}")
    try:
        return Row(name, item[0], operator.index(item[1]))
    except TypeError:
        raise TypeError(f"y in {name} must be an integer, got {item[1]!r}") from None


def _is_image(value: object) -> bool:
    kind = find_loaded("PIL.Image", "Image")  # its objects cannot exist before it is imported
    return isinstance(value, Tensor) or (isinstance(kind, type) and isinstance(value, kind))


def array_to_tensor(array: Array, what: str) -> Tensor:
    """An image as a tensor: (H, W, C) and, of uint8, (H, W) become (C, H, W), as in torchvision."""
    return arrays_to_tensor(array[None], what)[0]


def arrays_to_tensor(arrays: Array, what: str) -> Tensor:
    """Images as one tensor: (N, H, W, C) and, of uint8, (N, H, W) become (N, C, H, W); other shapes stay.

    Raises ValueError where three axes do not tell which one holds the channels, TypeError where it holds no numbers.
    """
    if arrays.ndim == 3 and arrays.dtype == np.uint8:
        arrays = arrays[:, None]
    elif arrays.ndim == 4:
        shape = arrays.shape[1:]
        first, last = shape[0] in _CHANNELS, shape[2] in _CHANNELS
        if first and last:
            raise ValueError(f"{what}: which axis of {shape} holds the channels? Pass a tensor, channels first")
        arrays = arrays.transpose(0, 3, 1, 2) if last else arrays
    return numbers_to_tensor(arrays, what)


def numbers_to_tensor(array: Array, what: str) -> Tensor:
    """An array as a tensor, whatever its strides and its byte order. Raises TypeError where it holds no numbers."""
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{what} must be uint8 or floating-point numbers, got an array of {array.dtype}")
    native = np.float64 if array.dtype == np.longdouble else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.ascontiguousarray(array, native))


def _describe(item: object) -> str:
    if isinstance(item, tuple | list):
        return f"{type(item).__name__} of {', '.join(type(part).__name__ for part in item[:3])}" if item else "nothing"
    return f"a mapping of {', '.join(map(str, item))}" if isinstance(item, Mapping) else shorten(type(item).__name__)
