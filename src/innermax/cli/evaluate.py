"""`innermax evaluate`: attacks a trained model with test images."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import innermax as im
from innermax.cli.arguments import SOURCES, check_file, split_words
from innermax.cli.evaluation import choose_attacks, choose_data, choose_options, evaluation_parser, is_run_folder
from innermax.data.image_set import Data
from innermax.distributed.launch import find_device, is_first
from innermax.models.wrappers import IMAGENET_STATISTICS
from innermax.reporting.tables import format_audit, format_table
from innermax.utils.files import hash_tensors
from innermax.utils.serialization import describe
from innermax.utils.version import __version__


def run(words: list[str]) -> None:
    """Attacks a trained model with the test images, audits the result and writes what is asked for."""
    sources, options = split_words(words, "a run folder or a model", "innermax evaluate runs/digits")
    description = f"Attack a trained model with the test images and audit the result. SOURCE is {SOURCES}."
    chosen = evaluation_parser("innermax evaluate SOURCE", description, set()).parse_args(options)
    _evaluate(sources[0], chosen)


def _evaluate(source: str, chosen: Any) -> None:
    """Evaluates a source as chosen, writes and prints what comes out."""
    data_name, attacks = choose_data([source], chosen), choose_attacks([source], chosen)
    options = choose_options(chosen)
    check_file("--html", chosen.html)
    model = _load_model(source, chosen)
    data = im.load_data(data_name, validation=0)
    surrogates = None
    if chosen.surrogate is not None:
        surrogates = {chosen.surrogate: im.load_model(chosen.surrogate, allow_code=chosen.allow_code)}
    rows_dir = chosen.rows_dir
    if rows_dir is None and is_run_folder(source) and os.access(source, os.W_OK):
        rows_dir = _own_rows(Path(source), model, data_name, attacks, options | {"limit": chosen.limit})
    evaluation = im.evaluate(
        model,
        data.test[: chosen.limit],
        attacks,
        rows_dir=rows_dir,
        surrogates=surrogates,
        progress=is_first(),
        **options,
    )
    if is_first():
        _write_results(source, chosen, model, data, attacks, evaluation)
        if rows_dir is not None:
            where = f"Example by example: {Path(rows_dir) / 'rows.parquet'}"
            Console().print(where, highlight=False, soft_wrap=True)


def _write_results(
    source: str, chosen: Any, model: nn.Module, data: Data, attacks: Mapping[str, Any], evaluation: im.Evaluation
) -> None:
    """Writes the files that are asked for, and prints the table and the audit."""
    if chosen.json is not None:
        evaluation.to_json(chosen.json)
    if chosen.html is not None:
        test, names = data.test[: chosen.limit], data.class_names
        device = find_device(chosen.device)
        shown = im.gallery(model, test, attacks, evaluation, class_names=names, device=device) if attacks else None
        im.report({source: im.Exhibit(evaluation, source, shown)}, chosen.html)
    console = Console()
    console.print(format_table(evaluation))
    if evaluation.audit is not None:
        console.print(format_audit(evaluation.audit))


def _load_model(source: str, chosen: Any) -> nn.Module:
    """The model of a source, of a run its last or best epoch, with a normalisation in front where one is asked for."""
    path = Path(source) / "best.safetensors" if chosen.best else source
    model: nn.Module = im.load_model(path, allow_code=chosen.allow_code)
    if chosen.normalize is None:
        return model
    pair = IMAGENET_STATISTICS if chosen.normalize == "imagenet" else chosen.normalize
    if len(pair) != 2:
        raise ValueError(f"--normalize must be imagenet or [MEAN,STD], got {chosen.normalize}")
    return nn.Sequential(im.Normalize(*pair), model)


def _own_rows(run: Path, model: nn.Module, data: str, attacks: Mapping[str, Any], options: dict[str, Any]) -> Path:
    """A folder inside a run folder, another for each evaluation that is asked for."""
    asked = describe([data, attacks, options, __version__, torch.__version__])
    return run / "rows" / hash_tensors([(str(asked), torch.empty(0)), *model.state_dict().items()])
