"""innermax transfer."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

import innermax as im
from tests.helpers.commands import said


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with different ε, as far as they are read, and models without a run."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, (name, eps) in enumerate({"run": 0.15, "wide": 0.5, "bare": None}.items()):
        torch.manual_seed(seed)
        im.save_model(folder / name, im.build_model("digits-cnn", input_shape=(1, 8, 8)))
        if eps is not None:
            settings = {"data": "digits", "threat": {"norm": "linf", "eps": eps}}
            (folder / name / "config.yaml").write_text(yaml.safe_dump({"settings": settings}))
    im.save_model(folder / "few", im.build_model("digits-cnn", num_classes=4, input_shape=(1, 8, 8)))
    im.save_model(folder / "large", im.build_model("mnist-cnn", input_shape=(3, 28, 28)))
    return folder


def test_the_command(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    words = ("--attacks", "fgsm,pgd-2", "--limit", "50", "--batch-size", "30", "--json", "t.json")
    status, out, err = said(capsys, "transfer", "run", "bare", str(runs / "run"), *words)
    assert (status, err) == (0, "")
    assert "Images made on run" in out
    assert all(heading in out for heading in ("Clean", "FGSM", "PGD-2", "bare", "(white box)", "50 examples."))
    result = im.Transfer.from_json(Path("t.json").read_text())
    index = result.columns()["index"][:50].tolist()
    assert index == sorted(set(index)) != list(range(50)), "a random sample, by its numbers in the test set"
    assert result.white_box == (("run", str(runs / "run")),), "one place is one model, however it is spelled"
    assert "eps=0.15" in result.settings.attacks["pgd-2"], "the run's own"
    test = im.load_data("digits", validation=0).test.sample(50, seed=0)
    threat, model = im.Linf(0.15), im.load_model("run")
    attacks = {"fgsm": im.FGSM(threat), "pgd-2": im.PGD(threat, steps=2)}
    evaluation = im.evaluate(model, test, attacks, batch_size=30, precision="auto")
    assert result.accuracy["run"][str(runs / "run")] == {name: evaluation.accuracy[name] for name in attacks}
    expected = im.transfer(model, {"bare": im.load_model("bare")}, test, attacks, batch_size=30, precision="auto")
    assert result.accuracy["run"]["bare"] == expected.accuracy["surrogate"]["bare"]
    again = ("--rows-dir", "rows", "--devices", "1")
    repeated = said(capsys, "transfer", "run", "bare", str(runs / "run"), *words, *again)
    assert (repeated.status, repeated.err) == (0, "")
    assert repeated.out == out.partition("Example by example: ")[0] + "Example by example: rows/rows.parquet\n"
    assert im.Transfer.from_json(Path("t.json").read_text()).to_json() == result.to_json()
    assert Path("rows/rows.parquet").is_file()
    shutil.rmtree("rows")


def test_the_command_asks_where_runs_differ(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    status, _, err = said(capsys, "transfer", "bare", "run", "wide", "--limit", "8", "--attacks", "fgsm")
    assert (status, err) == (2, "innermax: run and wide differ in their threat: give --threat.norm and --threat.eps\n")
    options = ["--threat.norm", "l2", "--threat.eps", "1/2", "--limit", "8", "--attacks", "fgsm"]
    status, out, err = said(capsys, "transfer", "bare", "run", "wide", *options)
    assert (status, err) == (0, "")
    assert "Images made on bare" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run"], "transfer takes a surrogate and then its targets"),
        (["--attacks", "fgsm"], "transfer takes a surrogate and then its targets"),
        (["run", "nowhere"], "nowhere"),
        (["bare", "few"], "the data set is not known: give --data"),
        (["bare", "few", "--data", "digits"], "is not known: give --threat.eps"),
        (["run", "few"], "must have the same classes: surrogate 'run' has 10, target 'few' has 4"),
        (["run", "large"], "target 'large': the model fails on x of shape (32, 1, 8, 8)"),
        (["run", "bare", "--attacks", "pdg-10"], "did you mean 'pgd-10'"),
        (["run", "bare", "--attacks", ""], "at least one attack"),
        (["run", "bare", "--devices", "0"], "devices must be at least 1, got 0"),
        (["run", "bare", "--limit", "0"], "limit must be at least 1, got 0"),
        (
            ["run", "bare", "--limit", "last:5"],
            "--limit must be a number such as 500, for a random sample, or first:500",
        ),
        (["run", "bare", "--json", "no/where.json"], "its folder does not exist"),
        (["run", "bare", "--json", "run"], "it is a folder"),
        (["run", "bare", "--quantize", "40"], "quantize must be in 1…16"),
        (["run", "bare", "--data", "minst"], "did you mean 'mnist'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(runs, capsys, monkeypatch, words, expected):
    monkeypatch.chdir(runs)
    before = sorted(runs.rglob("*"))
    status, out, err = said(capsys, "transfer", *words, *([] if "--json" in words else ["--json", "out.json"]))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("innermax: ")
    assert expected in err
    assert sorted(runs.rglob("*")) == before


def test_rows_are_kept_in_a_folder_that_is_told(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    words = ["transfer", "bare", "run", "--attacks", "fgsm", "--limit", "9"]
    status, out, _ = said(capsys, *words)
    assert status == 0
    kept = out.rpartition("Example by example: ")[2].strip()
    assert Path(kept).is_file()
    assert said(capsys, *words).out.endswith(f"{kept}\n")
