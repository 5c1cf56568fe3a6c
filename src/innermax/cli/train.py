"""`innermax train`: a recipe and its options become a run."""

import argparse
import inspect
import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import innermax as im
from innermax.attacks.named import parse_attacks
from innermax.cli.arguments import Parser, build_parser, is_given, read_fractions, split_words
from innermax.cli.recipes import read_yaml, recipe_text
from innermax.cli.settings import GROUPS, RecipeSettings, build_strategy
from innermax.data.image_set import Data
from innermax.distributed.launch import count_processes, find_device, is_first
from innermax.evaluation.curve import list_minimal
from innermax.models.registry import MODELS
from innermax.objectives import Objective, build_objective, find_objective, search_loss
from innermax.reporting.tables import format_audit, format_curve, format_table
from innermax.training.loggers import LoggerName
from innermax.training.options import option_names
from innermax.training.train import train
from innermax.utils.console import PlainConsole
from innermax.utils.files import write_text
from innermax.utils.validation import unknown

_OPTIONS = option_names("on_command_line")  # go to `im.train` as they are; the recipe's settings stand for the others
# Help that the docstring of `im.train` does not give; a group in a file of its own does no more than a recipe.
_HELP = {
    "model": f"Network: {', '.join(MODELS)}.",
    "run_dir": "Folder of the run. By default runs/RECIPE-STRATEGY-seedSEED.",
    "devices": "Processes on each machine that share every batch; on GPUs, one per GPU. By default as many as torchrun "
    "or SLURM started, else one.",
    **dict.fromkeys(GROUPS, argparse.SUPPRESS),
}
_RECORDED = ("data", "validation", "model", "init", "threat", "attack")  # in the run's config.yaml, beside those


def run(words: list[str]) -> None:
    """Trains as a recipe says, then attacks the result with the test images."""
    recipes, options = split_words(words, "the name of a recipe", "innermax train digits")
    parser = train_parser(read_recipe(recipes[0]) if recipes else {})
    chosen = parser.parse_args(options)
    objective = build_objective(chosen.objective, chosen.beta, chosen.label_smoothing, chosen.awp)
    otherwise = search_loss(find_objective(objective)) is not None
    if otherwise and chosen.dynamic.c_max is not None and not is_given("dynamic.c_max", options):
        chosen.dynamic.c_max = None
        if chosen.strategy == "dynamic":
            warnings.warn(
                f"a recipe's dynamic.c_max is in units of the cross-entropy: for objective {chosen.objective} it is "
                "measured at the end of the first epoch",
                stacklevel=2,
            )
    _train_and_attack(recipes[0], parser.instantiate(chosen), chosen.as_dict(), objective)


def train_parser(recipe: Mapping[str, Any]) -> Parser:
    """The parser of `innermax train`, from the same signatures as the library, with a recipe's values as defaults."""
    parser = build_parser(
        "innermax train RECIPE",
        "Train a classifier as a recipe says, then attack it with the test images. RECIPE is a name from innermax "
        "recipes or a YAML file. Every setting of the recipe is an option; null unsets one. The same command resumes a "
        "run that was stopped.",
    )
    parser.add_class_arguments(RecipeSettings, as_group=False)
    for name, kind in GROUPS.items():
        parser.add_class_arguments(kind, name)
    built: set[str | int] = {name for name in inspect.signature(train).parameters if name not in _OPTIONS}
    parser.add_function_arguments(train, as_group=False, skip=built)
    shown = "Show a live display on a terminal, elsewhere a line per epoch."
    parser.add_argument("--progress", type=bool, default=True, help=shown)
    parser.add_argument("--logger", type=LoggerName | None, help="Also log each epoch to tensorboard, wandb or mlflow.")
    for action in parser._actions:
        action.help = _HELP.get(action.dest, action.help)
    parser.set_defaults(dict(recipe))
    return parser


def read_recipe(name: str) -> dict[str, Any]:
    """The values of a recipe, option → value. Raises ValueError where it is not readable or a setting does not fit."""
    recipe = read_yaml(recipe_text(name))
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe {name} holds no settings")
    parser = train_parser({})
    known = [action.dest for action in parser._actions]
    values: dict[str, Any] = {}
    for key, value in recipe.items():
        if key in ("run_dir", "overwrite"):
            raise ValueError(f"recipe {name} must not say where to write: give --{key.replace('_', '-')} yourself")
        if (key in GROUPS) != isinstance(value, dict):
            raise ValueError(f"recipe {name}: {key} must {'' if key in GROUPS else 'not '}hold settings of its own")
        values |= {f"{key}.{part}": each for part, each in value.items()} if key in GROUPS else {str(key): value}
    for setting in values:
        if setting not in known:
            raise unknown(f"setting in recipe {name}", setting, known)
    try:
        values = {setting: read_fractions(value, parser.type_of(setting)) for setting, value in values.items()}
        parser.parse_object({"data": "", "model": ""} | _nest(values))  # which the command line may give instead
    except ValueError as error:
        raise ValueError(f"recipe {name}: {error}") from error
    return values


