"""Evaluations, audits and transfers as tables for the terminal."""

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from innermax.attacks.named import display_name
from innermax.evaluation.audit import Audit, write_advice
from innermax.evaluation.result import Convergence, Evaluation
from innermax.evaluation.transfer import Transfer
from innermax.evaluation.verify import Verification
from innermax.threat import format_eps
from innermax.utils.intervals import Accuracy

# Columns and their smallest widths: a narrow terminal loses the last columns, never the names.
_COLUMNS = {
    "accuracy\n%": 8,
    "95 %\ninterval": 12,
    "FOSC\nmedian": 6,
    "FOSC\np90": 5,
    "zero\ngrad. %": 7,
    "gradient\ncalls": 8,
}
_FACTORS = 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0  # of ε, at which a curve is printed
_ATTACKS_ABREAST = 4  # in 80 columns, beside the clean images


def format_table(evaluation: Evaluation) -> Table:
    """A rich table for 80 columns: accuracy on clean images, under each attack and in the worst case; convergence."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=_write_caption(evaluation), caption_justify="left")
    table.add_column("", min_width=10, overflow="fold")
    for heading, width in _COLUMNS.items():
        table.add_column(heading, justify="right", overflow="fold", min_width=width)
    table.add_row("Clean", *_accuracy_cells(evaluation.accuracy["clean"]))
    for name, convergence in evaluation.convergence.items():
        table.add_row(display_name(name), *_accuracy_cells(evaluation.accuracy[name]), *_search_cells(convergence))
    table.add_section()
    table.add_row("Worst case", *_accuracy_cells(evaluation.worst_case), style="bold")
    return table


def format_curve(evaluation: Evaluation, attack: str) -> Table:
    """A rich table of robust accuracy around ε, from an attack that looks for the smallest perturbation.

    At each ε it is the lower of that attack's and of all others' of its norm.
    """
    eps = evaluation.curve([], attack=attack).own_eps
    scale = eps or evaluation.curve(attack=attack).eps[-1]  # where ε is 0, the distance of nearly all images
    curve = evaluation.curve(list(dict.fromkeys(factor * scale for factor in _FACTORS)), attack=attack)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(f"{display_name(attack)}, at other ε"))
    table.title_justify, table.title_style = "left", ""
    for heading in ("ε", "accuracy\n%", "95 %\ninterval"):
        table.add_column(heading, justify="right", min_width=8)
    for size, value in zip(curve.eps, curve.accuracy, strict=True):
        table.add_row(format_eps(size), *_accuracy_cells(value), style="bold" if size == eps else "")
    return table


def format_sizes(evaluations: Mapping[float, Evaluation]) -> Group:
    """Rich tables for 80 columns, one per four attacks: a row per ε, with the accuracy under each attack."""
    first = next(iter(evaluations.values()))
    attacks = list(first.rows)
    parts = [attacks[start : start + _ATTACKS_ABREAST] for start in range(0, len(attacks), _ATTACKS_ABREAST)]
    clean = first.accuracy["clean"]
    caption = (
        f"{first.settings.count:,} examples, of which {100 * clean.value:.2f} % ({_format_interval(clean)}) are "
        "classified correctly without an attack. Accuracy in %, with its 95 % interval below."
    )
    return Group(*(_sizes_table(evaluations, abreast) for abreast in parts), caption)


def _sizes_table(evaluations: Mapping[float, Evaluation], attacks: Sequence[str]) -> Table:
    """Some attacks and the worst case of all: a row per ε."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("ε", justify="right", min_width=8)
    for heading in (*map(display_name, attacks), "Worst case"):
        table.add_column(Text(heading), justify="right", overflow="fold", min_width=10)
    for eps, found in evaluations.items():
        cells = (*(found.accuracy[name] for name in attacks), found.worst_case)
        table.add_row(format_eps(eps), *(f"{100 * cell.value:.2f}\n{_format_interval(cell)}" for cell in cells))
    return table


