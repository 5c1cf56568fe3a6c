"""`innermax sweep`: one training for each combination of options."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from innermax.cli.arguments import Parser, option_name, show_options, split_words
from innermax.cli.settings import ADDED
from innermax.cli.sweep_engine import SweepRun, SweepSettings, combinations, sweep
from innermax.cli.sweep_table import format_sweep, sweep_rows, write_sweep
from innermax.cli.train import read_recipe, train_parser
from innermax.training.options import TrainingOptions, option_names
from innermax.utils.console import PlainConsole

_EXAMPLE = "innermax sweep digits --seed 0 1 2"
_OF_THE_SWEEP = {"run_dir", *SweepSettings.__annotations__}  # options with one value, for all its runs
# Options that may differ when a run is resumed; but runs of a sweep may be there to compare numbers of processes.
_NOT_IDENTIFYING = {option.name for option in fields(TrainingOptions)} - option_names("identifies")
_NOT_IDENTIFYING -= {"devices", "nodes", "parallel"}


def run(words: list[str]) -> None:
    """Trains as a recipe says, once for each combination of the values of its options."""
    recipes, options = split_words(words, "the name of a recipe", _EXAMPLE)
    parser = sweep_parser(read_recipe(recipes[0]) if recipes else {})
    if options == ["--help"]:
        parser.parse_args(options)
    runs, chosen = list_runs(parser, recipes[0], read_values(parser, options))
    folder = Path(chosen.run_dir or f"runs/{Path(recipes[0]).stem}-sweep")
    settings = SweepSettings(chosen.workers, chosen.engine, chosen.submitit)
    failed = sweep(folder, runs, settings, lambda line: print(line, file=sys.stderr, flush=True))
    rows = sweep_rows(folder)
    write_sweep(folder, rows, failed)
    PlainConsole().print(format_sweep(rows))
    print(folder / "table.md")
    if failed:
        reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise ChildProcessError(f"{len(failed)} of {len(runs)} runs failed: {reasons}")


def sweep_parser(recipe: Mapping[str, Any]) -> Parser:
    """The parser of one combination of a sweep: `innermax train`'s options, and those of the whole sweep."""
    parser = train_parser(recipe)
    parser.prog, parser.usage = "innermax sweep", "innermax sweep RECIPE [OPTIONS]"
    parser.description = (
        "Train as a recipe says, once for each combination of the values of its options: --strategy standard dynamic "
        "--seed 0 1 2 makes six runs. Each has a folder in --run-dir; the same command resumes them, and ends with one "
        "table. Every option of innermax train takes one value or several."
    )
    parser.add_class_arguments(SweepSettings, as_group=False)
    for action in parser._actions:
        if action.dest == "run_dir":
            action.help = "Folder of the sweep, with a folder per run. By default runs/RECIPE-sweep."
    return parser


def read_values(parser: Parser, words: Sequence[str]) -> dict[str, list[str]]:
    """Option → its values, of words such as --seed 0 1 --lr=0.1; a Boolean option without a value is true.

    Raises ValueError where an option has no value, or a value no option.
    """
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            name = option_name(option)
            found.setdefault(name, []).extend([value] if equals else [])
        elif name is None:
            raise ValueError(f"sweep takes options such as --seed after the recipe, got {word}: for example {_EXAMPLE}")
        else:
            found[name].append(word)
    for name, values in found.items():
        if not values and parser.type_of(name) is not bool:
            raise ValueError(f"{show_options('--' + name)} needs a value")
    return {name: values or ["true"] for name, values in found.items()}


def list_runs(parser: Parser, recipe: str, options: Mapping[str, Sequence[str]]) -> tuple[list[SweepRun], Any]:
    """A run for each combination of the options' values, and the values of the whole sweep."""
    for name, values in options.items():
        if name.partition(".")[0] in _OF_THE_SWEEP and len(values) > 1:
            shown = show_options("--" + name)
            raise ValueError(f"{shown} is the whole sweep's and must have one value, got {' '.join(values)}")
        if name == "overwrite":
            raise ValueError("sweep takes no --overwrite: remove the folder of a run to make it again")
    runs: list[SweepRun] = []
    chosen: Any = None
    for name, combination in combinations(options).items():
        words = {option: f"--{option}={value}" for option, value in combination.items()}
        chosen = parser.parse_args(list(words.values()))
        stated = chosen.as_dict()
        left_out = _OF_THE_SWEEP | _NOT_IDENTIFYING | {key for key in ADDED if stated[key] == ADDED[key]}
        settings = {key: value for key, value in stated.items() if key not in left_out}
        own = [word for option, word in words.items() if option.partition(".")[0] not in _OF_THE_SWEEP]
        runs.append(SweepRun(name, [recipe, *own], settings))
    return runs, chosen
