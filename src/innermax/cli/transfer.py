"""`innermax transfer`: images made on one model, scored on others."""

import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from innermax.cli.arguments import SOURCES, check_count, check_file, spelled_out
from innermax.cli.evaluate import build_threat, evaluation_parser


def run(words: list[str]) -> None:
    """Attacks one trained model with the test images and shows others what came out."""
    parser = evaluation_parser(
        "transfer SURROGATE TARGET…",
        "Attack one trained model, the surrogate, and score the images on others, the targets: black-box robustness. "
        f"Each is {SOURCES}.",
        {"best", "html", "normalize", "devices", "rows_dir", "surrogate"},
    )
    sources = list(takewhile(lambda word: not word.startswith("-"), words))
    options = words[len(sources) :]
    if len(sources) < 2:
        if words and not {"-h", "--help"} & set(words):
            raise ValueError(
                "transfer takes a surrogate and then its targets, such as: innermax transfer runs/other runs/digits"
            )
        options = ["--help"]
    _run_transfer(sources, parser.parse_args(spelled_out(options)))


def _run_transfer(sources: Sequence[str], chosen: Any) -> None:
    from rich.console import Console

    import innermax as im
    from innermax.attacks.named import named_attacks
    from innermax.cli.progress import show_evaluation
    from innermax.distributed.launch import find_device
    from innermax.reporting.tables import format_transfer

    surrogate, *targets = sources
    name = chosen.data or _agreed(sources, "data", "--data")
    if name is None:
        raise ValueError(f"none of {', '.join(sources)} is a run folder, so their data set is not known: give --data")
    asked = vars(chosen.threat)
    own = _agreed(sources, "threat", "--threat.norm and --threat.eps") if None in asked.values() else None
    attacks = named_attacks(chosen.attacks, build_threat(surrogate, own or {}, **asked))
    device = find_device(chosen.device)
    check_count("limit", chosen.limit)
    check_file("json", chosen.json)
    models = _loaded(sources, chosen.allow_code)
    test = im.load_data(name, validation=0).test
    options = {name: getattr(chosen, name) for name in ("batch_size", "seed", "quantize", "precision")}
    with show_evaluation({f"{surrogate}: {name}": attack for name, attack in attacks.items()}) as show:
        transfer = im.transfer(
            {surrogate: models[surrogate]},
            {target: models[target] for target in targets},
            test[: chosen.limit],
            attacks,
            **options,
            device=device,
            progress=show,
        )
    if chosen.json is not None:
        transfer.to_json(chosen.json)
    Console().print(format_transfer(transfer))


def _agreed(sources: Sequence[str], setting: str, option: str) -> Any:
    """What the run folders among the sources say of a setting, None where none does. ValueError where they differ."""
    from innermax.training.run_folder import read_settings

    runs = [source for source in sources if (Path(source) / "config.yaml").is_file()]
    told = {source: read_settings(Path(source)).get(setting) for source in runs}
    known = [(source, value) for source, value in told.items() if value is not None]
    for source, value in known:
        if value != known[0][1]:
            raise ValueError(f"{known[0][0]} and {source} differ in their {setting}: give {option}")
    return known[0][1] if known else None


def _loaded(sources: Sequence[str], allow_code: bool) -> dict[str, Any]:
    """Source → model; one model for what lies at one place, however it is spelled."""
    import innermax as im

    places = {os.path.realpath(source): source for source in sources}
    models = {place: im.load_model(source, allow_code=allow_code) for place, source in places.items()}
    return {source: models[os.path.realpath(source)] for source in sources}
