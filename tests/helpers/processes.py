"""Two processes, and what of their runs is compared with one's."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from innermax.training.checkpoints import find_checkpoints
from innermax.utils.files import load_tensors
from tests.helpers import ranks
from tests.helpers.ranks import BATCH, COUNT, EPOCHS, evaluated, trained


def weights(folder):
    return load_tensors(folder / "model.safetensors")[0]


def distance(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def copied(folder, to, before):
    """A run folder as it was when it stood inside an epoch: without the states that came later."""
    shutil.copytree(folder, to)
    for path in find_checkpoints(to):
        if path.name >= before:
            path.unlink()
    assert find_checkpoints(to), "a state to go on from"
    assert "batch-00000000" not in find_checkpoints(to)[0].name, "one from inside an epoch"
    return to


def within(folder, act):
    """Calls act, once, when a training that runs in the folder has saved a state from inside an epoch."""
    before = find_checkpoints(folder)[:1]

    def wait():
        while find_checkpoints(folder)[:1] == before or find_checkpoints(folder)[0].name.endswith(
            "-00000000.safetensors"
        ):
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


class Alone:
    """What one process makes of each training, done when it is asked for, and the folders of the runs."""

    def __init__(self, place):
        self.place, self.runs = place, {}

    def __call__(self, name):
        if name not in self.runs:
            self.runs[name] = trained(name, run_dir=self.place / name, keep_checkpoints=99, checkpoint_every=2)
        return self.runs[name]


def torchrun(*words):
    """Two processes that torchrun starts."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, ranks.__file__, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def kill_second(folder):
    """Loses the second process of a training inside an epoch; the error, and the seconds until it comes."""
    began = []

    def kill():
        began.append(time.monotonic())
        os.kill(max(child.pid for child in multiprocessing.active_children()), signal.SIGKILL)

    within(folder, kill)
    with pytest.raises(ChildProcessError) as caught:
        trained("slow", devices=2, run_dir=folder, checkpoint_every=1)
    return {"error": caught.value, "seconds": time.monotonic() - began[0]}


def check_killed(told):
    """A process that dies ends the job, which says who it was."""
    assert str(told["error"]).startswith("one of 2 processes ended early: rank 1 terminated with signal SIGKILL")
    assert "the same command goes on from" in told["error"].__notes__[0]
    assert told["seconds"] < 30
    assert not multiprocessing.active_children()


def check_alike(one, file):
    """Two processes, which wrote the file, trained as one did."""
    found, told = load_tensors(file)
    assert len(one.history) == EPOCHS
    assert EPOCHS * -(-COUNT // BATCH) > 20, "updates"
    assert distance(found, one.model.state_dict()) < 1e-4
    for row, other in zip(told["history"], one.history, strict=True):
        assert row.keys() == other.keys()
        for key in ("loss", "fosc", "halfway_gauge", "threshold", "skipped_batches"):
            expected = other.get(key)
            assert row.get(key) == (None if expected is None else pytest.approx(expected, rel=1e-4)), key
        for key in ("accuracy", "gradients"):  # which a rounding may turn for a single example
            assert row[key] == pytest.approx(other[key], abs=0.01), key


def check_alike_in_parts(one, folder):
    """Two processes with a part of the network each, whose run's folder it is, trained as one did."""
    assert distance(weights(folder), one.model.state_dict()) < 1e-4
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in one.history], abs=1e-4)


def check_alike_evaluated(folder, place):
    """Two processes made the table of one, and both know all of it."""
    one = evaluated(rows_dir=place / "rows")
    assert (folder / "rows" / "rows.parquet").read_bytes() == (place / "rows" / "rows.parquet").read_bytes()
    for rank in (0, 1):
        assert json.loads((folder / f"rank{rank}.json").read_text()) == one.examples.to_json()
