"""Defences side by side: accuracies over seeds, and differences paired over images and seeds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from innermax.attacks.guided_pgd import GuidedPGD
from innermax.attacks.named import named_attack
from innermax.reporting.tables import shown_name
from innermax.reproduce.artifact import Known
from innermax.reproduce.cache import Question, seed_of
from innermax.reproduce.experiments import Attacks, Scored, Trained, bits
from innermax.reproduce.scales import Scale, Training
from innermax.threat import Linf
from innermax.utils.intervals import paired_difference, student

TABLE = ("fgsm", "pgd-10", "pgd-20", "cw-30")  # the attacks of the paper's tables
STRONGEST = "guided"
FEW = 500  # images it is run on
INTERVALS = (
    "Differences on the same images and seeds; in brackets Student's 95 % interval over seeds, or, with fewer than "
    "three, the interval over images of each."
)


def attacks_of(eps: float, names: Sequence[str] = TABLE) -> Attacks:
    """The attacks of these names, on L∞ balls of this size."""
    return tuple((name, named_attack(name, Linf(eps))) for name in names)


def strongest(scale: Scale, eps: float) -> Attacks:
    """The guided attack, about as strong as AutoAttack, so that nobody takes masked gradients for robustness."""
    return ((STRONGEST, GuidedPGD(Linf(eps), budget=scale.budget)),)


def asked_of(scale: Scale, data: str, names: Sequence[str] = TABLE) -> list[tuple[Attacks, int | None]]:
    """Attacks of these names on all of a scale's test images, and the guided one on fewer."""
    eps, images = getattr(scale, data).eps, scale.images[data]
    return [(attacks_of(eps, names), images), (strongest(scale, eps), min(images or FEW, FEW))]


@dataclass(frozen=True)
class Row:
    """One defence in a table.

    Args:
        title: what the table calls it.
        trainings: one a seed.
        asked: attacks, and on how many images; each training is asked for all.
        paper: accuracies in per cent by attack, as the paper prints them.
        options: of the questions, beside these, as `Scored` names them.
    """

    title: str
    trainings: Sequence[Training]
    asked: Sequence[tuple[Attacks, int | None]]
    paper: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def scored(self, training: Training) -> list[Scored]:
        """What one training is asked."""
        return [Scored(training, attacks, images, **self.options) for attacks, images in self.asked]

    def seeds(self, attack: str) -> list[Scored]:
        """The questions that ask for an attack, or first for "clean", one a seed."""
        place = next((n for n, (attacks, _) in enumerate(self.asked) if attack in dict(attacks)), 0)
        return [self.scored(training)[place] for training in self.trainings]

    def questions(self) -> list[Question]:
        """All that the row needs."""
        asked: list[Question] = []
        for training in self.trainings:
            asked += [Trained(training), *self.scored(training)]
        return asked

    def numbers(self, known: Known) -> dict[str, Any]:
        """{"title", "paper", "seeds": {seed: {"gradients", "seconds", "accuracy": {attack: …}}}} of what is known."""
        seeds = {}
        for training in self.trainings:
            trained = known(Trained(training))
            answers = [answer for answer in map(known, self.scored(training)) if answer is not None]
            if trained is None or not answers:
                continue
            measured: dict[str, Any] = {}
            for answer in reversed(answers):  # of clean images the first question asks most
                measured |= {
                    name: {key: value[key] for key in ("accuracy", "low", "high", "total")}
                    for name, value in answer.items()
                    if isinstance(value, Mapping) and "accuracy" in value
                }
            seeds[str(training.seed)] = {
                "epochs": training.setting.epochs,
                "gradients": sum(row["gradients"] for row in trained["history"]),  # an example, over the training
                "seconds": round(sum(row["seconds"] for row in trained["history"]), 1),
                "environment": trained["environment"],
                "accuracy": measured,
            }
        return {"title": self.title, "paper": dict(self.paper), "seeds": seeds}


