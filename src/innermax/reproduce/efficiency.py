"""Beyond the paper: training that spends fewer gradients for the same robustness."""

from typing import TYPE_CHECKING, Any

from innermax.attacks.pgd import PGD
from innermax.reproduce import plots
from innermax.reproduce.artifact import Artifact, Find, Numbers
from innermax.reproduce.cache import Experiment
from innermax.reproduce.comparison import (
    FEW_IMAGES,
    STRONGEST,
    TABLE_ATTACKS,
    TableRow,
    compare_all,
    format_differences,
    list_attacks,
    markdown_table,
    mean_accuracy,
    sort_by_seed,
)
from innermax.reproduce.scales import Scale, Training
from innermax.strategies import Standard, Strategy, WarmStart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STRONG = "pgd-100 × 3"
_SHOWN = ("clean", *TABLE_ATTACKS, _STRONG, STRONGEST)


def _row(scale: Scale, name: str, strategy: Strategy) -> TableRow:
    """A strategy, attacked with the paper's attacks on all test images and with the strong ones on fewer."""
    plain, strongest = list_attacks(scale, "mnist")
    threat = scale.mnist.threat
    restarted = PGD(threat, 100, threat.eps / 10, restarts=3, stop_on_success=True)
    trainings = [Training(scale.mnist, strategy, seed) for seed in range(scale.seeds["mnist"])]
    return TableRow(name, trainings, [plain, (((_STRONG, restarted),), strongest[1]), strongest])


def _rows(scale: Scale) -> list[TableRow]:
    """Standard, the strategies that spend fewer gradients, and the paper's."""
    setting = scale.mnist
    sizes = tuple(setting.eps * share for share in (1, 1, 1 / 2, 1 / 4))
    return [
        _row(scale, "Standard", setting.strategy("standard")),
        _row(scale, "WarmStart, 2 steps", WarmStart(setting.pgd())),
        _row(scale, "WarmStart, 1 step", WarmStart(setting.pgd(), steps=1)),
        _row(scale, "Dynamic as published", setting.strategy("dynamic")),
        _row(scale, "Standard, 4 shrinking steps", Standard(setting.pgd(steps=4, step_size=sizes))),
        _row(scale, "Curriculum", setting.strategy("curriculum")),
        _row(scale, "FGSM→PGD", setting.strategy("fgsm-pgd")),
    ]


def _experiments(scale: Scale) -> list[Experiment]:
    return sort_by_seed([row.experiments() for row in _rows(scale)])


def _numbers(scale: Scale, find: Find) -> dict[str, Any]:
    rows = _rows(scale)
    return {
        "rows": [row.numbers(find) for row in rows],
        "differences": compare_all(find, rows, rows[0], _SHOWN),
    }


def _text(numbers: Numbers) -> str:
    parts = [
        "MNIST, accuracy in %. *Gradients* are input gradients per training image over the whole training. The last "
        f"two columns are measured on the first {FEW_IMAGES:,} test images: PGD-100 with step ε/10 and three restarts, "
        "and the guided attack, a cheaper stand-in for AutoAttack.",
        markdown_table(numbers["rows"], _SHOWN),
        *format_differences(numbers["differences"], "Standard", _SHOWN),
    ]
    return "\n\n".join(parts)


def _draw(numbers: Numbers, figure: "Figure") -> None:
    """Draws robust accuracy under the strongest attack against gradients spent."""
    found = []
    for number, row in enumerate(numbers["rows"]):  # so that a row has the same colour whichever others were run
        value = mean_accuracy(row, STRONGEST)
        spent = [seed["gradients"] for seed in row["seeds"].values()]
        if value is not None:
            seeds = f"{len(spent)} seed{'s' if len(spent) > 1 else ''}"
            found.append((number, f"{row['title']} ({seeds})", sum(spent) / len(spent), value))
    plots.draw_frontier(found, figure)


ARTIFACTS = (Artifact("cheaper", "Robust accuracy against gradients spent", _experiments, _numbers, _text, _draw),)
