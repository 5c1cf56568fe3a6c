"""Writes results/warm_start.md: a training step of WarmStart beside Standard's, ours and other people's.

python bench/warm_start.py --write results/warm_start.md
"""

import argparse
import json
from pathlib import Path

import peers
import torch
from speed import SETTINGS, Ours, Plain
from timing import machine, ratio, shown, timed

import innermax as im

HEAD = """# What a warm start saves in time

`python bench/warm_start.py` on {machine}.
One training step, attack and update, batch 128; variants in turns in one process, medians of the ratios, turn by turn,
with quartiles. Epochs are equally many, so the ratio of whole trainings is that of their steps.
[How robust they become](paper/cpu/cheaper.md)."""


def measured(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Each variant's time over WarmStart's, by name."""
    torch.manual_seed(0)
    setting = SETTINGS[name]
    x, y = setting.images(128)
    variants = {
        "WarmStart, 2 steps": Ours(setting, x, y, "auto", im.WarmStart),
        "Standard PGD-10": Ours(setting, x, y, "auto"),
        "Standard PGD-10, naive script": Plain(setting, x, y, peers.naive),
    }
    if "torchattacks" in peers.installed():
        variants["Standard PGD-10, torchattacks in a plain loop"] = Plain(setting, x, y, peers.torchattacks)
    seconds = timed(variants, rounds)
    return {key: ratio(values, seconds["WarmStart, 2 steps"]) for key, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", type=Path)
    told = parser.parse_args()
    found = {name: measured(name, told.rounds) for name in SETTINGS}
    lines = [HEAD.format(machine=machine())]
    for name, table in found.items():
        lines += ["", f"## {name}", "", "| training step | time over WarmStart's |", "| --- | --- |"]
        lines += [f"| {variant} | {shown(value)} |" for variant, value in table.items()]
    page = "\n".join(lines) + "\n"
    print(page)
    if told.write is not None:
        told.write.write_text(page, encoding="utf-8")
        told.write.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
