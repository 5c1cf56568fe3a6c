"""Training throughput on a GPU, what share of its bf16 matrix peak that is, and where the rest goes: for bench/gpu.py.

PGD-10 adversarial training of the paper's 8-layer CIFAR network, PreAct ResNet-18 and WideResNet-34-10, batches of 128
to 1,024. Every case is measured in turns of its own parts: the whole step, its attack, the attack's ten gradients
alone, and its update.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from steps import started, whole
from timing import matrix_peak, timed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import innermax as im
from innermax.training.batch_attack import Attacked

STEPS, EPS = 10, 8 / 255
NETWORKS: dict[str, tuple[str, dict[str, int]]] = {
    "8-layer CNN": ("cifar-cnn", {}),
    "PreAct ResNet-18": ("preact-resnet18", {}),
    "WideResNet-34-10": ("wideresnet", {"depth": 34, "width": 10}),
}
SMOKE: dict[str, tuple[str, dict[str, int]]] = {"WideResNet-10-1": ("wideresnet", {"depth": 10, "width": 1})}


def measure(note: Callable[[str, Any], None], deadline: float, device: str, smoke: bool) -> None:
    """Notes the peak and every case that begins before the deadline: all networks first, then larger batches."""
    peak = matrix_peak(torch.bfloat16, torch.device(device), 256 if smoke else 8192)
    note("peak", f"{peak / 1e12:,.1f} TFLOP/s")
    batches, rounds = ([4], 1) if smoke else ([128, 256, 512, 1024], 7)
    for batch in batches:
        for name, (network, options) in (SMOKE if smoke else NETWORKS).items():
            title = f"{name}, batch {batch}"
            if time.monotonic() > deadline:
                note(title, "no time was left")
                continue
            try:
                note(title, _measure_case(Case(network, options, batch, device), rounds, peak))
            except torch.OutOfMemoryError as error:
                note(title, f"out of memory ({str(error).partition('.')[0]})")
            if device != "cpu":  # the case's memory, before the next one
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


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
        self.loop.descend(self.x, self.y, Attacked(self.x), 0.0, len(self.x))

    def operations(self) -> float:
        """Multiplications and additions of one step, as torch counts them."""
        counter = FlopCounterMode(display=False)
        with counter:  # as it is recorded
            im.Oracle._gradient(self.loop.state.oracle, self.x, self.y, im.losses.cross_entropy, ())
        attack = STEPS * counter.get_total_flops()
        counter = FlopCounterMode(display=False)
        with counter:
            self.update()
        return float(attack + counter.get_total_flops())


def _measure_case(case: Case, rounds: int, peak: float) -> dict[str, Any]:
    parts = {part: partial(getattr(case, part)) for part in ("step", "attack", "gradients", "update")}
    found: dict[str, Any] = {part: statistics.median(values) for part, values in timed(parts, rounds).items()}
    speed = case.operations() / found["step"]
    used = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    return found | {
        "plan": case.loop.state.oracle.plan,
        "images/s": len(case.x) / found["step"],
        "FLOP/s": speed,
        "of peak": speed / peak,
        "memory": used,
    }
