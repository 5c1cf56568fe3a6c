"""What the terminal shows of an evaluation."""

import math

from rich import box
from rich.table import Table

from innermax.evaluation import Convergence, Evaluation
from innermax.statistics import Accuracy

# The columns and the width below which each would be cut: a narrow terminal loses the last ones, never the names.
_COLUMNS = {
    "accuracy\n%": 8,
    "95 %\ninterval": 12,
    "FOSC\nmedian": 6,
    "FOSC\np90": 5,
    "zero\ngrad. %": 7,
    "gradient\ncalls": 8,
}


def format_table(evaluation: Evaluation) -> Table:
    """A rich table for 80 columns: accuracy on clean images, under each attack and in the worst case; convergence."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=_caption(evaluation), caption_justify="left")
    table.add_column("", min_width=10, overflow="fold")
    for heading, width in _COLUMNS.items():
        table.add_column(heading, justify="right", overflow="fold", min_width=width)
    table.add_row("Clean", *_accuracy(evaluation.accuracy["clean"]))
    for name, convergence in evaluation.convergence.items():
        table.add_row(shown_name(name), *_accuracy(evaluation.accuracy[name]), *_search(convergence))
    table.add_section()
    table.add_row("Worst case", *_accuracy(evaluation.worst_case), style="bold")
    return table


def shown_name(name: str) -> str:
    """An attack's name as tables print it: FGSM, PGD-20, C&W∞ for "fgsm", "pgd-20", "cw-30"; others as they are."""
    if name.startswith("cw-"):
        return "C&W∞" if name == "cw-30" else f"C&W∞-{name.removeprefix('cw-')}"
    return name.upper() if name == "fgsm" or name.startswith("pgd-") else name


def _caption(evaluation: Evaluation) -> str:
    count = f"{evaluation.settings.count:,} examples."
    if not evaluation.rows:
        return count
    return (
        f"{count} FOSC and zero gradients are the survivors': FOSC near 0 says that the search has converged; a zero "
        "gradient gave it nothing to follow, and is left out of FOSC. Gradient calls are per example."
    )


def _accuracy(value: Accuracy) -> tuple[str, str]:
    return f"{100 * value.value:.2f}", f"{100 * value.low:.2f}–{100 * value.high:.2f}"


def _search(convergence: Convergence) -> tuple[str, ...]:
    survivors = convergence.survivors
    zero = "–" if math.isnan(survivors.zero_gradient) else f"{100 * survivors.zero_gradient:.1f}"
    return _number(survivors.fosc_median), _number(survivors.fosc_p90), zero, f"{convergence.gradients:,.1f}"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2g}"
