"""Images become one tensor: in memory, or in a file where memory should not hold them all.

PIL is imported where it is used: training on tensors does not need it.
"""

import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image
from innermax.utils.files import IN_MEMORY

_PART = 4 * 2**20  # bytes of images made at a time
_MOST_ROWS = 256  # images made at a time
_GREY_MODES = ("1", "L", "LA", "La")
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MOST_PIXELS = 4096 * 4096  # of one image; checked on its header, before anything is decoded
_THREADED_PIXELS = 128 * 128  # measured: below this, threads waiting for Python's lock cost more than they bring
Array = npt.NDArray[Any]
Task = TypeVar("Task")
Made = TypeVar("Made")


class Row(NamedTuple):
    """An image, still encoded (bytes or a file), PIL's or a tensor; what to call it in an error; and its label."""

    name: str
    image: Any
    label: int


def decoded(rows: Callable[[], Iterator[Row]], count: int) -> tuple[Tensor, Tensor]:
    """The images as uint8 (count, C, H, W), grey if all are, else RGB, and their labels.

    Alpha is dropped. Never more images are in memory than a few parts, where the tensor itself is not.

    Args:
        rows: begins to read `count` ≥ 1 rows, whenever it is called.

    Raises:
        ValueError: an image cannot be read, or has not the first one's size; there is no room for a file of them.
    """
    reading = rows()
    first = next(reading)
    with _opened(first) as image:
        size, grey = image.size, image.mode in _GREY_MODES
        if math.prod(size) > _MOST_PIXELS:
            raise ValueError(f"{size[0]}×{size[1]} pixels are more than the {_MOST_PIXELS:,} allowed")
    reading = chain([first], reading)
    if grey:
        found = _decoded(reading, count, size, "L")
        if found is not None:
            return found
        reading = rows()
    return cast(tuple[Tensor, Tensor], _decoded(reading, count, size, "RGB"))


def stacked(rows: Iterator[Row], count: int) -> tuple[Tensor, Tensor]:
    """Images that are tensors as one, floats as float32, and their labels.

    Raises:
        ValueError: an image has not the first one's shape and type; there is no room for a file of them.
    """
    first = next(rows)
    kind = _kind(first.image)
    labels: list[int] = []
    dtype = torch.float32 if first.image.is_floating_point() else first.image.dtype
    sample = torch.empty(0, dtype=dtype).numpy()

    def parts() -> Iterator[Array]:
        reading = chain([first], rows)
        while part := list(islice(reading, _fitting(first.image.numel() * sample.itemsize))):
            others = [other for other in (_kind(row.image) for row in part) if other != kind]
            if others:
                raise ValueError(f"the data set's images must have one shape and type, got {kind} and {others[0]}")
            labels.extend(row.label for row in part)
            yield torch.stack([row.image for row in part]).detach().to("cpu", dtype).numpy()

    images = gathered(parts(), (count, *first.image.shape), sample.dtype)
    return cast(Tensor, images), torch.tensor(labels)


def taken(images: Tensor, index: Tensor) -> Tensor:
    """images[index]."""
    size = images.shape[1:].numel() * images.element_size()
    if images.device.type != "cpu" or index.numel() * size <= IN_MEMORY:
        return images[index]
    positions = torch.arange(len(images))[index.cpu()]
    parts = (images[part].numpy() for part in torch.split(positions, _fitting(size)))
    return cast(Tensor, gathered(parts, (len(positions), *images.shape[1:]), images[:0].numpy().dtype))


def coloured(images: Tensor) -> Tensor:
    """Grey images (N, 1, H, W) with three channels, all the same."""
    count, _, height, width = images.shape
    parts = (part.expand(-1, 3, -1, -1).numpy() for part in torch.split(images, _fitting(3 * height * width)))
    return cast(Tensor, gathered(parts, (count, 3, height, width), images[:0].numpy().dtype))


