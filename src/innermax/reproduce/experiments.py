"""The experiments: values whose fields say what is measured. Their results are JSON."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

import innermax as im
from innermax.attacks.base import Attack
from innermax.attacks.trace import trace_search
from innermax.data.image_set import ImageSet
from innermax.distributed.launch import find_device
from innermax.evaluation.model_checks import trust_normalisation
from innermax.evaluation.result import Evaluation
from innermax.reproduce.cache import Cache, Result, hash_name, load_data
from innermax.reproduce.scales import Training
from innermax.utils.intervals import accuracy

Attacks = tuple[tuple[str, Attack], ...]  # (name, attack) pairs: a tuple, so that an experiment can be hashed


@dataclass(frozen=True)
class Trained:
    """The history of a training: a row of measures per epoch."""

    training: Training

    def run(self, cache: Cache) -> Result:
        """{"history": rows}."""
        return {"history": list(cache.train(self.training).history)}


@dataclass(frozen=True)
class Scored:
    """Which images are classified correctly, clean and under each attack.

    Args:
        training: of the network that is attacked.
        attacks: names and attacks; without any, only clean images are scored.
        images: number of images, the first ones; None: all.
        split: that the images are from.
        made_on: training of another network, on which the adversarial images are made (black-box).
        best: take the best epoch on the validation split instead of the last.
    """

    training: Training
    attacks: Attacks
    images: int | None = None
    split: Literal["test", "validation"] = "test"
    made_on: Training | None = None
    best: bool = False

    def run(self, cache: Cache) -> Result:
        """Of "clean" and each attack {"accuracy", "low", "high", "total", "correct"} and, white-box, its cost."""
        model = cache.network(self.training, self.best)
        data = load_data(self.training.setting)
        images = (data.test if self.split == "test" else data.validation)[: self.images]  # type: ignore[index]
        if self.made_on is not None:
            surrogate = cache.network(self.made_on)
            found = im.transfer(surrogate, {"target": model}, images, dict(self.attacks))
            columns = {name: found.correct("surrogate", "target", name) for name, _ in self.attacks}
            return {name: pack_correct(column) for name, column in columns.items()}
        rows = cache.models / f"{hash_name(self)}-rows"  # an interrupted evaluation resumes from there
        with trust_normalisation():
            evaluation = im.evaluate(model, images, dict(self.attacks), rows_dir=rows, audit=False)
        return {
            name: pack_correct(evaluation.correct(name)) | cost_of(evaluation, name)
            for name in ("clean", *evaluation.rows)
        }


@dataclass(frozen=True)
class Gauged:
    """The end of an attack's search for each of the first test images: FOSC, loss and verdict."""

    training: Training
    attack: im.PGD
    images: int

    def run(self, cache: Cache) -> Result:
        """{"fosc", "relative_fosc", "loss", "correct"}: lists of one number per image."""
        images = load_data(self.training.setting).test[: self.images]
        model = cache.network(self.training)
        with trust_normalisation():
            rows = im.evaluate(model, images, {"attack": self.attack}, audit=False).rows["attack"]
        return {name: _round_values(getattr(rows, name)) for name in ("fosc", "relative_fosc", "loss", "correct")}


@dataclass(frozen=True)
class Followed:
    """FOSC and loss of the first test images after each step of an attack."""

    training: Training
    attack: im.PGD
    images: int

    def run(self, cache: Cache) -> Result:
        """{"fosc", "loss"}: a list per step, from the start on, of one number per image."""
        device = find_device(cache.device)
        images: ImageSet = load_data(self.training.setting).test[: self.images].to(device)
        x, y = images.batch(torch.arange(len(images), device=device))
        trace = trace_search(self.attack, cache.network(self.training), x, y)
        return {name: [_round_values(step) for step in getattr(trace, name).cpu().numpy()] for name in ("fosc", "loss")}


def unpack_correct(entry: Mapping[str, Any]) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """(N,) which images are classified correctly, of one entry of a `Scored` result."""
    packed = np.frombuffer(base64.b85decode(entry["correct"]), dtype=np.uint8)
    return np.unpackbits(packed, count=entry["total"]).astype(bool)


def pack_correct(correct: Any) -> Result:
    """One entry of a `Scored` result, of which images are classified correctly."""
    measured = accuracy(int(correct.sum()), len(correct))
    packed = base64.b85encode(np.packbits(np.asarray(correct, dtype=bool)).tobytes()).decode()
    return {
        "accuracy": measured.value,
        "low": measured.low,
        "high": measured.high,
        "total": measured.total,
        "correct": packed,
    }


def cost_of(evaluation: Evaluation, name: str) -> Result:
    """The gradients and forward passes an image of an attack; empty for "clean"."""
    if name == "clean":
        return {}
    found = evaluation.convergence[name]
    return {"gradients": round(found.gradients, 3), "forwards": round(found.forwards, 3)}


def _round_values(values: Any) -> list[Any]:
    """Numbers rounded to five digits, enough for a picture; None for those that are not finite."""
    if np.asarray(values).dtype == bool:
        return [int(value) for value in values]
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in np.asarray(values, dtype=float)]
