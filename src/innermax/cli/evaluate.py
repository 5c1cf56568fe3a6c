"""`innermax evaluate`: attacks a trained model with test images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

import innermax as im
from innermax.cli.arguments import SOURCES, check_file, split_words
from innermax.cli.evaluation import (
    TestImages,
    check_classes,
    choose_attacks,
    choose_data,
    choose_options,
    evaluation_parser,
    is_run_folder,
    load_images,
    load_source,
)
from innermax.cli.rows import measure_into, own_rows, print_place
from innermax.distributed.launch import find_device, is_first
from innermax.evaluation.curve import list_minimal
from innermax.evaluation.saved_images import check_new_folder
from innermax.reporting.tables import format_audit, format_curve, format_table


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
    if chosen.save_images is not None:
        check_new_folder(Path(chosen.save_images), "--save-images")
        if not attacks:
            raise ValueError("--save-images needs at least one attack")
    model = load_source(source, chosen)
    test = load_images(data_name, [source], chosen)
    check_classes(model, test, chosen)
    surrogates = None
    if chosen.surrogate is not None:
        surrogates = {chosen.surrogate: im.load_model(chosen.surrogate, allow_code=chosen.allow_code)}

    def evaluate(rows_dir: Path | None) -> im.Evaluation:
        return im.evaluate(
            model,
            test.images,
            attacks,
            rows_dir=rows_dir,
            surrogates=surrogates,
            keep_images=chosen.save_images is not None,
            progress=is_first(),
            **options,
        )

    asked = [data_name, attacks, options | {"limit": chosen.limit}]
    own = own_rows(Path(source) if is_run_folder(source) else None, asked, model.state_dict())
    rows_dir, evaluation = measure_into(chosen.rows_dir, own, evaluate)
    if is_first():
        _write_results(source, chosen, model, test, attacks, evaluation)
        print_place(rows_dir)


def _write_results(
    source: str, chosen: Any, model: nn.Module, test: TestImages, attacks: Mapping[str, Any], evaluation: im.Evaluation
) -> None:
    """Writes the files that are asked for, and prints the table and the audit."""
    if chosen.json is not None:
        evaluation.to_json(chosen.json)
    if chosen.save_images is not None:
        evaluation.save_images(chosen.save_images)
    if chosen.html is not None:
        device, (images, names) = find_device(chosen.device), test
        shown = im.gallery(model, images, attacks, evaluation, class_names=names, device=device) if attacks else None
        im.report({source: im.Exhibit(evaluation, source, shown)}, chosen.html)
    console = Console(markup=False)
    console.print(format_table(evaluation))
    for name in list_minimal(evaluation.rows):
        console.print(format_curve(evaluation, name))
    if evaluation.audit is not None:
        console.print(format_audit(evaluation.audit))
