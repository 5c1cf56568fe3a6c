"""Several processes: they train as one does, they end together, and what one number of them began another goes on."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import innermax as im
from innermax.distributed import launch
from innermax.distributed.launch import Launch, find_launch, plan_launch
from innermax.distributed.process_group import Ranks, find_members, synchronise_batch_norm
from innermax.training.checkpoints import find_checkpoints
from innermax.utils.files import load_tensors
from tests.helpers import ranks
from tests.helpers.ranks import BATCH, COUNT, EPOCHS, evaluated, network, trained

CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(900)  # processes start slowly on a machine that is busy otherwise


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


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return Alone(tmp_path_factory.mktemp("alone"))


def torchrun(*words):
    """Two processes that torchrun starts."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, ranks.__file__, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of two processes that was interrupted, went on, and lost its second process; what was said, and when."""
    folder, told = tmp_path_factory.mktemp("stopped") / "run", {}
    within(folder, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trained("slow", devices=2, run_dir=folder, checkpoint_every=1)
    told["interrupted"] = find_checkpoints(folder)[0].name
    return folder, told | kill_second(folder)


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


@pytest.fixture(scope="module")
def together(tmp_path_factory, alone, stopped):
    """The folder in which two processes of torchrun did everything, and went on with what one or two had begun."""
    folder = tmp_path_factory.mktemp("together")
    for name in ("warm", "standard"):
        alone(name)
    copied(alone.place / "warm", folder / "warm-of-one-ddp", "epoch-000002-batch-00000004")
    copied(alone.place / "standard", folder / "standard-of-one-fsdp", "epoch-000002-batch-00000004")
    shutil.copytree(stopped[0], folder / "slow-of-two")
    torchrun(folder)
    return folder


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


def test_two_processes_train_and_evaluate_as_one_does(alone, tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    torchrun(folder, "few")
    check_alike(alone("dynamic"), folder / "dynamic.safetensors")
    check_alike_in_parts(alone("standard"), folder / "standard-fsdp")
    check_alike_evaluated(folder, tmp_path)


def test_a_process_that_dies_ends_the_job_which_says_who_it_was(tmp_path):
    check_killed(kill_second(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard", "dynamic", "warm", "weighted", "frozen", "spoiled", "streamed"])
def test_two_processes_train_in_every_way_as_one_does(alone, together, name):
    check_alike(alone(name), together / f"{name}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["standard", "dynamic", "warm", "weighted", "frozen", "norm", "spoiled", "slow", "streamed"]
)
def test_what_was_compared_is_more_than_a_start(alone, name):
    """The trainings move the weights, stop some searches early, and leave batches out."""
    run, before = alone(name), network(norm=name in ("norm", "frozen"), frozen=name == "frozen").state_dict()
    assert distance(run.model.state_dict(), before) > 0.01
    if name == "dynamic":
        assert any(row["gradients"] < 3 and row["gradients"] % 1 for row in run.history)
    if name == "spoiled":
        assert all(row["skipped_batches"] == 1 for row in run.history)


@pytest.mark.slow
def test_batch_norm_of_each_share_is_the_documented_difference(alone, together):
    one, (found, told) = alone("norm"), load_tensors(together / "norm.safetensors")
    assert 1e-4 < distance(found, one.model.state_dict()) < 0.1
    assert [row["loss"] for row in told["history"]] == pytest.approx([row["loss"] for row in one.history], abs=0.05)
    (mine, _), (theirs, _) = (load_tensors(together / f"norm-of-{rank}.safetensors") for rank in (0, 1))
    assert distance(mine, theirs) == 0, "statistics that attacks and files share"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard", "warm"])
def test_a_network_in_parts_trains_as_a_whole_one(alone, together, name):
    check_alike_in_parts(alone(name), together / f"{name}-fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["warm-of-one-ddp", "standard-of-one-fsdp"])
def test_two_processes_go_on_with_what_one_began(alone, together, name):
    assert distance(weights(together / name), alone(name.partition("-")[0]).model.state_dict()) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the attack network was:UserWarning")  # in parts, and is whole now
@pytest.mark.parametrize("name", ["standard-ddp", "warm-ddp", "standard-fsdp", "warm-fsdp"])
def test_one_process_goes_on_with_what_two_began(alone, together, tmp_path, name):
    folder = copied(together / name, tmp_path / "run", "epoch-000002-batch-00000004")
    kind = name.partition("-")[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the attack network was 'in 2 parts")  # it is another one now, and says so
        run = trained(kind, run_dir=folder)
    assert len(run.history) == EPOCHS
    assert distance(run.model.state_dict(), alone(kind).model.state_dict()) < 1e-4


@pytest.mark.slow
def test_what_was_interrupted_and_killed_goes_on_with_one_process_and_with_two(alone, together, stopped, tmp_path):
    folder, told = stopped
    assert not told["interrupted"].endswith("-00000000.safetensors")
    check_killed(told)
    shutil.copytree(folder, tmp_path / "run")
    expected = alone("slow").model.state_dict()
    assert distance(trained("slow", run_dir=tmp_path / "run").model.state_dict(), expected) < 1e-4
    assert distance(weights(together / "slow-of-two"), expected) < 1e-4


# Who is there, and what is refused


@given(st.integers(1, 50), st.integers(1, 8))
def test_shares_cover_a_batch_and_their_means_make_its_mean(count, processes):
    batch = torch.arange(count) * 3
    several = [Ranks(rank, processes, CPU) for rank in range(processes)]
    shares = [one.share(batch) for one in several]
    assert torch.equal(torch.cat(shares), batch)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    weighted = [several[0].weight(len(share), count) * share.double().mean() for share in shares if len(share) > 0]
    assert float(sum(weighted)) / processes == pytest.approx(float(batch.double().mean()))


def as_torchrun(monkeypatch, devices=2, count=4):
    told = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": devices, "WORLD_SIZE": count, "RANK": 1}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


def as_slurm(monkeypatch, **changed):
    told = {
        "SLURM_NTASKS": 4,
        "SLURM_STEP_ID": 0,
        "SLURM_NNODES": 2,
        "SLURM_NTASKS_PER_NODE": 2,
        "SLURM_PROCID": 1,
        "SLURM_JOB_NAME": "a",
    }
    for name, value in (told | changed).items():
        if value is not None:
            monkeypatch.setenv(name, str(value))


def test_the_processes_of_torchrun_and_slurm_are_found(monkeypatch):
    assert find_launch() is None
    assert plan_launch(None, None, CPU) == Launch()
    assert plan_launch(2, None, CPU) == Launch(2, 1, starts=True)
    with monkeypatch.context() as patch:
        as_torchrun(patch)
        assert plan_launch(None, None, CPU) == plan_launch(2, 2, CPU) == Launch(2, 2, launcher="torchrun")
        assert not launch.is_first()
        with pytest.raises(
            ValueError, match="devices and nodes must be 2 and 2, as torchrun started, or left out, got 4 and None"
        ):
            plan_launch(4, None, CPU)
        with pytest.raises(ValueError, match="devices must be 1 or 4, the processes that are running, got 2"):
            find_members(2, CPU)
        assert find_members(1, CPU).count == 1
    with monkeypatch.context() as patch:
        as_slurm(patch)
        assert plan_launch(None, None, CPU) == Launch(2, 2, launcher="SLURM")
        assert launch.count_processes() == 4
        assert not launch.is_first()
    with monkeypatch.context() as patch:
        as_slurm(patch, SLURM_NTASKS_PER_NODE=None)
        with pytest.raises(ValueError, match="--ntasks-per-node"):
            find_launch()
    with monkeypatch.context() as patch:
        as_slurm(patch, SLURM_JOB_NAME="bash")
        assert find_launch() is None
    with monkeypatch.context() as patch:
        as_slurm(patch, SLURM_STEP_ID=None)  # the batch script itself, which is one process
        assert find_launch() is None
    assert launch.is_first()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": 0}, "devices must be at least 1, got 0"),
        ({"nodes": 2}, "nodes=2 needs .*MASTER_ADDR and MASTER_PORT.*NODE_RANK"),
        ({"devices": 2, "batch_size": 1}, "batch_size must leave each of 2 processes an example, got batches of 1"),
        ({"devices": 2, "sync_batch_norm": True}, "sync_batch_norm needs several GPUs, got 2 processes on cpu"),
        ({"parallel": "fsdp"}, 'parallel="fsdp" needs several processes, got one'),
        ({"devices": 2, "parallel": "fsdp", "ema": 0.9}, 'parallel="fsdp" does not support ema: leave it out'),
        (
            {"devices": 2, "parallel": "fsdp", "validation_set": (torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))},
            'parallel="fsdp" does not support validation_set: .* evaluate the saved model',
        ),
    ],
)
def test_what_does_not_go_is_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        trained("frozen", run_dir=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_what_does_not_pickle_is_said():
    model = network()
    model.hidden = lambda x: x
    with pytest.raises(TypeError, match=r"devices=2 needs a model and attacks that pickle, and these do not: .*lambda"):
        im.train(model, ranks.examples(), im.Unsecured(), devices=2, progress=False)


def test_synchronised_batch_norm_learns_in_the_models_own_tensors():
    model = network(norm=True, frozen=True)
    twin = synchronise_batch_norm(model)
    assert isinstance(twin[1], nn.SyncBatchNorm)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert [p.data_ptr() for p in twin.state_dict().values()] == [p.data_ptr() for p in model.state_dict().values()]
    assert [module.training for module in twin.modules()] == [module.training for module in model.modules()]
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))


def test_an_older_runs_folder_is_known(tmp_path):
    """How many processes there are is no part of a run's configuration."""
    trained("frozen", run_dir=tmp_path, epochs=1)
    told = (tmp_path / "config.yaml").read_text()
    assert not any(name in told for name in ("devices", "nodes", "parallel", "sync_batch_norm"))
