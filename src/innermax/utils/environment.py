"""What a run ran on."""

import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from innermax.utils.version import __version__


def environment(seed: int) -> dict[str, Any]:
    """What a run ran on: versions, device, commit of the source, seed, command and date."""
    # Lightning Fabric also comes with these two; the source runs without being installed.
    fabric = _installed("lightning-fabric", "pytorch-lightning", "lightning")
    versions = {"innermax": __version__, "lightning-fabric": fabric, "numpy": _installed("numpy")}
    return {
        # torch's own answer also says for which devices it was built.
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)} | versions,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "seed": seed,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _installed(*names: str) -> str | None:
    """The version of the first of these packages that is installed; None where none is."""
    from importlib.metadata import PackageNotFoundError, version

    for name in names:
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def _processor() -> str:
    """The processor's name, and the vector instructions torch uses on it: they decide how fast bf16 is."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = next(iter(names), platform.processor() or platform.machine())
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _commit() -> str | None:
    """The commit of the source tree, where innermax runs from one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
