"""The page, the numbers and the picture that bench/attacks.py makes of its records."""

import json
import platform
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch

matplotlib.use("Agg")
from matplotlib import pyplot

NAMES = {
    "pgd-20": "PGD-20 (ε/4)",
    "pgd-100": "PGD-100 (ε/10)",
    "pgd-50x10": "PGD-50 × 10 restarts",
    "apgd-100": "APGD, cross-entropy",
    "apgd-t": "APGD, DLR, 9 targets",
    "guided": "guided",
    "autoattack": "AutoAttack",
}
MARKERS = {"pgd-20": "v", "pgd-100": "^", "pgd-50x10": "s", "apgd-100": "D", "apgd-t": "P", "autoattack": "*"}
BUDGETS = (50, 100, 250, 500, 1100)  # of the guided attack: smaller budgets are the beginning of its searches
Numbers = npt.NDArray[np.float64]
Panel = tuple[str, str, int]  # model, norm, images


class Runs:
    """The seeds of one attack on the images of one model: who survives, at what cost, one row a seed."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.seeds = [record["seed"] for record in records]
        self.survives = np.array([record["survives"] for record in records], dtype=bool)
        self.cost = np.array([record["gradients"] for record in records], dtype=float)
        self.cost += 0.5 * np.array([record["forwards"] for record in records])
        self.seconds = [record["seconds"] for record in records]

    @property
    def survivors(self) -> float:
        """How many survive, the mean over seeds."""
        return float(self.survives.sum(1).mean())

    def at(self, budget: float) -> tuple[Numbers, Numbers]:
        """(seeds,) survivors and mean cost an image, had each search ended at this cost."""
        return (self.survives | (self.cost > budget)).sum(1), np.minimum(self.cost, budget).mean(1)

    def for_cost(self, mean: float) -> float:
        """The budget an image with which this costs so much on average."""
        budgets = np.unique(np.ceil(np.append(np.arange(1, self.cost.max() + 1), self.cost.max())))
        affordable = [b for b in budgets if self.at(b)[1].mean() <= mean]
        return float(affordable[-1]) if affordable else float(budgets[0])


def collected(folder: Path) -> dict[Panel, dict[str, Runs]]:
    """The records by model, norm and number of images; then by attack."""
    found: dict[Panel, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        kinds = found[record["model"], record["norm"], len(record["clean"])]
        if any(other["clean"] != record["clean"] for others in kinds.values() for other in others):
            raise ValueError(f"{path} is of another {record['model']} than the records before it")
        kinds[record["kind"]].append(record)
    return {panel: {kind: Runs(records) for kind, records in kinds.items()} for panel, kinds in found.items()}


def strongest(attacks: dict[str, Runs]) -> int:
    """How many images survive every attack with every seed."""
    return int(np.logical_and.reduce([runs.survives.all(0) for runs in attacks.values()]).sum())


def title(panel: Panel) -> str:
    """A model's name; an unsecured one is attacked in both norms."""
    model, norm, _ = panel
    data, _, how = model.partition("-")
    known = {"digits": "digits", "mnist": "MNIST", "cifar10": "CIFAR-10"}[data]
    return f"{known} {'L∞' if norm == 'linf' else 'L2'} {how.rpartition('-')[2]}"


def spread(values: Iterable[float]) -> str:
    """The mean, and each seed's value where they differ."""
    values = list(values)
    shown = ", ".join(f"{value:.0f}" for value in values)
    return f"{np.mean(values):.2f} ({shown})" if len(set(values)) > 1 else f"{np.mean(values):.0f}"


def goals(panels: dict[Panel, dict[str, Runs]]) -> list[str]:
    """Guided against AutoAttack: at a quarter and at a tenth of its cost."""
    lines = [
        "| model | images | survive AutoAttack | guided, ¼ of its cost | more | ⅒ | more, points | every attack |",
        "| --- |" + " --- |" * 7,
    ]
    for panel, attacks in panels.items():
        if not {"guided", "autoattack"} <= attacks.keys():
            continue
        ours, theirs = attacks["guided"], attacks["autoattack"]
        quarter, tenth = (ours.at(ours.for_cost(theirs.cost.mean() / share))[0] for share in (4, 10))
        more = quarter.mean() - theirs.survivors
        points = 100 * (tenth.mean() - theirs.survivors) / panel[2]
        lines.append(
            f"| {title(panel)} | {panel[2]} | {spread(theirs.survives.sum(1))} | {spread(quarter)} | {more:+.2f} | "
            f"{spread(tenth)} | {points:+.2f} | {strongest(attacks)} |"
        )
    return lines


