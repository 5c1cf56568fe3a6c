"""Trainings that have not reached their last epoch: how far they are, kept beside the answers and told on the pages."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from innermax.reproduce.answers import read_object
from innermax.reproduce.cache import Cache, Result, hash_name
from innermax.reproduce.experiments import Trained
from innermax.reproduce.scales import Training
from innermax.utils.files import write_json

FILE = "unfinished.json"  # name of a training → its progress, beside the pack of answers


@dataclass(frozen=True)
class Begun:
    """How far a training is that has not finished."""

    training: Training

    def run(self, cache: Cache) -> Result:
        """{"epochs", "seconds", "device", "threads", "validation_clean", "validation_robust"}, of its run folder.

        "epochs" are complete ones, 0 where it was not begun; then there is nothing else.
        """
        folder = cache.models / hash_name(self.training)
        metrics = folder / "metrics.jsonl"
        history = list(map(json.loads, metrics.read_text(encoding="utf-8").splitlines())) if metrics.exists() else []
        if not history:
            return {"epochs": 0}
        made_on = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        return {
            "epochs": len(history),
            "seconds": round(sum(row["seconds"] for row in history), 1),
            **{key: made_on[key] for key in ("device", "threads")},
            **{key: history[-1].get(key) for key in ("validation_clean", "validation_robust")},
        }


def record_progress(folder: Path, cache: Cache, trainings: Iterable[Training]) -> Mapping[str, Result]:
    """Adds how far trainings are to a folder's record, and returns it, by their names.

    A training that has gone further elsewhere keeps its entry; one that has finished loses it.
    """
    file = folder / FILE
    known: dict[str, Any] = read_object(file) if file.exists() else {}
    before = dict(known)
    for training in trainings:
        name = hash_name(training)
        if cache.find(Trained(training)) is not None:
            known.pop(name, None)
            continue
        found = Begun(training).run(cache)
        if found["epochs"] > known.get(name, {"epochs": 0})["epochs"]:
            known[name] = found
    if not known:
        file.unlink(missing_ok=True)
    elif known != before:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, dict(sorted(known.items())))
    return known


def describe_progress(title: str, found: Mapping[str, Any]) -> str:
    """The epochs that a training has behind it, what it measures there, and the hours that it still needs."""
    hours = found["seconds"] / found["epochs"] * (found["of"] - found["epochs"]) / 3600
    measured = {"clean": found["validation_clean"], "under the training attack": found["validation_robust"]}
    accuracies = " and ".join(f"{100 * value:.1f} % {name}" for name, value in measured.items() if value is not None)
    scored = f"; on the validation images it then has {accuracies}" if accuracies else ""
    return (
        f"{title} has {found['epochs']} of {found['of']} epochs behind it ({found['device']}, threads: "
        f"{found['threads']}){scored}. At its pace so far it needs {hours:,.1f} more hours."
    )
