"""Trainings and an evaluation that one process or several do.

`torchrun … ranks.py FOLDER` does every training in turn, `torchrun … ranks.py FOLDER few` two and the evaluation.
"""

import io
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from torch import nn

import innermax as im
from innermax.objectives import cross_entropy
from innermax.oracle import oracle
from innermax.training import alarm
from innermax.utils.files import save_tensors

PGD = im.PGD(im.Linf(0.1), steps=3)
COUNT, BATCH, EPOCHS = 403, 80, 4  # six batches of 68 and 67, an epoch: shares of one batch differ
MARKED = 7  # an example that `spoiled` cannot do with


def examples(count=COUNT):
    data = im.load_data("digits").train
    images, labels = data.images[:count].clone(), data.labels[:count]
    images[MARKED] = 255
    return images, labels


def stream():
    """Examples that are read anew in every epoch."""
    images, labels = examples()
    rows = {"image": [], "label": labels.tolist()}
    for image in images:
        file = io.BytesIO()
        Pictures.fromarray(image[0].numpy()).save(file, "PNG")
        rows["image"].append({"bytes": file.getvalue(), "path": None})
    held = Dataset.from_dict(rows, Features({"image": Image(), "label": Value("int64")}))
    return im.ImageStream(held.to_iterable_dataset(4), COUNT, buffer=50)


def network(norm=False, frozen=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.BatchNorm2d(4) if norm else nn.Identity()
        head = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        model = nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), head)
    if frozen:
        layer.running_mean.fill_(0.1)
        layer.eval()
    return model


def spoiled(model, x, y, x_adv, epoch):
    """Cross-entropy, which is no number where the marked example is among the share."""
    loss, logits = cross_entropy(model, x, y, x_adv, epoch)
    return (loss * float("nan") if bool((x.flatten(1).amin(1) == 1).any()) else loss), logits


def slow(model, x, y, x_adv, epoch):
    """Cross-entropy, and time to be interrupted in."""
    time.sleep(0.05)
    return cross_entropy(model, x, y, x_adv, epoch)


def trained(name, **options):
    """One of the trainings, by name."""
    dynamic = im.Dynamic(PGD, "auto")
    model, strategy, more = {
        "standard": (network(), im.Standard(PGD), {"optimizer": "adamw"}),
        "dynamic": (network(), dynamic, {"shift": 1, "flip": True}),
        "warm": (network(), im.WarmStart(PGD), {"shift": 1}),
        "weighted": (network(), im.Standard(PGD), {"objective": "loss_weighted", "clip": 0.5, "ema": 0.9}),
        "trades": (network(), im.WarmStart(PGD), {"objective": im.AWP(im.TRADES(3), 0.02)}),
        "free": (network(), im.Free(PGD, replays=2), {"epochs": 2 * EPOCHS}),
        "pgi": (network(), im.FGSMPGI(PGD), {"shift": 1}),
        "aligned": (network(), im.FGSMRS(PGD), {"objective": "grad_align"}),
        "strengthened": (network(), im.Standard(im.FGSM(PGD.threat)), {"on_overfit": "strengthen"}),
        "frozen": (network(norm=True, frozen=True), im.Standard(PGD), {}),
        "norm": (network(norm=True), im.Standard(PGD), {}),
        "spoiled": (network(), im.Standard(PGD), {"objective": spoiled, "on_nan": "skip"}),
        "slow": (network(), im.WarmStart(PGD), {"objective": slow}),
        "streamed": (network(), dynamic, {"shift": 1}),
    }[name]
    data = stream() if name == "streamed" else examples()
    defaults = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 0.02, "precision": "float32", "progress": False}
    nervous = mock.patch.multiple(alarm, LEVEL=0.0, RISE=1.0) if name == "strengthened" else nullcontext()
    with nervous:
        return im.train(model, data, strategy, **defaults | more | options)


def evaluated(**options):
    """An evaluation."""
    attacks = {"fgsm": im.FGSM(PGD.threat), "pgd": im.PGD(PGD.threat, steps=5, random_start=True)}
    return im.evaluate(network(norm=True).eval(), examples(130), attacks, batch_size=20, seed=3, audit=False, **options)


def keep(folder, name, run):
    """The first process writes what came out."""
    if os.environ["RANK"] == "0":
        save_tensors(folder / f"{name}.safetensors", run.model.state_dict(), {"history": list(run.history)})


def evaluate(folder):
    """An evaluation: its rows, and what each process knows of it."""
    evaluation = evaluated(devices=2, rows_dir=folder / "rows")
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(evaluation.examples.to_json()))


def few(folder):
    """A training in copies and one in parts, and the evaluation."""
    keep(folder, "dynamic", trained("dynamic"))
    trained("standard", parallel="fsdp", run_dir=folder / "standard-fsdp")
    evaluate(folder)


def everything(folder):
    """Every training, and those that others began."""
    for name in (
        "dynamic", "weighted", "trades", "free", "pgi", "aligned", "strengthened", "frozen", "norm", "spoiled",
        "streamed",
    ):  # fmt: skip
        run = trained(name)
        keep(folder, name, run)
        if name == "norm":
            save_tensors(folder / f"norm-of-{os.environ['RANK']}.safetensors", run.model.state_dict())
    for name, parallel in (
        ("standard", "ddp"),
        ("warm", "ddp"),
        ("warm", "fsdp"),
        ("standard", "fsdp"),
        ("trades", "fsdp"),
        ("strengthened", "fsdp"),
    ):
        run = trained(
            name, parallel=parallel, run_dir=folder / f"{name}-{parallel}", keep_checkpoints=99, checkpoint_every=2
        )
        if parallel == "ddp":
            keep(folder, name, run)
    for name, parallel in (("warm", "ddp"), ("standard", "fsdp")):
        trained(name, parallel=parallel, run_dir=folder / f"{name}-of-one-{parallel}")
    trained("slow", run_dir=folder / "slow-of-two")


if __name__ == "__main__":
    torch.set_num_threads(1)
    oracle.times_as_long = lambda *_: 0.5  # as in the process that they are compared with
    (few if sys.argv[2:] == ["few"] else everything)(Path(sys.argv[1]))
