"""`innermax.report`: writes the page."""

from pathlib import Path
from typing import Any

import torch

from innermax.reporting.contents import read_entries
from innermax.utils.files import write_text
from innermax.utils.optional import extra


def report(
    evaluations_or_runs: Any, path: str | Path, *, pictures: int = 200, device: torch.device | str | None = None
) -> Path:
    """Writes the robustness report, one HTML page that needs no other file or network; returns its path.

    Args:
        evaluations_or_runs: an Evaluation, a Run, an Exhibit, a run folder or the file of an evaluation's JSON; or
            several of them, as a sequence or by the names that the page uses.
        path: of the page; its folder must exist.
        pictures: ≥ 0, the largest number of pictures made from run folders, whose models and images are loaded and
            attacked again, as `innermax.gallery` does. 0: nothing is computed.
        device: where to make them. None: where models are loaded to.

    Raises:
        ValueError, TypeError: evaluations_or_runs holds something else, or a file that is not readable; pictures is
            negative; path cannot be written.
    """
    if isinstance(pictures, bool) or not isinstance(pictures, int):
        raise TypeError(f"pictures must be an integer, got {pictures!r}")
    if pictures < 0:
        raise ValueError(f"pictures must be at least 0, got {pictures}")
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"path {path} cannot be written: it is a folder, or its folder does not exist")
    with extra("report"):  # before pictures are made that could not be shown
        from innermax.reporting.page import render

    entries = read_entries(evaluations_or_runs, pictures, device)
    write_text(path, render(entries))
    return path
