"""The folder of an evaluation's or a transfer's rows: the one that was named, or one of its own."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from innermax.evaluation.store import OtherRows
from innermax.utils.console import PlainConsole
from innermax.utils.files import hash_tensors
from innermax.utils.serialization import describe
from innermax.utils.version import __version__

T = TypeVar("T")


def own_rows(run: Path | None, asked: Sequence[Any], weights: Mapping[str, torch.Tensor]) -> Path | None:
    """A folder for the rows of what is asked for: inside a run folder, or among the user's caches.

    None where neither can be written.
    """
    told = describe([*asked, __version__, torch.__version__])
    name = hash_tensors([(str(told), torch.empty(0)), *weights.items()])
    if run is not None and os.access(run, os.W_OK):
        return run / "rows" / name
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "innermax" / "rows"
    try:
        caches.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # there is no home
        return None
    return caches / name if os.access(caches, os.W_OK) else None


def measure_into(named: str | None, own: Path | None, measure: Callable[[Path | None], T]) -> tuple[Path | None, T]:
    """The folder of rows, and what is measured.

    Args:
        named: the folder that the user named, if so: the rows of something else in it are an error.
        own: else this one, with a number behind its name where it holds the rows of something else.
        measure: takes the folder.
    """
    if named is not None:
        return Path(named), measure(Path(named))
    folder, number = own, 1
    while True:
        try:
            return folder, measure(folder)
        except OtherRows:  # of other images under the same name, or in another precision
            number += 1
            folder = own and own.with_name(f"{own.name}-{number}")


def print_place(folder: Path | None) -> None:
    """Prints where the table of all rows is."""
    if folder is not None:
        PlainConsole().print(f"Example by example: {folder / 'rows.parquet'}", highlight=False, soft_wrap=True)
