"""A training step, PGD-10 and an update: the command line's against a plain script's, in processes of their own.

    python bench/training_step.py --write results/training_step.md

Each process has the memory settings of its kind: a script glibc's defaults, ours those that the command line gives
itself. The floor is the step's multiplications and additions at the rate of this machine's large matrix products.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peers
import torch
from speed import SETTINGS, STEPS, Ours, Plain
from timing import machine, matrix_peak, ratio, shown, timed
from torch.utils.flop_counter import FlopCounterMode

import innermax as im
from innermax.oracle.oracle import Oracle
from innermax.utils.allocator import TUNABLES

WAYS = ("ours", "ours, one thread", "naive script", "naive script, one thread")
_BATCH, _STEPS = 128, 3


def measure(network: str, way: str) -> dict[str, float]:
    """Seconds of a step, the median; its operations; FLOP/s of matrix products in bf16 and float32; in this process."""
    if way.endswith("one thread"):
        torch.set_num_threads(1)
    torch.manual_seed(0)
    setting = SETTINGS[network]
    x, y = setting.images(_BATCH)
    step = Ours(setting, x, y, "auto") if way.startswith("ours") else Plain(setting, x, y, peers.naive)
    found = {"seconds": statistics.median(timed({"step": step}, _STEPS)["step"])}
    found |= {name: matrix_peak(getattr(torch, name), torch.device("cpu")) for name in ("bfloat16", "float32")}
    return found | ({"operations": count_operations(step)} if isinstance(step, Ours) else {})


def count_operations(step: Ours) -> float:
    """Multiplications and additions of a step, as torch counts them."""
    counts = []
    for part in (
        lambda: Oracle._gradient(step.loop.state.oracle, step.x, step.y, im.losses.cross_entropy, ()),
        step.descend,
    ):
        counter = FlopCounterMode(display=False)
        with counter:
            part()
        counts.append(counter.get_total_flops())
    return float(STEPS * counts[0] + counts[1])


def ask(network: str, way: str) -> dict[str, float]:
    """The same in a process of its own."""
    environment = os.environ | ({"GLIBC_TUNABLES": TUNABLES} if way.startswith("ours") else {})
    environment.pop("OMP_NUM_THREADS", None)  # a way says itself how many threads it takes
    command = [sys.executable, __file__, "--one", network, way]
    answer: dict[str, float] = json.loads(
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    return answer


def table(network: str, turns: list[list[dict[str, float]]]) -> list[str]:
    """The rows of a network; turns: in each, every way's answer."""
    operations = turns[0][0]["operations"]
    lines = []
    for place, way in enumerate(WAYS):
        answers = [turn[place] for turn in turns]
        seconds = statistics.median(answer["seconds"] for answer in answers)
        own = WAYS[place % 2]
        times = ratio([answer["seconds"] for answer in answers], [turn[place % 2]["seconds"] for turn in turns])
        kind = "bfloat16" if way.startswith("ours") else "float32"
        peak = statistics.median(answer[kind] for answer in answers)
        share = operations / seconds / peak
        lines.append(
            f"| {network} | {way} | {_BATCH / seconds:,.1f} | {shown(times)} of {own} | {peak / 1e9:,.0f} {kind} "
            f"| {share:.0%} | {_BATCH * peak / operations:,.0f} |"
        )
    return lines


def main() -> None:
    """Prints or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--write", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(*given.one)))
        return
    lines = [
        "# A training step",
        "",
        f"`python bench/training_step.py` on {machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}.",
        f"PGD-10 and an update on {_BATCH} images, each way in processes of its own, in turns; medians, ratios with",
        "quartiles. Ours runs with the memory settings of the command line, the script with glibc's defaults. The peak",
        "is measured with large matrix products; at the peak a step would pass the images of the last column.",
        "",
        "| network | step | images/s | time | peak, GFLOP/s | of the peak | images/s at the peak |",
        "| --- | --- | ---: | --- | --- | ---: | ---: |",
    ]
    for network in given.networks:
        turns: list[list[dict[str, Any]]] = [[ask(network, way) for way in WAYS] for _ in range(given.rounds)]
        lines += table(network, turns)
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if given.write:
        given.write.write_text(text)


if __name__ == "__main__":
    main()