def spread(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean and Student's 95 % interval of it over seeds; None for fewer than three, which say little."""
    if len(values) < 3:
        return None
    found = student(values)
    return found.estimate, found.low, found.high


def accuracy_over_seeds(row: Mapping[str, Any], attack: str) -> tuple[float, float, float] | None:
    """Mean accuracy in per cent and its 95 % interval: over seeds from three on, else over images (Wilson)."""
    found = [seed["accuracy"][attack] for seed in row["seeds"].values() if attack in seed["accuracy"]]
    if not found:
        return None
    over_seeds = spread([100 * value["accuracy"] for value in found])
    if over_seeds is not None:
        return over_seeds
    mean = statistics.mean(100 * value["accuracy"] for value in found)
    return mean, 100 * min(value["low"] for value in found), 100 * max(value["high"] for value in found)


def table(rows: Sequence[Mapping[str, Any]], attacks: Sequence[str]) -> str:
    """Markdown: a line a defence, each attack's accuracy with its interval, the paper's beside it where it has one."""
    papers = [attack for attack in attacks if any(attack in row["paper"] for row in rows)]
    heads = []
    for attack in attacks:
        heads += [title(attack), *(["paper"] if attack in papers else [])]
    lines = [
        f"| defence | seeds | gradients | {' | '.join(heads)} |",
        f"| --- | --- | --- |{' ---: |' * len(heads)}",
    ]
    for row in rows:
        cells = []
        for attack in attacks:
            cells.append(_cell(accuracy_over_seeds(row, attack)))
            if attack in papers:
                cells.append(f"*{row['paper'][attack]:.2f}*" if attack in row["paper"] else "")
        spent = [seed["gradients"] for seed in row["seeds"].values()]
        seeds, cost = (f"{len(spent)}", f"{statistics.mean(spent):.0f}") if spent else ("not run", "")
        lines.append(f"| {row['title']} | {seeds} | {cost} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(known: Known, one: Row, other: Row, attack: str) -> dict[str, Any] | None:
    """How two defences' accuracies differ, in points: paired over the images of a seed, then Student's over seeds."""
    seeds = []
    for pair in zip(one.seeds(attack), other.seeds(attack), strict=True):
        first, second = map(known, pair)
        if first is None or second is None:
            continue
        mine, theirs = bits(first[attack]), bits(second[attack])
        paired = paired_difference(int((mine & ~theirs).sum()), int((theirs & ~mine).sum()), len(mine))
        seeds.append({name: 100 * getattr(paired, name) for name in ("estimate", "low", "high")})
    if not seeds:
        return None
    whole = spread([seed["estimate"] for seed in seeds])
    over_seeds = None if whole is None else dict(zip(("mean", "low", "high"), whole, strict=True))
    return {"seeds": seeds, "over_seeds": over_seeds}


def differences(known: Known, rows: Sequence[Row], base: Row, attacks: Sequence[str]) -> dict[str, Any]:
    """How each other row differs from the base, by title and attack."""
    return {
        row.title: {attack: difference(known, row, base, attack) for attack in attacks}
        for row in rows
        if row.title != base.title
    }


def differences_table(found: Mapping[str, Any], base: str, attacks: Sequence[str]) -> list[str]:
    """Markdown: how to read it, and a line for each row of which anything is known; nothing where there is none."""
    lines = [
        f"| {name} | {' | '.join(points(row[attack]) for attack in attacks)} |"
        for name, row in found.items()
        if any(value is not None for value in row.values())
    ]
    head = [f"| minus {base}, points | {' | '.join(map(title, attacks))} |", f"| --- |{' --- |' * len(attacks)}"]
    return [INTERVALS, "\n".join([*head, *lines])] if lines else []


def points(value: Mapping[str, Any] | None) -> str:
    """A difference as a table shows it."""
    if value is None:
        return "not run"
    whole = value["over_seeds"]
    if whole is None:
        return ", ".join(
            f"{seed['estimate']:+.2f} [{seed['low']:+.2f}, {seed['high']:+.2f}]" for seed in value["seeds"]
        )
    return f"**{whole['mean']:+.2f}** [{whole['low']:+.2f}, {whole['high']:+.2f}]"


def by_seed(rows: Sequence[Sequence[Question]]) -> list[Question]:
    """The questions of several rows, the first seed of all of them before the second: half a table is whole rows."""
    return sorted((question for row in rows for question in row), key=seed_of)


def title(attack: str) -> str:
    """An attack's name as a table shows it."""
    return "Clean" if attack == "clean" else shown_name(attack)


def _cell(value: tuple[float, float, float] | None) -> str:
    return "" if value is None else f"**{value[0]:.2f}** <sub>{value[1]:.1f}–{value[2]:.1f}</sub>"
