"""A robust speed run: PreAct ResNet-18 on CIFAR-10 to 45 % under AutoAttack in as few minutes as possible.

    python bench/speedrun.py --out FOLDER --data DATA   # DATA: a folder that holds cifar10/*.parquet
    python bench/speedrun.py --smoke --out FOLDER       # every part on a processor, in a minute

The rules stand at the top of the page, page.md in the folder, which is written anew after each epoch. The same command
on the same folder goes on where it was stopped, in the training or in the evaluation.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timing import machine

import innermax as im
from innermax.data.image_set import Data, ImageSet
from innermax.objectives import CrossEntropy
from innermax.utils.files import write_text
from innermax.utils.randomness import permutation

GOAL, IMAGES, EPS = 0.45, 1_000, 8 / 255
RULES = """# Speed run

**{goal:.0f} % under AutoAttack with a PreAct ResNet-18 on CIFAR-10, in as few minutes as possible.** The rules:

- Data: CIFAR-10's 50,000 training images, and nothing else: no other images, real or generated, and no network that
  has learned from any.
- Network: PreAct ResNet-18 with the CIFAR stem, 11.2 million parameters, ReLU, at 32×32.
- Threat model: L∞, ε = 8/255, on pixels in [0, 1].
- Time: from the beginning of the first batch to the last update, on one machine: attacks, updates, augmentation, and
  whatever is compiled on the way. Not: reading the data, compiling before the first batch, checkpoints, evaluation.
- The network of the last epoch counts. Nothing was chosen by looking at test images.
- Robust accuracy: the standard AutoAttack, float32, on {images:,} test images that a seed draws, of which a 95 %
  interval is told. It counts where the point estimate reaches {goal:.0f} %.
