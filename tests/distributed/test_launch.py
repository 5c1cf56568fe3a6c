"""Who is there, and what is refused."""

import pytest
import torch

from innermax.distributed import launch
from innermax.distributed.launch import Launch, find_launch, plan_launch
from innermax.distributed.process_group import find_members
from tests.helpers.ranks import trained

CPU = torch.device("cpu")


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


def test_an_older_runs_folder_is_known(tmp_path):
    """How many processes there are is no part of a run's configuration."""
    trained("frozen", run_dir=tmp_path, epochs=1)
    told = (tmp_path / "config.yaml").read_text()
    assert not any(name in told for name in ("devices", "nodes", "parallel", "sync_batch_norm"))
