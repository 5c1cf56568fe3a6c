"""Checkpoints: the last few states of a run, each written whole and checked by its hash when it is read."""

import hashlib
import itertools
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from innermax.distributed.fsdp import WholeState
from innermax.models.files import load_weights
from innermax.training.alarm import is_alarm
from innermax.training.run_folder import CHECKPOINTS
from innermax.utils.files import hash_tensors, load_tensors, save_tensors, write_text
from innermax.utils.serialization import is_finite_number, is_row

_PACE = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)?")
_NAME = re.compile(r"epoch-(\d+)-batch-(\d+)\.safetensors")
_GAUGES = {"fosc", "relative_fosc", "ball_fosc", "zero_gradient"}


# What an optimiser keeps of each parameter. A file that somebody else made may lack some of it.
_PARAMETER_STATE: dict[type[torch.optim.Optimizer], set[str]] = {
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


@runtime_checkable
class Stateful(Protocol):
    """A network or an optimiser, whose state is a dictionary."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Any, /) -> Any: ...


def save_checkpoint(
    folder: Path,
    networks: Mapping[str, Stateful],
    optimizer: Stateful,
    position: Mapping[str, Any],
    kept: Mapping[str, Tensor] = MappingProxyType({}),
    keep: int = 2,
) -> None:
    """Writes networks, optimiser, kept tensors and position as a run folder's newest checkpoint.

    At an epoch's end the history goes into metrics.jsonl, too. Of the checkpoints before, the newest keep − 1 stay.
    """
    tensors = {f"{name}/{key}": value for name, net in networks.items() for key, value in net.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{key}": v for key, v in state.items() if isinstance(v, Tensor)}
    tensors |= kept
    if position["batch"] == 0:  # first: once the checkpoint is written, this epoch does not come again
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in position["history"]]
        write_text(folder / "metrics.jsonl", "".join(lines))
    path = folder / CHECKPOINTS / f"epoch-{position['epoch']:06d}-batch-{position['batch']:08d}.safetensors"
    save_tensors(path, tensors, {"position": dict(position), "sha256": _digest(tensors, position)})
    for old in find_checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)


def load_checkpoint(
    folder: Path,
    networks: Mapping[str, Stateful],
    optimizer: Stateful,
    kept: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Any]:
    """Loads networks, optimiser and kept tensors from the newest checkpoint that is whole, and warns where it is not
    the newest; the checkpoint's position, empty where there is none.

    Raises:
        ValueError: no checkpoint is whole, or the one that is does not fit.
    """
    damaged = []
    for path in find_checkpoints(folder):
        try:
            tensors, position = _read(path)
        except ValueError as error:
            damaged.append(f"{path} is damaged ({error})")
            continue
        if damaged:
            warnings.warn(f"{'; '.join(damaged)}: the run goes on from {path}", stacklevel=2)
        _fill(path, tensors, networks, optimizer, kept)
        return position
    if damaged:
        raise ValueError(f"no checkpoint of {folder} is whole: {'; '.join(damaged)}; start afresh with overwrite")
    return {}


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest first."""
    files = (path for path in (folder / CHECKPOINTS).glob("*.safetensors") if path.is_file())
    found = {path: _NAME.fullmatch(path.name) for path in files}
    places = {path: (int(match[1]), int(match[2])) for path, match in found.items() if match is not None}
    return sorted(places, key=places.__getitem__, reverse=True)


def due_every(every: int | str | None) -> Callable[[], bool]:
    """A function that is True at every so many calls, or at the first call after each span of time such as "10min".

    Raises:
        ValueError, TypeError: every is neither.
    """
    if every is None:
        return lambda: False
    requirement = "checkpoint_every must be a number of updates or a time such as 10min, 90s or 2h"
    if isinstance(every, bool) or not isinstance(every, int | str):
        raise TypeError(f"{requirement}, got {every!r}")
    match = _PACE.fullmatch(str(every))
    if match is None or float(match[1]) == 0 or (match[2] is None and "." in match[1]):
        raise ValueError(f"{requirement}, got {every}")
    if match[2] is None:
        counted, updates = itertools.count(1), int(match[1])
        return lambda: next(counted) % updates == 0
    span, last = float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]], [time.monotonic()]

    def over() -> bool:
        if time.monotonic() - last[0] < span:
            return False
        last[0] = time.monotonic()
        return True

    return over


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and position of a checkpoint. Raises ValueError where it is not what was written."""
    tensors, meta = load_tensors(path)
    position = meta.get("position")
    if not isinstance(position, dict) or meta.get("sha256") != _digest(tensors, position):
        raise ValueError("its contents do not match their hash")
    strange = next((name for name, value in position.items() if not _is_valid(name, value)), None)
    if strange is not None:
        raise ValueError(f"its {strange[:60]!r} is not what a run writes")
    return tensors, position


def _is_valid(name: str, value: Any) -> bool:
    """Whether a run writes such a value into its position. The hash does not tell: anybody can compute it."""
    match name, value:
        case (("epoch" | "batch"), int()):
            return not isinstance(value, bool) and 0 <= value < 2**53
        case "micro_batch", None | int():
            return value is None or value >= 1
        case "totals", dict():
            return all(map(is_finite_number, value.values())) and (
                "examples" not in value or {"loss", "correct"} <= set(value)
            )
        case "gauged", dict():
            lists = all(isinstance(v, list) and v and all(map(is_finite_number, v)) for v in value.values())
            return lists and set(value) in (set(), _GAUGES)
        case "history", list():
            return all(map(is_row, value))
        case "alarm", dict():
            return is_alarm(value)
        case (("attack_network" | "updates"), str()):
            return True
        case "seconds", _:
            return is_finite_number(value)
    return False


def _digest(tensors: Mapping[str, Tensor], position: Mapping[str, Any]) -> str:
    text = json.dumps(position, sort_keys=True) + hash_tensors(sorted(tensors.items(), key=lambda item: item[0]))
    return hashlib.sha256(text.encode()).hexdigest()


def _fill(
    path: Path,
    tensors: Mapping[str, Tensor],
    networks: Mapping[str, Stateful],
    optimizer: Stateful,
    kept: Mapping[str, Tensor],
) -> None:
    whole: Any = optimizer.sharded if isinstance(optimizer, WholeState) else optimizer
    try:
        state = _optimizer_state(tensors, whole)
        for prefix, network in networks.items():
            own = {name.removeprefix(f"{prefix}/"): v for name, v in tensors.items() if name.startswith(f"{prefix}/")}
            if isinstance(network, nn.Module):
                load_weights(network, own)
            else:
                network.load_state_dict(own)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if not isinstance(optimizer, WholeState):
            match_layout(whole)
        for name, value in kept.items():
            _check_like(name, tensors[name], value)
            value.copy_(tensors[name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} does not fit this run: {' '.join(str(error).split())[:300]}") from error


def _optimizer_state(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """The state of each parameter, by its number. Raises ValueError where it is not this optimiser's."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if not name.startswith("optimizer/"):
            continue
        match = re.fullmatch(r"optimizer/(\d{1,9})/(\w+)", name)
        if match is None or int(match[1]) >= len(parameters):
            raise ValueError(f"{name[:60]!r} belongs to no parameter")
        if value.ndim > 0:
            _check_like(name, value, parameters[int(match[1])])
        state.setdefault(int(match[1]), {})[match[2]] = value
    wanted = next((names for kind, names in _PARAMETER_STATE.items() if isinstance(optimizer, kind)), None)
    for number, found in state.items():
        if wanted is not None and set(found) != wanted:
            raise ValueError(
                f"optimizer/{number} holds {', '.join(sorted(found))} instead of {', '.join(sorted(wanted))}"
            )
    return state


def _check_like(name: str, value: Tensor, other: Tensor) -> None:
    if value.shape != other.shape or value.is_floating_point() != other.is_floating_point():
        found, wanted = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (value, other))
        raise ValueError(f"{name} is {found} instead of {wanted}")


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Gives each entry of the optimiser's state its parameter's memory layout.

    Files hold tensors contiguously, but fused optimisers combine a parameter and its state in the order of memory.
    """
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
