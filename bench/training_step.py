"""What one adversarial training step costs: innermax against the script everybody writes, and the gauge's own price.

    python bench/training_step.py [--rounds N] [--write results/training_step.md]

Both sides do PGD-10 with ten gradients and one SGD update on a batch of 128 images for the paper's MNIST network. All
variants take turns in one process, so that a machine that slows down slows them all; ratios are medians over rounds,
with quartiles.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innermax as im
from innermax.oracle import Oracle

BATCH, STEPS, EPS = 128, 10, 0.3


def naive_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """Adversarial training as it is usually written: float32, evaluation mode in the attack, loss.backward()."""
    model.eval()
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        F.cross_entropy(model(x_adv), y).backward()
        with torch.no_grad():
            x_adv = x_adv + EPS / 4 * x_adv.grad.sign()
            x_adv = torch.clamp(torch.minimum(torch.maximum(x_adv, x - EPS), x + EPS), 0, 1)
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(x_adv.detach()), y).backward()
    optimizer.step()


class Ours:
    """The same step as `innermax.train` takes it, one call a step."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, precision: str) -> None:
        from innermax.data import ImageSet
        from innermax.objectives import cross_entropy
        from innermax.training import _Loop

        options = {
            "device": "auto", "precision": precision, "ema": None, "optimizer": "sgd", "lr": 0.01, "momentum": 0.9,
            "weight_decay": 1e-4, "seed": 0, "epochs": 1, "batch_size": BATCH, "shift": 0, "flip": False, "clip": None,
            "lr_schedule": "constant", "lr_drops": (),
        }  # fmt: skip
        self._loop = _Loop.started(model, ImageSet(x, y), options)
        self._attack, self._objective = im.PGD(im.Linf(EPS), steps=STEPS), cross_entropy
        self.plan = self._loop.oracle.plan

    def __call__(self) -> None:
        index = torch.arange(BATCH, device=self._loop.device)
        self._loop.update(index, self._attack, self._objective, 0.0, gauge=False)


def timed(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant, in turns; two rounds of warm-up are left out."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, variant in variants.items():
            began = time.perf_counter()
            variant()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios, turn by turn."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)
    return {"median": middle, "low": low, "high": high}


def measure(rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, y = torch.rand(BATCH, 1, 28, 28, device=device), torch.randint(0, 10, (BATCH,), device=device)

    def network() -> nn.Module:
        return im.build_model("mnist-cnn", input_shape=(1, 28, 28)).to(device)

    naive = network()
    optimizer = torch.optim.SGD(naive.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    ours, ours32 = Ours(network(), x, y, "auto"), Ours(network(), x, y, "float32")
    steps = timed({"naive": lambda: naive_step(naive, optimizer, x, y), "fast": ours, "float32": ours32}, rounds)

    result: dict[str, object] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "plan": ours.plan,
        "naive images/s": BATCH / statistics.median(steps["naive"]),
        "ours images/s": BATCH / statistics.median(steps["fast"]),
        "naive over ours": ratio(steps["naive"], steps["fast"]),
        "naive over ours in float32": ratio(steps["naive"], steps["float32"]),
    }
    plain, gauged = im.PGD(im.Linf(EPS), steps=STEPS), im.PGD(im.Linf(EPS), steps=STEPS, stop_at=0.0)
    model = network()
    for name, oracle in {"fast": Oracle.fast(model, x[:16]), "float32": Oracle(model)}.items():
        calls = gauged(oracle, x, y, final="none").gradient_calls
        if not bool((calls == STEPS).all()):
            raise RuntimeError("an example stopped early: the two loops do not compute the same number of gradients")
        loops = timed(
            {
                "plain": lambda oracle=oracle: plain(oracle, x, y, final="none"),
                "gauged": lambda oracle=oracle: gauged(oracle, x, y, final="none"),
            },
            3 * rounds,
        )
        result[f"gauge at every step, {name}"] = ratio(loops["gauged"], loops["plain"])
    return result


def as_markdown(result: dict[str, object]) -> str:
    lines = [
        "# One training step",
        "",
        f"`make bench` on {result['machine']}, torch {result['torch']}; attack network: {result['plan']}.",
        "PGD-10 adversarial training of the paper's MNIST network, batch 128: ten gradients and one update on each",
        "side; variants in turns in one process, medians of the ratios with quartiles.",
        "",
        "| figure | median | quartiles |",
        "| --- | --- | --- |",
    ]
    for name, value in result.items():
        if isinstance(value, dict):
            lines.append(f"| {name} | {value['median']:.3f} | {value['low']:.3f} – {value['high']:.3f} |")
        elif isinstance(value, float):
            lines.append(f"| {name} | {value:,.0f} | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", type=Path, help="Markdown file; the numbers go into a .json beside it")
    arguments = parser.parse_args()
    found = measure(arguments.rounds)
    print(as_markdown(found))
    if arguments.write is not None:
        arguments.write.write_text(as_markdown(found))
        arguments.write.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
