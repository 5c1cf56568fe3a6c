"""Sweeps: many runs of one recipe, stopped and gone on with, failing alone, and their table."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from innermax.cli import main, sweep_engine
from innermax.cli.sweep import list_runs, read_values, sweep_parser
from innermax.cli.sweep_engine import SweepRun, _run_all, combinations
from innermax.cli.sweep_table import Measure, run_measures, sweep_rows, write_sweep
from innermax.cli.train import read_recipe
from innermax.training.checkpoints import find_checkpoints
from innermax.training.options import TrainingOptions
from innermax.utils.files import LOCK, lock_file
from innermax.utils.intervals import student
from tests.helpers.commands import said

FAST = ["--epochs", "1", "--strategy", "standard", "--attack.steps", "1", "--attacks", "fgsm"]
LONG = ["--epochs", "12", "--strategy", "unsecured", "--attacks="]


def digest(run):
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def waited(happens, seconds=120.0):
    """Waits until it happens."""
    until = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.05)


def is_free(run):
    """Whether nobody works in a run folder."""
    try:
        with lock_file(run / LOCK, str(run)):
            return True
    except ValueError:
        return False


class Uninterrupted:
    """A run that nobody stops."""

    def interrupt(self):
        raise AssertionError


def test_options_are_listed():
    words = ["--strategy", "standard", "dynamic", "--lr=0.1", "--flip", "--seed", "-1", "2", "--lr", "0.2"]
    parser = sweep_parser({})
    assert read_values(parser, words) == {
        "strategy": ["standard", "dynamic"],
        "lr": ["0.1", "0.2"],
        "flip": ["true"],
        "seed": ["-1", "2"],
    }
    assert read_values(parser, ["--run-dir", "a-b", "--submitit.slurm_partition", "gpu"]) == {
        "run_dir": ["a-b"],
        "submitit.slurm_partition": ["gpu"],
    }


def test_a_sweep_reads_fractions_where_numbers_are_expected():
    options = {"threat.eps": ["4/255", "8/255"], "data": ["1/2"], "attack.step_size": ["[1/8,1/4]"], "run_dir": ["3/4"]}
    runs, chosen = list_runs(sweep_parser({"model": "mnist-cnn"}), "mnist", options)
    assert [run.settings["threat"]["eps"] for run in runs] == [4 / 255, 8 / 255]
    assert [run.name for run in runs] == ["threat.eps=4_255", "threat.eps=8_255"]
    assert {run.settings["data"] for run in runs} == {"1/2"}
    assert runs[0].settings["attack"]["step_size"] == [0.125, 0.25]
    assert chosen.run_dir == "3/4"
    assert "--data=1/2" in runs[0].words
    assert not any("run_dir" in word for word in runs[0].words)


@given(
    st.dictionaries(
        st.sampled_from(["seed", "lr", "threat.eps"]), st.lists(st.integers(0, 9).map(str), min_size=1, unique=True)
    )
)
def test_combinations_are_the_product_and_each_has_its_name(options):
    found = combinations(options)
    count = 1
    for values in options.values():
        count *= len(values)
    assert len(found) == count == len({str(chosen) for chosen in found.values()})
    assert all(chosen[name] in values for chosen in found.values() for name, values in options.items())
    assert all("/" not in name and not name.startswith(".") for name in found)


def test_names_are_made_of_what_varies():
    options = {"threat.eps": ["4/255", "8/255"], "seed": ["3"], "strategy": ["standard", "dynamic"]}
    assert list(combinations(options))[:2] == [
        "strategy=standard,threat.eps=4_255",
        "strategy=dynamic,threat.eps=4_255",
    ]
    assert list(combinations({"seed": ["3"]})) == ["run"]
    with pytest.raises(ValueError, match=r"seed=0: give each value once"):
        combinations({"seed": ["0", "1", "0"]})


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_no_more_than_the_workers_run_and_what_fails_stops_nobody(workers, tmp_path, monkeypatch):
    monkeypatch.setattr("innermax.cli.sweep_engine._PACE", 0.0)
    runs = [SweepRun(str(number), [], {}) for number in range(6)]
    together, most = set(), []

    class Counted(Uninterrupted):
        def __init__(self, run):
            self.run, self.left = run, 3
            together.add(run.name)
            most.append(len(together))

        def status(self):
            self.left -= 1
            if self.left:
                return None
            together.discard(self.run.name)
            return int(self.run.name in "24")

    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "2.log").write_text("one\ninnermax: what it was\n\n")
    heard = []
    failed = _run_all(tmp_path, runs, Counted, workers, heard.append)
    assert max(most) == min(workers, 6)
    assert failed == {"2": "what it was", "4": "exit status 1"}
    assert sorted(line for line in heard if "started" in line) == [f"{number}: started" for number in range(6)]
    assert "2: failed: what it was" in heard
    assert "3: finished" in heard


def test_a_run_that_another_process_still_works_in_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("innermax.cli.sweep_engine._PACE", 0.0)
    order = []

    class Quick(Uninterrupted):
        def __init__(self, run):
            order.append(run.name)

        def status(self):
            if order == ["free"]:
                held.__exit__(None, None, None)
            return 0

    held = lock_file(tmp_path / "held" / LOCK, "it")
    held.__enter__()
    assert _run_all(tmp_path, [SweepRun("held", [], {}), SweepRun("free", [], {})], Quick, 2, lambda _: None) == {}
    assert order == ["free", "held"]


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9), st.floats(0.5, 0.99))
def test_student_is_scipys(values, confidence):
    found = student(values, confidence)
    if stats.sem(values) > 1e-9:
        expected = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-6)
    assert found.low <= found.estimate <= found.high
    with pytest.raises(ValueError, match="at least two"):
        student(values[:1])


@pytest.fixture(params=["here", pytest.param("processes", marks=pytest.mark.slow)])
def local(request, monkeypatch):
    """The local engine; in the fast tests its runs are calls in this process, without processes and audits."""
    if request.param == "here":
        monkeypatch.setattr(sweep_engine, "_local", start_here)


def start_here(folder, workers):
    """A local engine whose runs are over when they have started."""

    class Over(Uninterrupted):
        def __init__(self, run):
            with (folder / "logs" / f"{run.name}.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
                self.exit_status = main(sweep_engine._command(folder, run))

        def status(self):
            return self.exit_status

    return Over


def test_a_run_is_a_process_whose_output_is_its_log(tmp_path):
    (tmp_path / "logs").mkdir()
    runs = [SweepRun("bad", ["digits", "--lr", "-1"], {})]
    failed = _run_all(tmp_path, runs, sweep_engine._local(tmp_path, 1), 1, lambda _: None)
    assert failed == {"bad": "--lr must be a finite number > 0, got -1.0"}


@pytest.mark.usefixtures("local")
def test_a_sweep_with_runs_that_fail(tmp_path, capsys):
    """One table, whose numbers are the runs' own; the failing are named, and tried again, the finished are not."""
    folder = tmp_path / "sweep"
    words = ["sweep", "digits", "--run-dir", str(folder), *FAST, "--lr", "0.05", "-1", "--seed", "0", "1"]
    status, out, err = said(capsys, *words, "--workers", "2")
    assert status == 2
    assert "innermax: 2 of 4 runs failed: lr=-1,seed=0: --lr must be" in err
    assert out.splitlines()[-1] == str(folder / "table.md")
    runs = [folder / f"lr=0.05,seed={seed}" for seed in (0, 1)]
    assert digest(runs[0]) != digest(runs[1])

    table = json.loads((folder / "table.json").read_text())
    good, bad = table["rows"]
    assert (good["settings"], bad["settings"]) == ({"lr": 0.05}, {"lr": -1.0})
    assert bad["measures"] == {}
    assert list(table["failed"]) == ["lr=-1,seed=0", "lr=-1,seed=1"]
    for name, measure in good["measures"].items():
        values = [own(run)[name] for run in runs]
        assert measure["mean"] == pytest.approx(sum(values) / 2)
        half = 12.706204736 * abs(values[0] - values[1]) / 2  # t at 1 degree of freedom × s/√2
        assert measure["low"] == pytest.approx(max(0.0, measure["mean"] - half))
        high = measure["mean"] + half
        assert measure["high"] == pytest.approx(high if name in ("gradients", "seconds") else min(1.0, high))
    assert set(good["measures"]) == {"clean", "fgsm", "worst_case", "gradients", "seconds"}
    clean = good["measures"]["clean"]["mean"]
    line = next(line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| 0.05 | 2 |"))
    assert f"| {100 * clean:.2f} (" in line
    assert f"| {good['measures']['gradients']['mean']:.1f} (" in line
    assert "| -1 | 0 of 2 | – | – | – | – |" in (folder / "table.md").read_text()
    assert f"{100 * clean:.2f}" in out

    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*") if path.is_file()}
    assert said(capsys, *words)[0] == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (folder / "logs/lr=-1,seed=0.log").read_text().count("lr must be") == 2

    # The same setting by other words is the same run, and nothing is left to do.
    status, _, err = said(capsys, *words[:4], *FAST, "--seed", "0", "1", "--lr", "0.05")
    assert (status, "2 runs" in err and "2 of them finished" in err) == (0, True)
    assert sorted(path.name for path in folder.iterdir() if "seed" in path.name) == [run.name for run in runs]

    more = ["--seed", "0", "1", "--lr", "0.05", "0.1", "--epochs", "2"]
    (line,) = said(capsys, *words[:4], *FAST[2:], *more)[2].splitlines()
    assert "run lr=0.05,seed=0 of" in line
    assert "epochs: 1 there, 2 here" in line

    # An evaluation of other weights is left out, and one that does not say whose it is is counted; both are told.
    scores = (runs[0] / "evaluation.json").read_text()
    (runs[1] / "evaluation.json").write_text(scores)
    with pytest.warns(UserWarning, match=r"seed=1/evaluation.json measured other weights than the run's: innermax"):
        row, other = sweep_rows(folder)
    write_sweep(folder, [row, other], {})
    assert (row.finished, list(row.left_out)) == ([runs[0].name], [runs[1].name])
    assert row.measures["clean"] == Measure(own(runs[0])["clean"], None, None)
    told = (folder / "table.md").read_text()
    assert "| 0.05 | 1 of 2 |" in told
    assert "Left out: lr=0.05,seed=1: " in told
    unsigned = {key: value for key, value in json.loads(scores).items() if key != "weights"}
    (runs[1] / "evaluation.json").write_text(json.dumps(unsigned))
    with pytest.warns(UserWarning, match=r"seed=1/evaluation.json measured this run's weights is not known"):
        assert len(sweep_rows(folder)[0].finished) == 2

    (runs[0] / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match=r"seed=0/evaluation.json: text must be an evaluation's JSON: KeyError"):
        sweep_rows(folder)


def own(run):
    """A run's measures, from its own files."""
    scored = json.loads((run / "evaluation.json").read_text())
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {name: value["correct"] / value["total"] for name, value in scored["accuracy"].items()}
    found["worst_case"] = scored["worst_case"]["correct"] / scored["worst_case"]["total"]
    return found | {name: sum(row[name] for row in history) for name in ("gradients", "seconds")}


@pytest.mark.slow
def test_a_sweep_that_is_interrupted_and_killed_goes_on_to_the_same_end(tmp_path, capsys):
    folder = tmp_path / "sweep"
    words = ["sweep", "digits", "--run-dir", str(folder), *LONG, "--seed", "0", "1"]
    runs = [folder / f"seed={seed}" for seed in (0, 1)]
    for sent, run in zip((signal.SIGINT, signal.SIGKILL), runs, strict=True):
        process = subprocess.Popen([sys.executable, "-m", "innermax.cli", *words], stderr=subprocess.PIPE, text=True)
        waited(lambda run=run: len(find_checkpoints(run)) > 1 or (run / "evaluation.json").exists())
        process.send_signal(sent)
        told = process.communicate()[1]
        if sent == signal.SIGINT:
            assert process.returncode == 130
            assert "the same command continues" in told
        waited(lambda: all(map(is_free, [run for run in runs if run.exists()])))  # the runs end with it
        assert not (run / "evaluation.json").exists(), "it was over before it was stopped"
    status, out, _ = said(capsys, *words)
    assert (status, "12 epochs" in out) == (0, False)
    assert [len((run / "metrics.jsonl").read_text().splitlines()) for run in runs] == [12, 12]
    alike = tmp_path / "alike"
    assert said(capsys, "train", "digits", "--run-dir", str(alike), *LONG, "--seed", "1", "--progress", "false")[0] == 0
    assert digest(alike) == digest(runs[1]) != digest(runs[0])
    assert run_measures(alike)["clean"] == run_measures(runs[1])["clean"]


def test_a_run_ends_with_the_sweep_of_a_scripts_background_job():
    """Which ignores Ctrl-C, and so do the processes that it starts."""
    words = [
        sys.executable,
        "-c",
        "from innermax.cli.sweep_engine import end_with_parent as e; e(); import time; time.sleep(99)",
    ]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    _, told = process.communicate(timeout=60)
    assert b"KeyboardInterrupt" in told


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "name of a recipe"),
        (["minst"], "did you mean 'mnist'"),
        (["digits", "0"], "unexpected '0': sweep takes the name of a recipe, then options: for example"),
        (["digits", "--run-dir"], "--run-dir needs a value"),
        (["digits", "--seed", "--flip"], "--seed needs a value"),
        (["digits", "--sede", "0", "1"], "--sede"),
        (["digits", "--strategy", "standard", "dynamik"], "dynamic"),
        (["digits", "--run-dir", "a", "b"], "--run-dir is the whole sweep's"),
        (["digits", "--workers", "1", "2"], "--workers is the whole sweep's"),
        (["digits", "--workers", "0"], "workers must be at least 1"),
        (["digits", "--engine", "ray"], "--engine must be local or submitit, got ray"),
        (["digits", "--overwrite"], "sweep takes no --overwrite"),
        (["digits", "--seed", "0", "0"], "give each value once"),
        (["digits", "--run-dir", "full"], "holds no sweep of innermax"),
        (["digits", "--run-dir", "damaged"], "sweep.json: not readable as JSON"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(words, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, file in (("full", "mine"), ("damaged", "sweep.json")):
        Path(name).mkdir()
        (Path(name) / file).write_text("{")
    before = sorted(tmp_path.rglob("*"))
    status, _, err = said(capsys, "sweep", *(words or ["--seed"]))
    assert (status, err.count("\n")) == (2, 1)
    assert expected in err
    assert sorted(tmp_path.rglob("*")) == before


def test_two_sweeps_in_one_folder(tmp_path, capsys):
    with lock_file(tmp_path / "sweep" / LOCK, "it"):
        status, _, err = said(capsys, "sweep", "digits", "--run-dir", str(tmp_path / "sweep"), *FAST)
    assert (status, f"--run-dir {tmp_path / 'sweep'} is in use by process {os.getpid()}" in err) == (2, True)


def test_submitit_is_an_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    words = ["sweep", "digits", "--run-dir", str(tmp_path / "sweep"), *FAST, "--engine", "submitit"]
    assert "innermax[slurm]" in said(capsys, *words)[2]


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # its log files
def test_jobs_of_submitit(tmp_path, capsys):
    """Its executor for trying things out, which runs a job in this process."""
    pytest.importorskip("submitit", reason="the engine submitit is not tested: pip install 'innermax[slurm]'")
    words = ["sweep", "digits", "--run-dir", str(tmp_path / "sweep"), *FAST, "--engine", "submitit"]
    refused = said(capsys, *words, "--submitit.cluster", "debug", "--submitit.slurm_partitoin", "gpu")
    assert (refused[0], "slurm_partitoin" in refused[2]) == (2, True)
    status, out, _ = said(capsys, *words, "--lr", "0.05", "-1", "--submitit.cluster", "debug")
    assert status == 2
    rows = {row.settings["lr"]: row for row in sweep_rows(tmp_path / "sweep")}
    assert list(rows[0.05].finished) == ["lr=0.05"]
    assert not rows[-1.0].finished
    assert f"{100 * own(tmp_path / 'sweep/lr=0.05')['clean']:.2f}" in out


def test_what_identifies_a_run_of_a_sweep():
    """The index of a sweep holds these names, so an older folder is only known while they stay."""
    runs, _ = list_runs(sweep_parser(read_recipe("digits")), "digits", {"seed": ["0", "1"]})
    options = {field.name for field in fields(TrainingOptions)}
    left_out = {"run_dir", "overwrite", "checkpoint_every", "keep_checkpoints", "logger", "progress", "device"}
    assert options - runs[0].settings.keys() == left_out | {"validation_attack", "settings"}


@pytest.mark.slow
def test_jobs_on_slurm_outlive_the_sweep_and_are_found_again(tmp_path, capsys, monkeypatch):
    """SLURM's own commands, played by scripts: a job goes on in the background, whoever handed it in."""
    pytest.importorskip("submitit", reason="the engine submitit is not tested: pip install 'innermax[slurm]'")
    words = ["sweep", "digits", "--run-dir", str(tmp_path / "sweep"), *LONG, "--engine", "submitit"]
    words += ["--submitit.slurm_use_srun", "false", "--submitit.timeout_min", "30"]
    monkeypatch.setenv("PATH", os.defpath)
    assert 'Could not detect "srun"' in said(capsys, *words)[2]
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in {
        "srun": "",
        "sacct": "echo 'JobID|State|NodeList'; echo '7|RUNNING|here'",
        "sbatch": f"cp $1 {tmp_path}/asked; echo $1 >> {tmp_path}/handed_in\n"
        "SLURM_JOB_ID=7 setsid bash $1 > /dev/null 2>&1 &\necho 'Submitted batch job 7'",
    }.items():
        (commands / name).write_text(f"#!/bin/bash\n{script}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.defpath}")
    process = subprocess.Popen([sys.executable, "-m", "innermax.cli", *words], stderr=subprocess.DEVNULL)
    waited((tmp_path / "sweep/jobs.json").exists)
    process.kill()
    process.wait()
    assert "--time=30" in (tmp_path / "asked").read_text()
    status, out, _ = said(capsys, *words)
    assert (status, len((tmp_path / "handed_in").read_text().splitlines())) == (0, 1)
    assert f"{100 * own(tmp_path / 'sweep/run')['clean']:.2f}" in out


def test_settings_of_later_versions_are_left_out_at_their_defaults():
    """A folder of an earlier version knows nothing of them, and goes on."""
    parser = sweep_parser(read_recipe("digits"))
    (plain,), _ = list_runs(parser, "digits", {})
    assert not {"beta", "label_smoothing", "awp"} & plain.settings.keys()
    (told,), _ = list_runs(parser, "digits", {"objective": ["trades"], "beta": ["3"], "awp": ["0.01"]})
    assert told.settings == plain.settings | {"objective": "trades", "beta": 3.0, "awp": 0.01}
