"""Decodes images into one tensor: in memory, or in a temporary file when they are many.

PIL is imported where it is used: training on tensors does not need it.
"""

import math
import os
import shutil
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
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
from innermax.utils.optional import extra

_PART = 4 * 2**20  # bytes of images decoded at a time
_MOST_ROWS = 256  # images decoded at a time
_GREY_MODES = ("1", "L", "LA", "La")
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
_ORIENTED_BY = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where Pillow looks for an orientation
_COMMON = ("PNG", "JPEG", "WEBP", "BMP")
# EPS would run Ghostscript; the others Pillow knows without being able to decode them.
_UNREADABLE = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
_MOST_PIXELS = 4096 * 4096  # of one image; checked on its header, before anything is decoded
_THREADED_PIXELS = 128 * 128  # measured: below this, threads waiting for Python's lock cost more than they bring
Array = npt.NDArray[Any]
Task = TypeVar("Task")
Made = TypeVar("Made")


class Row(NamedTuple):
    """An image (encoded bytes, a file, a PIL image or a tensor), its name in errors, and its label."""

    name: str
    image: Any
    label: int


@cache
def image_formats() -> tuple[str, ...]:
    """The formats that images are read in: what Pillow decodes, as it calls them."""
    with extra("data"):
        from PIL import Image

    Image.init()
    known = set(Image.OPEN) - _UNREADABLE
    common = [name for name in _COMMON if name in known]  # first, since Pillow tries one after the other
    return (*common, *sorted(known - set(common)))


@cache
def image_suffixes() -> frozenset[str]:
    """The endings of files in these formats, in small letters, such as .png."""
    with extra("data"):
        from PIL import Image

    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in image_formats())


def decode(rows: Callable[[], Iterator[Row]], count: int) -> tuple[Tensor, Tensor]:
    """The images as uint8 (count, C, H, W), grey if all are, else RGB, and their labels.

    They are upright, as their EXIF orientation says; of several frames the first is taken; alpha is dropped. Where the
    tensor is in a file, only a few parts of it are in memory at a time.

    Args:
        rows: each call starts reading the `count` ≥ 1 rows anew.

    Raises:
        ValueError: an image cannot be read or differs in size from the first; the disk has no room for the file.
    """
    reading = rows()
    first = next(reading)
    with _open_image(first) as opened:
        if math.prod(opened.size) > _MOST_PIXELS:
            raise ValueError(f"{opened.size[0]}×{opened.size[1]} pixels are more than the {_MOST_PIXELS:,} allowed")
        image = _first_frame(opened, first)
        size, grey = image.size, image.mode in _GREY_MODES
    reading = chain([first], reading)
    if grey:
        found = _decode(reading, count, size, "L")
        if found is not None:
            return found
        reading = rows()
    return cast(tuple[Tensor, Tensor], _decode(reading, count, size, "RGB"))


def stack(rows: Iterator[Row], count: int) -> tuple[Tensor, Tensor]:
    """Images that are tensors as one tensor, floats as float32, and their labels.

    Raises:
        ValueError: an image differs in shape or type from the first; the disk has no room for the file.
    """
    first = next(rows)
    kind = _shape_and_type(first.image)
    labels: list[int] = []
    dtype = torch.float32 if first.image.is_floating_point() else first.image.dtype
    sample = torch.empty(0, dtype=dtype, device="cpu").numpy()

    def parts() -> Iterator[Array]:
        reading = chain([first], rows)
        while part := list(islice(reading, _images_per_part(first.image.numel() * sample.itemsize))):
            others = [other for other in (_shape_and_type(row.image) for row in part) if other != kind]
            if others:
                raise ValueError(f"the data set's images must have one shape and type, got {kind} and {others[0]}")
            labels.extend(row.label for row in part)
            yield torch.stack([row.image for row in part]).detach().to("cpu", dtype).numpy()

    images = gather(parts(), (count, *first.image.shape), sample.dtype)
    return cast(Tensor, images), torch.tensor(labels, device="cpu")


def select(images: Tensor, index: Tensor) -> Tensor:
    """images[index], in a file where it is too large for memory."""
    size = images.shape[1:].numel() * images.element_size()
    if images.device.type != "cpu" or index.numel() * size <= IN_MEMORY:
        return images[index]
    positions = torch.arange(len(images), device="cpu")[index.cpu()]
    parts = (images[part].numpy() for part in torch.split(positions, _images_per_part(size)))
    return cast(Tensor, gather(parts, (len(positions), *images.shape[1:]), images[:0].numpy().dtype))


def to_rgb(images: Tensor) -> Tensor:
    """Grey images (N, 1, H, W) as RGB: three equal channels."""
    count, _, height, width = images.shape
    parts = (part.expand(-1, 3, -1, -1).numpy() for part in torch.split(images, _images_per_part(3 * height * width)))
    return cast(Tensor, gather(parts, (count, 3, height, width), images[:0].numpy().dtype))


