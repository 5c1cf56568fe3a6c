"""Folders of image files, one per class."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from innermax.data.decoding import Row, decode, image_suffixes
from innermax.data.image_set import ImageSet
from innermax.utils.validation import unknown

_NAMED = 3  # files that a warning names


def subfolders(path: Path) -> tuple[str, ...]:
    """The names of the folders in a folder, sorted, without hidden ones."""
    return tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def from_class_folders(path: Path, class_names: tuple[str, ...]) -> ImageSet:
    """The images under path/class, at any depth, sorted by class, folder and file name.

    A warning names what is left out: files that are no images, and those outside the folders of classes.

    Raises:
        ValueError: a folder is no known class, or holds no images; an image cannot be read.
    """
    for name in subfolders(path):
        if name not in class_names:
            raise unknown(f"class in {path}:", name, class_names)
    rows: list[Row] = []
    others = [entry for entry in sorted(path.iterdir()) if entry.is_file() and not entry.name.startswith(".")]
    empty = []
    for label, name in enumerate(class_names):
        files = list(_files(path / name))
        images = [file for file in files if file.suffix.lower() in image_suffixes()]
        others += sorted(set(files) - set(images))
        if not images and (path / name).is_dir():
            empty.append(name)
        rows.extend(Row(str(file), file, label) for file in images)
    if not rows:
        raise ValueError(f"{path} holds no images (folders of .png, .jpg or other image files, one per class)")
    if empty:
        raise ValueError(f"classes without an image in {path}: {', '.join(empty)}; remove their folders, or fill them")
    for file in (row.image for row in rows):
        if not file.is_file():  # a pipe would be waited for
            raise ValueError(f"{file.parent} holds an entry with the name of an image that is no file: {file.name}")
    if others:
        named = ", ".join(str(file.relative_to(path)) for file in others[:_NAMED])
        more = ", …" if len(others) > _NAMED else ""
        warnings.warn(
            f"{path}: {len(others)} files are no images of a class, and left out: {named}{more}", stacklevel=4
        )
    return ImageSet(*decode(lambda: iter(rows), len(rows)))


def _files(folder: Path) -> Iterator[Path]:
    """All files under a folder, sorted by folder and name, without hidden ones; links are followed, each folder once.

    Raises OSError where a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: list[tuple[str, list[str]]] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse if folder.exists() else None):
        place = os.path.realpath(root)
        folders[:] = [] if place in seen else [name for name in folders if not name.startswith(".")]
        if place not in seen:
            found.append((root, names))
        seen.add(place)
    for root, names in sorted(found):
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))
