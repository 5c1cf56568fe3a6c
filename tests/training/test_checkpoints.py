"""Runs that are killed, short of disk, damaged, and asked for twice: what goes on ends as if nothing had happened."""

import errno
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import innermax as im
from innermax.oracle import oracle
from innermax.training import run_folder
from innermax.training.checkpoints import due_every, find_checkpoints, load_checkpoint, save_checkpoint
from innermax.utils.files import LockHeld, load_tensors, lock_file, write_bytes
from tests.helpers.networks import same
from tests.helpers.training import timeless

THREAT = im.Linf(0.1)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["innermax.training", "innermax.evaluation", "lightning_fabric", "pytest"])
SAFETENSORS = ("model.safetensors", "best.safetensors")


def examples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 6, 6), dtype=torch.uint8, generator=generator), torch.arange(count) % 3


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 2),  # of several channels, which training keeps last in memory
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(36, 3),
        )


def trained(folder, **options):
    strategy = im.Dynamic(im.PGD(THREAT, steps=3), "auto")
    defaults = {"epochs": 3, "batch_size": 4, "ema": 0.9, "shift": 1, "lr": 0.1, "checkpoint_every": 1}
    return im.train(
        network(),
        examples(24, 1),
        options.pop("strategy", strategy),
        validation_set=examples(8, 2),
        run_dir=folder,
        progress=False,
        **defaults | options,
    )