def gather(parts: Iterable[Array | None], shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Tensor | None:
    """The parts, one after the other, as one tensor of this shape; None as soon as one part is.

    More than IN_MEMORY bytes go into a temporary file (in TMPDIR) that is mapped into memory. The file is unlinked, so
    that it disappears with the tensor or the process.

    Raises:
        ValueError: the disk has no room for the file.
    """
    size = math.prod(shape) * dtype.itemsize
    if size > IN_MEMORY:
        return _fill_file(parts, shape, dtype, size)
    whole, place = np.empty(shape, dtype), 0
    for part in parts:
        if part is None:
            return None
        whole[place : place + len(part)] = part
        place += len(part)
    return torch.from_numpy(whole)


def _fill_file(
    parts: Iterable[Array | None], shape: tuple[int, ...], dtype: "np.dtype[Any]", size: int
) -> Tensor | None:
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
            # Not through the memory map: on a full disk that would kill the process.
            file.write(np.ascontiguousarray(part).data)
        file.flush()
        return torch.from_numpy(np.memmap(file, dtype, "r+", shape=shape))


def _images_per_part(size: int) -> int:
    """How many images of `size` bytes are decoded at a time."""
    return max(1, min(_MOST_ROWS, _PART // max(size, 1)))


def _shape_and_type(image: object) -> str:
    """What all images of a set must share, in words."""
    return f"{tuple(image.shape)} {image.dtype}" if isinstance(image, Tensor) else type(image).__name__


def _decode(reading: Iterator[Row], count: int, size: tuple[int, int], mode: str) -> tuple[Tensor, Tensor] | None:
    """The images (count, C, H, W), C = 1 for mode "L" and 3 for "RGB", and labels; None where mode is "L" and one has
    colour."""
    width, height = size
    labels: list[int] = []

    def batches() -> Iterator[list[Row]]:
        while batch := list(islice(reading, _images_per_part(width * height * len(mode)))):
            labels.extend(row.label for row in batch)
            yield batch

    work = partial(read_pixels, size=size, mode=mode)
    threads = min(os.cpu_count() or 1, 8) if width * height >= _THREADED_PIXELS else 1
    with ThreadPoolExecutor(threads) as pool:
        parts = map(work, batches()) if threads == 1 else map_ahead(pool, work, batches(), 2 * threads)
        images = gather(parts, (count, len(mode), height, width), np.dtype(np.uint8))
    return None if images is None else (images, torch.tensor(labels, device="cpu"))


def map_ahead(
    pool: ThreadPoolExecutor, work: Callable[[Task], Made], batches: Iterator[Task], most: int
) -> Iterator[Made]:
    """work(batch) for each batch, in order, with at most `most` of them in progress in the pool."""
    pending: deque[Future[Made]] = deque()
    for batch in batches:
        pending.append(pool.submit(work, batch))
        if len(pending) == most:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def read_pixels(rows: list[Row], size: tuple[int, int], mode: str) -> Array | None:
    """The rows' pixels (n, C, H, W); None where mode is "L" and one has colour."""
    width, height = size
    pixels = np.empty((len(rows), height, width, len(mode)), np.uint8)
    for place, row in enumerate(rows):
        with _open_image(row) as opened:
            # From the header: an image's pixels are not touched before its size is known.
            image = _first_frame(opened, row) if opened.size in (size, size[::-1]) else opened
            if image.size != size:
                raise ValueError(
                    f"{image.size[0]}×{image.size[1]} pixels, but the first image has {width}×{height}: images must "
                    "have one size"
                )
            if image.mode not in _GREY_MODES + _COLOUR_MODES:
                raise ValueError(f"mode {image.mode} is not 8 bits per channel")
            if mode == "L" and image.mode not in _GREY_MODES:
                return None
            converted = image if image.mode == mode else image.convert(mode)
            pixels[place] = np.asarray(converted).reshape(height, width, len(mode))
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _first_frame(image: "Image.Image", row: Row) -> "Image.Image":
    """The image as it is meant to be seen: of encoded ones the first frame, upright."""
    with extra("data"):
        from PIL import ExifTags, Image, ImageOps

    if isinstance(row.image, Image.Image):  # its pixels are what its owner sees
        return image
    if getattr(image, "is_animated", False) and image.format != "MPO":  # where the others are previews
        warnings.warn("images hold several frames (GIF, TIFF and the like): of each the first is taken", stacklevel=2)
    image.load()  # some formats tell their orientation behind the pixels
    told = image.format == "TIFF" or not image.info.keys().isdisjoint(_ORIENTED_BY)
    if not told or image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


@contextmanager
def _open_image(row: Row) -> "Iterator[Image.Image]":
    """Context manager: the image, of which only the header is read; failures become a ValueError with its name."""
    with extra("data"):
        from PIL import Image, UnidentifiedImageError

    source: bytes | Path | Image.Image | None = row.image
    try:
        if isinstance(source, Image.Image):
            yield source
        elif source is None:
            raise ValueError("the image is missing")
        else:
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=image_formats()) as image:
                yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"{row.name}: not a readable image") from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, its bomb errors and more
        raise ValueError(f"{row.name}: {' '.join(str(error).split())}") from error
