"""What tests of several processes share."""

import os
import shutil
import signal

import pytest

from innermax.training.checkpoints import find_checkpoints
from tests.helpers.processes import Alone, copied, kill_second, torchrun, within
from tests.helpers.ranks import trained


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """What one process makes of each training."""
    return Alone(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    """A run of two processes that was interrupted, went on, and lost its second process; what was said, and when."""
    folder, told = tmp_path_factory.mktemp("stopped") / "run", {}
    within(folder, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trained("slow", devices=2, run_dir=folder, checkpoint_every=1)
    told["interrupted"] = find_checkpoints(folder)[0].name
    return folder, told | kill_second(folder)


@pytest.fixture(scope="session")
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
