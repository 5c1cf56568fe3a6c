"""`innermax export`: a model as other programs read it."""

import warnings
from pathlib import Path
from typing import Any

from torch import nn

import innermax as im
from innermax.cli.arguments import SOURCES, build_parser, split_words
from innermax.cli.evaluation import is_run_folder
from innermax.cli.settings import ExportSettings
from innermax.reporting.contents import read_evaluation
from innermax.training.run_folder import read_settings
from innermax.utils.files import read_config


def run(words: list[str]) -> None:
    """Writes a model as other programs read it, or uploads it."""
    sources, options = split_words(words, "a run folder or a model", "innermax export runs/digits")
    parser = build_parser("innermax export SOURCE", f"Write a model for other programs. SOURCE is {SOURCES}.")
    parser.add_class_arguments(ExportSettings, as_group=False)
    chosen = parser.parse_args(options)
    _export(sources[0], chosen)


def _export(source: str, chosen: Any) -> None:
    """Writes or uploads the model of a source, and prints where it is."""
    path = Path(source)
    if chosen.push is not None and chosen.format != "hub":
        raise ValueError(f"--push uploads the format hub, got --format {chosen.format}")
    if chosen.to is None and chosen.push is None and not path.is_dir():
        raise ValueError(f"{source} is no folder: give --to, the file or folder to write")
    best = chosen.best and (path / "best.safetensors").is_file()
    model = im.load_model(path / "best.safetensors" if best else source, allow_code=chosen.allow_code)
    if chosen.format != "hub":
        print(im.export_model(model, chosen.to or path / f"model.{chosen.format}", input_shape=chosen.input_shape))
        return
    about: dict[str, Any] = {"license": chosen.license}
    if is_run_folder(source):
        read_settings(path)  # raises where the card could not tell of it
        about["training"] = read_config(path)
    if (path / "evaluation.json").is_file():
        about["evaluation"] = _own_evaluation(path, model, chosen.best)
    if chosen.push is not None:
        print(im.push_to_hub(model, chosen.push, private=chosen.private, **about))
        return
    folder = Path(chosen.to or path / "hub")
    im.save_pretrained(model, folder, **about)
    print(folder)


def _own_evaluation(folder: Path, model: nn.Module, best: bool) -> im.Evaluation | None:
    """A run's evaluation of this model; None, with a warning, where evaluation.json is of other weights."""
    path = folder / "evaluation.json"
    evaluation = read_evaluation(path)
    match evaluation.is_of(model):
        case True:
            return evaluation
        case None if best:  # of which it is, if the run wrote it
            warnings.warn(f"{path} does not say which weights it measured: it may be of other ones", stacklevel=2)
            return evaluation
    command = f"innermax evaluate {folder} {'--best ' * best}--json {path}"
    warnings.warn(
        f"{path} is not of the exported weights, so the card leaves it out; to measure them: {command}", stacklevel=2
    )
    return None
