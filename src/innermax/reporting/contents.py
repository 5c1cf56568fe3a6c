"""What a report is told of each model: evaluations, trainings and pictures, from values or from run folders."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from innermax.attacks.named import named_attack
from innermax.data.image_set import ImageSet
from innermax.data.load import load_data
from innermax.evaluation.result import Evaluation
from innermax.evaluation.scoring import on_device
from innermax.models.files import hash_weights
from innermax.models.load import load_model
from innermax.oracle.oracle import Oracle
from innermax.reporting.gallery import Gallery, gallery
from innermax.threat import build_threat
from innermax.training.run_folder import read_settings
from innermax.training.train import Run
from innermax.utils.files import load_tensors, read_config
from innermax.utils.serialization import is_row, parse_json

_AGREEING = 0.99  # share of clean predictions by which the model that was evaluated is known
_PROBED = 200  # images


@dataclass(frozen=True, eq=False)
class Exhibit:
    """What there is to say of one model; a report leaves out what is not there.

    Attributes:
        evaluation: how robust it is.
        run: its training, or the run folder that holds it.
        gallery: pictures, from `innermax.gallery`.
    """

    evaluation: Evaluation | None = None
    run: Run | str | Path | None = None
    gallery: Gallery | None = None


@dataclass(frozen=True, eq=False)
class Story:
    """An exhibit, read: a row of measures an epoch, configuration and environment of the run, and what is missing."""

    name: str
    evaluation: Evaluation | None = None
    gallery: Gallery | None = None
    history: Sequence[Mapping[str, Any]] = ()
    configuration: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


def stories(shown: Any, pictures: int, device: torch.device | str | None) -> list[Story]:
    """Everything that `innermax.report` takes, read. Raises ValueError or TypeError for anything else."""
    if not isinstance(shown, Mapping):
        several = list(shown) if isinstance(shown, list | tuple) else [shown]
        shown = dict(zip(_names(several), several, strict=True))
    if not shown:
        raise ValueError("evaluations_or_runs must hold at least one, got none")
    return [_story(str(name), value, pictures // len(shown), device) for name, value in shown.items()]


def _names(several: Sequence[Any]) -> list[str]:
    """What each is called: folders and files by their own name where it is one's alone, the others by number."""
    paths = [Path(value) if isinstance(value, str | Path) else None for value in several]
    paths = [
        value.run_dir if isinstance(value, Run) and path is None else path
        for value, path in zip(several, paths, strict=True)
    ]
    short = [None if path is None else path.resolve().name for path in paths]
    names = [
        f"model {number}" if path is None else str(name) if short.count(name) == 1 else str(path)
        for number, (path, name) in enumerate(zip(paths, short, strict=True), 1)
    ]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"evaluations_or_runs holds {twice} more than once")
    return names


def _story(name: str, value: Any, pictures: int, device: torch.device | str | None) -> Story:
    match value:
        case Evaluation():
            return Story(name, value, missing=("Only the evaluation is at hand: no training, no images.",))
        case Exhibit():
            return replace(_trained(Story(name), value.run), evaluation=value.evaluation, gallery=value.gallery)
        case Run():
            return (
                _trained(Story(name), value)
                if value.run_dir is None
                else _folder(name, value.run_dir, pictures, device)
            )
        case str() | Path():
            path = Path(value)
            if path.is_dir():
                return _folder(name, path, pictures, device)
            missing = ("Only the evaluation is at hand: no training, no images.",)
            return Story(name, read_evaluation(path), missing=missing)
    raise TypeError(
        "evaluations_or_runs must hold evaluations, runs, exhibits, run folders or an evaluation's JSON files, "
        f"got {type(value).__name__} for {name!r}"
    )


def _trained(story: Story, run: Run | str | Path | None) -> Story:
    """The story with its training."""
    if isinstance(run, Run):
        story = replace(story, history=run.history)
        run = run.run_dir
    if run is None or not (Path(run) / "config.yaml").is_file():
        return story
    folder = Path(run)
    environment = _environment(folder / "environment.json") if (folder / "environment.json").is_file() else {}
    history = story.history
    metrics = folder / "metrics.jsonl"
    if not history and metrics.is_file():
        history = [_row(metrics, line) for line in _text(metrics).split("\n") if line]
    return replace(story, history=history, configuration=read_config(folder), environment=environment)


