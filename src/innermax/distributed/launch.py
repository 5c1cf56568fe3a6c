"""The processes of one training or evaluation: how many there are to be, and which of them this one is.

Lightning Fabric starts them, or finds those that torchrun or SLURM started.
"""

import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from innermax.utils.validation import check_count, unknown

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Plan:
    """So many processes, one a device: `devices` on each of `nodes` machines.

    `starts`: whether this process starts its machine's, else it is one of them already; `launcher`: what started those.
    """

    devices: int = 1
    nodes: int = 1
    starts: bool = False
    launcher: str | None = None

    @property
    def count(self) -> int:
        """Processes in all."""
        return self.devices * self.nodes


def planned(devices: int | None, nodes: int | None, device: torch.device) -> Plan:
    """How many processes there are to be. None: as many as torchrun or SLURM started, else one.

    Raises:
        ValueError, TypeError: there are not so many devices, or not so many processes were started.
    """
    for name, value in (("devices", devices), ("nodes", nodes)):
        if value is not None:
            check_count(value, name)
    found = launched()
    if found is not None and (found.count > 1 or found.launcher == "torchrun"):
        if (devices or found.devices, nodes or found.nodes) != (found.devices, found.nodes):
            raise ValueError(
                f"devices={devices}, nodes={nodes}: {found.launcher} started {found.devices} processes on each of "
                f"{found.nodes} machines; leave both out, or start as many"
            )
        return found
    plan = Plan(devices or 1, nodes or 1, starts=(devices or 1) * (nodes or 1) > 1)
    if plan.count > 1 and device.index is not None:
        raise ValueError(f"device must name no single GPU where there are {plan.count} processes, got {device}")
    check_devices(plan.devices, device)
    if plan.nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= os.environ.keys():
        raise ValueError(
            f"nodes={nodes} needs the same command on each machine with MASTER_ADDR and MASTER_PORT, a free port of "
            "the first one, and NODE_RANK, its number from 0, in the environment; or torchrun, or SLURM"
        )
    return plan


def launched() -> Plan | None:
    """The processes that torchrun or SLURM started this one among; None where it is alone."""
    if dist.is_available() and dist.is_torchelastic_launched():
        devices, count = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return Plan(devices, count // devices, launcher="torchrun")
    if not {"SLURM_NTASKS", "SLURM_STEP_ID"} <= os.environ.keys():  # srun sets both, a batch script has the first
        return None
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    if not SLURMEnvironment.detect():  # an interactive shell
        return None
    count, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
    if count > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ValueError("SLURM must be told the processes of each machine: give it --ntasks-per-node")
    return Plan(count // nodes, nodes, launcher="SLURM")


def launched_count() -> int:
    """How many processes torchrun or SLURM started, 1 where this one is alone."""
    found = launched()
    return 1 if found is None else found.count


def is_first() -> bool:
    """Whether this process is the one that speaks and writes for all: the only one, or the first of all machines."""
    found = launched()
    if found is None or found.count == 1:
        return int(os.environ.get("NODE_RANK", "0")) == 0
    return int(os.environ["RANK" if found.launcher == "torchrun" else "SLURM_PROCID"]) == 0


def chosen_device(device: str) -> torch.device:
    """The device a name means; "auto" is a GPU where there is one. Raises ValueError where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise unknown("device", device, ["auto", "cpu", "cuda", "cuda:0"]) from None
    if chosen.type not in ("cpu", "cuda"):
        raise unknown("device", device, ["auto", "cpu", "cuda", "cuda:0"])
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return chosen


def check_devices(devices: int, device: torch.device) -> None:
    """Raises unless there are so many devices of this kind; on a CPU any number of processes."""
    check_count(devices, "devices")
    if devices > 1 and device.type not in ("cpu", "cuda"):
        raise ValueError(f"devices={devices} needs cpu or cuda, got the device {device}")
    if devices > 1 and device.type == "cuda" and torch.cuda.device_count() < devices:
        raise ValueError(f"devices must be at most the {torch.cuda.device_count()} GPUs that torch sees, got {devices}")
