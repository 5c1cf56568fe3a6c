"""Run folders: configuration, environment, metrics and the state that a run resumes from."""

import json
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
from torch import Tensor, nn

from innermax.checkpoints import load_tensors, save_tensors, write_bytes, write_json

_STATE = Path("checkpoints") / "last.safetensors"
# What a run writes beside its folders and config.yaml, by which it is known: that one is replaced, never removed.
_FILES = ("environment.json", "metrics.jsonl", "model.safetensors", "best.safetensors", "config.json", "logger.json")


def open_folder(folder: Path, configuration: Mapping[str, Any], overwrite: bool) -> Path:
    """A run folder of this configuration, made or found.

    Raises:
        ValueError: the folder holds a run of another configuration, or files that are no run's.
    """
    before = read_config(folder) if (folder / "config.yaml").exists() else None
    if before is None:
        if not is_vacant(folder):
            raise ValueError(f"run_dir {folder} exists and holds no run of innermax; choose another folder")
    elif overwrite and configuration.keys() <= before.keys():
        _clear(folder)
        before = None
    else:
        differing = differences(before, configuration)
        if differing:
            raise ValueError(
                f"run_dir {folder} belongs to another configuration ({'; '.join(differing[:4])}); "
                "choose another folder, or start afresh with overwrite"
            )
    if before is None:
        text = yaml.safe_dump(dict(configuration), sort_keys=False, allow_unicode=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "config.yaml", text.encode())
    (folder / _STATE).parent.mkdir(exist_ok=True)
    if not (folder / "environment.json").exists():
        write_json(folder / "environment.json", environment(int(configuration["training"]["seed"])))
    return folder


def is_vacant(folder: Path) -> bool:
    """Whether there is no folder, or in it only what a process left that was killed while it wrote config.yaml."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name == "config.yaml.part" for path in folder.iterdir())


def read_config(folder: Path) -> dict[str, Any]:
    """A run's configuration. Raises ValueError where it is not readable."""
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a readable configuration: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a configuration of innermax")
    return config


def save_state(
    folder: Path,
    networks: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    position: Mapping[str, Any],
    kept: Tensor | None = None,
) -> None:
    """Writes networks, optimiser, kept perturbations and position into the checkpoint, history into metrics.jsonl."""
    tensors = {f"{name}/{key}": value for name, net in networks.items() for key, value in net.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{key}": v for key, v in state.items() if isinstance(v, Tensor)}
    tensors |= {} if kept is None else {"kept": kept}
    save_tensors(folder / _STATE, tensors, position)
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in position["history"]]
    write_bytes(folder / "metrics.jsonl", "".join(lines).encode())


def load_state(
    folder: Path, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, kept: Tensor | None = None
) -> dict[str, Any]:
    """Fills networks, optimiser and kept perturbations from the checkpoint; its position, empty where there is none.

    Raises:
        ValueError: the checkpoint is damaged or does not fit.
    """
    path = folder / _STATE
    if not path.exists():
        return {}
    tensors, position = load_tensors(path)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, number, key = name.split("/")
            state.setdefault(int(number), {})[key] = value
    try:
        for prefix, network in networks.items():
            own = {name.removeprefix(f"{prefix}/"): v for name, v in tensors.items() if name.startswith(f"{prefix}/")}
            network.load_state_dict(own)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if kept is not None:
            kept.copy_(tensors["kept"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} does not fit this run: {' '.join(str(error).split())[:300]}") from error
    return position


def environment(seed: int) -> dict[str, Any]:
    """What a run ran on: versions, device, commit of the source, seed, command and date."""
    from importlib.metadata import version

    packages = ("innermax", "torch", "lightning-fabric", "numpy")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": gpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "seed": seed,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


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
    for name in ("checkpoints", "tensorboard", "rows"):
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