def _folder(name: str, folder: Path, pictures: int, device: torch.device | str | None) -> Story:
    """A run folder's story; pictures are made where its model and images are what was evaluated."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is no run folder: it holds no config.yaml")
    story = _trained(Story(name), folder)
    if not (folder / "evaluation.json").is_file():
        hint = f"innermax evaluate {folder} --json {folder / 'evaluation.json'}"
        return replace(story, missing=(f"This run has not been evaluated: {hint}",))
    try:
        evaluation, source = _own_evaluation(folder)
    except OtherWeights as error:
        warnings.warn(str(error), stacklevel=2)
        return replace(story, missing=(f"{error}.",))
    story = replace(story, evaluation=evaluation)
    if evaluation.weights is None:
        story = replace(story, missing=("The evaluation does not say which weights it measured.",))
    if pictures < 1:
        return story
    try:
        return replace(story, gallery=_gallery(folder, evaluation, source, pictures, device))
    except ValueError as error:
        return replace(story, missing=(*story.missing, f"No pictures: {' '.join(str(error).split())}"))


class OtherWeights(ValueError):
    """An evaluation is not one of the models beside it."""


def _own_evaluation(folder: Path) -> tuple[Evaluation, Path | None]:
    """A run's evaluation, and the file of the model that it measured; None where it does not say.

    Raises:
        ValueError: it is not readable.
        OtherWeights: it is of none of the run's models.
    """
    path = folder / "evaluation.json"
    evaluation = read_evaluation(path)
    files = _model_files(folder)
    if evaluation.weights is None or not files:
        return evaluation, None
    for file in files:
        try:
            if hash_weights(load_tensors(file)[0]) == evaluation.weights:
                return evaluation, file
        except ValueError:  # damaged: whoever loads it says so
            return evaluation, None
    raise OtherWeights(
        f"{path} measured other weights than the run's: innermax evaluate {folder} --json {path} measures these"
    )


def _model_files(folder: Path) -> list[Path]:
    return [folder / name for name in ("best.safetensors", "model.safetensors") if (folder / name).is_file()]


def _gallery(
    folder: Path, evaluation: Evaluation, source: Path | None, pictures: int, device: torch.device | str | None
) -> Gallery:
    """Pictures from what a run folder says; source: the evaluated model's file, where it is known.

    Raises ValueError where that is not enough.
    """
    told = read_settings(folder)
    if not told.get("data") or not told.get("threat"):
        raise ValueError("the run folder does not say its data set and threat model; innermax.gallery makes them")
    threat = build_threat(**told["threat"])
    attacks = {name: named_attack(name, threat) for name in evaluation.rows}
    data = load_data(told["data"], validation=0)
    test = data.test[: len(evaluation.label)]
    for file in _model_files(folder) if source is None else [source]:
        model = load_model(file)
        if source is not None or _answers_alike(model, test, evaluation, device):
            names = data.class_names
            return gallery(model, test, attacks, evaluation, pictures=pictures, class_names=names, device=device)
    raise ValueError("the evaluation in the run folder is not of its model")


def _answers_alike(model: nn.Module, test: ImageSet, evaluation: Evaluation, device: torch.device | str | None) -> bool:
    """Whether a model's predictions are an evaluation's, on the first images."""
    model, place = on_device(model, test, device)
    few = torch.arange(min(_PROBED, len(test)))
    x, _ = test.batch(few)
    predicted = Oracle(model).logits(x.to(place)).argmax(1).cpu().numpy()
    return bool(np.mean(predicted == evaluation.clean_prediction[: len(few)]) >= _AGREEING)


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation in a file. Raises ValueError, with the file's name, where it is none."""
    try:
        return Evaluation.from_json(_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _row(path: Path, line: str) -> dict[str, Any]:
    row = _json(path, line)
    if not is_row(row):
        raise ValueError(f"{path} is damaged: a line holds no measures")
    measures: dict[str, Any] = row
    return measures


def _environment(path: Path) -> dict[str, Any]:
    told = _json(path, _text(path))
    if not isinstance(told, dict) or not isinstance(told.get("versions", {}), dict):
        raise ValueError(f"{path} is damaged: it holds no versions")
    if not isinstance(told.get("command", []), list):
        raise ValueError(f"{path} is damaged: its command is no list of words")
    return told


def _json(path: Path, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable: {error}") from error
