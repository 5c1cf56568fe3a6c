"""How fast innermax is: against other libraries, against the floor of the machine, and against itself.

    make bench                                   # writes results/speed.md and results/speed.json
    python bench/speed.py --rounds 3             # a quick look
    python bench/speed.py --only attacks steps   # some of the sections; of a page that is there the others are kept

All variants of a table take turns in one process, so that a machine that slows down slows them all; figures are medians
of ratios, turn by turn, with quartiles. Peers are installed as bench/peers.py says; those that are not are left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
import torch.nn.functional as F
from steps import started, whole
from timing import machine, matrix_peak, ratio, shown, timed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import innermax as im
from innermax.oracle.oracle import Oracle
from innermax.strategies import Strategy
from innermax.training.batch_attack import Attacked

STEPS = 10


@dataclass(frozen=True)
class Setting:
    """A network of the paper's, its inputs and its ε; `batch` for attacks."""

    network: str
    shape: tuple[int, int, int]
    eps: float
    batch: int

    def model(self) -> nn.Module:
        return im.build_model(self.network, input_shape=self.shape)

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        return torch.rand(count, *self.shape), torch.randint(0, 10, (count,))


SETTINGS = {
    "MNIST CNN": Setting("mnist-cnn", (1, 28, 28), 0.3, 128),
    "CIFAR CNN": Setting("cifar-cnn", (3, 32, 32), 8 / 255, 32),
}


def attacks(rounds: int) -> dict[str, Any]:
    """PGD-10 of every peer, on the model as it is and on the model in bf16 and channels last."""
    found: dict[str, Any] = {}
    builders = peers.installed()
    for name, setting in SETTINGS.items():
        torch.manual_seed(0)
        model, (x, y) = setting.model().eval(), setting.images(setting.batch)
        lowered = peers.LoweredModel(model)
        fast = Oracle.fast(model, x[:16])
        variants = {
            "ours, fast": partial(peers.innermax_attack(fast, setting.eps, STEPS), x, y),
            "ours, float32 as the model is": partial(peers.innermax_attack(Oracle(model), setting.eps, STEPS), x, y),
            "ours, float32 folded": partial(
                peers.innermax_attack(Oracle.fast(model, x[:16], "float32"), setting.eps, STEPS), x, y
            ),
        }
        for peer, build in builders.items():
            variants[peer] = partial(build(model, setting.eps, STEPS), x, y)
            variants[f"{peer}, bf16"] = partial(build(lowered, setting.eps, STEPS), x, y)
        seconds = timed(variants, rounds)
        found[name] = {
            "batch": setting.batch,
            "plan": fast.plan,
            "milliseconds": {key: 1e3 * statistics.median(values) for key, values in seconds.items()},
            "over ours": {key: ratio(values, seconds["ours, fast"]) for key, values in seconds.items()},
            "over floor": {key: ratio(values, seconds["floor"]) for key, values in seconds.items()},
            "bf16 peak": STEPS * pass_flops(fast, x, y) / statistics.median(seconds["ours, fast"]),
        }
    return found


class Ours:
    """A training step as `innermax.train` takes it, one call a step."""

    def __init__(
        self,
        setting: Setting,
        x: Tensor,
        y: Tensor,
        precision: str,
        strategy: Callable[[im.PGD], Strategy] = im.Standard,
    ) -> None:
        self.strategy = strategy(im.PGD(im.Linf(setting.eps), steps=STEPS))
        self.loop = started(setting.model(), x, y, precision, strategy=self.strategy)
        self.x, self.y, self.batch = x, y, whole(self.loop)
        self.loop.state.epoch = 1  # where a warm start has something to start from
        self.pgd = self.strategy.attack_at(0.5)

    def __call__(self) -> None:
        self.loop.step(self.batch, self.pgd, 0.0)

    def attack(self) -> Tensor:
        return self.pgd(self.loop.state.oracle, self.x, self.y, final="none").x_adv

    def descend(self) -> None:
        self.loop.descend(self.x, self.y, Attacked(self.x), 0.0, len(self.x))


class Plain:
    """Adversarial training as it is usually written, around any attack: float32, evaluation mode in the attack."""

    def __init__(self, setting: Setting, x: Tensor, y: Tensor, build: peers.Builder) -> None:
        self.model, self.x, self.y = setting.model(), x, y
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        self.attack = build(self.model, setting.eps, STEPS)

    def __call__(self) -> None:
        self.model.eval()
        x_adv = self.attack(self.x, self.y)
        self.model.train()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x_adv.detach()), self.y).backward()
        self.optimizer.step()


