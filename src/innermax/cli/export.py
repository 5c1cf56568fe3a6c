"""`innermax export`: a model as other programs read it."""

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
    from innermax.reporting.contents import read_evaluation
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
    if chosen.best and (path / "evaluation.json").is_file():
        about["evaluation"] = read_evaluation(path / "evaluation.json")
    if chosen.push is not None:
        print(im.push_to_hub(model, chosen.push, private=chosen.private, **about))
        return
    folder = Path(chosen.to or path / "hub")
    im.save_pretrained(model, folder, **about)
    print(folder)
