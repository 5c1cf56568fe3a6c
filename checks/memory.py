"""How much memory an attack and an evaluation take: ours and the peers', each in a fresh process.

    python checks/memory.py [--write results/memory.md]

PGD-10 and PGD-40 on 128 images for the CIFAR CNN: a search that kept what it computed would grow with its steps. And
PGD-1 evaluations of 1,000 and 10,000 images for the MNIST CNN: what grows with the images is rows of numbers, not
images. Resident memory as the Linux kernel counts it, in MiB; "above the start" is the peak less what the process held
just before, libraries loaded, model built and two images attacked. glibc is told to give freed tensors back at once:
what it keeps for later, a hundred MiB after many batches, would say more about it than about who allocated.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import innermax as im
from innermax.oracle.oracle import Oracle

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from peers import PEERS, Attack, innermax_attack, installed

BATCH, EPS = 128, 8 / 255
STEPS = (10, 40)
IMAGES = (1_000, 10_000)
_OURS = {"innermax, fast": "auto", "innermax, the model as it is": None}
_EVALUATION = "evaluation"
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


def attack_memory(name: str, steps: int) -> dict[str, float]:
    """What one attack of a batch takes in this process."""
    torch.manual_seed(0)
    model = im.build_model("cifar-cnn", input_shape=(3, 32, 32)).eval()
    x, y = torch.rand(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    attack = _attack(name, model, x, steps)
    attack(x[:2], y[:2])  # what a library loads at its first call is not the search's
    return _growth(lambda: attack(x, y))


def evaluation_memory(count: int) -> dict[str, float]:
    """What our evaluation of made-up uint8 images takes in this process."""
    torch.manual_seed(0)
    model = im.build_model("mnist-cnn", input_shape=(1, 28, 28))
    images, labels = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (count,))
    attacks = {"pgd-1": im.PGD(im.Linf(EPS), steps=1)}
    im.evaluate(model, (images[:2], labels[:2]), attacks)
    return _growth(lambda: im.evaluate(model, (images, labels), attacks))


def measure() -> dict[str, object]:
    """Memory of every attack and evaluation, in MiB."""
    attacks = [*_OURS, *installed()]
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "attacks": {name: {str(steps): _fresh(name, steps) for steps in STEPS} for name in attacks},
        "evaluations": {str(count): _fresh(_EVALUATION, count) for count in IMAGES},
    }


def as_markdown(result: dict[str, object]) -> str:
    lines = [
        "# Memory",
        "",
        f"`python checks/memory.py` on {result['machine']}, torch {result['torch']}.",
        "MiB of resident memory, each figure from a process of its own. Above the start: the peak less what the",
        "process held just before, libraries, model and images loaded; glibc gives freed tensors back at once.",
        "",
        f"{BATCH} images, the paper's CIFAR network:",
        "",
        "| attack | " + " | ".join(f"PGD-{steps}, above the start" for steps in STEPS) + " | "
        + " | ".join(f"PGD-{steps}, peak" for steps in STEPS) + " |",
        "| --- |" + " --- |" * (2 * len(STEPS)),
    ]  # fmt: skip
    for name, cases in result["attacks"].items():
        cells = [f"{cases[str(steps)][figure]:.0f}" for figure in ("above", "peak") for steps in STEPS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "`im.evaluate` with PGD-1, the paper's MNIST network, uint8 images:",
        "",
        "| images | above the start | peak |",
        "| --- | --- | --- |",
    ]
    for count, case in result["evaluations"].items():
        lines.append(f"| {int(count):,} | {case['above']:.0f} | {case['peak']:.0f} |")
    return "\n".join(lines) + "\n"


def _attack(name: str, model: torch.nn.Module, x: torch.Tensor, steps: int) -> Attack:
    if name not in _OURS:
        return PEERS[name](model, EPS, steps)
    precision = _OURS[name]
    oracle = Oracle(model) if precision is None else Oracle.fast(model, x[:16], precision)
    return innermax_attack(oracle, EPS, steps)


def _growth(work: Callable[[], object]) -> dict[str, float]:
    """Resident memory while `work` runs: its peak, and the peak less what was held before."""
    # Not getrusage's ru_maxrss: a child process begins with its parent's peak there, and building may have needed more
    # than the attack does. The kernel's high-water mark is the process's own and can be set back.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    work()
    peak = _memory("VmHWM")
    return {"above": peak - before, "peak": peak}


def _memory(field: str) -> float:
    """A size in /proc/self/status, in MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def _fresh(case: str, size: int) -> dict[str, float]:
    """A case's memory, measured in a new process."""
    command = [sys.executable, __file__, "--case", case, "--size", str(size)]
    environment = os.environ | _GIVE_BACK
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="Markdown file; the numbers go into a .json beside it")
    parser.add_argument(
        "--case", choices=[*_OURS, *PEERS, _EVALUATION], help="measure this case alone, in this process"
    )
    parser.add_argument("--size", type=int, default=STEPS[0], help="steps, or images, of the case")
    arguments = parser.parse_args()
    if arguments.case == _EVALUATION:
        print(json.dumps(evaluation_memory(arguments.size)))
    elif arguments.case is not None:
        print(json.dumps(attack_memory(arguments.case, arguments.size)))
    else:
        found = measure()
        print(as_markdown(found))
        if arguments.write is not None:
            arguments.write.write_text(as_markdown(found))
            arguments.write.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
