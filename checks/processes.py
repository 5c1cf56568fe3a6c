"""Several processes beside one: equal losses, deaths, and runs that go on with another number: a section of Markdown.

python checks/processes.py [--kills 2]
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn

import innermax as im
from innermax.objectives import cross_entropy
from innermax.strategies import Strategy
from innermax.training.checkpoints import find_checkpoints
from innermax.utils.files import load_tensors

PGD = im.PGD(im.Linf(0.1), steps=5)
UPDATES = 20
COUNT = 500


def network(norm: bool, frozen: bool = False) -> nn.Module:
    """A small network of digits, its weights always the same."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(8) if norm else nn.Identity()
    head = nn.Sequential(nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10))
    model = nn.Sequential(nn.Conv2d(1, 8, 3), layer, nn.ReLU(), head)
    if frozen:
        layer.eval()
    return model


def losses(model: nn.Module, strategy: Strategy, **options) -> list[float]:
    """The loss of each of the updates, each an epoch of a single batch."""
    with tempfile.TemporaryDirectory() as folder:
        data = im.load_data("digits").train[:COUNT]
        settings = {"epochs": UPDATES, "batch_size": COUNT, "lr": 0.05, "precision": "float32", "progress": False}
        run = im.train(model, data, strategy, run_dir=Path(folder) / "run", **settings, **options)
    return [row["loss"] for row in run.history]


def slow(model, x, y, x_adv, epoch):
    """Cross-entropy, and time to be killed in."""
    time.sleep(0.05)
    return cross_entropy(model, x, y, x_adv, epoch)


def trained(folder: Path, **options) -> dict[str, torch.Tensor]:
    """A training with a warm start, whose state is more than weights; the weights it ends with."""
    data = im.load_data("digits").train[:COUNT]
    settings = {"epochs": 4, "batch_size": 50, "lr": 0.05, "precision": "float32", "progress": False}
    strategy = im.WarmStart(PGD)
    im.train(network(False), data, strategy, objective=slow, run_dir=folder, checkpoint_every=1, **settings, **options)
    return load_tensors(folder / "model.safetensors")[0]


def killed(folder: Path, rank: int) -> tuple[float, str]:
    """A training of two processes of which one is killed inside an epoch: seconds to its end, and what it says."""
    at = []

    def kill() -> None:
        while not find_checkpoints(folder) or find_checkpoints(folder)[0].name.endswith("batch-00000000.safetensors"):
            time.sleep(0.01)
        children = sorted(child.pid for child in multiprocessing.active_children())
        at.append(time.monotonic())
        os.kill(children[rank], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    try:
        trained(folder, devices=2)
    except ChildProcessError as error:
        return time.monotonic() - at[0], str(error)
    raise SystemExit("it ended before it was killed")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two networks' weights."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def main() -> None:
    """Prints the section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=2, help="of each of two processes")
    kills = parser.parse_args().kills
    torch.set_num_threads(1)
    print(f"{UPDATES} updates, float32, one batch of {COUNT} digits each: the largest difference of their losses\n")
    print("| network | strategy | processes | largest difference |\n| --- | --- | --- | --- |")
    for name, told in (("no BatchNorm", (False,)), ("BatchNorm frozen", (True, True)), ("BatchNorm", (True,))):
        for strategy in (im.Standard(PGD), im.Dynamic(PGD, 0.02)):
            one = losses(network(*told), strategy)
            for several in ({"devices": 2}, {"devices": 2, "parallel": "fsdp"}):
                other = losses(network(*told), strategy, **several)
                most = max(abs(a - b) for a, b in zip(one, other, strict=True))
                words = "two, fsdp" if "parallel" in several else "two, ddp"
                print(f"| {name} | {type(strategy).__name__} | {words} | {most:.1e} |", flush=True)
    with tempfile.TemporaryDirectory() as place:
        whole, message = trained(Path(place) / "whole"), ""
        print("\n| killed (SIGKILL) | seconds to the end of the job |\n| --- | --- |")
        for rank in (0, 1):
            for turn in range(kills):
                seconds, message = killed(Path(place) / f"{rank}-{turn}", rank)
                print(f"| rank {rank} | {seconds:.1f} |", flush=True)
        print(f"\nIt says: `{message}`\n")
        print("| went on with | largest difference from the weights of the run of one process |\n| --- | --- |")
        ways = {
            "1": {},
            "2, ddp": {"devices": 2},
            "3, ddp": {"devices": 3},
            "2, fsdp": {"devices": 2, "parallel": "fsdp"},
        }
        for words, options in ways.items():
            folder = Path(place) / f"on-{words}"
            shutil.copytree(Path(place) / "1-0", folder)
            print(f"| {words} | {apart(trained(folder, **options), whole):.1e} |", flush=True)


if __name__ == "__main__":
    main()
