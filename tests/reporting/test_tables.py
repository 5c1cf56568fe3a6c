"""Tables in a terminal."""

import io
import itertools

import pytest
from rich.console import Console

import innermax as im
from innermax.evaluation.audit import judge
from innermax.reporting.tables import format_audit, format_curve, format_table, format_transfer
from tests.helpers.audits import evidence
from tests.helpers.evaluation import Scripted, examples, network


def test_the_table_of_an_evaluation_fits_80_columns():
    attacks = {
        "pgd-20": im.PGD(im.Linf(0.1), steps=5),
        "cw": im.CW(im.Linf(0.1), 3),
        "an attack with a rather long name": im.FGSM(im.L2(0.5)),
    }
    attacks["no-gauge"] = Scripted(im.L2(0.1), lambda x, y, index: x)
    evaluation = im.evaluate(network(), examples(), attacks)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(format_table(evaluation))
    text = console.export_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    row = next(line for line in lines if "PGD-20" in line).split()
    found = evaluation.accuracy["pgd-20"]
    assert row[1:3] == [f"{100 * found.value:.2f}", f"{100 * found.low:.2f}–{100 * found.high:.2f}"]
    assert row[3] == f"{evaluation.convergence['pgd-20'].survivors.fosc_median:.2g}"
    assert row[-1] == "6.0"
    assert next(line for line in lines if "no-gauge" in line).split()[3:6] == ["–"] * 3
    assert any("Worst case" in line for line in lines)


def shown(result, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(format_transfer(result))
    return console.export_text()


def test_the_table_of_a_transfer_fits_80_columns():
    model = network(0)
    attacks = {"fgsm": im.FGSM(im.Linf(0.1)), "pgd": im.PGD(im.Linf(0.1), steps=4)}
    attacks |= {"cw-30": im.CW(im.Linf(0.1), 3), "no-step": Scripted(im.Linf(0.1), lambda x, y, index: x)}
    attacks["an attack with a rather long name"] = im.FGSM(im.L2(0.5))
    targets = {"itself": model, "runs/a name that is longer than its column": network(1), "[/odd]": network(2)}
    result = im.transfer({"itself": model, "[b]": network(3)}, targets, examples(), attacks)
    text = shown(result)
    lines = [line.strip() for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert lines.count("Images made on itself") == lines.count("Images made on [b]") == 2, "four attacks abreast"
    assert "C&W∞" in text
    row = next(number for number, line in enumerate(lines) if line.startswith("itself"))
    cells = [result.clean_accuracy["itself"], *list(result.accuracy["itself"]["itself"].values())[:4]]
    assert lines[row].split()[1:] == [f"{100 * cell.value:.2f}" for cell in cells]
    below = [f"{100 * cell.low:.1f}–{100 * cell.high:.1f}" for cell in cells]
    assert lines[row + 1].split() == ["(white", "box)", *below]
    assert text.count("(white box)") == 2
    assert "[/odd]" in text
    assert "White box: the target is the surrogate." in " ".join(lines)
    assert "hite box" not in shown(im.transfer(model, {"b": network(1)}, examples(), {"fgsm": im.FGSM(im.Linf(0.1))}))


@pytest.mark.parametrize("width", [60, 80])
def test_the_text_of_an_audit(width):
    audit = judge(evidence(total_gain=0.123, zero_margin_gradient=1.0, passed=("round",), fallen={"margin": 7}))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(format_audit(audit))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    for words in ("gradients masked", "at least 12.3 points", "(stopped by round)", "margin 7 of 25", "Advice: attack"):
        assert words in flat
    assert "innermax evaluate RUN --attacks square-5000" in flat
    assert "innermax evaluate 'my run' --best --attacks square" in format_audit(audit, "'my run' --best").plain
    console.print(format_audit(judge(evidence())))
    assert "no failure found" in " ".join(console.export_text().split())


def test_the_table_of_a_curve():
    evaluation = im.evaluate(network(), examples(), {"fmn-9": im.FMN(im.Linf(8 / 255), 9)}, audit=False)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(format_curve(evaluation, "fmn-9"))
    rows = [line.split() for line in console.export_text().splitlines() if line[:8].strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["2/255", "4/255", "6/255", "8/255", "10/255", "12/255", "16/255"]
    assert rows[3][1] == f"{100 * evaluation.accuracy['fmn-9'].value:.2f}"
    assert all(float(one[1]) >= float(other[1]) for one, other in itertools.pairwise(rows))
