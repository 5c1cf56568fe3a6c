"""Writes results/race.md: whole trainings on MNIST, ours and other people's, each to its trained network.

python bench/race.py --write results/race.md     # needs the data; an hour and a half on one core

Each trains the paper's 4-layer CNN on the same images with the same schedule. Ours runs for several numbers of epochs,
a whole schedule each: the shortest training that is as robust as a plain script's says how much sooner it is there.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
import torch.nn.functional as F
from timing import machine
from torch import nn

import innermax as im
from innermax.data.image_set import Data
from innermax.strategies import Strategy

EPS, BATCH, LR, DROPS, DECAY = 0.3, 128, 0.01, (0.4, 0.8), 1e-4
JUDGES = {"PGD-20": im.PGD(im.Linf(EPS), steps=20), "C&W∞": im.PGD(im.Linf(EPS), steps=30, loss="margin")}
HEAD = """# A race

`python bench/race.py` on {machine}.
MNIST, {images:,} images, the paper's 4-layer CNN, ε = 0.3, batches of 128, SGD with the paper's schedule; seconds of
the whole training, compiling included, in the order in which they ran; robust accuracy in % on {judged:,} images held
out, with its 95 % interval over images, one seed. Ours a second time, last, shows how much the machine drifted.

**As robust as the plain script (PGD-20) in 1/{factor:.0f} of its time**, and at equal epochs in 1/{equal:.0f}."""


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return im.build_model("mnist-cnn", input_shape=(1, 28, 28))


def ours(make: Callable[[im.PGD], Strategy]) -> Callable[[Data, int, int, int], nn.Module]:
    """`im.train`."""

    def train(data: Data, images: int, epochs: int, seed: int) -> nn.Module:
        strategy = make(im.PGD(im.Linf(EPS), steps=10))
        run = im.train(
            network(seed), data.train[:images], strategy, epochs=epochs, batch_size=BATCH, lr=LR, lr_drops=DROPS,
            weight_decay=DECAY, seed=seed, progress=False,
        )  # fmt: skip
        return run.model

    return train


def plain(build: peers.Builder) -> Callable[[Data, int, int, int], nn.Module]:
    """The loop of most scripts around an attack, float32, with the images in memory as float32."""

    def train(data: Data, images: int, epochs: int, seed: int) -> nn.Module:
        model, (x, y) = network(seed), data.train[:images].batch(torch.arange(images))
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY)
        drops = [round(share * epochs) for share in DROPS]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
        attack = build(model, EPS, 10)
        for _ in range(epochs):
            for index in torch.randperm(images).split(BATCH):
                model.eval()
                x_adv = attack(x[index], y[index]).detach()
                model.train()
                optimizer.zero_grad()
                F.cross_entropy(model(x_adv), y[index]).backward()
                optimizer.step()
            schedule.step()
        return model.eval()

    return train


def raced(told: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a training: name, epochs, seconds, accuracies."""
    data = im.load_data("mnist", validation=told.judged)
    warm, standard = ours(im.WarmStart), ours(im.Standard)
    entries = [("WarmStart, ours", warm, epochs) for epochs in (told.epochs, *told.fewer)]
    entries += [("Standard, ours", standard, told.epochs), ("Standard, naive script", plain(peers.naive), told.epochs)]
    if "torchattacks" in peers.installed():
        entries.append(("Standard, torchattacks in a plain loop", plain(peers.torchattacks), told.epochs))
    entries.append(("WarmStart, ours, again", warm, told.epochs))
    rows = []
    for name, train, epochs in entries:
        began = time.perf_counter()
        model = train(data, told.images, epochs, told.seed)
        row = {"training": name, "epochs": epochs, "seconds": round(time.perf_counter() - began, 1)}
        found = im.evaluate(model, data.validation, JUDGES, precision="float32", audit=False)
        for attack in ("clean", *JUDGES):
            value = found.accuracy[attack]
            row[attack] = [value.value, value.low, value.high]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def page(rows: list[dict[str, Any]], told: argparse.Namespace) -> str:
    first, naive = rows[0]["seconds"], next(row for row in rows if "naive" in row["training"])
    soonest = min(r["seconds"] for r in rows if "WarmStart" in r["training"] and r["PGD-20"] >= naive["PGD-20"])
    gained = {"factor": naive["seconds"] / soonest, "equal": naive["seconds"] / first}
    heads = ("training", "epochs", "seconds", "over WarmStart's", "clean", *JUDGES)
    lines = [HEAD.format(machine=machine(), images=told.images, judged=told.judged, **gained), ""]
    lines += [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in rows:
        cells = [
            f"{100 * v:.1f} <sub>{100 * low:.1f}–{100 * high:.1f}</sub>" for v, low, high in map(row.get, heads[4:])
        ]
        whole = [row["training"], row["epochs"], f"{row['seconds']:.0f}", f"{row['seconds'] / first:.2f}", *cells]
        lines.append(f"| {' | '.join(map(str, whole))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--fewer", type=int, nargs="*", default=[4, 3], help="ours also for so many epochs")
    parser.add_argument("--judged", type=int, default=1_000, help="images held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path)
    told = parser.parse_args()
    rows = raced(told)
    text = page(rows, told)
    print(text)
    if told.write is not None:
        told.write.write_text(text, encoding="utf-8")
        told.write.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
