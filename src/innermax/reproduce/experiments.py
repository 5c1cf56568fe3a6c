"""What pieces ask of a workshop: values that say what is measured, each with how it is done."""

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
from innermax.evaluation.model_checks import normalisation_known
from innermax.evaluation.result import Evaluation
from innermax.reproduce.cache import Answer, Workshop, fingerprint, load
from innermax.reproduce.scales import Training
from innermax.utils.intervals import accuracy

Attacks = tuple[tuple[str, Attack], ...]  # a name and an attack each: a value that can be told apart by what it says


@dataclass(frozen=True)
class Trained:
    """How a training went: a row of measures an epoch."""

    training: Training

    def answer(self, workshop: Workshop) -> Answer:
        """{"history": rows}."""
        return {"history": list(workshop.run(self.training).history)}


@dataclass(frozen=True)
class Scored:
    """Who is right on clean images and under each attack.

    Args:
        training: what is attacked.
        attacks: names and attacks; without any, clean images alone are scored.
        images: the first so many, None: all.
        split: whose images.
        made_on: another training, on whose network the images are made (black-box).
        best: the best epoch on the validation split instead of the last.
    """

    training: Training
    attacks: Attacks
    images: int | None = None
    split: Literal["test", "validation"] = "test"
    made_on: Training | None = None
    best: bool = False

    def answer(self, workshop: Workshop) -> Answer:
        """Of "clean" and each attack {"correct": bits, "accuracy", "low", "high"} and, white-box, what it cost."""
        model = workshop.model(self.training, self.best)
        data = load(self.training.setting)
        images = (data.test if self.split == "test" else data.validation)[: self.images]  # type: ignore[index]
        if self.made_on is not None:
            surrogate = workshop.model(self.made_on)
            found = im.transfer(surrogate, {"target": model}, images, dict(self.attacks))
            columns = {name: found.correct("surrogate", "target", name) for name, _ in self.attacks}
            return {name: _score(column) for name, column in columns.items()}
        rows = workshop.models / f"{fingerprint(self)}-rows"  # an interrupted evaluation goes on from there
        with normalisation_known():
            evaluation = im.evaluate(model, images, dict(self.attacks), rows_dir=rows, audit=False)
        return {
            name: _score(evaluation.correct(name)) | _cost(evaluation, name) for name in ("clean", *evaluation.rows)
        }


@dataclass(frozen=True)
class Gauged:
    """Where an attack's searches end on the first test images: FOSC, loss and verdict, a number an example."""

    training: Training
    attack: im.PGD
    images: int

    def answer(self, workshop: Workshop) -> Answer:
        """{"fosc", "relative_fosc", "loss", "correct"}: lists of one number an example."""
        images = load(self.training.setting).test[: self.images]
        model = workshop.model(self.training)
        with normalisation_known():
            rows = im.evaluate(model, images, {"attack": self.attack}, audit=False).rows["attack"]
        return {name: _short(getattr(rows, name)) for name in ("fosc", "relative_fosc", "loss", "correct")}


@dataclass(frozen=True)
class Followed:
    """FOSC and loss of the first test images after each of an attack's steps."""

    training: Training
    attack: im.PGD
    images: int

    def answer(self, workshop: Workshop) -> Answer:
        """{"fosc", "loss"}: a list a step, from the start on, of one number an example."""
        device = find_device(workshop.device)
        images: ImageSet = load(self.training.setting).test[: self.images].to(device)
        x, y = images.batch(torch.arange(len(images), device=device))
        trace = trace_search(self.attack, workshop.model(self.training), x, y)
        return {name: [_short(step) for step in getattr(trace, name).cpu().numpy()] for name in ("fosc", "loss")}


def bits(answer: Mapping[str, Any]) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """(N,) who is right, of one entry of a `Scored` answer."""
    packed = np.frombuffer(base64.b85decode(answer["correct"]), dtype=np.uint8)
    return np.unpackbits(packed, count=answer["total"]).astype(bool)


def _score(correct: Any) -> Answer:
    measured = accuracy(int(correct.sum()), len(correct))
    packed = base64.b85encode(np.packbits(np.asarray(correct, dtype=bool)).tobytes()).decode()
    return {
        "accuracy": measured.value,
        "low": measured.low,
        "high": measured.high,
        "total": measured.total,
        "correct": packed,
    }


def _cost(evaluation: Evaluation, name: str) -> Answer:
    if name == "clean":
        return {}
    found = evaluation.convergence[name]
    return {"gradients": round(found.gradients, 3), "forwards": round(found.forwards, 3)}


def _short(values: Any) -> list[Any]:
    """Numbers with five digits, which is what a picture can show; None for those that are not finite."""
    if np.asarray(values).dtype == bool:
        return [int(value) for value in values]
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in np.asarray(values, dtype=float)]
