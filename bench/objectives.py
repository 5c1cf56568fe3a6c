"""What a training step costs with each objective, against the sum of the passes that it asks for.

    python bench/objectives.py [--rounds 15] [--networks mnist-cnn] [--write results/objectives.md]

The paper's MNIST and CIFAR networks, PGD-10, one batch. Each turn times, one after the other, the whole step with every
objective, and the passes alone: the search with the cross-entropy (S), a forward pass of the attack network (f), the
update with the cross-entropy (U), and a forward and backward pass of the network that learns (b). The cross-entropy
takes S + U, TRADES S + f + U + b, MART S + U + b, AWP its objective's and all of its passes b again.
Memory is the peak of resident memory during a step less what the process held before, in a process of its own; glibc
gives freed tensors back at once.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from steps import started, whole
from timing import machine, ratio, shown, timed

import innermax as im
from innermax.objectives import Objective, cross_entropy
from innermax.training.batch_attack import Attacked
from innermax.training.loop import Loop

CASES = {"mnist-cnn": ((1, 28, 28), 0.3, 128), "cifar-cnn": ((3, 32, 32), 8 / 255, 128)}
OBJECTIVES: dict[str, tuple[Objective, str]] = {
    "cross-entropy": (cross_entropy, "SU"),
    "label smoothing 0.1": (im.CrossEntropy(label_smoothing=0.1), "SU"),
    "TRADES": (im.TRADES(), "SfUb"),
    "MART": (im.MART(), "SUb"),
    "AWP, cross-entropy": (im.AWP(), "SUb"),
    "AWP, TRADES": (im.AWP("trades"), "SfUbbb"),
}
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


def loop_of(network: str, objective: Objective, precision: str) -> Loop:
    """A training before its first update, on one batch of noise."""
    shape, eps, batch = CASES[network]
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8), torch.randint(0, 10, (batch,))
    model = im.build_model(network, input_shape=shape)
    strategy = im.Standard(im.PGD(im.Linf(eps), steps=10))
    return started(model, images, labels, precision, strategy=strategy, objective=objective, lr=0.01)


def step_of(loop: Loop) -> Callable[[], object]:
    """One batch: attack and update."""
    batch = whole(loop)
    attack = loop.options.strategy.attack_at(0.0)
    return lambda: loop.step(batch, attack, 0.0)


def passes_of(loop: Loop) -> dict[str, Callable[[], object]]:
    """The passes of a step with the cross-entropy, each alone."""
    batch, state = whole(loop), loop.state
    attack = loop.options.strategy.attack_at(0.0)
    assert attack is not None
    x_adv = attack(state.oracle, batch.x, batch.y, final="none").x_adv
    rows = torch.arange(len(batch.x))

    def pass_back() -> None:
        with state.arithmetic.keep_images(state.network, "cpu"):
            loss = F.cross_entropy(state.wrapped(x_adv).float(), batch.y)
        loop.ranks.fabric.backward(loss)

    return {
        "S": lambda: attack(state.oracle, batch.x, batch.y, final="none"),
        "f": lambda: state.oracle.side_by_side(lambda some: state.oracle.logits(batch.x[some]), rows),
        "U": lambda: loop.descend(batch.x, batch.y, Attacked(x_adv), 0.0, len(batch.y)),
        "b": pass_back,
    }


def measure(networks: Sequence[str], rounds: int, precision: str) -> dict[str, Any]:
    """For each network and objective: milliseconds of a step, its ratio to the sum of its passes, and memory."""
    found: dict[str, Any] = {}
    for network in networks:
        steps = {name: step_of(loop_of(network, objective, precision)) for name, (objective, _) in OBJECTIVES.items()}
        passes = passes_of(loop_of(network, cross_entropy, precision))
        seconds = timed(steps | passes, rounds)
        found[network] = {
            name: {
                "ms": 1000 * sorted(seconds[name])[rounds // 2],
                "passes": " + ".join(letters),
                "ratio": ratio(seconds[name], [sum(turn) for turn in zip(*(seconds[p] for p in letters), strict=True)]),
                "memory": fresh_memory(network, name, precision),
            }
            for name, (_, letters) in OBJECTIVES.items()
        }
    return found


def memory(network: str, name: str, precision: str) -> float:
    """MiB that the second step takes above what this process holds before it."""
    step = step_of(loop_of(network, OBJECTIVES[name][0], precision))
    step()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def fresh_memory(network: str, name: str, precision: str) -> float:
    """`memory` in a new process."""
    command = [sys.executable, __file__, "--memory", network, name, "--precision", precision]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | _GIVE_BACK)
    return float(done.stdout.splitlines()[-1])


def _resident(field: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def as_markdown(result: Mapping[str, Any]) -> str:
    lines = [
        "# What an objective costs",
        "",
        f"`python bench/objectives.py --rounds {result['rounds']} --precision {result['precision']}` on",
        f"{result['machine']}, torch {result['torch']}. {result['note']}",
        "",
        "A training step with PGD-10 on a batch of 128: its median time; the median ratio, with quartiles, to the sum",
        "of the passes that it asks for, timed in the same turn; and the peak of memory above what the process held",
        "before the step. S is the search, f a forward pass of the attack network, U the update with the",
        "cross-entropy, b a forward and backward pass of the network that learns.",
    ]
    for network, rows in result["networks"].items():
        lines += ["", f"{network}:", "", "| objective | ms a step | its passes | step / passes | MiB |"]
        lines.append("| --- | --- | --- | --- | --- |")
        lines += [
            f"| {name} | {row['ms']:.0f} | {row['passes']} | {shown(row['ratio'])} | {row['memory']:.0f} |"
            for name, row in rows.items()
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precision", default="auto", help="auto, float32 or bf16")
    parser.add_argument("--note", default="", help="a sentence about the machine")
    parser.add_argument("--write", type=Path, help="Markdown file; the numbers go into a .json beside it")
    parser.add_argument("--memory", nargs=2, metavar=("NETWORK", "OBJECTIVE"), help="measure this alone, here")
    arguments = parser.parse_args()
    if arguments.memory:
        print(memory(*arguments.memory, arguments.precision))
        sys.exit()
    result = {
        "machine": machine(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "precision": arguments.precision,
        "note": arguments.note,
        "networks": measure(arguments.networks, arguments.rounds, arguments.precision),
    }
    print(as_markdown(result), end="")
    if arguments.write is not None:
        arguments.write.write_text(as_markdown(result), encoding="utf-8")
        arguments.write.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