def metrics(folder):
    return timeless(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


def ends_alike(folder, whole):
    assert metrics(folder) == metrics(whole)
    for name in SAFETENSORS:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    (one, mine), (other, theirs) = (load_tensors(find_checkpoints(path)[0]) for path in (folder, whole))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert mine["position"]["epoch"] == theirs["position"]["epoch"]


def _child(folder, precision):
    torch.set_num_threads(1)
    oracle.times_as_long = lambda *_: 0.5  # as in this process
    trained(folder, precision=precision, epochs=16)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_killed_at_any_moment_it_ends_as_if_nothing_had_happened(tmp_path, precision):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trained(tmp_path / "whole", precision=precision, epochs=16)
        moments, folder, places = random.Random(precision), tmp_path / "run", []
        for _ in range(15):
            process = CONTEXT.Process(target=_child, args=(folder, precision))
            process.start()
            before, goal = find_checkpoints(folder)[:1], moments.randrange(0, 7)
            while process.is_alive() and goal > 0:
                time.sleep(0.001)
                now = find_checkpoints(folder)[:1]
                before, goal = now, goal - (now != before)
            time.sleep(moments.random() * 0.03)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL, "it ended before it was killed: give it more to do"
            places.append([path.name for path in find_checkpoints(folder)[:1]])
        assert len({str(place) for place in places}) > 8, places
        assert not places[-1] or places[-1][0] < "epoch-000016"
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a kill leaves nothing that is damaged
            trained(folder, precision=precision, epochs=16)
        ends_alike(folder, tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)


def state(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.rand(4, 3)).square().sum().backward()
        optimizer.step()
    return net, optimizer


def position(epoch=2, batch=0, **more):
    return {"epoch": epoch, "batch": batch, "totals": {"loss": 0.1 + 0.2}, "history": [{"fosc": None}], **more}


@pytest.fixture
def folder(tmp_path):
    configuration = {"training": {"seed": 3}, "model": "M", "examples": {"train": 5}, "settings": {}}
    return run_folder.open_folder(tmp_path / "run", configuration, False)


def test_the_state_comes_back_bit_for_bit(folder):
    net, optimizer = state(0)
    assert load_checkpoint(folder, {"model": net}, optimizer) == {}
    kept = {"kept": torch.randn(3, 2).half(), "momentum": torch.randn(3, 2).bfloat16()}
    save_checkpoint(folder, {"model": net, "ema": net}, optimizer, position(), kept)
    assert (folder / "metrics.jsonl").read_text() == '{"fosc": null}\n'
    other, theirs = state(1)
    came = {name: torch.zeros_like(value) for name, value in kept.items()}
    assert load_checkpoint(folder, {"model": other}, theirs, came) == position()
    assert same(came, kept)
    torch.testing.assert_close(other.state_dict(), net.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(theirs.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_a_foreign_state(folder):
    net, optimizer = state(0)
    save_checkpoint(folder, {"model": net}, optimizer, position())
    with pytest.raises(ValueError, match=r"batch-00000000.safetensors does not fit this run: .*size mismatch"):
        load_checkpoint(folder, {"model": nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))}, optimizer)


def test_metrics_hold_no_nan(folder):
    net, optimizer = state(0)
    with pytest.raises(ValueError):
        save_checkpoint(folder, {"model": net}, optimizer, position(history=[{"loss": math.nan}]))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_states_stay(folder, keep):
    net, optimizer = state(0)
    for epoch, batch in ((0, 0), (0, 9), (0, 10), (1, 0)):
        save_checkpoint(folder, {"model": net}, optimizer, position(epoch, batch), keep=keep)
    names = [path.name for path in find_checkpoints(folder)]
    assert names == [f"epoch-{e:06d}-batch-{b:08d}.safetensors" for e, b in ((1, 0), (0, 10), (0, 9))][:keep]
    assert len(list((folder / "checkpoints").iterdir())) == keep


DAMAGES = {
    "shorter": lambda content, place: content[: -place - 1],
    "empty": lambda content, place: b"",
    "a bit turned": lambda content, place: content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
    "zeros": lambda content, place: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_the_newest_is_damaged_the_one_before_is_taken(folder, damage):
    net, optimizer = state(0)
    for epoch in (1, 2):
        save_checkpoint(folder, {"model": net}, optimizer, position(epoch))
    newest, before = find_checkpoints(folder)
    content = newest.read_bytes()
    names = f"{re.escape(str(newest))} is damaged .*goes on from {re.escape(str(before))}"
    for place in random.Random(0).sample(range(8, len(content)), 20):  # the first 8 bytes are a length
        newest.write_bytes(DAMAGES[damage](content, place))
        with pytest.warns(UserWarning, match=names):
            assert load_checkpoint(folder, {"model": net}, optimizer) == position(1)
    before.unlink()
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole: .* is damaged .*start afresh with overwrite"):
        load_checkpoint(folder, {"model": net}, optimizer)


def test_a_run_whose_newest_state_is_damaged_ends_the_same(tmp_path):
    trained(tmp_path / "whole", epochs=3)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", epochs=3, objective=Stopping(9))
    newest = find_checkpoints(tmp_path / "run")[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        trained(tmp_path / "run", epochs=3)
    ends_alike(tmp_path / "run", tmp_path / "whole")


class Stopping:
    """Cross-entropy on the attacked batch that does something before one of its calls."""

    __qualname__ = "cross_entropy"

    def __init__(self, at, act=None):
        self.left, self.act = at, act

    def __call__(self, model, x, y, x_adv, epoch):
        self.left -= 1
        if self.left == 0:
            if self.act is None:
                raise KeyboardInterrupt
            self.act()
        logits = model(x_adv)
        return nn.functional.cross_entropy(logits, y), logits


# The disk


def test_another_process_is_refused_and_named(tmp_path):
    process = CONTEXT.Process(target=_hold, args=(tmp_path / "run",))
    process.start()
    while len(find_checkpoints(tmp_path / "run")) < 2:  # it sleeps once the second is written
        time.sleep(0.01)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=rf"run_dir .*run is in use by process {process.pid} on .* since 20"):
            trained(tmp_path / "run", overwrite=overwrite)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    trained(tmp_path / "run", epochs=1, overwrite=True)


def _hold(folder):
    trained(folder, objective=Stopping(2, lambda: time.sleep(300)))


def test_a_lock_is_for_one_at_a_time(tmp_path):
    path = tmp_path / "deep" / "lock"
    with lock_file(path, "this"):
        with pytest.raises(LockHeld, match=rf"^this is in use by process {os.getpid()} on "), lock_file(path, "this"):
            pass
        with lock_file(path.with_name("other"), "that"):
            pass
    with lock_file(path, "this"):
        pass


def _full(folder, words):
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # the system refuses what is larger, as a full disk does
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        trained(folder)
    except OSError as error:
        words.put(" ".join([str(error), *error.__notes__]))


def test_a_full_disk_leaves_the_last_state_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", objective=Stopping(8))
    trained(tmp_path / "whole")
    before = find_checkpoints(tmp_path / "run")
    words = CONTEXT.Queue()
    process = CONTEXT.Process(target=_full, args=(tmp_path / "run", words))
    process.start()
    told = words.get(timeout=60)
    process.join()
    assert "safetensors cannot be written: File too large" in told
    assert f"the same command goes on from {before[0]}" in told
    assert find_checkpoints(tmp_path / "run") == before
    assert not list((tmp_path / "run").rglob("*.part"))
    trained(tmp_path / "run")
    ends_alike(tmp_path / "run", tmp_path / "whole")


def test_a_folder_that_is_removed_while_the_run_runs(tmp_path):
    with pytest.raises(OSError, match=r"run/checkpoints/epoch.* cannot be written: No such file or directory"):
        trained(tmp_path / "run", objective=Stopping(5, lambda: shutil.rmtree(tmp_path / "run")))


def _powerless(folder, words):
    trained(None, epochs=1)  # which imports what the powerless may not read
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)
    try:
        trained(folder, epochs=1)
    except OSError as error:
        words.put(str(error))


def test_a_folder_that_cannot_be_written():
    with tempfile.TemporaryDirectory() as place:  # others cannot look into tmp_path
        folder = Path(place) / "run"
        trained(folder, epochs=1)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for path in (Path(place), folder, *folder.rglob("*")):
            path.chmod(0o555)
            words = CONTEXT.Queue()
        process = CONTEXT.Process(target=_powerless, args=(folder, words))
        process.start()
        told = words.get(timeout=60)
        process.join()
        assert re.search(r"Permission denied: .*run/lock", told)
        assert {path: path.read_bytes() for path in before} == before
        for path in (Path(place), folder, *folder.rglob("*")):
            path.chmod(0o755)


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none/a cannot be written: No such file or directory"):
        write_bytes(tmp_path / "none" / "a", b"")


def test_where_the_system_has_no_locks(tmp_path, monkeypatch):
    """Some network file systems: a warning, and no lock; any other error is one."""

    def refusing(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", flock)

    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        refusing(number)
        warned = pytest.warns(UserWarning, match=r"lock cannot be locked here \(.*\): see that nothing else uses it")
        with warned, lock_file(tmp_path / "lock", "it"):
            assert f"process {os.getpid()}" in (tmp_path / "lock").read_text()
    refusing(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), lock_file(tmp_path / "lock", "it"):
        raise AssertionError


# How often


@pytest.mark.parametrize(("every", "asked"), [(1, [True] * 6), (3, [False, False, True] * 2), ("2", [False, True] * 3)])
def test_every_so_many_updates(every, asked):
    due = due_every(every)
    assert [due() for _ in asked] == asked


@pytest.mark.parametrize(("every", "seconds"), [("90s", 90), ("1.5min", 90), ("0.5 h", 1800)])
def test_every_so_often(monkeypatch, every, seconds):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    due = due_every(every)
    answers = []
    for share in (0.5, 0.99, 1.01, 1.5, 2.02, 2.1):
        clock[0] = share * seconds
        answers.append(due())
    assert answers == [False, False, True, False, True, False]


@pytest.mark.parametrize("every", [0, -1, "often", "5 days", "0min", "1.5"])
def test_other_words_are_refused(every):
    with pytest.raises(ValueError, match=r"checkpoint_every must be a number of updates or a time such as 10min"):
        due_every(every)


@pytest.mark.parametrize("every", [True, 1.5, [10]])
def test_other_types_are_refused(untyped, every):
    with pytest.raises(TypeError, match=r"checkpoint_every must be a number of updates or a time such as 10min"):
        due_every(every)


def test_never_unless_asked():
    assert not any(due_every(None)() for _ in range(3))
