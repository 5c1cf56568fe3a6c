"""Tables of defences: accuracies over seeds, and differences paired over images and seeds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from innermax.attacks.guided_pgd import GuidedPGD
from innermax.attacks.named import build_attack, display_name
from innermax.reproduce.artifact import Find
from innermax.reproduce.cache import Experiment, find_seed
from innermax.reproduce.experiments import Attacks, Scored, Trained, unpack_correct
from innermax.reproduce.scales import Scale, Training
from innermax.reproduce.unfinished import Begun, describe_progress
from innermax.threat import Linf
from innermax.utils.intervals import paired_difference, student

TABLE_ATTACKS = ("fgsm", "pgd-10", "pgd-20", "cw-30")  # the attacks of the paper's tables
STRONGEST = "guided"
FEW_IMAGES = 500  # that it is run on
INTERVALS = (
    "Differences on the same images and seeds. In brackets: Student's 95 % interval over seeds or, with fewer than "
    "three seeds, each one's interval over images."
)


def build_attacks(eps: float, names: Sequence[str] = TABLE_ATTACKS) -> Attacks:
    """The attacks of these names, on L∞ balls of this size."""
    return tuple((name, build_attack(name, Linf(eps))) for name in names)


def build_strongest(scale: Scale, eps: float) -> Attacks:
    """The guided attack, a cheaper stand-in for AutoAttack: it tells robustness from masked gradients."""
    return ((STRONGEST, GuidedPGD(Linf(eps), budget=scale.budget)),)


def list_attacks(scale: Scale, data: str, names: Sequence[str] = TABLE_ATTACKS) -> list[tuple[Attacks, int | None]]:
    """(attacks, number of images): those of these names on all of a scale's test images, the guided one on fewer."""
    eps, images = getattr(scale, data).eps, scale.images[data]
    return [
        (build_attacks(eps, names), images),
        (build_strongest(scale, eps), min(images or FEW_IMAGES, FEW_IMAGES)),
    ]


@dataclass(frozen=True)
class TableRow:
    """One defence in a table.

    Args:
        title: in the table.
        trainings: one per seed.
        attacks: attacks, and on how many images each training is tested with them.
        paper: accuracies in per cent by attack, as the paper prints them.
        options: more fields of the `Scored` experiments.
    """

    title: str
    trainings: Sequence[Training]
    attacks: Sequence[tuple[Attacks, int | None]]
    paper: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def list_scored(self, training: Training) -> list[Scored]:
        """The experiments that test one training."""
        return [Scored(training, attacks, images, **self.options) for attacks, images in self.attacks]

    def seeds(self, attack: str) -> list[Scored]:
        """The experiments with an attack, or with "clean", one per seed."""
        place = next((n for n, (attacks, _) in enumerate(self.attacks) if attack in dict(attacks)), 0)
        return [self.list_scored(training)[place] for training in self.trainings]

    def experiments(self) -> list[Experiment]:
        """All experiments of the row."""
        found: list[Experiment] = []
        for training in self.trainings:
            found += [Trained(training), *self.list_scored(training)]
        return found

    def numbers(self, find: Find) -> dict[str, Any]:
        """{"title", "paper", "seeds": {seed: {"gradients", "seconds", "accuracy": {attack: …}}}}, of what was run.

        Where no seed was, but a training has begun, also "begun": how far it is, of how many epochs.
        """
        seeds = {}
        for training in self.trainings:
            trained = find(Trained(training))
            results = [result for result in map(find, self.list_scored(training)) if result is not None]
            if trained is None or not results:
                continue
            measured: dict[str, Any] = {}
            for result in reversed(results):  # the first has most clean images
                measured |= {
                    name: {key: value[key] for key in ("accuracy", "low", "high", "total")}
                    for name, value in result.items()
                    if isinstance(value, Mapping) and "accuracy" in value
                }
            seeds[str(training.seed)] = {
                "epochs": training.setting.epochs,
                "gradients": sum(row["gradients"] for row in trained["history"]),  # per example, over the training
                "seconds": round(sum(row["seconds"] for row in trained["history"]), 1),
                "environment": trained["environment"],
                "accuracy": measured,
            }
        return {"title": self.title, "paper": dict(self.paper), "seeds": seeds} | ({} if seeds else self._begun(find))

    def _begun(self, find: Find) -> dict[str, Any]:
        for training in self.trainings:
            found = find(Begun(training))
            if found is not None:
                return {"begun": {**found, "of": training.setting.epochs}}
        return {}


def mean_over_seeds(values: Sequence[float]) -> tuple[float, float, float] | None:
    """(mean, low, high): Student's 95 % interval over seeds; None for fewer than three."""
    if len(values) < 3:
        return None
    found = student(values)
    return found.estimate, found.low, found.high


def mean_accuracy(row: Mapping[str, Any], attack: str) -> tuple[float, float, float] | None:
    """Mean accuracy in per cent and its 95 % interval: over three or more seeds, else over images (Wilson)."""
    found = [seed["accuracy"][attack] for seed in row["seeds"].values() if attack in seed["accuracy"]]
    if not found:
        return None
    over_seeds = mean_over_seeds([100 * value["accuracy"] for value in found])
    if over_seeds is not None:
        return over_seeds
    mean = statistics.mean(100 * value["accuracy"] for value in found)
    return mean, 100 * min(value["low"] for value in found), 100 * max(value["high"] for value in found)


