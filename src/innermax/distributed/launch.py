"""How many processes a training or an evaluation has, on which devices, and who starts them.

torchrun or SLURM has started them already, or Lightning Fabric will.
"""

import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from innermax.utils.validation import check_count, unknown

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Launch:
    """The processes of a training: `devices` on each of `nodes` machines, one per device.

    starts: whether this process has to start those of its machine; else it is one of them.
    launcher: "torchrun" or "SLURM" where it started them.
    """

    devices: int = 1
    nodes: int = 1
    starts: bool = False
    launcher: str | None = None

    @property
    def count(self) -> int:
        """Processes in all."""
        return self.devices * self.nodes


def plan_launch(devices: int | None, nodes: int | None, device: torch.device) -> Launch:
    """The processes that devices and nodes ask for. None: as many as torchrun or SLURM started, else one.

    Raises:
        ValueError, TypeError: there are fewer devices, or another number of processes was started.
    """
    for name, value in (("devices", devices), ("nodes", nodes)):
        if value is not None:
            check_count(value, name)
    found = find_launch()
    if found is not None and (found.count > 1 or found.launcher == "torchrun"):
        if (devices or found.devices, nodes or found.nodes) != (found.devices, found.nodes):
            raise ValueError(
                f"devices and nodes must be {found.devices} and {found.nodes}, as {found.launcher} started, or left "
                f"out, got {devices} and {nodes}"
            )
        return found
    launch = Launch(devices or 1, nodes or 1, starts=(devices or 1) * (nodes or 1) > 1)
    if launch.count > 1 and device.index is not None:
        raise ValueError(f"device must be a kind such as cuda for {launch.count} processes, got {device}")
    check_devices(launch.devices, device)
    if launch.nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= os.environ.keys():
        raise ValueError(
            f"nodes={nodes} needs the same command on each machine, with MASTER_ADDR and MASTER_PORT (the address and "
            "a free port of the first machine) and NODE_RANK (the machine's number, from 0) in the environment; or "
            "torchrun, or SLURM"
        )
    return launch


def find_launch() -> Launch | None:
    """The processes among which torchrun or SLURM started this one; None where neither did."""
    if dist.is_available() and dist.is_torchelastic_launched():
        devices, count = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return Launch(devices, count // devices, launcher="torchrun")
    if not {"SLURM_NTASKS", "SLURM_STEP_ID"} <= os.environ.keys():  # srun sets both, a batch script has the first
        return None
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    if not SLURMEnvironment.detect():  # an interactive shell
        return None
    count, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
    if count > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ValueError("SLURM must know how many processes each machine has: give it --ntasks-per-node")
    return Launch(count // nodes, nodes, launcher="SLURM")


def count_processes() -> int:
    """How many processes torchrun or SLURM started; 1 where neither did."""
    found = find_launch()
    return 1 if found is None else found.count


def is_first() -> bool:
    """Whether this process prints and writes for all: it is the only one, or rank 0."""
    found = find_launch()
    if found is None or found.count == 1:
        return int(os.environ.get("NODE_RANK", "0")) == 0
    return int(os.environ["RANK" if found.launcher == "torchrun" else "SLURM_PROCID"]) == 0


def find_device(device: str) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one. Raises ValueError for an unknown or missing device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise unknown("device", device, ["auto", "cpu", "cuda", "cuda:0"]) from None
    if chosen.type not in ("cpu", "cuda"):
        raise unknown("device", device, ["auto", "cpu", "cuda", "cuda:0"])
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must be cpu or one of the {torch.cuda.device_count()} CUDA devices that torch sees, got {device!r}"
        )
    return chosen


def check_devices(devices: int, device: torch.device) -> None:
    """Raises unless there are so many devices of this kind; a CPU takes any number of processes."""
    check_count(devices, "devices")
    if devices > 1 and device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda where devices={devices}, got {device}")
    if devices > 1 and device.type == "cuda" and torch.cuda.device_count() < devices:
        raise ValueError(f"devices must be at most the {torch.cuda.device_count()} GPUs that torch sees, got {devices}")
