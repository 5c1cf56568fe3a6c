"""What commands share: how their words are read and checked."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

SOURCES = (
    "a run folder, a model file or folder, a Hub id, timm:NAME, or with --allow-code module:function or a .pt2 program "
    "of torch.export"
)
_FRACTION = r"^(\d+\.?\d*)/(\d+\.?\d*)$"


def check_count(name: str, count: int | None) -> None:
    if count is not None and count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")


def check_file(option: str, path: str | None) -> None:
    """Raises where a file cannot be written, before the work that goes into it."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{option} {path} cannot be written: its folder does not exist")
    if path is not None and Path(path).is_dir():
        raise ValueError(f"{option} {path} cannot be written: it is a folder")


def spelled_out(words: Sequence[str]) -> list[str]:
    """The words as the parser wants them: --run-dir as --run_dir, a bare --overwrite as true, 8/255 as a decimal."""

    def decimal(match: re.Match[str]) -> str:
        return repr(float(match[1]) / float(match[2])) if float(match[2]) else match[0]

    result: list[str] = []
    for word, following in pairwise([*words, "--"]):
        name, equals, value = word.partition("=")
        if not word.startswith("--") or word == "--help":
            result.append(re.sub(_FRACTION, decimal, word))
            continue
        if not equals and following.startswith("--"):
            equals, value = "=", "true"
        result.append(name.replace("-", "_").replace("__", "--", 1) + equals + re.sub(_FRACTION, decimal, value))
    return result