def format_audit(audit: Audit, source: str | None = None) -> Text:
    """The audit's verdict and, where it found a failure, its causes, evidence and advice.

    source: the run or model that was audited, for `write_advice`.
    """
    if audit.verdict in ("no failure found", "nothing to audit"):
        return Text(audit.sentence)
    text = Text(audit.sentence, style="bold")
    found = audit.evidence
    lines = [f"Cause: {cause}." for cause in audit.causes]
    fallen = [f"{name} {count}" for name, count in found.fallen.items() if count]
    if fallen:
        lines.append(f"Fell to: {', '.join(fallen)} of {found.sampled} tried.")
    lines.append(f"Advice: {write_advice(audit, source)}")
    return text.append("\n" + "\n".join(lines), style="not bold")


def format_verification(found: Verification) -> Group:
    """The checks, each with ok, NO or nothing in front, and the verdict."""
    signs = {True: "ok", False: "NO", None: ""}
    checks = Table.grid(padding=(0, 2, 0, 0))
    for check in found.checks:
        checks.add_row(signs[check.passed], f"{check.name}: {check.evidence}")
    verdict = Text(f"{found.verdict.capitalize()}.", style="bold")
    proof = "" if found.refuted else " That is no proof: something that was not tried may still refute it."
    return Group(checks, verdict.append(proof, style="not bold"))


def format_transfer(transfer: Transfer) -> Group:
    """Rich tables for 80 columns, one per surrogate and four attacks: each target's accuracy, clean and transferred."""
    attacks = list(transfer.settings.attacks)
    rows = [attacks[start : start + _ATTACKS_ABREAST] for start in range(0, len(attacks), _ATTACKS_ABREAST)]
    tables = [_transfer_table(transfer, surrogate, abreast) for surrogate in transfer.accuracy for abreast in rows]
    caption = f"{transfer.settings.count:,} examples. Accuracy in %, with its 95 % interval below."
    if transfer.white_box:
        caption += " White box: the target is the surrogate."
    return Group(*tables, caption)


def _transfer_table(transfer: Transfer, surrogate: str, attacks: Sequence[str]) -> Table:
    """The images of one surrogate: a row per target, a column per attack."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1), title_justify="left", title_style="")
    table.title = Text(f"Images made on {surrogate}")
    table.add_column("target", min_width=10, overflow="fold")
    for heading in ("Clean", *map(display_name, attacks)):
        table.add_column(Text(heading), justify="right", overflow="fold", min_width=10)
    for target, accuracy in transfer.accuracy[surrogate].items():
        name = Text(target + ("\n(white box)" if (surrogate, target) in transfer.white_box else ""))
        cells = (transfer.clean_accuracy[target], *(accuracy[attack] for attack in attacks))
        table.add_row(name, *(f"{100 * cell.value:.2f}\n{_format_interval(cell)}" for cell in cells))
    return table


def _write_caption(evaluation: Evaluation) -> str:
    count = f"{evaluation.settings.count:,} examples."
    if not evaluation.rows:
        return count
    reached = (
        f" {display_name(name)}: {100 * value.value:.2f} % ({_format_interval(value)}) are taken for the target."
        for name, value in evaluation.reached.items()
    )
    return (
        f"{count}{''.join(reached)} FOSC and zero gradients are those of survivors. FOSC near 0 means that the "
        "search converged; a zero gradient gives it nothing to follow, and is left out of FOSC. Gradient calls are per "
        "example."
    )


def _accuracy_cells(value: Accuracy) -> tuple[str, str]:
    return f"{100 * value.value:.2f}", f"{100 * value.low:.2f}–{100 * value.high:.2f}"


def _format_interval(value: Accuracy) -> str:
    return f"{100 * value.low:.1f}–{100 * value.high:.1f}"


def _search_cells(convergence: Convergence) -> tuple[str, ...]:
    survivors = convergence.survivors
    zero = "–" if math.isnan(survivors.zero_gradient) else f"{100 * survivors.zero_gradient:.1f}"
    return (
        _format_number(survivors.fosc_median),
        _format_number(survivors.fosc_p90),
        zero,
        f"{convergence.gradients:,.1f}",
    )


def _format_number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2g}"
