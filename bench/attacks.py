"""Robust accuracy against cost: PGD, PGD with restarts, APGD, AutoAttack and the guided attack on the same models.

    python bench/attacks.py                              # trains fifteen small models first, into runs/attacks/models
    python bench/attacks.py --models DIR --only linf     # run folders of such models; some of them

Every (model, attack, seed) is kept as one file under runs/attacks and not repeated, so that the command goes on where
it was interrupted; results/attacks.md, .json and .png are made of the files there are. Attacks search in float32, and
what they find is scored by the model itself. An example's cost is its gradients and half its forward-only queries.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attacks_report import written

import innermax as im
from innermax.threat import Threat

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Source:
    """A data set, the network and the training that its models share, and how many test images are attacked."""

    network: str
    linf: float
    l2: float
    training_images: int | None
    epochs: int
    lr: float
    attacked: int


SOURCES = {
    "digits": Source("digits-cnn", 0.15, 1.0, None, 20, 0.05, 150),
    "mnist": Source("mnist-cnn", 0.3, 2.0, 30_000, 6, 0.02, 60),
    "cifar10": Source("mnist-cnn", 8 / 255, 0.5, 8_000, 6, 0.05, 40),
}
MODELS = ("unsecured", "linf-standard", "linf-dynamic", "l2-standard", "l2-dynamic")
ATTACKS: dict[str, tuple[Callable[[Threat], Any], tuple[int, ...]]] = {
    "pgd-20": (lambda threat: im.PGD(threat, steps=20, stop_on_success=True), (0,)),
    "pgd-100": (lambda threat: im.PGD(threat, steps=100, step_size=threat.eps / 10, stop_on_success=True), (0,)),
    "pgd-50x10": (
        lambda threat: im.PGD(threat, steps=50, step_size=threat.eps / 10, restarts=10, stop_on_success=True),
        (0,),
    ),
    "apgd-100": (im.APGD, (0,)),
    "apgd-t": (lambda threat: im.APGD(threat, loss="dlr", targets=9), (0,)),
    "guided": (im.GuidedPGD, SEEDS),
    "autoattack": (im.AutoAttack, SEEDS),
}


def threats(name: str) -> dict[str, Threat]:
    """The threat models that a model is attacked in: its own, or both."""
    source = SOURCES[name.partition("-")[0]]
    both: dict[str, Threat] = {"linf": im.Linf(source.linf), "l2": im.L2(source.l2)}
    return {norm: threat for norm, threat in both.items() if norm in name or "unsecured" in name}


def trained(name: str, folder: Path) -> torch.nn.Module:
    """The model of a run folder, trained where it is not there or not to its end."""
    kind, _, how = name.partition("-")
    source, metrics = SOURCES[kind], folder / "metrics.jsonl"
    epochs = max(3, source.epochs // 2) if how == "unsecured" else source.epochs
    if not metrics.exists() or len(metrics.read_text().splitlines()) < epochs:
        data = im.load_data(kind, validation=0)
        train = data.train if source.training_images is None else data.train[: source.training_images]
        strategy = im.Unsecured()
        if how != "unsecured":
            (threat,) = threats(name).values()
            attack = im.PGD(threat, steps=7, step_size=threat.eps / 3, gauge="exact")
            strategy = im.Standard(attack) if how.endswith("standard") else im.Dynamic(attack, c_max="auto")
        torch.manual_seed(0)
        model = im.build_model(source.network, input_shape=train.shape)
        options = {"lr": source.lr, "lr_schedule": "cosine", "flip": kind == "cifar10"}
        im.train(model, train, strategy, epochs=epochs, run_dir=folder, progress=False, **options)
    return im.load_model(folder)


def attacked(model: torch.nn.Module, images: im.ImageSet, attack: Any, seeds: list[int]) -> list[dict[str, Any]]:
    """Who survives one attack, and what each example cost: a record a seed.

    Seeds are example numbers of their own, so that all searches share their batches.
    """
    began, count = time.perf_counter(), len(images)
    x, y = images.batch(torch.arange(count).repeat(len(seeds)))
    index = torch.cat([torch.arange(count) + seed * count for seed in seeds])
    result = attack(im.Oracle.fast(model, x[:16], "float32"), x, y, index=index, final="loss")
    if not bool(attack.threat.contains(result.x_adv, x).all()):
        raise RuntimeError(f"{attack} left its threat model")
    with torch.no_grad():
        clean, scored = (model.eval()(point).argmax(1) == y for point in (x, result.x_adv))
    seconds = round((time.perf_counter() - began) / len(seeds), 1)
    columns = {
        "clean": clean.int(),
        "survives": (clean & scored).int(),
        "gradients": result.gradient_calls,
        "forwards": result.forward_calls,
    }
    parts = {name: value.reshape(len(seeds), count).tolist() for name, value in columns.items()}
    return [
        {name: part[row] for name, part in parts.items()} | {"seed": seed, "attack": repr(attack), "seconds": seconds}
        for row, seed in enumerate(seeds)
    ]


def main(models: Path, runs: Path, names: list[str], kinds: list[str]) -> None:
    """Runs what has not been run yet."""
    runs.mkdir(parents=True, exist_ok=True)
    for name in names:
        source, kind_of_data = SOURCES[name.partition("-")[0]], name.partition("-")[0]
        for kind in kinds:
            make, seeds = ATTACKS[kind]
            for norm, threat in threats(name).items():
                paths = {seed: runs / f"{name}_{norm}_{source.attacked}_{kind}_{seed}.json" for seed in seeds}
                missing = [seed for seed, path in paths.items() if not path.exists()]
                if not missing:
                    continue
                images = im.load_data(kind_of_data, validation=0).test[: source.attacked]
                for record in attacked(trained(name, models / name), images, make(threat), missing):
                    record |= {"model": name, "norm": norm, "eps": threat.eps, "kind": kind}
                    path = paths[record["seed"]]
                    path.write_text(json.dumps(record))
                    print(f"{path.stem}: {sum(record['survives'])} survive, {record['seconds']} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("runs/attacks/models"), help="run folders, by model")
    parser.add_argument("--runs", type=Path, default=Path("runs/attacks"), help="where finished attacks are kept")
    parser.add_argument("--only", default="", help="models whose names hold this")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--write", type=Path, default=Path("results/attacks.md"))
    arguments = parser.parse_args()
    names = [f"{data}-{model}" for data in SOURCES for model in MODELS]
    main(arguments.models, arguments.runs, [name for name in names if arguments.only in name], arguments.attacks)
    written(arguments.runs, arguments.write)
