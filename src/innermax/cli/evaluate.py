"""`innermax evaluate`: attacks a trained model with test images."""

import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import innermax as im
from innermax.cli.arguments import SOURCES, check_file, leave_out, split_words
from innermax.cli.evaluation import (
    TestImages,
    check_classes,
    choose_data,
    choose_options,
    choose_sized_attacks,
    evaluation_parser,
    is_run_folder,
    load_images,
    load_source,
)
from innermax.cli.rows import measure_into, own_rows, print_place
from innermax.distributed.launch import find_device, is_first
from innermax.evaluation.curve import list_minimal
from innermax.evaluation.saved_images import check_new_folder, write_images
from innermax.evaluation.sizes import name_folder
from innermax.reporting.tables import format_audit, format_curve, format_sizes, format_table
from innermax.threat import format_eps
from innermax.utils.console import PlainConsole
from innermax.utils.files import write_text

_OF_ONE_EVALUATION = {"attacks", "targets", "rows_dir", "json", "html", "save_images"}
# By ε, None for the only one: the attacks and what came of them.
Results = Mapping[float | None, tuple[Mapping[str, Any], im.Evaluation]]


def run(words: list[str]) -> None:
    """Attacks a trained model with the test images, audits the result and writes what is asked for."""
    sources, options = split_words(words, "a run folder or a model", "innermax evaluate runs/digits")
    description = f"Attack a trained model with the test images and audit the result. SOURCE is {SOURCES}."
    chosen = evaluation_parser("innermax evaluate SOURCE", description, set(), sizes=True).parse_args(options)
    _evaluate(sources[0], chosen, shlex.join([sources[0], *leave_out(_OF_ONE_EVALUATION, options)]))


def _evaluate(source: str, chosen: Any, again: str) -> None:
    """Evaluates a source as chosen, at one ε or at several, writes and prints what comes out.

    again: the source with the options of every further evaluation of it.
    """
    data_name, sized = choose_data([source], chosen), choose_sized_attacks([source], chosen)
    options = choose_options(chosen)
    check_file("--html", chosen.html)
    if chosen.save_images is not None:
        check_new_folder(Path(chosen.save_images), "--save-images")
        if not all(sized.values()):
            raise ValueError("--save-images needs at least one attack")
    model = load_source(source, chosen)
    test = load_images(data_name, [source], chosen)
    check_classes(model, test, chosen)
    own_options: dict[str, Any] = {"keep_images": chosen.save_images is not None, "progress": is_first()}
    if chosen.surrogate is not None:
        own_options["surrogates"] = {chosen.surrogate: im.load_model(chosen.surrogate, allow_code=chosen.allow_code)}
    results, places = {}, []
    for eps, attacks in sized.items():
        evaluate = partial(_evaluate_into, model, test, attacks, options | own_options)
        asked = [data_name, attacks, options | {"limit": chosen.limit}]
        own = own_rows(Path(source) if is_run_folder(source) else None, asked, model.state_dict())
        named = chosen.rows_dir
        if named is not None and eps is not None:
            named = str(name_folder(named, eps))
        rows_dir, evaluation = measure_into(named, own, evaluate)
        results[eps] = attacks, evaluation
        places.append(rows_dir)
    if is_first():
        _write_results(source, chosen, model, test, results)
        _print_results({eps: evaluation for eps, (_, evaluation) in results.items()}, again)
        for place in places:
            print_place(place)


def _evaluate_into(
    model: nn.Module, test: TestImages, attacks: Mapping[str, Any], options: Mapping[str, Any], rows_dir: Path | None
) -> im.Evaluation:
    return im.evaluate(model, test.images, attacks, rows_dir=rows_dir, **options)


def _write_results(source: str, chosen: Any, model: nn.Module, test: TestImages, results: Results) -> None:
    """Writes the files that are asked for."""
    evaluations = {eps: evaluation for eps, (_, evaluation) in results.items()}
    if chosen.json is not None:
        _write_json(Path(chosen.json), evaluations)
    if chosen.save_images is not None:
        _save_images(Path(chosen.save_images), evaluations)
    if chosen.html is not None:
        device, (images, names) = find_device(chosen.device), test
        exhibits = {}
        for eps, (attacks, evaluation) in results.items():
            shown = None
            if attacks:
                shown = im.gallery(model, images, attacks, evaluation, class_names=names, device=device)
            exhibits[source if eps is None else f"{source}, ε = {format_eps(eps)}"] = im.Exhibit(
                evaluation, source, shown
            )
        im.report(exhibits, chosen.html)


def _write_json(path: Path, evaluations: Mapping[float | None, im.Evaluation]) -> None:
    """Writes the evaluation, or a list of them with their ε."""
    if None in evaluations:
        evaluations[None].to_json(path)
        return
    parts = (f'{{"eps": {eps!r}, "evaluation": {found.to_json()}}}' for eps, found in evaluations.items())
    write_text(path, f'{{"evaluations": [{", ".join(parts)}]}}\n')


def _save_images(folder: Path, evaluations: Mapping[float | None, im.Evaluation]) -> None:
    """Writes the images of all attacks, of several ε with it behind the attack's name."""
    if None in evaluations:
        evaluations[None].save_images(folder)
        return
    arrays = {
        f"{name}-eps-{eps!r}": own
        for eps, evaluation in evaluations.items()
        for name, own in evaluation.image_arrays().items()
    }
    write_images(folder, arrays)


def _print_results(evaluations: Mapping[float | None, im.Evaluation], again: str) -> None:
    """Prints a table, the curves of smallest perturbations and the audit; of several ε one table and each audit."""
    console = PlainConsole()
    if None not in evaluations:
        console.print(format_sizes({eps: found for eps, found in evaluations.items() if eps is not None}))
    for eps, evaluation in evaluations.items():
        if eps is None:
            console.print(format_table(evaluation))
            for name in list_minimal(evaluation.rows):
                console.print(format_curve(evaluation, name))
        if evaluation.audit is not None:
            which = "" if eps is None else f"ε = {format_eps(eps)}. "
            console.print(which, format_audit(evaluation.audit, again), sep="")
