"""innermax evaluate."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

import innermax as im
from innermax.evaluation.audit import judge
from tests.helpers.audits import evidence
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


def test_advice_is_for_what_was_evaluated(tmp_path, monkeypatch, capsys):
    """With the options that say how, and without those of this evaluation alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    failed = judge(evidence(total_gain=0.1, zero_margin_gradient=1.0))
    monkeypatch.setattr("innermax.evaluation.evaluate._audit", lambda *_: failed)
    words = ["innermax/digits-linf-0.15", "--limit", "8", "--threat.eps", "0.2"]
    status, out, err = said(capsys, "evaluate", words[0], "--attacks", "fgsm", *words[1:], "--json", "s.json")
    assert (status, err) == (0, "")
    assert f"innermax evaluate {' '.join(words)} --attacks square-5000" in " ".join(out.split())
    assert "innermax evaluate RUN --attacks" in im.Evaluation.from_json(Path("s.json").read_text()).audit.advice


def test_images_are_saved_for_verify(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    torch.manual_seed(0)
    im.save_model("mine", im.build_model("digits-cnn", input_shape=(1, 8, 8)))
    words = ["mine", "--data", "digits", "--threat.eps", "0.1"]
    saving = ["evaluate", *words, "--attacks", "fgsm,pgd-5", "--limit", "60", "--save-images", "out"]
    status, _, err = said(capsys, *saving)
    assert (status, err) == (0, "")
    with np.load("out/pgd-5.npz") as file:
        wrong = int((file["labels"] != file["predictions"]).sum())
        assert len(file["images"]) == 60
        assert len(list(Path("out/pgd-5").glob("*.png"))) == wrong
    status, out, _ = said(capsys, "verify", *words, "--attacks", "fgsm", "--limit", "60", "--images", "out/pgd-5.npz")
    assert status == 0
    assert f"ok  handed images inside the threat model: {wrong} of {wrong}" in out
    assert f"ok  handed images misclassified alone and in a batch, twice: {wrong} of {wrong}" in out
    assert "--save-images out exists and is no empty folder" in refused(capsys, *saving)
    nothing = ["evaluate", *words, "--attacks", "", "--save-images", "other"]
    assert "--save-images needs at least one attack" in refused(capsys, *nothing)
    told = refused(capsys, "verify", *words, "--save-images", "other")
    assert told == "innermax: --save-images is an option of innermax evaluate, not of innermax verify\n"
    assert "--claims is an option of innermax verify" in refused(capsys, "evaluate", *words, "--claims", "0.5")
    assert "--targets is an option of innermax evaluate, not of innermax transfer" in refused(
        capsys, "transfer", "mine", *words, "--targets=next"
    )


def test_several_sizes_make_one_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    torch.manual_seed(0)
    im.save_model("mine", im.build_model("digits-cnn", input_shape=(1, 8, 8)))
    words = ["evaluate", "mine", "--data", "digits", "--limit", "40", "--attacks", "fgsm,pgd-3"]
    files = ["--json", "s.json", "--html", "s.html", "--rows-dir", "rows", "--save-images", "images"]
    status, out, err = said(capsys, *words, "--threat.eps", "[0,8/255,0.1]", *files)
    assert (status, err) == (0, "")
    document = json.loads(Path("s.json").read_text())
    found = [(part["eps"], part["evaluation"]) for part in document["evaluations"]]
    assert [eps for eps, _ in found] == [0.0, 8 / 255, 0.1]
    for eps, one in found:
        alone = f"alone-{eps}.json"
        assert said(capsys, *words, "--threat.eps", str(eps), "--json", alone)[0] == 0
        assert json.loads(Path(alone).read_text())["accuracy"] == one["accuracy"]
        assert f"{100 * one['worst_case']['value']:.2f}" in out
        assert Path(f"images/pgd-3-eps-{eps}.npz").is_file()
        assert im.Evaluation.from_json(json.dumps(one)).settings.count == 40
    assert [line.split()[0] for line in out.splitlines() if line[:9].strip() in ("0", "8/255", "0.1")]
    assert out.count("Example by example: rows/eps-") == 3
    assert "ε = 8/255" in Path("s.html").read_text(encoding="utf-8")
    assert "--threat.eps must hold at least one number" in refused(capsys, *words, "--threat.eps", "[]")
    one = "--threat.eps must be one number here, got [0.1, 0.2]: run the command once for each, or innermax evaluate"
    assert one in refused(capsys, "verify", *words[1:4], "--threat.eps", "[0.1,0.2]")
    assert one in refused(capsys, "transfer", "mine", *words[1:4], "--threat.eps", "[0.1,0.2]")
    assert "at least one attack for several --threat.eps" in refused(
        capsys, *words[:-1], "", "--threat.eps", "[0.1,0.2]"
    )


def test_targets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    torch.manual_seed(0)
    im.save_model("mine", im.build_model("digits-cnn", input_shape=(1, 8, 8)))
    words = ["evaluate", "mine", "--data", "digits", "--limit", "40", "--threat.eps", "0.2", "--targets"]
    status, out, err = said(capsys, *words, "next", "--attacks", "fgsm,pgd-5", "--json", "s.json")
    assert (status, err) == (0, "")
    found = im.Evaluation.from_json(Path("s.json").read_text())
    share = found.reached["pgd-5 to next"]
    assert share.correct > 0
    assert "PGD-5 to next" in out
    assert f"PGD-5 to next: {100 * share.value:.2f} % (" in " ".join(out.split())
    message = refused(capsys, *words, "next", "--attacks", "fgsm,square-5")
    verified = said(capsys, "verify", *words[1:], "next", "--attacks", "pgd-5", "--claims", "1", "--json", "v.json")
    assert verified.status == 1
    attacked = json.loads(Path("v.json").read_text())["evaluation"]["settings"]["attacks"]
    assert list(attacked) == ["pgd-5 to next"]
    assert "square-5 takes no targets: attack of Targeted must be PGD, FGSM, CW or APGD" in message
    assert "--targets must be one of random, next, least-likely, got most" in refused(capsys, *words, "most")
