"""`innermax sweep`: one training for each combination of options."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from innermax.cli.arguments import spelled_out
from innermax.cli.train import read_recipe, train_parser

# What may differ when a run of a sweep is gone on with.
_NOT_IDENTIFYING = {"overwrite", "checkpoint_every", "keep_checkpoints", "logger", "progress", "device"}


def run(words: list[str]) -> None:
    """Trains as a recipe says with each combination of the values that its options have."""
    from rich.console import Console

    from innermax.cli.settings import read_yaml, recipe_text
    from innermax.cli.sweep_engine import SweepSettings, sweep
    from innermax.cli.sweep_table import format_sweep, sweep_rows, write_sweep

    asks = not words or words[0] in ("-h", "--help")
    if not asks and words[0].startswith("-"):
        raise ValueError("sweep takes the name of a recipe first, such as: innermax sweep digits --seed 0 1 2")
    parser = _sweep_parser({} if asks else read_recipe(words[0], read_yaml(recipe_text(words[0]))))
    if asks or {"-h", "--help"} & set(words):
        parser.parse_args(["--help"])
    plans, chosen = _planned(parser, words[0], _listed(words[1:]))
    folder = Path(chosen.run_dir or f"runs/{Path(words[0]).stem}-sweep")
    settings = SweepSettings(chosen.workers, chosen.engine, chosen.submitit)
    failed = sweep(folder, plans, settings, lambda line: print(line, file=sys.stderr, flush=True))
    rows = sweep_rows(folder)
    write_sweep(folder, rows, failed)
    Console().print(format_sweep(rows))
    print(folder / "table.md")
    if failed:
        told = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise ChildProcessError(f"{len(failed)} of {len(plans)} runs failed: {told}")


def _planned(parser: Any, recipe: str, options: dict[str, list[str]]) -> tuple[list[Any], Any]:
    """A plan for each combination of the options' values, and what the whole sweep was told."""
    from innermax.cli.sweep_engine import Plan, SweepSettings, combinations

    own = {"run_dir", *SweepSettings.__annotations__}
    for name, given in options.items():
        if name.partition(".")[0] in own and len(given) > 1:
            raise ValueError(f"{name} is the whole sweep's and takes one value, got {' '.join(given)}")
        if name == "overwrite":
            raise ValueError("sweep takes no overwrite: remove the folder of a run to make it again")
    plans: list[Plan] = []
    chosen: Any = None
    for name, values in combinations(options).items():
        words = spelled_out([f"--{option}={value}" for option, value in values.items()])
        chosen = parser.parse_args(words)
        settings = {key: value for key, value in chosen.as_dict().items() if key not in own | _NOT_IDENTIFYING}
        kept = [word for word, option in zip(words, values, strict=True) if option.partition(".")[0] not in own]
        plans.append(Plan(name, [recipe, *kept], settings))
    return plans, chosen


def _sweep_parser(recipe: dict[str, Any]) -> Any:
    """The parser of one combination of a sweep: `innermax train`'s, and what is the whole sweep's."""
    from innermax.cli.sweep_engine import SweepSettings

    parser = train_parser(recipe)
    parser.prog = "innermax sweep RECIPE"
    parser.description = (
        "Train as a recipe says, once for each combination of what its options are given: --strategy standard dynamic "
        "--seed 0 1 2 are six runs. Each has a folder in --run-dir; the same command goes on where it was stopped, and "
        "ends with one table. Every option of innermax train takes one value or several."
    )
    parser.add_class_arguments(SweepSettings, as_group=False)
    return parser


def _listed(words: Sequence[str]) -> dict[str, list[str]]:
    """Option → its values, of words such as --seed 0 1 --lr=0.1; an option without one is true."""
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.removeprefix("--").partition("=")
            name = option.replace("-", "_")
            found.setdefault(name, []).extend([value] if equals else [])
        elif name is None:
            raise ValueError(f"sweep takes options after the recipe, got {word}")
        else:
            found[name].append(word)
    return {name: values or ["true"] for name, values in found.items()}