def rows(panels: dict[Panel, dict[str, Runs]]) -> list[str]:
    """Robust accuracy and cost of every attack on every model."""
    lines = ["| model | attack | seeds | robust accuracy, % | cost an image | seconds |", "| --- |" + " --- |" * 5]
    for panel, attacks in panels.items():
        for kind in (kind for kind in NAMES if kind in attacks):
            runs = attacks[kind]
            found = [("", runs.survives.sum(1), runs.cost.mean(1))]
            if kind == "guided":
                found = [(f", budget {budget}", *runs.at(budget)) for budget in BUDGETS]
            for suffix, survivors, cost in found:
                accuracy = 100 * survivors.mean() / panel[2]
                seconds = "" if suffix else f"{np.mean(runs.seconds):.0f}"
                cells = f"{len(runs.seeds)} | {accuracy:.2f} | {cost.mean():.1f} | {seconds}"
                lines.append(f"| {title(panel)} | {NAMES[kind]}{suffix} | {cells} |")
    return lines


def numbers(panels: dict[Panel, dict[str, Runs]]) -> list[dict[str, Any]]:
    """What is behind the page."""
    found = []
    for (model, norm, images), attacks in panels.items():
        for kind, runs in attacks.items():
            record: dict[str, Any] = {"model": model, "norm": norm, "images": images, "attack": kind}
            record |= {"seeds": runs.seeds, "seconds": runs.seconds, "survive_every_attack": strongest(attacks)}
            record["survivors"] = runs.survives.sum(1).tolist()
            record["cost"] = runs.cost.mean(1).round(2).tolist()
            if kind == "guided":
                record["survivors_by_budget"] = {budget: runs.at(budget)[0].tolist() for budget in BUDGETS}
            found.append(record)
    return found


def draw(panels: dict[Panel, dict[str, Runs]], path: Path) -> None:
    """Images that survive although some attack makes them fall, against mean cost; one panel a robust model."""
    shown = {panel: kinds for panel, kinds in panels.items() if "unsecured" not in panel[0] and "guided" in kinds}
    columns = min(4, len(shown))
    depth = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(depth, columns, figsize=(3.3 * columns, 2.7 * depth + 0.7), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (panel, attacks) in zip(axes.flat, shown.items(), strict=False):
        least = strongest(attacks)
        for kind, (color, style) in {"autoattack": ("#777777", "--"), "guided": ("#0b4f9c", "-")}.items():
            if kind in attacks:
                runs = attacks[kind]
                points = [runs.at(budget) for budget in np.unique(np.geomspace(5, runs.cost.max(), 120).round())]
                cost = [value[1].mean() for value in points]
                beyond = np.array([value[0] for value in points]) - least
                axis.plot(cost, beyond.mean(1), style, color=color, lw=2, label=f"{NAMES[kind]}, as it goes")
                axis.fill_between(cost, beyond.min(1), beyond.max(1), color=color, alpha=0.2, lw=0)
        for kind, marker in MARKERS.items():
            if kind in attacks:
                runs = attacks[kind]
                size = 90 if kind == "autoattack" else 38
                face = "black" if kind == "autoattack" else "white"
                place = [runs.cost.mean()], [runs.survivors - least]
                axis.scatter(*place, s=size, marker=marker, fc=face, ec="black", zorder=3, label=NAMES[kind])
        if "autoattack" in attacks:
            for share in (4, 10):
                axis.axvline(attacks["autoattack"].cost.mean() / share, color="#bbbbbb", lw=1, ls=":", zorder=0)
        weakest = max(runs.survivors for kind, runs in attacks.items() if kind != "pgd-20")
        axis.set_ylim(-0.4, max(2.5, 1.3 * (weakest - least)))
        axis.set_xscale("log")
        axis.set_xlim(5, 7000)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_title(f"{title(panel)}: {least} of {panel[2]} survive all", fontsize=9)
        axis.tick_params(labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.supxlabel("gradients + ½ forward-only queries an image, mean (dotted: ⅒ and ¼ of AutoAttack's)", fontsize=10)
    figure.supylabel("survivors beyond those of all attacks together", fontsize=10)
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), ncols=4, loc="upper center", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0.01, 0, 1, 1 - 0.55 / (2.7 * depth + 0.7)))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def put(text: str, page: Path) -> None:
    """Replaces what stands between the marks of a page, or begins it."""
    begin, end = "<!-- measured -->", "<!-- /measured -->"
    old = page.read_text() if page.exists() else f"# Attacks: robust accuracy against cost\n\n{begin}{end}\n"
    before, rest = old.split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


def written(folder: Path, page: Path) -> None:
    """Writes the page's tables, the numbers and the picture."""
    panels = {panel: attacks for panel, attacks in collected(folder).items() if len(attacks) > 1}
    order = {"digits": 0, "mnist": 1, "cifar10": 2}
    panels = dict(sorted(panels.items(), key=lambda item: (order[item[0][0].partition("-")[0]], item[0])))
    threads = torch.get_num_threads()
    machine = f"{platform.machine()}, torch {torch.__version__}, {threads} thread{'s' if threads > 1 else ''}"
    put("\n".join([f"Measured on {machine}.", "", *goals(panels), "", *rows(panels)]), page)
    page.with_suffix(".json").write_text(json.dumps(numbers(panels), indent=1) + "\n")
    draw(panels, page.with_suffix(".png"))