def steps(rounds: int) -> dict[str, Any]:
    """A whole training step, PGD-10 and one update; and the parts of ours."""
    found: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        torch.manual_seed(0)
        x, y = setting.images(128)
        ours = Ours(setting, x, y, "auto")
        variants: dict[str, Callable[[], object]] = {
            "ours, fast": ours,
            "ours, float32": Ours(setting, x, y, "float32"),
            "naive script": Plain(setting, x, y, peers.naive),
        }
        if "torchattacks" in peers.installed():
            variants["torchattacks in a plain loop"] = Plain(setting, x, y, peers.torchattacks)
        variants |= {"attack": ours.attack, "update": ours.descend, "refresh": ours.loop.state.oracle.refresh}
        seconds = timed(variants, rounds)
        parts = {key: seconds.pop(key) for key in ("attack", "update", "refresh")}
        found[name] = {
            "batch": len(x),
            "images/s": {key: len(x) / statistics.median(values) for key, values in seconds.items()},
            "over ours": {key: ratio(values, seconds["ours, fast"]) for key, values in seconds.items()},
            "milliseconds": {key: 1e3 * statistics.median(values) for key, values in parts.items()},
            "refresh over attack": ratio(parts["refresh"], parts["attack"]),
        }
    return found


def gauge(rounds: int) -> dict[str, Any]:
    """PGD-10 that measures FOSC at every step over PGD-10 that does not, the same number of gradients."""
    found: dict[str, Any] = {}
    setting = SETTINGS["MNIST CNN"]
    torch.manual_seed(0)
    model, (x, y) = setting.model(), setting.images(setting.batch)
    plain, gauged = (im.PGD(im.Linf(setting.eps), steps=STEPS, stop_at=stop_at) for stop_at in (None, 0.0))
    for name, oracle in {"fast": Oracle.fast(model, x[:16]), "float32 as the model is": Oracle(model)}.items():
        calls = gauged(oracle, x, y, final="none").gradient_calls
        if not bool((calls == STEPS).all()):
            raise RuntimeError("an example stopped early: the two loops do not compute the same number of gradients")
        seconds = timed(
            {
                "plain": partial(plain, oracle, x, y, final="none"),
                "gauged": partial(gauged, oracle, x, y, final="none"),
            },
            20 * rounds,
        )
        found[name] = ratio(seconds["gauged"], seconds["plain"])
    return found


def active_set(rounds: int) -> dict[str, Any]:
    """Dynamic with 30 % of the examples active on average, over the same search with a mask on the whole batch."""
    found: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        torch.manual_seed(0)
        model, (x, y) = setting.model(), setting.images(128)
        oracle, threat = Oracle.fast(model, x[:16]), im.Linf(setting.eps)
        low, high = 0.0, 100.0
        for _ in range(40):  # the threshold at which an example costs three gradients of ten
            middle = (low + high) / 2
            cost = im.PGD(threat, steps=STEPS, stop_at=middle)(oracle, x, y, final="none").gradient_calls
            low, high = (middle, high) if float(cost.double().mean()) > 0.3 * STEPS else (low, middle)
        dynamic = im.PGD(threat, steps=STEPS, stop_at=high)
        active = dynamic(oracle, x, y, final="none").gradient_calls.double().mean() / STEPS
        seconds = timed(
            {
                "active set": partial(dynamic, oracle, x, y, final="none"),
                "mask": partial(oracle.side_by_side, partial(masked, oracle, threat, x, y, high), torch.arange(len(x))),
            },
            2 * rounds,
        )
        found[name] = {"active": float(active), "ratio": ratio(seconds["active set"], seconds["mask"])}
    return found


def masked(oracle: Oracle, threat: im.Linf, x: Tensor, y: Tensor, stop_at: float, rows: Tensor) -> Tensor:
    """Dynamic as it is usually written: every gradient for the whole batch, finished examples held by a mask."""
    x, y = x[rows], y[rows]
    feasible = threat.around(x)
    x_adv = threat.sample(x)
    going = torch.ones(len(x), dtype=torch.bool)
    for step in range(STEPS):
        gradient = oracle.gradient(x_adv, y, im.losses.cross_entropy).gradient
        if step > 0:
            going &= feasible.gap(gradient, x_adv) > stop_at
        x_adv = torch.where(going[:, None, None, None], feasible.step(x_adv, gradient, threat.eps / 4), x_adv)
    return x_adv


def start_up(rounds: int) -> dict[str, Any]:
    """Seconds until `import` returns, in fresh processes."""

    def imported(name: str) -> Callable[[], object]:
        return partial(subprocess.run, [sys.executable, "-c", f"import {name}"], check=True)

    seconds = timed({name: imported(name) for name in ("torch", "innermax")}, 2 * rounds)
    return {
        "torch": statistics.median(seconds["torch"]),
        "innermax": statistics.median(seconds["innermax"]),
        "innermax over torch": ratio(seconds["innermax"], seconds["torch"]),
    }


def pass_flops(oracle: Oracle, x: Tensor, y: Tensor) -> float:
    """Multiplications and additions of one gradient of a batch, as torch counts them."""
    counter = FlopCounterMode(display=False)
    with counter:
        oracle.gradient(x, y, im.losses.cross_entropy)
    return float(counter.get_total_flops())


SECTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "attacks": attacks,
    "steps": steps,
    "gauge": gauge,
    "active set": active_set,
    "start-up": start_up,
}


def attack_table(name: str, found: dict[str, Any], peak: float) -> list[str]:
    lines = [
        f"### {name}, batch {found['batch']}",
        "",
        f"Attack network: {found['plan']}. Ours reaches {found['bf16 peak'] / peak:.0%} of this machine's bf16 peak.",
        "",
        "| PGD-10 | milliseconds | over ours, fast | over the floor |",
        "| --- | --- | --- | --- |",
    ]
    for variant, milliseconds in sorted(found["milliseconds"].items(), key=lambda item: item[1]):
        mine, floor = found["over ours"][variant], found["over floor"][variant]
        lines.append(f"| {variant} | {milliseconds:,.0f} | {shown(mine)} | {shown(floor)} |")
    return [*lines, ""]


def step_table(name: str, found: dict[str, Any]) -> list[str]:
    lines = [f"### {name}, batch {found['batch']}", "", "| step | images/s | time over ours |", "| --- | --- | --- |"]
    for variant, speed in found["images/s"].items():
        lines.append(f"| {variant} | {speed:,.0f} | {shown(found['over ours'][variant])} |")
    parts = ", ".join(f"{part} {value:,.1f} ms" for part, value in found["milliseconds"].items())
    refresh = found["refresh over attack"]["median"]
    return [*lines, "", f"Ours: {parts}; the refresh is {refresh:.2%} of the attack.", ""]


def as_markdown(found: dict[str, Any]) -> str:
    """The page; sections that were not measured are left out."""
    peaks = found["peaks"]
    lines = [
        "# Speed",
        "",
        f"`make bench` on {found['machine']}, torch {found['torch']}, OMP_WAIT_POLICY={found['wait policy']}.",
        "Variants in turns in one process; medians of the ratios, turn by turn, with quartiles. This machine",
        f"multiplies matrices at {peaks['bf16'] / 1e9:,.0f} GFLOP/s in bf16, {peaks['bf16'] / peaks['float32']:.1f} "
        f"times the {peaks['float32'] / 1e9:,.0f} of float32.",
        "",
    ]
    if "attacks" in found:
        lines += ["## One attack: PGD-10, ten gradients, nothing at the last iterate where a peer allows it", ""]
        lines += ["The floor is ten bare forward and input-gradient passes, float32, eager, with no update; “bf16”"]
        lines += ["gives a peer the model in bf16 and channels last.", ""]
        for name, table in found["attacks"].items():
            lines += attack_table(name, table, peaks["bf16"])
    if "steps" in found:
        lines += ["## One training step: PGD-10 and an update", ""]
        for name, table in found["steps"].items():
            lines += step_table(name, table)
    if "gauge" in found:
        lines += ["## The gauge at every step, over the same search without it", ""]
        lines += ["| attack network | ratio |", "| --- | --- |"]
        lines += [f"| {name} | {shown(value, 3)} |" for name, value in found["gauge"].items()] + [""]
    if "active set" in found:
        lines += ["## The active set, over a mask on the whole batch", ""]
        lines += ["| network | examples active, on average | ratio |", "| --- | --- | --- |"]
        for name, value in found["active set"].items():
            lines.append(f"| {name} | {value['active']:.1%} | {shown(value['ratio'])} |")
        lines.append("")
    if "start-up" in found:
        times = found["start-up"]
        lines += ["## Start-up", ""]
        lines += [f"`import torch` takes {times['torch']:.2f} s, `import innermax` {times['innermax']:.2f} s:"]
        lines += [f"{shown(times['innermax over torch'])}.", ""]
    lines.append(Path(__file__).with_name("tried.md").read_text())
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--write", type=Path, help="Markdown file; the numbers go into a .json beside it")
    arguments = parser.parse_args()
    import os

    cpu = torch.device("cpu")
    found: dict[str, Any] = {}
    if arguments.write is not None and arguments.only != list(SECTIONS) and arguments.write.exists():
        found = json.loads(arguments.write.with_suffix(".json").read_text())  # the other sections stay as they are
    found |= {
        "machine": machine(),
        "torch": torch.__version__,
        "wait policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
    }
    if "attacks" in arguments.only or "peaks" not in found:  # attacks are held against peaks of their own hour
        found["peaks"] = {"bf16": matrix_peak(torch.bfloat16, cpu), "float32": matrix_peak(torch.float32, cpu)}
    for section in arguments.only:
        found[section] = SECTIONS[section](arguments.rounds)
        print(f"{section} done", file=sys.stderr, flush=True)
    print(as_markdown(found))
    if arguments.write is not None:
        arguments.write.write_text(as_markdown(found))
        arguments.write.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
