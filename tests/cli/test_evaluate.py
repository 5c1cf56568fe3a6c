"""innermax evaluate."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests.helpers.commands import refused, said
from tests.helpers.recipes import FAST


def test_train_then_evaluate(folder, capsys):
    assert said(capsys, "train", "mnist", "--run-dir", "run", *FAST)[0] == 0
    before = Path("run/metrics.jsonl").read_text()
    assert said(capsys, "train", "mnist", "--run-dir", "run", *FAST)[0] == 0, "a finished run is only evaluated again"
    assert Path("run/metrics.jsonl").read_text() == before
    status, out, err = said(capsys, "evaluate", "run", "--attacks", "fgsm,pgd-2", "--limit", "3", "--json", "s.json")
    assert (status, err) == (0, "")
    assert all(name in out for name in ("Clean", "FGSM", "PGD-2", "Worst case"))
    scores = json.loads(Path("s.json").read_text())
    assert scores["settings"]["count"] == 3
    assert len(scores["examples"]["index"]) == 3
    said(capsys, "evaluate", "run", "--attacks", "fgsm", "--limit", "first:3", "--json", "first.json")
    assert "index" not in json.loads(Path("first.json").read_text())["examples"]
    assert "eps=0.3" in scores["settings"]["attacks"]["pgd-2"]
    assert said(capsys, "evaluate", "run", "--threat.norm", "l2", "--threat.eps", "1/2", "--json", "t.json")[0] == 0
    assert "L2(eps=0.5" in json.loads(Path("t.json").read_text())["settings"]["attacks"]["fgsm"]
    assert "give --threat.eps" in refused(capsys, "evaluate", "run", "--threat.norm", "l2")
    assert "folder does not exist" in refused(capsys, "evaluate", "run", "--json", "no/where.json")
    best = said(capsys, "evaluate", "run", "--best", "--attacks", "fgsm", "--quantize", "8")
    assert best[0] == 0
    assert said(capsys, "train", "mnist", "--run-dir", "next", "--init", "run", *FAST)[0] == 0


def test_rows_are_kept_and_named(folder, capsys, monkeypatch):
    assert said(capsys, "train", "mnist", "--run-dir", "run", *FAST)[0] == 0
    words = ["evaluate", "run", "--attacks", "fgsm,pgd-2"]
    assert said(capsys, *words)[0] == 0
    (own,) = Path("run/rows").iterdir()
    assert f"{own}/rows.parquet" in said(capsys, *words)[1]
    assert pyarrow.parquet.read_table(own / "rows.parquet").num_rows == 4
    assert said(capsys, *words, "--seed", "1")[0] == 0
    assert len(list(Path("run/rows").iterdir())) == 2
    assert said(capsys, *words, "--rows-dir", "mine")[0] == 0
    assert "seed: 0 there, 1 here" in refused(capsys, *words, "--rows-dir", "mine", "--seed", "1")
    assert "devices must be at least 1" in refused(capsys, *words, "--devices", "0")

    def broken(error):
        def call(*_, **__):
            raise error

        return call

    monkeypatch.setattr("innermax.attacks.pgd.PGD.__call__", broken(ValueError("it\nbroke")))
    assert "it broke Rows that are finished are kept in part:" in refused(capsys, *words, "--rows-dir", "part")
    monkeypatch.setattr("innermax.attacks.pgd.PGD.__call__", broken(KeyboardInterrupt()))
    status, _, err = said(capsys, *words, "--rows-dir", "part")
    assert (status, err.count("\n")) == (130, 1)
    assert "kept in part" in err
