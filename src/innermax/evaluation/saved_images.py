"""Adversarial images in files: arrays for programs, and pictures for people."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from innermax.evaluation.store import Column
from innermax.utils.optional import extra

_LONGEST = 60  # characters of an attack's name in a file's


def check_new_folder(folder: Path, what: str) -> None:
    """Raises ValueError where a folder of images could not be made: it holds something, or its parent is missing."""
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise ValueError(f"{what} {folder} exists and is no empty folder: choose another, or remove it")
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"{what} {folder} cannot be written: its parent folder does not exist")


def write_images(folder: Path, attacks: Mapping[str, Mapping[str, Column]]) -> None:
    """Writes a folder with each attack's arrays as .npz, and pictures of its misclassified images as PNG.

    attacks: for each its images (N, *features), labels, predictions and index. The folder is there when it is whole.
    Raises ValueError where it exists and is not empty, OSError where it cannot be written.
    """
    check_new_folder(folder, "folder")
    try:
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.absolute().parent) as place:
            made = Path(place) / folder.name
            made.mkdir()
            for stem, arrays in zip(_name_files(attacks), attacks.values(), strict=True):
                with (made / f"{stem}.npz").open("xb") as file:
                    np.savez(file, allow_pickle=False, **arrays)
                    file.flush()
                    os.fsync(file.fileno())
                if _are_pictures(arrays["images"]):
                    _write_pictures(made / stem, **arrays)
            made.replace(folder)
    except OSError as error:
        raise OSError(error.errno, f"{folder} cannot be written: {error.strerror or error}") from error


def _name_files(attacks: Iterable[str]) -> list[str]:
    """A file name for each attack, its own where file systems take it; equal ones get a number."""
    stems: list[str] = []
    for name in attacks:
        stem = plain = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:_LONGEST] or "_"
        while stem.lower() in map(str.lower, stems):
            stem = f"{plain}-{len(stems)}"
        stems.append(stem)
    return stems


def _are_pictures(images: Column) -> bool:
    """Whether arrays are grey or RGB images (C, H, W), with values in [0, 1] unless they are bytes."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        return False
    return images.dtype == np.uint8 or bool(images.min() >= 0 and images.max() <= 1)


def _write_pictures(folder: Path, images: Column, labels: Column, predictions: Column, index: Column) -> None:
    """Writes a PNG of every misclassified image."""
    with extra("data"):
        from PIL import Image

    folder.mkdir()
    for row in np.flatnonzero(predictions != labels):
        levels = images[row] if images.dtype == np.uint8 else np.rint(images[row] * 255).astype(np.uint8)
        picture = Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0))
        picture.save(folder / f"{index[row]:05d}-label{labels[row]}-predicted{predictions[row]}.png")
