"""`innermax export`: a model as other programs read it."""

import warnings
from pathlib import Path
from typing import Any

from innermax.cli.arguments import SOURCES, spelled_out


def run(words: list[str]) -> None:
    """Writes a model as other programs read it."""
    from jsonargparse import ArgumentParser

    from innermax.cli.settings import ExportSettings

    parser = ArgumentParser(
        prog="innermax export SOURCE", description=f"Write a model for others: {SOURCES}.", exit_on_error=False
    )
    parser.add_class_arguments(ExportSettings, as_group=False)
    if not words or words[0].startswith("-"):
        if words and words[0] not in ("-h", "--help"):
            raise ValueError("export takes a run folder or a model first, such as: innermax export runs/digits")
        words = ["", "--help"]
    _run_export(words[0], parser.parse_args(spelled_out(words[1:])))


def _run_export(source: str, chosen: Any) -> None:
    import innermax as im
    from innermax.training.run_folder import read_settings
    from innermax.utils.files import read_config

    path = Path(source)
    if chosen.push is not None and chosen.format != "hub":
        raise ValueError(f"push uploads the format hub, got {chosen.format}")
    if chosen.to is None and chosen.push is None and not path.is_dir():
        raise ValueError(f"{source} is no folder: say with --to what to write")
    best = chosen.best and (path / "best.safetensors").is_file()
    model = im.load_model(path / "best.safetensors" if best else source, allow_code=chosen.allow_code)
    if chosen.format != "hub":
        print(im.export_model(model, chosen.to or path / f"model.{chosen.format}", input_shape=chosen.input_shape))
        return
    about: dict[str, Any] = {"license": chosen.license}
    if (path / "config.yaml").is_file():
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


def _own_evaluation(folder: Path, model: Any, best: bool) -> Any:
    """What a run's evaluation.json says of this model; None, with a warning, where it is of other weights."""
    from innermax.reporting.contents import read_evaluation

    path = folder / "evaluation.json"
    evaluation = read_evaluation(path)
    match evaluation.is_of(model):
        case True:
            return evaluation
        case None if best:  # of which it is, if the run wrote it
            warnings.warn(f"{path} does not say which weights it measured: it may be of other ones", stacklevel=2)
            return evaluation
    command = f"innermax evaluate {folder} {'--best ' * best}--json {path}"
    told = f"{path} is not of the exported weights, so the card leaves it out; to measure them: {command}"
    warnings.warn(told, stacklevel=2)
    return None
