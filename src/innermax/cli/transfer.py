"""`innermax transfer`: images made on one model, scored on others."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import innermax as im
from innermax.cli.arguments import SOURCES, split_words
from innermax.cli.evaluation import (
    check_classes,
    choose_attacks,
    choose_data,
    choose_options,
    evaluation_parser,
    load_images,
)
from innermax.cli.rows import measure_into, own_rows, print_place
from innermax.distributed.launch import is_first
from innermax.reporting.tables import format_transfer
from innermax.utils.console import PlainConsole

_OF_EVALUATE_ALONE: set[str | int] = {"best", "html", "normalize", "save_images", "surrogate", "targets"}


def run(words: list[str]) -> None:
    """Attacks one trained model with the test images and scores the adversarial images on others."""
    example = "innermax transfer runs/other runs/digits"
    sources, options = split_words(words, "a surrogate and then its targets", example, least=2, most=None)
    description = (
        "Make adversarial images on one trained model, the surrogate, and score them on others, the targets: black-box "
        f"robustness. Each is {SOURCES}."
    )
    usage = "innermax transfer SURROGATE TARGET…"
    _transfer(sources, evaluation_parser(usage, description, _OF_EVALUATE_ALONE).parse_args(options))


def _transfer(sources: Sequence[str], chosen: Any) -> None:
    """Attacks the first source, scores on the others, writes and prints what comes out."""
    data, attacks, options = choose_data(sources, chosen), choose_attacks(sources, chosen), choose_options(chosen)
    models = _load_models(sources, chosen.allow_code)
    surrogate, *targets = sources
    test = load_images(data, sources, chosen)
    for model in models.values():
        check_classes(model, test, chosen)

    def measure(rows_dir: Path | None) -> im.Transfer:
        return im.transfer(
            {surrogate: models[surrogate]},
            {target: models[target] for target in targets},
            test.images,
            attacks,
            rows_dir=rows_dir,
            progress=is_first(),
            **options,
        )

    weights = {f"{name}: {key}": value for name, own in models.items() for key, value in own.state_dict().items()}
    asked = [list(sources), data, attacks, options | {"limit": chosen.limit}]
    rows_dir, transfer = measure_into(chosen.rows_dir, own_rows(None, asked, weights), measure)
    if not is_first():
        return
    if chosen.json is not None:
        transfer.to_json(chosen.json)
    PlainConsole().print(format_transfer(transfer))
    print_place(rows_dir)


def _load_models(sources: Sequence[str], allow_code: bool) -> dict[str, nn.Module]:
    """Source → model; one model for what lies at one place, however it is spelled."""
    places = {os.path.realpath(source): source for source in sources}
    models = {place: im.load_model(source, allow_code=allow_code) for place, source in places.items()}
    return {source: models[os.path.realpath(source)] for source in sources}