def build_network(name: str, classes: int, shape: Sequence[int], seed: int, init: str | None) -> nn.Module:
    """The network with weights drawn from the seed, or taken from the model that `init` names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = im.build_model(name, num_classes=classes, input_shape=shape)
    return model if init is None else im.load_model(init, model).train()


def _train_and_attack(recipe: str, chosen: Any, stated: Mapping[str, Any], objective: str | Objective) -> None:
    """Trains as chosen, then evaluates and reports on the result; stated: the same as plain values."""
    threat = chosen.threat.build()
    attack, attacks = chosen.attack.build(threat), parse_attacks(chosen.attacks, threat)
    strategy = build_strategy(chosen.strategy, attack, chosen)
    device = find_device(chosen.device)
    held_out = _share_or_count(chosen.validation)
    data = im.load_data(chosen.data, validation=held_out, label_column=chosen.label_column)
    folder = Path(chosen.run_dir or f"runs/{Path(recipe).stem}-{chosen.strategy}-seed{chosen.seed}")
    options = {name: value for name, value in chosen.as_dict().items() if name in _OPTIONS}
    run = im.train(
        build_network(chosen.model, data.num_classes, data.train.shape, chosen.seed, chosen.init),
        data.train,
        strategy,
        objective=objective,
        validation_set=data.validation,
        validation_attack=attack,
        settings={name: stated[name] for name in _RECORDED} | _given(label_column=chosen.label_column),
        **options | {"run_dir": folder, "logger": chosen.logger, "progress": chosen.progress},
    )
    processes = count_processes()
    if processes == 1 and not is_first():  # of several machines another one goes on
        return
    model = im.load_model(folder) if processes > 1 and chosen.parallel == "fsdp" else run.model
    which = "the last epoch"
    if run.best is not None:
        im.load_model(folder / "best.safetensors", model)
        which = f"epoch {run.best['epoch'] + 1}, the best on the validation split"
    devices = processes if processes > 1 else chosen.devices or 1
    shown = chosen.progress and is_first()
    evaluation = im.evaluate(
        model, data.test, attacks, seed=chosen.seed, device=device, devices=devices, progress=shown
    )
    if is_first():
        _write_results(folder, run, model, data, attacks, evaluation, device)
        where = f"Model of {which}. Run folder: {folder}. Report: {folder / 'report.html'}"
        PlainConsole().print(where, highlight=False, soft_wrap=True)


def _write_results(
    folder: Path,
    run: im.Run,
    model: nn.Module,
    data: Data,
    attacks: Mapping[str, Any],
    evaluation: im.Evaluation,
    device: torch.device,
) -> None:
    """Writes evaluation.json and report.html into the run folder, and prints the table and the audit."""
    write_text(folder / "evaluation.json", evaluation.to_json() + "\n")
    names = data.class_names
    shown = im.gallery(model, data.test, attacks, evaluation, class_names=names, device=device) if attacks else None
    im.report({folder.name: im.Exhibit(evaluation, run, shown)}, folder / "report.html")
    console = PlainConsole()
    console.print(format_table(evaluation))
    for name in list_minimal(evaluation.rows):
        console.print(format_curve(evaluation, name))
    if evaluation.audit is not None:
        measured = [str(folder)] if run.best is None else [str(folder), "--best"]
        console.print(format_audit(evaluation.audit, shlex.join(measured)), "")


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by names such as threat.eps, as groups in a group."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        group, _, option = name.rpartition(".")
        (found.setdefault(group, {}) if group else found)[option] = value
    return found


def _given(**settings: Any) -> dict[str, Any]:
    """The settings that were given: what is left out is no part of a run's configuration."""
    return {name: value for name, value in settings.items() if value is not None}


def _share_or_count(validation: float) -> float:
    """A validation split of 1 or more is a count."""
    return int(validation) if validation >= 1 or validation == 0 else validation
