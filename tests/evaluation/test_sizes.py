"""One evaluation at each of several ε."""

from types import SimpleNamespace

import numpy as np
import pytest

import innermax as im
from innermax.reporting.tables import format_sizes
from tests.helpers.evaluation import Scripted, linear_problem

ATTACKS = {"fgsm": im.FGSM(im.Linf(0.5)), "pgd": im.PGD(im.L2(1.0), steps=4, step_size=0.05)}


@pytest.fixture(scope="module")
def problem():
    return linear_problem()


def evaluate(problem, eps, **options):
    model, x, y, *_ = problem
    return im.evaluate_each_eps(model, (x, y), ATTACKS, eps, audit=False, **options)


def test_each_is_an_evaluation_of_its_own(problem):
    model, x, y, margin, weight = problem
    found = evaluate(problem, [0.1, 0, np.float64(0.05)], seed=3)
    assert list(found) == [0.1, 0, 0.05]
    for eps, evaluation in found.items():
        robust = margin > eps * weight.abs().sum()
        assert evaluation.accuracy["fgsm"].correct == int(robust.sum())
        own = {"fgsm": im.FGSM(im.Linf(eps)), "pgd": im.PGD(im.L2(eps), steps=4, step_size=0.05)}
        alone = im.evaluate(model, (x, y), own, audit=False, seed=3)
        assert alone.settings == evaluation.settings
        for key, column in alone.columns().items():
            np.testing.assert_array_equal(column, evaluation.columns()[key])
    assert found[0].worst_case == found[0].accuracy["clean"]


def test_rows_are_kept_by_size(problem, tmp_path, monkeypatch):
    first = evaluate(problem, [0.1], rows_dir=tmp_path / "rows")
    both = evaluate(problem, [0.05, 0.1], rows_dir=tmp_path / "rows")
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == ["eps-0.05", "eps-0.1"]
    monkeypatch.setattr(im.PGD, "__call__", lambda *_, **__: pytest.fail("attacked again"))
    again = evaluate(problem, (0.1, 0.05), rows_dir=tmp_path / "rows")
    assert first[0.1].accuracy == both[0.1].accuracy == again[0.1].accuracy
    assert both[0.05].accuracy == again[0.05].accuracy


def test_the_table_has_a_row_for_each(problem):
    found = evaluate(problem, [0.05, 0.1])
    (table, caption) = format_sizes(found).renderables
    assert list(table.columns[0].cells) == ["0.05", "0.1"]
    assert [column.header.plain if hasattr(column.header, "plain") else column.header for column in table.columns] == [
        "ε",
        "FGSM",
        "pgd",
        "Worst case",
    ]
    worst = [cell.split("\n")[0] for cell in table.columns[3].cells]
    assert worst == [f"{100 * evaluation.worst_case.value:.2f}" for evaluation in found.values()]
    assert f"{100 * found[0.1].accuracy['clean'].value:.2f} % (" in caption


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("attacks", "eps", "error", "message"),
    [
        (ATTACKS, [], ValueError, "eps must hold at least one number and none twice, got \\[\\]"),
        (ATTACKS, [0.1, 0.1], ValueError, "none twice"),
        (ATTACKS, 0.1, TypeError, "eps must be a list of numbers, got 0.1"),
        (ATTACKS, ["0.1"], TypeError, "eps must be a list of numbers"),
        (ATTACKS, [0.1, -1.0], ValueError, "eps must be a finite number of at least 0, got -1.0"),
        (ATTACKS, [0.1, 7.0], ValueError, "eps must be at most"),
        ({}, [0.1], ValueError, "attacks must hold at least one attack, got none"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_search(problem, monkeypatch, attacks, eps, error, message):
    monkeypatch.setattr("innermax.evaluation.sizes.evaluate", lambda *_, **__: pytest.fail("searched"))
    model, x, y, *_ = problem
    with pytest.raises(error, match=message):
        im.evaluate_each_eps(model, (x, y), attacks, eps)


class Plain:
    threat = im.Linf(0.1)

    def __call__(self, model, x, y, *, seed=0, index=None, final="gradient"):
        return SimpleNamespace()


def test_own_attacks_are_resized_where_they_are_values(problem):
    model, x, y, *_ = problem
    own = {"far": Scripted(im.Linf(0.3), lambda x, y, index: x + 1)}
    found = im.evaluate_each_eps(model, (x, y), own, [0.02, 0.1], audit=False, keep_images=True)
    for eps, evaluation in found.items():
        assert float(np.abs(evaluation.images["far"] - x.numpy()).max()) == pytest.approx(eps, abs=1e-6)
    with pytest.raises(TypeError, match=r"attacks\['plain'\] must be a dataclass"):
        im.evaluate_each_eps(model, (x, y), {"plain": Plain()}, [0.1])


def test_a_size_beyond_the_bounds_of_l2_is_said_first(problem, monkeypatch):
    monkeypatch.setattr("innermax.evaluation.sizes.evaluate", lambda *_, **__: pytest.fail("searched"))
    model, x, y, *_ = problem
    with pytest.raises(ValueError, match="eps must be at most 3"):
        im.evaluate_each_eps(model, (x, y), {"pgd": im.PGD(im.L2(1.0))}, [0.1, 5.0])
