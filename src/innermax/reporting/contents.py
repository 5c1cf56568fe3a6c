"""The entries of a report: evaluation, training and pictures of each model, from values or from run folders."""

import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from innermax.attacks.named import build_attack
from innermax.data.image_set import ImageSet
from innermax.data.load import load_test_set
from innermax.evaluation.arguments import place_model
from innermax.evaluation.result import Evaluation
from innermax.models.files import hash_weights
from innermax.models.load import load_model
from innermax.models.wrappers import unwrap
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
    """One model in a report, which leaves out what is None; `report` refuses parts of different models.

    Attributes:
        evaluation: of its robustness.
        run: its training, or the run folder that holds it.
        gallery: pictures, from `innermax.gallery`.
    """

    evaluation: Evaluation | None = None
    run: Run | str | Path | None = None
    gallery: Gallery | None = None


@dataclass(frozen=True, eq=False)
class Entry:
    """An exhibit as it is read, with its run's measures per epoch, configuration and environment.

    missing: sentences for the reader about what is not there. source: what `innermax evaluate` takes for its model.
    """

    name: str
    evaluation: Evaluation | None = None
    gallery: Gallery | None = None
    history: Sequence[Mapping[str, Any]] = ()
    configuration: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    source: str | None = None


def read_entries(exhibits: Any, pictures: int, device: torch.device | str | None) -> list[Entry]:
    """The entries of whatever `innermax.report` takes. Raises ValueError or TypeError for anything else."""
    if not isinstance(exhibits, Mapping):
        several = list(exhibits) if isinstance(exhibits, list | tuple) else [exhibits]
        exhibits = dict(zip(_name_entries(several), several, strict=True))
    if not exhibits:
        raise ValueError("evaluations_or_runs must hold at least one, got none")
    return [_read_entry(str(name), value, pictures // len(exhibits), device) for name, value in exhibits.items()]


def _name_entries(several: Sequence[Any]) -> list[str]:
    """A name for each: of a folder or file its own name, or its path where two have that name; else a number."""
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


def _read_entry(name: str, value: Any, pictures: int, device: torch.device | str | None) -> Entry:
    match value:
        case Evaluation():
            return Entry(name, value, missing=("Only the evaluation is given: no training, no images.",))
        case Exhibit():
            _check_belonging(name, value)
            entry = replace(_add_training(Entry(name), value.run), evaluation=value.evaluation, gallery=value.gallery)
            return replace(entry, source=_write_source(value.run, value.evaluation))
        case Run():
            return (
                _add_training(Entry(name), value)
                if value.run_dir is None
                else _read_folder(name, value.run_dir, pictures, device)
            )
        case str() | Path():
            path = Path(value)
            if path.is_dir():
                return _read_folder(name, path, pictures, device)
            missing = ("Only the evaluation is given: no training, no images.",)
            return Entry(name, read_evaluation(path), missing=missing)
    raise TypeError(
        "evaluations_or_runs must hold evaluations, runs, exhibits, run folders or an evaluation's JSON files, "
        f"got {type(value).__name__} for {name!r}"
    )


def _check_belonging(name: str, exhibit: Exhibit) -> None:
    """Raises ValueError where evaluation, run and gallery are of different weights, as far as they tell."""
    weights = None if exhibit.evaluation is None else exhibit.evaluation.weights
    if weights is None:
        return
    if exhibit.gallery is not None and exhibit.gallery.weights not in (None, weights):
        raise ValueError(f"gallery of {name!r} must be made with its evaluation, got one of other weights")
    known = list(_read_weights(exhibit.run))
    if known and not any(_measured(weights, tensors) for tensors in known):
        raise ValueError(
            f"evaluation of {name!r} must be of its run's model, got one that measured other weights; evaluate that "
            "model, or leave the run out"
        )


def _read_weights(run: Run | str | Path | None) -> Iterator[Mapping[str, Any]]:
    """The weights of a run's models, in memory and in its folder."""
    folder = run.run_dir if isinstance(run, Run) else run
    if isinstance(run, Run):
        yield unwrap(run.model).state_dict()
    for file in [] if folder is None else _model_files(Path(folder)):
        yield load_tensors(file)[0]


def _measured(weights: str, state: Mapping[str, Any]) -> bool:
    """Whether a fingerprint is of these weights: as they are, in float32, or as those of a model behind `Normalize`."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    single = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    behind = {f"1.{name}": value for name, value in single.items()}
    return weights in map(hash_weights, (tensors, single, behind))


def _write_source(run: Run | str | Path | None, evaluation: Evaluation | None) -> str | None:
    """The model that an evaluation measured, as it is typed on a command line, with --best where a run has several."""
    run = run.run_dir if isinstance(run, Run) else run
    if run is None:
        return None
    source, best = shlex.quote(str(run)), Path(run) / "best.safetensors"
    if evaluation is not None and evaluation.weights is not None and best.is_file():
        with suppress(ValueError):  # damaged: whoever loads it says so
            return source + " --best" * _measured(evaluation.weights, load_tensors(best)[0])
    return source


def _add_training(entry: Entry, run: Run | str | Path | None) -> Entry:
    """The entry with the history, configuration and environment of its run."""
    if isinstance(run, Run):
        entry = replace(entry, history=run.history)
        run = run.run_dir
    if run is None or not (Path(run) / "config.yaml").is_file():
        return entry
    folder = Path(run)
    environment = _read_environment(folder / "environment.json") if (folder / "environment.json").is_file() else {}
    history = entry.history
    metrics = folder / "metrics.jsonl"
    if not history and metrics.is_file():
        history = [_read_row(metrics, line) for line in _read_text(metrics).split("\n") if line]
    return replace(entry, history=history, configuration=read_config(folder), environment=environment)


def _read_folder(name: str, folder: Path, pictures: int, device: torch.device | str | None) -> Entry:
    """The entry of a run folder, with pictures where its model and images are those that were evaluated."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is no run folder: it holds no config.yaml")
    entry = _add_training(Entry(name), folder)
    if not (folder / "evaluation.json").is_file():
        hint = f"innermax evaluate {folder} --json {folder / 'evaluation.json'}"
        return replace(entry, missing=(f"This run has not been evaluated: {hint}",))
    try:
        evaluation, source = read_own_evaluation(folder)
    except OtherWeights as error:
        warnings.warn(str(error), stacklevel=2)
        return replace(entry, missing=(f"{error}.",))
    entry = replace(entry, evaluation=evaluation, source=_write_source(folder, evaluation))
    if evaluation.weights is None:
        entry = replace(entry, missing=("The evaluation does not say which weights it measured.",))
    if pictures < 1:
        return entry
    try:
        return replace(entry, gallery=_make_gallery(folder, evaluation, source, pictures, device))
    except ValueError as error:
        return replace(entry, missing=(*entry.missing, f"No pictures: {' '.join(str(error).split())}"))


class OtherWeights(ValueError):
    """An evaluation measured none of the models in its folder."""


def read_own_evaluation(folder: Path) -> tuple[Evaluation, Path | None]:
    """A run's evaluation, and the file of the model that it measured; None where that cannot be told.

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
            if _measured(evaluation.weights, load_tensors(file)[0]):
                return evaluation, file
        except ValueError:  # damaged: whoever loads it says so
            return evaluation, None
    raise OtherWeights(
        f"{path} measured other weights than the run's: innermax evaluate {folder} --json {path} measures these"
    )


def _model_files(folder: Path) -> list[Path]:
    return [folder / name for name in ("best.safetensors", "model.safetensors") if (folder / name).is_file()]


def _make_gallery(
    folder: Path, evaluation: Evaluation, source: Path | None, pictures: int, device: torch.device | str | None
) -> Gallery:
    """Pictures of a run folder's model; source: the evaluated model's file, where it is known.

    Raises ValueError where that is not enough.
    """
    settings = read_settings(folder)
    if not settings.get("data") or not settings.get("threat"):
        raise ValueError("the run folder does not record its data set and threat model; use innermax.gallery")
    threat = build_threat(**settings["threat"])
    attacks = {name: build_attack(name, threat) for name in evaluation.rows}
    images, names = load_test_set(settings["data"], label_column=settings.get("label_column"))
    test = images[: len(evaluation.label)]
    for file in _model_files(folder) if source is None else [source]:
        model = load_model(file)
        if source is not None or _predicts_alike(model, test, evaluation, device):
            return gallery(model, test, attacks, evaluation, pictures=pictures, class_names=names, device=device)
    raise ValueError("the evaluation in the run folder is not of its model")


def _predicts_alike(
    model: nn.Module, test: ImageSet, evaluation: Evaluation, device: torch.device | str | None
) -> bool:
    """Whether a model predicts what an evaluation recorded, on the first images."""
    model, place = place_model(model, test, device)
    few = torch.arange(min(_PROBED, len(test)), device=test.labels.device)
    x, _ = test.batch(few)
    predicted = Oracle(model).logits(x.to(place)).argmax(1).cpu().numpy()
    return bool(np.mean(predicted == evaluation.clean_prediction[: len(few)]) >= _AGREEING)


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation in a file. Raises ValueError, with the file's name, where it holds none."""
    text = _read_text(path)
    try:
        return Evaluation.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_row(path: Path, line: str) -> dict[str, Any]:
    row = _read_json(path, line)
    if not is_row(row):
        raise ValueError(f"{path} is damaged: a line holds no measures")
    measures: dict[str, Any] = row
    return measures


def _read_environment(path: Path) -> dict[str, Any]:
    environment = _read_json(path, _read_text(path))
    if not isinstance(environment, dict) or not isinstance(environment.get("versions", {}), dict):
        raise ValueError(f"{path} is damaged: it holds no versions")
    if not isinstance(environment.get("command", []), list):
        raise ValueError(f"{path} is damaged: its command is no list of words")
    return environment


def _read_json(path: Path, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable: {getattr(error, 'strerror', None) or error}") from error
