"""Training throughput on a GPU, what share of its bf16 matrix peak that is, and where the rest goes.

    python bench/gpu.py [--minutes 8] [--write results/gpu.md]
    python bench/gpu.py --device cpu --smoke      # the same code on a processor, in seconds

PGD-10 adversarial training of the paper's 8-layer CIFAR network and of WideResNet-34-10, batches of 128 to 1,024. Every
case is measured in turns of its own parts: the whole step, its attack, the attack's ten gradients alone, and its
update. Cases that no longer fit into the minutes are left out and named. The last lines printed are the table.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from steps import started, whole
from timing import machine, matrix_peak, timed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import innermax as im

STEPS, EPS = 10, 8 / 255
NETWORKS = {"8-layer CNN": ("cifar-cnn", {}), "WideResNet-34-10": ("wideresnet", {"depth": 34, "width": 10})}
SMOKE = {"8-layer CNN": ("cifar-cnn", {}), "WideResNet-10-1": ("wideresnet", {"depth": 10, "width": 1})}


class Case:
    """A network, a batch on the device and the parts of a training step."""

    def __init__(self, network: str, options: dict[str, int], batch: int, device: str) -> None:
        torch.manual_seed(0)
        model = im.build_model(network, input_shape=(3, 32, 32), **options)
        images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
        labels = torch.randint(0, 10, (batch,))
        self.loop = started(model, images, labels, "auto", device, shift=4, flip=True)
        self.batch = whole(self.loop)
        self.x, self.y = self.batch.x, self.batch.y
        self.pgd = im.PGD(im.Linf(EPS), steps=STEPS)

    def step(self) -> None:
        """Data, augmentation, attack, update."""
        self.loop.step(self.batch, self.pgd, 0.0)

    def attack(self) -> Tensor:
        return self.pgd(self.loop.state.oracle, self.x, self.y, final="none").x_adv

    def gradients(self) -> None:
        """The attack's gradients without its steps."""
        for _ in range(STEPS):
            self.loop.state.oracle.gradient(self.x, self.y, im.losses.cross_entropy)

    def update(self) -> None:
        self.loop.descend(self.x, self.y, self.x, 0.0, len(self.x))

    def operations(self) -> float:
        """Multiplications and additions of one step, as torch counts them."""
        counter = FlopCounterMode(display=False)
        with counter:
            im.Oracle._gradient(self.loop.state.oracle, self.x, self.y, im.losses.cross_entropy)  # as it is recorded
        attack = STEPS * counter.get_total_flops()
        counter = FlopCounterMode(display=False)
        with counter:
            self.update()
        return float(attack + counter.get_total_flops())


def measure(
    networks: dict[str, tuple[str, dict[str, int]]], batches: list[int], rounds: int, device: str, deadline: float
) -> dict[str, Any]:
    """Every case that can begin before the deadline."""
    found: dict[str, Any] = {}
    for name, (network, options) in networks.items():
        for batch in batches:
            title = f"{name}, batch {batch}"
            if time.monotonic() > deadline:
                found[title] = "no time was left"
                continue
            try:
                case = Case(network, options, batch, device)
                parts = {part: partial(getattr(case, part)) for part in ("step", "attack", "gradients", "update")}
                seconds = {part: statistics.median(values) for part, values in timed(parts, rounds).items()}
                found[title] = seconds | {
                    "plan": case.loop.state.oracle.plan,
                    "images/s": batch / seconds["step"],
                    "FLOP/s": case.operations() / seconds["step"],
                    "memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
                }
            except torch.OutOfMemoryError as error:
                found[title] = f"out of memory ({str(error).partition('.')[0]})"
            if torch.cuda.is_available():
                case = parts = None  # type: ignore[assignment]  # their memory, before the next case
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            print(f"{title}: {found[title]}", flush=True)
    return found


def as_markdown(result: dict[str, Any]) -> str:
    """The page: one row a case; parts as shares of the step."""
    lines = [
        "# GPU",
        "",
        f"`python bench/gpu.py` on {result['machine']}, torch {result['torch']}, {result['date']}. bf16 matrix peak,",
        f"measured: {result['peak'] / 1e12:,.1f} TFLOP/s. Shares of a step: the attack's gradients, its steps between",
        "them, the update, and the rest (data, augmentation, waiting).",
        "",
        "| network | images/s | of the peak | gradients | steps | update | rest |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for title, case in result["cases"].items():
        if isinstance(case, str):
            lines.append(f"| {title} | {case} | | | | | |")
            continue
        shares = (case["gradients"], case["attack"] - case["gradients"], case["update"])
        rest = case["step"] - case["attack"] - case["update"]
        cells = " | ".join(f"{max(share / case['step'], 0):.0%}" for share in (*shares, rest))
        lines.append(f"| {title} | {case['images/s']:,.0f} | {case['FLOP/s'] / result['peak']:.0%} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--smoke", action="store_true", help="small networks and batches, two rounds")
    parser.add_argument("--write", type=Path, help="Markdown file; the numbers go into a .json beside it")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes - 90  # the last case may take that long
    batches, rounds = ([4, 8], 2) if arguments.smoke else ([128, 256, 512, 1024], 9)
    found: dict[str, Any] = {
        "machine": machine(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "peak": matrix_peak(torch.bfloat16, torch.device(arguments.device), 1024 if arguments.smoke else 8192),
        "cases": measure(SMOKE if arguments.smoke else NETWORKS, batches, rounds, arguments.device, deadline),
    }
    if arguments.write is not None:
        arguments.write.write_text(as_markdown(found))
        arguments.write.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    print(as_markdown(found))
