"""The benchmarks for a GPU: their every part runs on a processor, and their pages can be read at any moment."""

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from innermax.data.image_set import Data, ImageSet

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import gpu
import gpu_checks
import gpu_speed
import objectives
import overfitting_alarm
import overfitting_rule
import speed
import speedrun

BENCH = Path(gpu.__file__).parent


def run(script, folder, *words):
    done = subprocess.run(
        [sys.executable, str(BENCH / script), "--smoke", "--out", str(folder), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return (folder / "page.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_gpu_session_in_small(tmp_path):
    page = run("gpu.py", tmp_path, "--minutes", "15")
    assert "wrong" not in page
    assert "ended" not in page
    for found in (
        "| a resumed run | right |",
        "| gradients, LSTM | right |",
        "WideResNet-10-1, batch 4",
        "### Table 2",
    ):
        assert found in page
    assert page.count("training-") > 5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_speed_run_in_small(tmp_path):
    page = run("speedrun.py", tmp_path)
    assert "on 8 test images" in page
    assert "| 2 |" in page
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    again = run("speedrun.py", tmp_path)  # finds everything done
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert again.partition("## Result")[2].splitlines()[4:] == page.partition("## Result")[2].splitlines()[4:]


def test_the_parts_of_a_step_that_are_timed():
    setting = speed.SETTINGS["MNIST CNN"]
    ours = speed.Ours(setting, *setting.images(4), "float32")
    for part in (ours, ours.attack, ours.descend):
        part()
    case = gpu_speed.Case("wideresnet", {"depth": 10, "width": 1}, 4, "cpu")
    for part in (case.step, case.attack, case.gradients, case.update):
        part()
    for part in objectives.passes_of(objectives.loop_of("mnist-cnn", objectives.cross_entropy, "float32")).values():
        part()
    assert gpu_checks._memory(("wideresnet", (3, 32, 32), {"depth": 10, "width": 1}), "cpu", smoke=True)[1] == "no GPU"


def test_trainings_that_an_alarm_is_judged_by(tmp_path, monkeypatch):
    largest = max(fleet.images for fleet in overfitting_alarm.plan() if fleet.data == "digits")
    assert largest <= len(overfitting_alarm.images("digits")[0])
    for name, size in (("JUDGED", 40), ("PROBED", 8), ("STEPS", 3)):
        monkeypatch.setattr(overfitting_alarm, name, size)
    settings = tuple(overfitting_alarm.Setting(0.1, method, 0.003, 0) for method in ("fgsm", "rs@2", "n"))
    fleet = overfitting_alarm.Fleet("digits", "plain-8", 64, 8, 2, settings)
    monkeypatch.setattr(overfitting_alarm, "plan", lambda: [fleet])
    monkeypatch.setattr(overfitting_alarm, "images", overfitting_alarm.images.__wrapped__)
    runs = tmp_path / "runs.jsonl"
    monkeypatch.setattr(sys, "argv", ["overfitting_alarm.py", str(runs)])
    overfitting_alarm.main()
    overfitting_alarm.main()  # everything is done
    rows = [json.loads(line) for line in runs.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["fgsm", "rs@2", "n"]
    assert all(len(row["quarters"]) == 8 for row in rows)
    assert "**3 trainings so far" in overfitting_rule.page(rows)


@pytest.mark.parametrize("script", ["gpu.py", "speedrun.py"])
def test_without_a_gpu_one_line_says_so(script, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, str(BENCH / script), "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "--device cuda: torch finds no GPU; --smoke runs every part on a processor"
    ]
    assert not (tmp_path / "out").exists()


def test_the_page_of_a_session_that_was_cut_off(tmp_path):
    gpu.write_page(tmp_path)
    assert (tmp_path / "page.md").read_text().count("Not run.") == 3
    about = {"machine": "a GPU", "torch": "2.11.0", "date": "2026-01-01"}
    case = {"step": 2.0, "attack": 1.5, "gradients": 1.0, "update": 0.25, "images/s": 64.0, "FLOP/s": 4e14}
    case |= {"of peak": 0.5, "memory": "3.0 GiB", "plan": "bf16"}
    gpu._note(tmp_path, "checks", about=about, found={"memory": ["right", "3 GiB"]})
    gpu._note(tmp_path, "speed", found={"peak": "800.0 TFLOP/s", "CNN, batch 128": case, "CNN, batch 256": "no time"})
    gpu._note(tmp_path, "speed", ended="was ended by the clock")
    run_folder = tmp_path / "runs" / "training-1"
    run_folder.mkdir(parents=True)
    row = {"images_per_second": 9000.4, "validation_robust": 0.423}
    (run_folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    gpu._note(tmp_path, "tables", found={"now": "trained-1 … (3 s)"})
    page = (tmp_path / "page.md").read_text()
    for line in (
        "`python bench/gpu.py` on a GPU, torch 2.11.0, 2026-01-01.",
        "| memory | right | 3 GiB |",
        "| CNN, batch 128 | 64 | 400.0 | 50% | 50% | 25% | 12% | 12% | 3.0 GiB | bf16 |",
        "| CNN, batch 256 | no time | | | | | | | | |",
        "**This part was ended by the clock.**",
        "- now: trained-1 … (3 s)",
        "- training-1: 1 epochs, 9,000 images/s, validation 42.3 % under attack",
    ):
        assert line in page.splitlines()


def test_a_part_that_hangs_or_fails_leaves_its_time_to_the_next(tmp_path, monkeypatch, capsys):
    asked = []

    def start(words, timeout):
        part = words[words.index("--part") + 1]
        asked.append((part, float(words[words.index("--minutes") + 1]), timeout))
        if part == "checks":
            raise subprocess.TimeoutExpired(words, timeout)
        return SimpleNamespace(returncode=3 if part == "speed" else 0)

    clock = SimpleNamespace(monotonic=lambda: 60.0 * len(asked))  # each takes a minute
    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=start, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(gpu, "time", clock)
    told = argparse.Namespace(minutes=10.0, out=tmp_path, device="cuda", smoke=False, data=Path("data"))
    gpu._run_parts(told)
    assert [part for part, _, _ in asked] == ["checks", "speed", "tables"]
    assert [minutes for _, minutes, _ in asked] == pytest.approx([2.0, 0.35 * 9, 8.0])
    assert [timeout - 60 * minutes for _, minutes, timeout in asked] == pytest.approx([gpu._GRACE] * 3)
    page = capsys.readouterr().out
    assert "**This part was ended by the clock.**" in page
    assert "**This part ended with exit status 3.**" in page


def test_data_that_is_not_whole(monkeypatch, tmp_path):
    def lacking(train, test):
        sets = [ImageSet(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n).long()) for n in (train, test)]
        monkeypatch.setattr(gpu, "load_data", lambda name, validation: Data(name, sets[0], None, sets[1], 10, None))
        return gpu._lack(tmp_path)

    assert gpu._lack(None) == "--data was not given"
    assert lacking(50_000, 10_000) == ""
    assert lacking(30_000, 10_000) == "train has 30,000 of 50,000 images: copy the other shards"
    monkeypatch.undo()
    monkeypatch.setenv("INNERMAX_DATA", str(tmp_path))
    (tmp_path / "cifar10").mkdir()
    assert "holds neither" in gpu._lack(tmp_path)


def test_waits_are_counted_by_file_and_line(monkeypatch):
    """As torch warns of them in its sync debug mode."""
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with gpu_checks.count_waits("cuda") as places:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1.)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    ((place, times),) = places.items()
    assert place.startswith("test_bench.py:")
    assert times == 3


def test_a_check_that_fails_does_not_end_the_others(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("CUDA error: misaligned address\nand more")

    for name in ("_float32", "_gradients", "_recurrent", "_recordings", "_waits", "_resumed", "_memory"):
        monkeypatch.setattr(gpu_checks, name, fail if name == "_gradients" else lambda *_: ("right", "fine"))
    found = {}
    gpu_checks.check(found.__setitem__, float("inf"), "cuda", False, tmp_path)
    assert found["gradients, WideResNet-34-10, bf16"] == ("**wrong**", "RuntimeError: CUDA error: misaligned address")
    assert found["memory"] == ("right", "fine")
    gpu_checks.check(found.__setitem__, -1.0, "cuda", False, tmp_path)
    assert set(found.values()) == {("not here", "no time was left")}


def test_the_rules_of_the_speed_run_are_on_the_page_before_it_begins(tmp_path):
    test = ImageSet(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), torch.zeros(3).long())
    speedrun.write_page(tmp_path, speedrun.Recipe(), test, None)
    page = (tmp_path / "page.md").read_text()
    assert "45 % under AutoAttack" in page
    assert "0 of 20 epochs so far" in page


def test_the_speed_runs_images_are_drawn_from_the_whole_test_set():
    labels = torch.arange(100)
    drawn = speedrun._draw(ImageSet(torch.zeros(100, 1, 1, 1, dtype=torch.uint8), labels), 30)
    assert len(set(drawn.labels.tolist())) == 30
    assert drawn.labels.max() > 80
    assert drawn.labels.tolist() != sorted(drawn.labels.tolist())
