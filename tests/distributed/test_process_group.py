"""Several processes train as one does, and what one number of them began another goes on."""

import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from innermax.distributed.process_group import Ranks, synchronise_batch_norm
from innermax.utils.files import load_tensors
from tests.helpers.processes import (
    check_alike,
    check_alike_evaluated,
    check_alike_in_parts,
    copied,
    distance,
    torchrun,
    weights,
)
from tests.helpers.ranks import EPOCHS, network, trained

CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(900)  # processes start slowly on a machine that is busy otherwise


def test_two_processes_train_and_evaluate_as_one_does(alone, tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    torchrun(folder, "few")
    check_alike(alone("dynamic"), folder / "dynamic.safetensors")
    check_alike_in_parts(alone("standard"), folder / "standard-fsdp")
    check_alike_evaluated(folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["standard", "dynamic", "warm", "weighted", "free", "pgi", "strengthened", "frozen", "spoiled", "streamed"]
)
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
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_every_process_hears_the_same_alarm(alone, together, parallel):
    one = alone("strengthened").history
    if parallel == "ddp":
        found = load_tensors(together / "strengthened.safetensors")[1]["history"]
    else:
        lines = (together / "strengthened-fsdp" / "metrics.jsonl").read_text().splitlines()
        found = list(map(json.loads, lines))
    assert one[-1]["attack_steps"] > 1
    for row, other in zip(found, one, strict=True):
        for key in ("attack_steps", "overfit_batch", "overfit_relative_fosc"):
            assert row.get(key) == pytest.approx(other.get(key), rel=1e-4), key


@pytest.mark.slow
def test_random_directions_of_each_share_are_the_documented_difference(alone, together):
    one, (found, _) = alone("aligned"), load_tensors(together / "aligned.safetensors")
    assert 0 < distance(found, one.model.state_dict()) < 0.1


@pytest.mark.slow
def test_batch_norm_of_each_share_is_the_documented_difference(alone, together):
    one, (found, told) = alone("norm"), load_tensors(together / "norm.safetensors")
    assert 1e-4 < distance(found, one.model.state_dict()) < 0.1
    assert [row["loss"] for row in told["history"]] == pytest.approx([row["loss"] for row in one.history], abs=0.05)
    (mine, _), (theirs, _) = (load_tensors(together / f"norm-of-{rank}.safetensors") for rank in (0, 1))
    assert distance(mine, theirs) == 0, "statistics that attacks and files share"


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


@given(st.integers(1, 50), st.integers(1, 8))
def test_shares_cover_a_batch_and_their_means_make_its_mean(count, processes):
    batch = torch.arange(count) * 3
    several = [Ranks(rank, processes, CPU) for rank in range(processes)]
    shares = [one.share(batch) for one in several]
    assert torch.equal(torch.cat(shares), batch)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    weighted = [several[0].weight(len(share), count) * share.double().mean() for share in shares if len(share) > 0]
    assert float(sum(weighted)) / processes == pytest.approx(float(batch.double().mean()))


def test_synchronised_batch_norm_learns_in_the_models_own_tensors():
    model = network(norm=True, frozen=True)
    twin = synchronise_batch_norm(model)
    assert isinstance(twin[1], nn.SyncBatchNorm)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert [p.data_ptr() for p in twin.state_dict().values()] == [p.data_ptr() for p in model.state_dict().values()]
    assert [module.training for module in twin.modules()] == [module.training for module in model.modules()]
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
