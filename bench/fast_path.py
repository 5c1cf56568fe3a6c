"""Whether the fast path costs robustness: MNIST trained twice from each seed, with it and in float32; and whether its
attacks are weaker: the same models attacked both ways.

    python bench/fast_path.py --seeds 0 1 2 --write results/fast_path.md

Both trainings of a pair start from the same weights, see the same batches and draw the same random starts; the paper's
network, ε = 0.3, the Standard strategy on PGD-5 with step ε/2 (half the cost of PGD-10, on either side), a learning
rate that falls to 0, so that the last updates scatter little. Both are scored by PGD-20 in float32 on all 10,000 test
images. Finished runs are kept in the folder --runs and not repeated.
"""

import argparse
import json
import math
import platform
import statistics
from pathlib import Path

import scipy.stats
import torch

import innermax as im

EPS = 0.3


def trained(seed: int, precision: str, images: int, epochs: int, folder: Path) -> dict[str, float]:
    """Clean and PGD-20 accuracy, and training speed, of one run; read where it is done."""
    result = folder / "result.json"
    if result.exists():
        done: dict[str, float] = json.loads(result.read_text())
        return done
    data = im.load_data("mnist")
    torch.manual_seed(seed)
    run = im.train(
        im.build_model("mnist-cnn", input_shape=(1, 28, 28)),
        data.train[:images],
        im.Standard(im.PGD(im.Linf(EPS), steps=5, step_size=EPS / 2)),
        epochs=epochs,
        lr=0.02,
        lr_schedule="cosine",
        seed=seed,
        precision=precision,
        run_dir=folder,
        progress=False,
    )
    attacks = {"pgd-20": im.PGD(im.Linf(EPS), steps=20)}
    scored = im.evaluate(run.model, data.test, attacks)
    done = {
        "clean": scored.accuracy["clean"].value,
        "pgd-20": scored.accuracy["pgd-20"].value,
        "images/s": statistics.median(row["images_per_second"] for row in run.history),
    }
    result.write_text(json.dumps(done, indent=2) + "\n")
    return done


def lowered(folder: Path) -> float:
    """PGD-20 accuracy of a trained model, in float32, when the attack searches on the fast path; read where known."""
    path = folder / "lowered.json"
    if not path.exists():
        attacks = {"pgd-20": im.PGD(im.Linf(EPS), steps=20)}
        scored = im.evaluate(im.load_model(folder), im.load_data("mnist").test, attacks, precision="auto")
        path.write_text(json.dumps(scored.accuracy["pgd-20"].value))
    return float(json.loads(path.read_text()))


def interval(differences: list[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean."""
    half = scipy.stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences) - half, statistics.mean(differences) + half


def page(
    pairs: dict[int, dict[str, dict[str, float]]], attacked: dict[str, tuple[float, float]], images: int, epochs: int
) -> str:
    differences = [100 * (pair["auto"]["pgd-20"] - pair["float32"]["pgd-20"]) for pair in pairs.values()]
    lines = [
        "# Does the fast path cost robustness?",
        "",
        f"`python bench/fast_path.py --seeds {' '.join(map(str, pairs))} --images {images} --epochs {epochs}` on "
        f"{platform.machine()}, torch {torch.__version__}.",
        "MNIST, the paper's network, Standard on PGD-5 with step ε/2, learning rate 0.02 falling to 0; every pair",
        "shares weights, batches and random starts. Accuracies in % on all 10,000 test images, attacked and scored in",
        "float32.",
        "",
        "| seed | clean, fast | clean, float32 | PGD-20, fast | PGD-20, float32 | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (seed, pair), difference in zip(pairs.items(), differences, strict=True):
        cells = [100 * pair[path][name] for name in ("clean", "pgd-20") for path in ("auto", "float32")]
        lines.append(f"| {seed} | " + " | ".join(f"{cell:.2f}" for cell in cells) + f" | {difference:+.2f} |")
    if len(differences) > 1:
        low, high = interval(differences)
        mean = statistics.mean(differences)
        lines += ["", f"Mean difference {mean:+.2f} points, paired 95 % interval [{low:+.2f}, {high:+.2f}]."]
    lines += [
        "",
        "The same models under PGD-20 whose search runs in float32 or on the fast path, bf16 for three quarters of the",
        "steps; scored in float32:",
        "",
    ]
    lines += ["| model | searched in float32 | on the fast path | difference |", "| --- | --- | --- | --- |"]
    for name, (exact, fast) in attacked.items():
        lines.append(f"| {name} | {100 * exact:.2f} | {100 * fast:.2f} | {100 * (fast - exact):+.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--attacked", type=int, default=2, help="of how many seeds the models are attacked both ways")
    parser.add_argument("--runs", type=Path, default=Path("runs/fast_path"))
    parser.add_argument("--write", type=Path, help="Markdown file; the numbers go into a .json beside it")
    arguments = parser.parse_args()
    pairs: dict[int, dict[str, dict[str, float]]] = {}
    for seed in arguments.seeds:
        pairs[seed] = {
            path: trained(seed, path, arguments.images, arguments.epochs, arguments.runs / f"{path}-{seed}")
            for path in ("auto", "float32")
        }
        print(f"seed {seed}: {pairs[seed]}", flush=True)
    attacked = {
        f"{path}, seed {seed}": (pair[path]["pgd-20"], lowered(arguments.runs / f"{path}-{seed}"))
        for seed, pair in list(pairs.items())[: arguments.attacked]
        for path in pair
    }
    text = page(pairs, attacked, arguments.images, arguments.epochs)
    print(text)
    if arguments.write is not None:
        arguments.write.write_text(text)
        numbers = {"trained": pairs, "attacked": attacked}
        arguments.write.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n")