def gathered(parts: Iterable[Array | None], shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Tensor | None:
    """The parts, one after the other, as one tensor of this shape; None as soon as one part is.

    More than IN_MEMORY bytes go into a file in the folder for temporary files (TMPDIR): of the tensor only what is read
    is in memory, as long as nothing else needs the room. The file has no name, so that it goes with the tensor or with
    the process, whatever ends that.

    Raises:
        ValueError: the folder has no room for it.
    """
    size = math.prod(shape) * dtype.itemsize
    if size > IN_MEMORY:
        return _filed(parts, shape, dtype, size)
    whole, place = np.empty(shape, dtype), 0
    for part in parts:
        if part is None:
            return None
        whole[place : place + len(part)] = part
        place += len(part)
    return torch.from_numpy(whole)


def _filed(parts: Iterable[Array | None], shape: tuple[int, ...], dtype: "np.dtype[Any]", size: int) -> Tensor | None:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"the images take {size / 2**30:.1f} GiB as numbers, and {folder} has room for {free / 2**30:.1f}: name "
            "another folder with TMPDIR"
        )
    with tempfile.TemporaryFile(prefix="innermax-") as file:
        for part in parts:
            if part is None:
                return None
            # Not through the map: where the disk is full, that kills a process.
            file.write(np.ascontiguousarray(part).data)
        file.flush()
        return torch.from_numpy(np.memmap(file, dtype, "r+", shape=shape))


def _fitting(size: int) -> int:
    """How many images of so many bytes are made at a time."""
    return max(1, min(_MOST_ROWS, _PART // max(size, 1)))


def _kind(image: object) -> str:
    """What images of one set share."""
    return f"{tuple(image.shape)} {image.dtype}" if isinstance(image, Tensor) else type(image).__name__


def _decoded(reading: Iterator[Row], count: int, size: tuple[int, int], mode: str) -> tuple[Tensor, Tensor] | None:
    """The images (count, C, H, W), C = 1 for mode "L" and 3 for "RGB", and labels; None where mode is "L" and one has
    colour."""
    width, height = size
    labels: list[int] = []

    def batches() -> Iterator[list[Row]]:
        while batch := list(islice(reading, _fitting(width * height * len(mode)))):
            labels.extend(row.label for row in batch)
            yield batch

    work = partial(pixels, size=size, mode=mode)
    threads = min(os.cpu_count() or 1, 8) if width * height >= _THREADED_PIXELS else 1
    with ThreadPoolExecutor(threads) as pool:
        parts = map(work, batches()) if threads == 1 else ahead(pool, work, batches(), 2 * threads)
        images = gathered(parts, (count, len(mode), height, width), np.dtype(np.uint8))
    return None if images is None else (images, torch.tensor(labels))


def ahead(pool: ThreadPoolExecutor, work: Callable[[Task], Made], batches: Iterator[Task], most: int) -> Iterator[Made]:
    """What `work` makes of the batches, in their order, with at most so many of them under way."""
    pending: deque[Future[Made]] = deque()
    for batch in batches:
        pending.append(pool.submit(work, batch))
        if len(pending) == most:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def pixels(rows: list[Row], size: tuple[int, int], mode: str) -> Array | None:
    """The rows' pixels (n, C, H, W); None where mode is "L" and one has colour."""
    width, height = size
    pixels = np.empty((len(rows), height, width, len(mode)), np.uint8)
    for place, row in enumerate(rows):
        with _opened(row) as image:
            if image.size != size:  # from the header: an image's pixels are not touched before its size is known
                raise ValueError(f"{image.size[0]}×{image.size[1]} pixels, but the first image has {width}×{height}")
            if image.mode not in _GREY_MODES + _COLOUR_MODES:
                raise ValueError(f"mode {image.mode} is not 8 bits a channel")
            if mode == "L" and image.mode not in _GREY_MODES:
                return None
            converted = image if image.mode == mode else image.convert(mode)
            pixels[place] = np.asarray(converted).reshape(height, width, len(mode))
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


@contextmanager
def _opened(row: Row) -> "Iterator[Image.Image]":
    """The image, its header read; whatever goes wrong with it becomes a ValueError that begins with its name."""
    from PIL import Image, UnidentifiedImageError

    source: bytes | Path | Image.Image | None = row.image
    try:
        if isinstance(source, Image.Image):
            yield source
        elif source is None:
            raise ValueError("the image is missing")
        else:
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as image:
                yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"{row.name}: not a readable {', '.join(_FORMATS)} image") from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, its bomb errors and more
        raise ValueError(f"{row.name}: {' '.join(str(error).split())}") from error