def markdown_table(rows: Sequence[Mapping[str, Any]], attacks: Sequence[str]) -> str:
    """Markdown: a line per defence, with each attack's accuracy, its interval and, where there is one, the paper's.

    Below it stands how far trainings are that have begun.
    """
    papers = [attack for attack in attacks if any(attack in row["paper"] for row in rows)]
    heads = []
    for attack in attacks:
        heads += [attack_title(attack), *(["paper"] if attack in papers else [])]
    lines = [
        f"| defence | seeds | gradients | {' | '.join(heads)} |",
        f"| --- | --- | --- |{' ---: |' * len(heads)}",
    ]
    for row in rows:
        cells = []
        for attack in attacks:
            cells.append(format_interval(mean_accuracy(row, attack)))
            if attack in papers:
                cells.append(f"*{row['paper'][attack]:.2f}*" if attack in row["paper"] else "")
        spent = [seed["gradients"] for seed in row["seeds"].values()]
        begun = row.get("begun")
        so_far = f"{begun['epochs']} of {begun['of']} epochs" if begun else "not run"
        seeds = f"{len(spent)}" if spent else so_far
        cost = f"{statistics.mean(spent):.0f}" if spent else ""
        lines.append(f"| {row['title']} | {seeds} | {cost} | {' | '.join(cells)} |")
    told = [describe_progress(row["title"], row["begun"]) for row in rows if "begun" in row]
    return "\n".join([*lines, *(["", " ".join(told)] if told else [])])


@runtime_checkable
class Compared(Protocol):
    """A row of a table, with the experiments that hold its verdicts."""

    @property
    def title(self) -> str:
        """In the table."""
        ...

    def seeds(self, attack: str) -> Sequence[Experiment]:
        """The experiments with an attack, or with "clean", one per seed."""
        ...


def compare(find: Find, one: Compared, other: Compared, attack: str) -> dict[str, Any] | None:
    """The difference of two defences' accuracies, in points: paired over the images of each seed, then over seeds."""
    seeds = []
    for pair in zip(one.seeds(attack), other.seeds(attack), strict=True):
        first, second = map(find, pair)
        if first is None or second is None:
            continue
        mine, theirs = unpack_correct(first[attack]), unpack_correct(second[attack])
        paired = paired_difference(int((mine & ~theirs).sum()), int((theirs & ~mine).sum()), len(mine))
        seeds.append({name: 100 * getattr(paired, name) for name in ("estimate", "low", "high")})
    if not seeds:
        return None
    whole = mean_over_seeds([seed["estimate"] for seed in seeds])
    over_seeds = None if whole is None else dict(zip(("mean", "low", "high"), whole, strict=True))
    return {"seeds": seeds, "over_seeds": over_seeds}


def compare_all(find: Find, rows: Sequence[Compared], base: Compared, attacks: Sequence[str]) -> dict[str, Any]:
    """The difference of each row from the base, by title and attack."""
    return {
        row.title: {attack: compare(find, row, base, attack) for attack in attacks}
        for row in rows
        if row.title != base.title
    }


def format_differences(found: Mapping[str, Any], base: str, attacks: Sequence[str]) -> list[str]:
    """Markdown: how to read it, and a line for each row with any difference; empty where there is none."""
    lines = [
        f"| {name} | {' | '.join(format_points(row[attack]) for attack in attacks)} |"
        for name, row in found.items()
        if any(value is not None for value in row.values())
    ]
    head = [f"| minus {base}, points | {' | '.join(map(attack_title, attacks))} |", f"| --- |{' --- |' * len(attacks)}"]
    return [INTERVALS, "\n".join([*head, *lines])] if lines else []


def format_points(value: Mapping[str, Any] | None) -> str:
    """A difference as text in a table."""
    if value is None:
        return "not run"
    whole = value["over_seeds"]
    if whole is None:
        return ", ".join(
            f"{seed['estimate']:+.2f} [{seed['low']:+.2f}, {seed['high']:+.2f}]" for seed in value["seeds"]
        )
    return f"**{whole['mean']:+.2f}** [{whole['low']:+.2f}, {whole['high']:+.2f}]"


def sort_by_seed(rows: Sequence[Sequence[Experiment]]) -> list[Experiment]:
    """The experiments of several rows, seed by seed: a table that is half measured has complete rows of fewer seeds."""
    return sorted((experiment for row in rows for experiment in row), key=find_seed)


def attack_title(attack: str) -> str:
    """An attack's name in a table."""
    return "Clean" if attack == "clean" else display_name(attack)


def format_interval(value: tuple[float, float, float] | None) -> str:
    """A mean and its interval as text in a table, empty for None."""
    return "" if value is None else f"**{value[0]:.2f}** <sub>{value[1]:.1f}–{value[2]:.1f}</sub>"
