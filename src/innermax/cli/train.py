"""`innermax train`: a recipe, a model and its options become a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from innermax.cli.arguments import spelled_out

_GROUPS = ("threat", "attack", "dynamic", "curriculum", "warm")  # of a recipe's settings
# What the recipe and the run say in their own way.
_NOT_OPTIONS: set[str | int] = {
    "model",
    "train_set",
    "strategy",
    "validation_set",
    "validation_attack",
    "objective",
    "settings",
    "logger",
}


def run(words: list[str]) -> None:
    """Trains as a recipe says, then attacks the result with the test images."""
    from innermax.cli.settings import read_yaml, recipe_text

    asks = not words or words[0] in ("-h", "--help")
    if not asks and words[0].startswith("-"):
        raise ValueError("train takes the name of a recipe first, such as: innermax train digits")
    recipe = "" if asks else words[0]
    parser = train_parser({} if asks else read_recipe(recipe, read_yaml(recipe_text(recipe))))
    chosen = parser.parse_args(["--help"] if asks else spelled_out(words[1:]))
    _run_training(recipe, parser.instantiate(chosen), chosen.as_dict())


def train_parser(recipe: dict[str, Any]) -> Any:
    """The parser of `innermax train`, from the same signatures as the library, with a recipe's values as defaults."""
    from jsonargparse import ArgumentParser

    from innermax.cli import settings
    from innermax.training.loggers import LoggerName
    from innermax.training.train import train

    parser = ArgumentParser(
        prog="innermax train RECIPE",
        description="Train a classifier as a recipe says; every setting of the recipe is an option.",
        exit_on_error=False,
    )
    parser.add_class_arguments(settings.RecipeSettings, as_group=False)
    for name in _GROUPS:
        parser.add_class_arguments(getattr(settings, f"{name.capitalize()}Settings"), name)
    parser.add_function_arguments(train, as_group=False, skip=_NOT_OPTIONS)
    parser.add_argument(
        "--logger",
        type=LoggerName | None,
        help="also log each epoch to tensorboard, wandb or mlflow; empty: to neither",
    )
    if recipe:
        parser.set_defaults(recipe)
    return parser


def read_recipe(name: str, recipe: object) -> dict[str, Any]:
    """A recipe's values. Raises ValueError where it is none or holds an unknown setting."""
    from innermax.utils.validation import unknown

    if not isinstance(recipe, dict):
        raise ValueError(f"recipe {name} holds no settings")
    known = [action.dest for action in train_parser({})._actions]
    for key, value in recipe.items():
        if key in ("run_dir", "overwrite"):
            raise ValueError(f"recipe {name} must not say where to write: give --{key.replace('_', '-')} yourself")
        if (key in _GROUPS) != isinstance(value, dict):
            raise ValueError(f"recipe {name}: {key} must {'' if key in _GROUPS else 'not '}hold settings of its own")
        inner = [f"{key}.{part}" for part in value] if isinstance(value, dict) else [str(key)]
        for setting in inner:
            if setting not in known:
                raise unknown(f"setting in recipe {name}", setting, known)
    return recipe


def _run_training(recipe: str, chosen: Any, stated: dict[str, Any]) -> None:
    from rich.console import Console

    import innermax as im
    from innermax.attacks.named import named_attacks
    from innermax.cli.progress import show_evaluation
    from innermax.cli.settings import build_strategy
    from innermax.distributed.launch import count_processes, find_device, is_first
    from innermax.reporting.tables import format_audit, format_table
    from innermax.utils.files import write_bytes

    threat = chosen.threat.build()
    attack = chosen.attack.build(threat)
    attacks = named_attacks(chosen.attacks, threat)
    strategy = build_strategy(chosen.strategy, attack, chosen.dynamic, chosen.curriculum, chosen.warm, chosen.switch)
    device = find_device(chosen.device)
    data = im.load_data(chosen.data, validation=_share_or_count(chosen.validation))
    model = _model(chosen.model, data.num_classes, data.train.shape, chosen.seed, chosen.init)
    folder = Path(chosen.run_dir or f"runs/{Path(recipe).stem}-{chosen.strategy}-seed{chosen.seed}")
    options = {name: value for name, value in chosen.as_dict().items() if name in _options()}
    run = im.train(
        model,
        data.train,
        strategy,
        objective=chosen.objective,
        validation_set=data.validation,
        validation_attack=attack,
        settings={name: stated[name] for name in ("data", "validation", "model", "init", "threat", "attack")},
        **options | {"run_dir": folder, "logger": chosen.logger},
    )
    processes = count_processes()
    if processes == 1 and not is_first():  # of several machines another one goes on
        return
    model = im.load_model(folder) if processes > 1 and chosen.parallel == "fsdp" else run.model
    which = "the last epoch"
    if run.best is not None:
        im.load_model(folder / "best.safetensors", model)
        which = f"epoch {run.best['epoch'] + 1}, the best on the validation split"
    options = {"seed": chosen.seed, "device": device, "devices": processes if processes > 1 else chosen.devices or 1}
    with show_evaluation(attacks, audit=True, speak=chosen.progress and is_first()) as show:
        evaluation = im.evaluate(model, data.test, attacks, **options, progress=show)
    if not is_first():
        return
    write_bytes(folder / "evaluation.json", (evaluation.to_json() + "\n").encode())
    names = data.class_names
    shown = im.gallery(model, data.test, attacks, evaluation, class_names=names, device=device) if attacks else None
    page = im.report({folder.name: im.Exhibit(evaluation, run, shown)}, folder / "report.html")
    console = Console()
    console.print(format_table(evaluation))
    if evaluation.audit is not None:
        console.print(format_audit(evaluation.audit), "")
    console.print(f"Model of {which}. Run folder: {folder}. Report: {page}", highlight=False, soft_wrap=True)


def _model(name: str, classes: int, shape: Sequence[int], seed: int, init: str | None) -> Any:
    """The network with weights drawn from the seed, or taken from `init`."""
    import torch

    import innermax as im

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = im.build_model(name, num_classes=classes, input_shape=shape)
    return model if init is None else im.load_model(init, model).train()


def _options() -> set[str]:
    """The options that go to the training as they are."""
    import inspect

    from innermax.training.train import train

    return set(inspect.signature(train).parameters) - _NOT_OPTIONS


def _share_or_count(validation: float) -> float:
    """A validation split of 1 or more is a count."""
    return int(validation) if validation >= 1 or validation == 0 else validation