"""


@dataclass(frozen=True)
class Recipe:
    """How the network is trained: WarmStart, a cosine to 0, averaged weights."""

    epochs: int = 20
    batch_size: int = 256
    lr: float = 0.2
    weight_decay: float = 5e-4
    ema: float = 0.995
    steps: int = 2
    label_smoothing: float = 0.1
    shift: int = 4
    flip: bool = True
    seed: int = 0


def main() -> None:
    told, recipe = _arguments()
    if told.data is not None:
        os.environ["INNERMAX_DATA"] = str(told.data)
    told.out.mkdir(parents=True, exist_ok=True)
    data = im.load_data("digits" if told.smoke else "cifar10", validation=0)
    run, test = told.out / "run", _draw(data.test, 8 if told.smoke else IMAGES)
    began = time.perf_counter()

    def progress(_name: str, done: int, total: int) -> None:
        if done in (1, total):
            write_page(told.out, recipe, test, None)

    model = train(data, recipe, told, run, progress)
    print(f"{time.perf_counter() - began:,.0f} s for the training, compiling included", flush=True)
    write_page(told.out, recipe, test, None)
    evaluation = evaluate(model, test, told)
    write_page(told.out, recipe, test, evaluation)
    print((told.out / "page.md").read_text(encoding="utf-8"))


def _arguments() -> tuple[argparse.Namespace, Recipe]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/train*.parquet and test*.parquet")
    parser.add_argument("--device", help="cuda, unless --smoke")
    parser.add_argument("--smoke", action="store_true", help="a small network, few images, an epoch, on a processor")
    for name in ("epochs", "batch_size", "seed", "steps"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Recipe, name))
    for name in ("lr", "weight_decay", "ema", "label_smoothing"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Recipe, name))
    told = parser.parse_args()
    told.device = told.device or ("cpu" if told.smoke else "cuda")
    if told.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU; --smoke runs every part on a processor")
    names = set(asdict(Recipe())) & set(vars(told))
    recipe = Recipe(**{name: getattr(told, name) for name in names})
    return told, Recipe(epochs=2, batch_size=32, shift=1, seed=recipe.seed) if told.smoke else recipe


def train(data: Data, recipe: Recipe, told: argparse.Namespace, folder: Path, progress: Any) -> torch.nn.Module:
    """The network of the last epoch, from the folder where it has been trained already."""
    torch.manual_seed(recipe.seed)
    name, options = ("wideresnet", {"depth": 10, "width": 1}) if told.smoke else ("preact-resnet18", {})
    model = im.build_model(name, input_shape=data.train.shape, **options)
    run = im.train(
        model, data.train[:64] if told.smoke else data.train, im.WarmStart(im.PGD(im.Linf(EPS)), steps=recipe.steps),
        objective=CrossEntropy(label_smoothing=recipe.label_smoothing), epochs=recipe.epochs,
        batch_size=recipe.batch_size, lr=recipe.lr, lr_schedule="cosine", weight_decay=recipe.weight_decay,
        ema=recipe.ema, shift=recipe.shift, flip=recipe.flip, seed=recipe.seed, device=told.device, run_dir=folder,
        progress=progress, keep_checkpoints=1,
    )  # fmt: skip
    return run.model


def _draw(test: ImageSet, count: int) -> ImageSet:
    """Test images that seed 0 draws."""
    return test[permutation(0, len(test), 0)[:count]]


def evaluate(model: torch.nn.Module, test: ImageSet, told: argparse.Namespace) -> im.Evaluation:
    """Under PGD-20 and AutoAttack; what an interrupted evaluation has found is not searched again."""
    threat = im.Linf(EPS)
    attacks = {"pgd-20": im.PGD(threat, steps=20), "autoattack": im.AutoAttack(threat)}
    rows = told.out / "rows"
    return im.evaluate(model, test, attacks, precision="float32", device=told.device, rows_dir=rows, audit=False)


def write_page(out: Path, recipe: Recipe, test: ImageSet, evaluation: im.Evaluation | None) -> None:
    """page.md: the rules, what came out, the recipe, and the epochs."""
    path = out / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    minutes = sum(row["seconds"] for row in rows) / 60
    lines = [RULES.format(goal=100 * GOAL, images=IMAGES), "## Result", ""]
    about = f"`python bench/speedrun.py` on {machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}."
    lines += [about, "", *_result(minutes, len(rows), recipe.epochs, test, evaluation), "", "## Recipe", ""]
    told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(recipe).items())
    lines += [f"WarmStart, SGD with momentum 0.9, the rate along a cosine to 0; {told}.", "", "## Epochs", ""]
    lines += ["| epoch | minutes | loss | accuracy under the training attack | gradients | images/s |"]
    lines += ["| --- | --- | --- | --- | --- | --- |", *map(_row, rows)]
    if rows:
        lines += ["", f"Attack network: {rows[-1]['attack_network']}."]
    write_text(out / "page.md", "\n".join(lines) + "\n")


def _result(minutes: float, done: int, epochs: int, test: ImageSet, evaluation: im.Evaluation | None) -> list[str]:
    if evaluation is None:
        return [f"{done} of {epochs} epochs so far, {minutes:.2f} minutes; not evaluated yet."]
    cells = {name: evaluation.accuracy[name] for name in ("clean", "pgd-20", "autoattack")}
    reached = "reached" if cells["autoattack"].value >= GOAL else "**missed**"
    shown = [f"{100 * v.value:.1f} <sub>{100 * v.low:.1f}–{100 * v.high:.1f}</sub>" for v in cells.values()]
    return [
        f"{100 * GOAL:.0f} % {reached} after **{minutes:.2f} minutes**; accuracy in % on {len(test):,} test images:",
        "",
        "| minutes | epochs | clean | PGD-20 | AutoAttack |",
        "| --- | --- | --- | --- | --- |",
        f"| {minutes:.2f} | {epochs} | {' | '.join(shown)} |",
    ]


def _row(row: Mapping[str, Any]) -> str:
    values = f"{row['loss']:.3f} | {100 * row['accuracy']:.1f} | {row['gradients']:.2f}"
    return f"| {row['epoch'] + 1} | {row['seconds'] / 60:.2f} | {values} | {row['images_per_second']:,.0f} |"


if __name__ == "__main__":
    main()
