"""Processes that a call starts end together."""

import shutil

import pytest

import innermax as im
from tests.helpers import ranks
from tests.helpers.processes import check_killed, distance, kill_second, weights
from tests.helpers.ranks import network, trained

pytestmark = pytest.mark.timeout(900)  # processes start slowly on a machine that is busy otherwise


def test_a_process_that_dies_ends_the_job_which_says_who_it_was(tmp_path):
    check_killed(kill_second(tmp_path / "run"))


@pytest.mark.slow
def test_what_was_interrupted_and_killed_goes_on_with_one_process_and_with_two(alone, together, stopped, tmp_path):
    folder, told = stopped
    assert not told["interrupted"].endswith("-00000000.safetensors")
    check_killed(told)
    shutil.copytree(folder, tmp_path / "run")
    expected = alone("slow").model.state_dict()
    assert distance(trained("slow", run_dir=tmp_path / "run").model.state_dict(), expected) < 1e-4
    assert distance(weights(together / "slow-of-two"), expected) < 1e-4


def test_what_does_not_pickle_is_said():
    model = network()
    model.hidden = lambda x: x
    with pytest.raises(TypeError, match=r"devices=2 needs a model and attacks that pickle, and these do not: .*lambda"):
        im.train(model, ranks.examples(), im.Unsecured(), devices=2, progress=False)
