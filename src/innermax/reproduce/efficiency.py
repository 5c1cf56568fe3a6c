"""Past the paper: training that pays only for the convergence it needs, at equal strength."""

from typing import TYPE_CHECKING, Any

from innermax.attacks.pgd import PGD
from innermax.reproduce import plots
from innermax.reproduce.artifact import Known, Numbers, Piece
from innermax.reproduce.cache import Question
from innermax.reproduce.comparison import (
    FEW,
    STRONGEST,
    TABLE,
    Row,
    accuracy_over_seeds,
    asked_of,
    by_seed,
    differences,
    differences_table,
    table,
)
from innermax.reproduce.scales import Scale, Training
from innermax.strategies import Standard, Strategy, WarmStart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STRONG = "pgd-100 × 3"
_SHOWN = ("clean", *TABLE, _STRONG, STRONGEST)


def _row(scale: Scale, name: str, strategy: Strategy) -> Row:
    """A strategy under the paper's attacks on all test images, and the strong ones on fewer."""
    plain, strongest = asked_of(scale, "mnist")
    threat = scale.mnist.threat
    restarted = PGD(threat, 100, threat.eps / 10, restarts=3, stop_on_success=True)
    trainings = [Training(scale.mnist, strategy, seed) for seed in range(scale.seeds["mnist"])]
    return Row(name, trainings, [plain, (((_STRONG, restarted),), strongest[1]), strongest])


def _rows(scale: Scale) -> list[Row]:
    """Standard, the strategies that spend less, and the paper's."""
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


def _questions(scale: Scale) -> list[Question]:
    return by_seed([row.questions() for row in _rows(scale)])


def _numbers(scale: Scale, known: Known) -> dict[str, Any]:
    rows = _rows(scale)
    return {
        "rows": [row.numbers(known) for row in rows],
        "differences": differences(known, rows, rows[0], _SHOWN),
    }


def _text(numbers: Numbers) -> str:
    parts = [
        "MNIST, accuracy in %. *Gradients* are input gradients a training image over the whole training. The last two "
        f"columns are on the first {FEW:,} test images: PGD-100 with step ε/10 and three restarts, and the guided "
        "attack, about as strong as AutoAttack.",
        table(numbers["rows"], _SHOWN),
        *differences_table(numbers["differences"], "Standard", _SHOWN),
    ]
    return "\n\n".join(parts)


def _draw(numbers: Numbers, figure: "Figure") -> None:
    """Robust accuracy under the strongest attack against gradients."""
    found = []
    for number, row in enumerate(numbers["rows"]):  # a row looks the same whichever others were run
        value = accuracy_over_seeds(row, STRONGEST)
        spent = [seed["gradients"] for seed in row["seeds"].values()]
        if value is not None:
            seeds = f"{len(spent)} seed{'s' if len(spent) > 1 else ''}"
            found.append((number, f"{row['title']} ({seeds})", sum(spent) / len(spent), value))
    plots.frontier(found, figure)


PIECES = (Piece("cheaper", "Robust accuracy against gradients spent", _questions, _numbers, _text, _draw),)
