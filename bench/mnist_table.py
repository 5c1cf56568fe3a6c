"""Makes results/mnist.md, results/mnist.json and the table of docs/recipes.md out of run folders.

    innermax train mnist --epochs 10 --validation 0 --strategy STRATEGY --seed SEED \\
        --run-dir runs/mnist-STRATEGY-seedSEED
    python bench/mnist_table.py runs results/mnist.md docs/recipes.md
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from innermax.attacks.named import display_name
from innermax.evaluation.result import Evaluation
from innermax.utils.files import read_config

ORDER = ("unsecured", "standard", "curriculum", "fgsm-pgd", "dynamic", "dynamic-exact")
TITLES = {
    "unsecured": "Unsecured",
    "standard": "Standard",
    "curriculum": "Curriculum",
    "fgsm-pgd": "FGSM→PGD",
    "dynamic": "Dynamic (the paper's: ball FOSC, c_max 0.5)",
    "dynamic-exact": "Dynamic (exact FOSC, measured c_max)",
}


def collect(folder: Path) -> list[dict[str, Any]]:
    """A record a finished run: what was trained, what it cost and how it scored."""
    records = []
    for path in sorted(folder.glob("mnist-*/evaluation.json")):
        strategy, _, seed = path.parent.name.removeprefix("mnist-").rpartition("-seed")
        evaluation = Evaluation.from_json(path.read_text())
        history = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        environment = json.loads((path.parent / "environment.json").read_text())
        scored = {name: vars(value) for name, value in evaluation.accuracy.items()}
        records.append(
            {
                "strategy": strategy,
                "seed": int(seed),
                "accuracy": scored | {"worst_case": vars(evaluation.worst_case)},
                "fosc_median": {name: value.fosc_median for name, value in evaluation.convergence.items()},
                "gradients": statistics.mean(row["gradients"] for row in history),
                "c_max": history[1]["threshold"] if strategy == "dynamic-exact" else None,
                "minutes": sum(row["seconds"] for row in history) / 60,
                "epochs": len(history),
                "command": environment["command"],
                "environment": {
                    name: environment[name] for name in ("versions", "device", "threads", "commit", "date")
                },
                "config": read_config(path.parent)["training"],
                "evaluation": evaluation,
            }
        )
    return sorted(records, key=lambda record: (ORDER.index(record["strategy"]), record["seed"]))


def seed_interval(values: Sequence[float]) -> str:
    """Mean and, from three seeds on, Student's 95 % interval over seeds, in points."""
    mean = statistics.mean(values)
    if len(values) < 3:
        return f"{100 * mean:+.2f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * mean:+.2f} [{100 * (mean - half):+.2f}, {100 * (mean + half):+.2f}]"


def table(records: list[dict[str, Any]]) -> list[str]:
    """One row a run, accuracy in per cent with its 95 % Wilson interval."""
    names = list(records[0]["accuracy"])
    head = [*map(display_name, names[:-1]), "worst case"]
    head[0] = "Clean"
    lines = [
        f"| strategy | seed | {' | '.join(head)} | gradients | minutes |",
        f"| --- | --- |{' --- |' * (len(head) + 2)}",
    ]
    for record in records:
        cells = [
            f"{100 * value['value']:.2f} <sub>{100 * value['low']:.1f}–{100 * value['high']:.1f}</sub>"
            for value in (record["accuracy"][name] for name in names)
        ]
        cost = f"{record['gradients']:.2f} | {record['minutes']:.1f}"
        lines.append(f"| {TITLES[record['strategy']]} | {record['seed']} | {' | '.join(cells)} | {cost} |")
    return lines


def summary(records: list[dict[str, Any]]) -> list[str]:
    """One row a strategy: the mean over its seeds, and the span of their 95 % intervals."""
    names = [name for name in records[0]["accuracy"] if name != "worst_case"]
    head = ["Clean", *map(display_name, names[1:])]
    lines = [f"| defence (seeds) | {' | '.join(head)} | gradients |", f"| --- |{' --- |' * (len(head) + 1)}"]
    for strategy in ORDER:
        own = [record for record in records if record["strategy"] == strategy]
        if not own:
            continue
        cells = []
        for name in names:
            values = [record["accuracy"][name] for record in own]
            low, high = min(value["low"] for value in values), max(value["high"] for value in values)
            mean = statistics.mean(value["value"] for value in values)
            cells.append(f"{100 * mean:.1f} <sub>{100 * low:.1f}–{100 * high:.1f}</sub>")
        gradients = statistics.mean(record["gradients"] for record in own)
        lines.append(f"| {TITLES[strategy].partition(' (')[0]} ({len(own)}) | {' | '.join(cells)} | {gradients:.1f} |")
    return lines


def differences(records: list[dict[str, Any]], strategy: str) -> list[str]:
    """How a strategy differs from Standard with the same seed, in points: paired over images, then over seeds."""
    standard = {record["seed"]: record for record in records if record["strategy"] == "standard"}
    own = [record for record in records if record["strategy"] == strategy and record["seed"] in standard]
    lines = []
    for name in own[0]["accuracy"] if own else []:
        found = [r["evaluation"].difference(standard[r["seed"]]["evaluation"], name) for r in own]
        cells = [f"{100 * d.estimate:+.2f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]" for d in found]
        title = {"clean": "Clean", "worst_case": "worst case"}.get(name, display_name(name))
        lines.append(f"| {title} | {' | '.join(cells)} | {seed_interval([d.estimate for d in found])} |")
    if not lines:
        return []
    seeds = " | ".join(f"seed {record['seed']}" for record in own)
    return [
        f"| {TITLES[strategy]} − Standard | {seeds} | mean over seeds |",
        f"| --- |{' --- |' * (len(own) + 1)}",
        *lines,
    ]


def put(text: str, page: Path) -> None:
    """Replaces what stands between the marks of a page."""
    begin, end = "<!-- measured -->", "<!-- /measured -->"
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


def main(folder: Path, target: Path, page: Path) -> None:
    """Writes the tables into the pages, and the numbers behind them beside the first."""
    records = collect(folder)
    parts = [table(records)]
    parts += [differences(records, strategy) for strategy in ("dynamic", "dynamic-exact")]
    put("\n\n".join("\n".join(part) for part in parts if part), target)
    put("\n".join(summary(records)), page)
    numbers = [{name: value for name, value in record.items() if name != "evaluation"} for record in records]
    target.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
