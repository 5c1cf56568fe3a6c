"""Run folders: how they are made, checked and cleared, and what their configuration says."""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from innermax.utils.environment import environment
from innermax.utils.files import is_vacant, read_config, write_json, write_text
from innermax.utils.serialization import differences
from innermax.utils.validation import shorten

CHECKPOINTS = "checkpoints"  # the folder in a run folder


# What training, evaluating, reporting and exporting write into a run folder. It is known by config.yaml, which is
# replaced and never removed.
_FOLDERS = (CHECKPOINTS, "tensorboard", "rows")
_FILES = (
    "environment.json",
    "metrics.jsonl",
    "model.safetensors",
    "best.safetensors",
    "config.json",
    "logger.json",
    "nonfinite.jsonl",
    "evaluation.json",
    "report.html",
    "model.onnx",
    "model.pt2",
)
_HUB = ("model.safetensors", "config.json", "README.md")  # in the folder hub


def open_folder(folder: Path, configuration: Mapping[str, Any], overwrite: bool) -> Path:
    """Makes the run folder of a configuration, or finds it.

    Raises:
        ValueError: the folder holds a run of another configuration, or files that are no run's.
    """
    before = check_folder(folder, configuration, overwrite)
    if before is not None and overwrite:
        _clear(folder)
        before = None
    if before is None:
        text = yaml.safe_dump(dict(configuration), sort_keys=False, allow_unicode=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", text)
    (folder / CHECKPOINTS).mkdir(exist_ok=True)
    if not (folder / "environment.json").exists():
        write_json(folder / "environment.json", environment(int(configuration["training"]["seed"])))
    return folder


def check_folder(folder: Path, configuration: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The configuration of the run in a folder, None where there is none; changes nothing.

    Raises:
        ValueError: as `open_folder`.
    """
    before = read_config(folder) if (folder / "config.yaml").exists() else None
    if before is None:
        if not is_vacant(folder):
            raise ValueError(f"run_dir {folder} exists and holds no run of innermax; choose another folder")
    elif not (overwrite and configuration.keys() <= before.keys()):
        differing = differences(before, configuration)
        if differing:
            raise ValueError(
                f"run_dir {folder} belongs to another configuration ({'; '.join(differing[:4])}); "
                "choose another folder, or start afresh with overwrite"
            )
    return before


def read_settings(folder: Path) -> dict[str, Any]:
    """What a run's configuration says of its data set and threat model.

    "data", "label_column", and "threat" with "norm" and "eps".

    Each may be missing. Raises ValueError where config.yaml is not readable, or says something else.
    """
    settings = read_config(folder).get("settings") or {}
    path = folder / "config.yaml"
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: settings must be a mapping, got {shorten(settings)}")
    data, threat, column = (settings.get(name) for name in ("data", "threat", "label_column"))
    if data is not None and not isinstance(data, str):
        raise ValueError(f"{path}: settings.data must be a name or a folder, got {shorten(data)}")
    if column is not None and not isinstance(column, str):
        raise ValueError(f"{path}: settings.label_column must be a name, got {shorten(column)}")
    if threat is not None and not (
        isinstance(threat, dict)
        and threat.keys() == {"norm", "eps"}
        and isinstance(threat["norm"], str)
        and isinstance(threat["eps"], int | float)
    ):
        raise ValueError(f"{path}: settings.threat must hold norm and eps, got {shorten(threat)}")
    found = {"data": data, "threat": threat, "label_column": column}
    return {name: value for name, value in found.items() if value is not None}


def _clear(folder: Path) -> None:
    """Removes what innermax wrote about the run before, and nothing else."""
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    hub = folder / "hub"
    if hub.is_dir() and not hub.is_symlink():  # a link leads to a folder that is no run's
        for name in _HUB:
            (hub / name).unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else, too
            hub.rmdir()
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
