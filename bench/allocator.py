"""What it saves to keep freed memory: a gradient of 128 images in processes of their own, in turns.

python bench/allocator.py --write results/allocator.md
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from timing import machine

import innermax as im
from innermax.losses import cross_entropy
from innermax.utils.allocator import TUNABLES

NETWORKS = {"MNIST CNN": ("mnist-cnn", (1, 28, 28)), "CIFAR CNN": ("cifar-cnn", (3, 32, 32))}
WAYS = ("glibc's defaults", "im.keep_freed_memory()", "the command line's environment")
_GRADIENTS = 12


def measure(network: str, way: str, threads: int) -> float:
    """Seconds of a gradient, the median, in this process."""
    torch.set_num_threads(threads)
    if way == WAYS[1]:
        im.keep_freed_memory()
    torch.manual_seed(0)
    name, shape = NETWORKS[network]
    x, y = torch.rand(128, *shape), torch.zeros(128, dtype=torch.int64)
    oracle = im.Oracle.fast(im.build_model(name, input_shape=shape), x[:16])
    rows, seconds = torch.arange(128), []
    for _ in range(_GRADIENTS + 3):
        began = time.perf_counter()
        oracle.side_by_side(lambda some: oracle.gradient(x[some], y[some], cross_entropy), rows)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


def ask(network: str, way: str, threads: int) -> float:
    """The same in a process of its own."""
    environment = os.environ | ({"GLIBC_TUNABLES": TUNABLES} if way == WAYS[2] else {})
    command = [sys.executable, __file__, "--one", network, way, str(threads)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Prints or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(measure(given.one[0], given.one[1], int(given.one[2])))
        return
    lines = [
        "# Memory that is kept",
        "",
        f"`python bench/allocator.py` on {machine()}. A gradient of 128 images through the compiled",
        "network, in processes of their own, in turns; medians, and the range of the ratios over the rounds.",
        "",
        "| network | threads | memory | milliseconds | over the defaults |",
        "| --- | --- | --- | --- | --- |",
    ]
    for network in NETWORKS:
        for threads in (1, os.cpu_count() or 1):
            turns = [[ask(network, way, threads) for way in WAYS] for _ in range(given.rounds)]
            for way, times in zip(WAYS, zip(*turns, strict=True), strict=True):
                ratios = [mine / turn[0] for mine, turn in zip(times, turns, strict=True)]
                told = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
                lines.append(f"| {network} | {threads} | {way} | {1000 * statistics.median(times):.1f} | {told} |")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if given.write:
        given.write.write_text(text)


if __name__ == "__main__":
    main()
