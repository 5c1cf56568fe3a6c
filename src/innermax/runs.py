"""Run folders: configuration, environment and metrics."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from innermax.checkpoints import write_bytes, write_json
from innermax.checks import shortened
from innermax.reading import parsed_yaml

STATES = "checkpoints"  # the folder of what a run goes on from
LOCK = "lock"  # of the process that works in a folder
# What a run writes beside its folders and config.yaml, by which it is known: that one is replaced, never removed.
_FILES = (
    "environment.json",
    "metrics.jsonl",
    "model.safetensors",
    "best.safetensors",
    "config.json",
    "logger.json",
    "nonfinite.jsonl",
)


def open_folder(folder: Path, configuration: Mapping[str, Any], overwrite: bool) -> Path:
    """A run folder of this configuration, made or found.

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
        write_bytes(folder / "config.yaml", text.encode())
    (folder / STATES).mkdir(exist_ok=True)
    if not (folder / "environment.json").exists():
        write_json(folder / "environment.json", environment(int(configuration["training"]["seed"])))
    return folder


def check_folder(folder: Path, configuration: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The configuration of the run in a folder, None where there is none; nothing is touched.

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


def is_vacant(folder: Path) -> bool:
    """Whether there is no folder, or in it only what a process left that was killed before it had a config.yaml."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name in ("config.yaml.part", LOCK) for path in folder.iterdir())


def read_config(folder: Path) -> dict[str, Any]:
    """A run's configuration. Raises ValueError where it is not readable."""
    path = folder / "config.yaml"
    try:
        config = parsed_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable configuration: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a configuration of innermax")
    return config


def told_settings(folder: Path) -> dict[str, Any]:
    """What a run's configuration says of its data set and threat model: "data", and "threat" with "norm" and "eps".

    Either may be missing. Raises ValueError where it is not readable, or says something else.
    """
    told = read_config(folder).get("settings") or {}
    path = folder / "config.yaml"
    if not isinstance(told, dict):
        raise ValueError(f"{path}: settings must be a mapping, came {shortened(told)}")
    data, threat = told.get("data"), told.get("threat")
    if data is not None and not isinstance(data, str):
        raise ValueError(f"{path}: settings.data must be a name or a folder, came {shortened(data)}")
    if threat is not None and not (
        isinstance(threat, dict)
        and threat.keys() == {"norm", "eps"}
        and isinstance(threat["norm"], str)
        and isinstance(threat["eps"], int | float)
    ):
        raise ValueError(f"{path}: settings.threat must hold norm and eps, came {shortened(threat)}")
    return {name: value for name, value in (("data", data), ("threat", threat)) if value is not None}


def environment(seed: int) -> dict[str, Any]:
    """What a run ran on: versions, device, commit of the source, seed, command and date."""
    from importlib.metadata import version

    packages = ("innermax", "torch", "lightning-fabric", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "seed": seed,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """The processor's name, and the vector instructions torch uses on it: they decide how fast bf16 is."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = next(iter(names), platform.processor() or platform.machine())
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def describe(value: object) -> Any:
    """A value as plain YAML: dataclasses by name and fields, functions by name, arrays and NumPy's numbers as lists
    and numbers. What it says never depends on the process, so that a run is known again.
    """
    if is_dataclass(value) and not isinstance(value, type):
        inner = {field.name: describe(getattr(value, field.name)) for field in fields(value)}
        return {"name": type(value).__name__} | inner
    if isinstance(value, Mapping):
        return {str(name): describe(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, partial):
        return {"name": describe(value.func), "arguments": describe(value.args)} | describe(value.keywords)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = getattr(value, "__qualname__", None)
    if name is None and type(value).__repr__ is object.__repr__:
        name = type(value).__qualname__  # its str would hold an address
    return str(value) if name is None else name


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The settings in which two configurations differ, each with both values."""
    found: list[str] = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {old} there, {new} here")
    return found


def _clear(folder: Path) -> None:
    """Removes what a run wrote, and nothing else."""
    for name in (STATES, "tensorboard", "rows"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


def _commit() -> str | None:
    """The commit of the source tree, where innermax runs from one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
