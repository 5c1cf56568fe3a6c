"""The command line: a thin door to training and evaluation."""

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

_HELP = """usage: innermax COMMAND …

Train classifiers that withstand adversarial examples, and know whether a robustness number can be believed.

  innermax recipes                            list the settings that come with innermax
  innermax train digits                       train a robust classifier, a minute on two cores
  innermax train mnist --strategy standard    the paper's setting, with another defence
  innermax sweep digits --seed 0 1 2          train it with each seed, and with each of whatever else has several values
  innermax evaluate runs/digits               attack a trained model
  innermax transfer runs/other runs/digits    make images on one model, score them on others
  innermax report runs/digits -o report.html  a page to look at: how robust, why, and pictures
  innermax export runs/digits --format onnx   write it for ONNX Runtime, torch.export or the Hugging Face Hub
  innermax reproduce table1 --scale cpu       make a table or a figure of the paper again

innermax COMMAND --help lists what a command takes. Fractions such as 8/255 are read as numbers.
"""
_SOURCES = (
    "a run folder, a model file or folder, a Hub id, timm:NAME, or with --allow-code module:function or a .pt2 program "
    "of torch.export"
)
_FRACTION = r"^(\d+\.?\d*)/(\d+\.?\d*)$"
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
# What may differ when a run of a sweep is gone on with.
_NOT_IDENTIFYING = {"overwrite", "checkpoint_every", "keep_checkpoints", "logger", "progress", "device"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status: 0, 2 for bad input (one line on stderr), 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if words[0] == "--version":
        from innermax import __version__

        print(f"innermax {__version__}")
        return 0
    from jsonargparse import ArgumentError

    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "sweep": _sweep,
        "evaluate": _evaluate,
        "transfer": _transfer,
        "report": _report,
        "export": _export,
        "recipes": _recipes,
        "reproduce": _reproduce,
    }
    try:
        if words[0] not in commands:
            from innermax.checks import unknown

            raise unknown("command", words[0], commands)
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]  # it takes the rest, and does not look
            commands[words[0]](words[1:])
    except (ValueError, TypeError, ArgumentError, ArithmeticError, OSError) as error:
        print(f"innermax: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if _one_line(stop):
            print(f"innermax: {_one_line(stop)}", file=sys.stderr)
        return 130
    except SystemExit as stop:  # how the parser ends once it has printed a command's help
        return int(stop.code or 0)
    return 0


def _one_line(said: BaseException | str) -> str:
    """What an exception or warning says, and its notes."""
    return " ".join(" ".join([str(said), *getattr(said, "__notes__", [])]).split())


def _warn(message: Warning | str, *_: object) -> None:
    """A warning as this command line says things."""
    print(f"innermax: {_one_line(message)}", file=sys.stderr)


def _train(words: list[str]) -> None:
    """Trains as a recipe says, then attacks the result with the test images."""
    from innermax.settings import read_yaml, recipe_text

    asks = not words or words[0] in ("-h", "--help")
    if not asks and words[0].startswith("-"):
        raise ValueError("train takes the name of a recipe first, such as: innermax train digits")
    recipe = "" if asks else words[0]
    parser = _train_parser({} if asks else _recipe(recipe, read_yaml(recipe_text(recipe))))
    chosen = parser.parse_args(["--help"] if asks else _spelled_out(words[1:]))
    _run_training(recipe, parser.instantiate(chosen), chosen.as_dict())


def _run_training(recipe: str, chosen: Any, stated: dict[str, Any]) -> None:
    from rich.console import Console

    import innermax as im
    from innermax.attacks.named import named_attacks
    from innermax.checkpoints import write_bytes
    from innermax.distribution import is_first, launched_count
    from innermax.progress import show_evaluation
    from innermax.settings import build_strategy
    from innermax.tables import format_audit, format_table
    from innermax.training import chosen_device

    threat = chosen.threat.build()
    attack = chosen.attack.build(threat)
    attacks = named_attacks(chosen.attacks, threat)
    strategy = build_strategy(chosen.strategy, attack, chosen.dynamic, chosen.curriculum, chosen.warm, chosen.switch)
    device = chosen_device(chosen.device)
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
    processes = launched_count()
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


def _sweep(words: list[str]) -> None:
    """Trains as a recipe says with each combination of the values that its options have."""
    from rich.console import Console

    from innermax.settings import read_yaml, recipe_text
    from innermax.sweep_table import format_sweep, sweep_rows, write_sweep
    from innermax.sweeping import SweepSettings, sweep

    asks = not words or words[0] in ("-h", "--help")
    if not asks and words[0].startswith("-"):
        raise ValueError("sweep takes the name of a recipe first, such as: innermax sweep digits --seed 0 1 2")
    parser = _sweep_parser({} if asks else _recipe(words[0], read_yaml(recipe_text(words[0]))))
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
    from innermax.sweeping import Plan, SweepSettings, combinations

    own = {"run_dir", *SweepSettings.__annotations__}
    for name, given in options.items():
        if name.partition(".")[0] in own and len(given) > 1:
            raise ValueError(f"{name} is the whole sweep's and takes one value, came {' '.join(given)}")
        if name == "overwrite":
            raise ValueError("sweep takes no overwrite: remove the folder of a run to make it again")
    plans: list[Plan] = []
    chosen: Any = None
    for name, values in combinations(options).items():
        words = _spelled_out([f"--{option}={value}" for option, value in values.items()])
        chosen = parser.parse_args(words)
        settings = {key: value for key, value in chosen.as_dict().items() if key not in own | _NOT_IDENTIFYING}
        kept = [word for word, option in zip(words, values, strict=True) if option.partition(".")[0] not in own]
        plans.append(Plan(name, [recipe, *kept], settings))
    return plans, chosen


def _evaluate(words: list[str]) -> None:
    """Attacks a trained model with the test images."""
    parser = _evaluation_parser("evaluate SOURCE", f"Attack a trained model: {_SOURCES}.", set())
    if not words or words[0].startswith("-"):
        if words and words[0] not in ("-h", "--help"):
            raise ValueError("evaluate takes a run folder or a model first, such as: innermax evaluate runs/digits")
        words = ["", "--help"]
    chosen = parser.parse_args(_spelled_out(words[1:]))
    _run_evaluation(words[0], chosen)


def _transfer(words: list[str]) -> None:
    """Attacks one trained model with the test images and shows others what came out."""
    parser = _evaluation_parser(
        "transfer SURROGATE TARGET…",
        "Attack one trained model, the surrogate, and score the images on others, the targets: black-box robustness. "
        f"Each is {_SOURCES}.",
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
    _run_transfer(sources, parser.parse_args(_spelled_out(options)))


def _evaluation_parser(command: str, description: str, skip: set[str | int]) -> Any:
    """The parser of a command that attacks trained models."""
    from jsonargparse import ArgumentParser

    from innermax.settings import EvaluateSettings, ThreatSettings

    parser = ArgumentParser(prog=f"innermax {command}", description=description, exit_on_error=False)
    parser.add_class_arguments(EvaluateSettings, as_group=False, skip=skip)
    parser.add_argument(
        "--threat.norm",
        type=ThreatSettings.__annotations__["norm"] | None,
        help="linf, l2 or l1; empty for the run's own",
    )
    parser.add_argument(
        "--threat.eps", type=float | None, help="largest perturbation, e.g. 8/255; empty for the run's own"
    )
    return parser


def _run_evaluation(source: str, chosen: Any) -> None:
    from rich.console import Console

    import innermax as im
    from innermax.attacks.named import named_attacks
    from innermax.distribution import is_first, launched_count
    from innermax.progress import show_evaluation
    from innermax.runs import told_settings
    from innermax.tables import format_audit, format_table
    from innermax.training import chosen_device

    path = Path(source)
    told = told_settings(path) if (path / "config.yaml").is_file() else {}
    name = chosen.data or told.get("data")
    if name is None:
        raise ValueError(f"{source} is no run folder, so its data set is not known: give --data")
    attacks = named_attacks(chosen.attacks, _threat(source, told.get("threat", {}), **vars(chosen.threat)))
    device = chosen_device(chosen.device)
    _check_count("limit", chosen.limit)
    _check_file("json", chosen.json)
    _check_file("html", chosen.html)
    model = im.load_model(path / "best.safetensors" if chosen.best else source, allow_code=chosen.allow_code)
    model = model if chosen.normalize is None else _normalized(model, chosen.normalize)
    other = chosen.surrogate
    surrogates = None if other is None else {other: im.load_model(other, allow_code=chosen.allow_code)}
    data = im.load_data(name, validation=0)
    test = data.test[: chosen.limit]
    options = {name: getattr(chosen, name) for name in ("batch_size", "seed", "quantize", "precision")}
    options["device"] = device
    rows_dir = chosen.rows_dir
    if rows_dir is None and (path / "config.yaml").is_file() and os.access(path, os.W_OK):
        rows_dir = _own_rows(path, model, name, attacks, {**options, "limit": chosen.limit})
    devices = launched_count() if chosen.devices is None else chosen.devices
    options |= {"devices": devices, "rows_dir": rows_dir, "surrogates": surrogates}
    with show_evaluation(attacks, audit=True, speak=is_first()) as show:
        evaluation = im.evaluate(model, test, attacks, **options, progress=show)
    if not is_first():
        return
    if chosen.json is not None:
        evaluation.to_json(chosen.json)
    if chosen.html is not None:
        names = data.class_names
        shown = im.gallery(model, test, attacks, evaluation, class_names=names, device=device) if attacks else None
        im.report({source: im.Exhibit(evaluation, source, shown)}, chosen.html)
    console = Console()
    console.print(format_table(evaluation))
    if evaluation.audit is not None:
        console.print(format_audit(evaluation.audit))
    if rows_dir is not None:
        console.print(f"Example by example: {Path(rows_dir) / 'rows.parquet'}", highlight=False, soft_wrap=True)


def _own_rows(run: Path, model: Any, data: str, attacks: dict[str, Any], options: dict[str, Any]) -> Path:
    """A folder inside a run folder, another for each evaluation that is asked for."""
    import torch

    from innermax import __version__
    from innermax.rows import fingerprint
    from innermax.runs import describe

    asked = describe([data, attacks, options, __version__, torch.__version__])
    return run / "rows" / fingerprint([(str(asked), torch.empty(0)), *model.state_dict().items()])


def _run_transfer(sources: Sequence[str], chosen: Any) -> None:
    from rich.console import Console

    import innermax as im
    from innermax.attacks.named import named_attacks
    from innermax.progress import show_evaluation
    from innermax.tables import format_transfer
    from innermax.training import chosen_device

    surrogate, *targets = sources
    name = chosen.data or _agreed(sources, "data", "--data")
    if name is None:
        raise ValueError(f"none of {', '.join(sources)} is a run folder, so their data set is not known: give --data")
    asked = vars(chosen.threat)
    own = _agreed(sources, "threat", "--threat.norm and --threat.eps") if None in asked.values() else None
    attacks = named_attacks(chosen.attacks, _threat(surrogate, own or {}, **asked))
    device = chosen_device(chosen.device)
    _check_count("limit", chosen.limit)
    _check_file("json", chosen.json)
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
    from innermax.runs import told_settings

    runs = [source for source in sources if (Path(source) / "config.yaml").is_file()]
    told = {source: told_settings(Path(source)).get(setting) for source in runs}
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


def _normalized(model: Any, normalize: Any) -> Any:
    """The model with a normalisation in front."""
    import torch

    import innermax as im
    from innermax.models import IMAGENET_STATISTICS

    pair = IMAGENET_STATISTICS if normalize == "imagenet" else normalize
    if len(pair) != 2:
        raise ValueError(f"normalize must be imagenet or [MEAN,STD], came {normalize}")
    return torch.nn.Sequential(im.Normalize(*pair), model)


def _check_count(name: str, count: int | None) -> None:
    if count is not None and count < 1:
        raise ValueError(f"{name} must be at least 1, came {count}")


def _check_file(option: str, path: str | None) -> None:
    """Raises where a file cannot be written, before the work that goes into it."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{option} {path} cannot be written: its folder does not exist")
    if path is not None and Path(path).is_dir():
        raise ValueError(f"{option} {path} cannot be written: it is a folder")


def _threat(source: str, own: dict[str, Any], norm: Any, eps: float | None) -> Any:
    """The threat model that was asked for, or else the run's own; an ε belongs to its norm."""
    from innermax.settings import ThreatSettings

    norm = norm or own.get("norm", "linf")
    if eps is None and norm == own.get("norm"):
        eps = own["eps"]
    if eps is None:
        raise ValueError(f"the size of {norm} perturbations for {source} is not known: give --threat.eps")
    return ThreatSettings(norm, eps).build()


def _report(words: list[str]) -> None:
    """Writes the robustness report of trained models."""
    from jsonargparse import ArgumentParser

    import innermax as im
    from innermax.training import chosen_device

    sources = list(takewhile(lambda word: not word.startswith("-"), words))
    parser = ArgumentParser(
        prog="innermax report RUN…",
        description="Write one HTML page: how robust models are, how they were trained, and what fools them. "
        "Each RUN is a run folder or the file of an evaluation's JSON.",
        exit_on_error=False,
    )
    parser.add_argument("-o", "--output", type=str, default="report.html", help="the page")
    parser.add_argument(
        "--pictures", type=int, default=200, help="made again from run folders, at most; 0 computes nothing"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    asks = "--help" in words or "-h" in words
    if not sources and words and not asks:
        raise ValueError("report takes run folders first, such as: innermax report runs/digits -o report.html")
    chosen = parser.parse_args(["--help"] if asks or not words else _spelled_out(words[len(sources) :]))
    shown: Any = sources[0] if len(sources) == 1 else sources
    print(im.report(shown, chosen.output, pictures=chosen.pictures, device=chosen_device(chosen.device)))


def _export(words: list[str]) -> None:
    """Writes a model as other programs read it."""
    from jsonargparse import ArgumentParser

    from innermax.settings import ExportSettings

    parser = ArgumentParser(
        prog="innermax export SOURCE", description=f"Write a model for others: {_SOURCES}.", exit_on_error=False
    )
    parser.add_class_arguments(ExportSettings, as_group=False)
    if not words or words[0].startswith("-"):
        if words and words[0] not in ("-h", "--help"):
            raise ValueError("export takes a run folder or a model first, such as: innermax export runs/digits")
        words = ["", "--help"]
    _run_export(words[0], parser.parse_args(_spelled_out(words[1:])))


def _run_export(source: str, chosen: Any) -> None:
    import innermax as im
    from innermax.reporting.exhibit import read_evaluation
    from innermax.runs import read_config, told_settings

    path = Path(source)
    if chosen.push is not None and chosen.format != "hub":
        raise ValueError(f"push uploads the format hub, came {chosen.format}")
    if chosen.to is None and chosen.push is None and not path.is_dir():
        raise ValueError(f"{source} is no folder: say with --to what to write")
    best = chosen.best and (path / "best.safetensors").is_file()
    model = im.load_model(path / "best.safetensors" if best else source, allow_code=chosen.allow_code)
    if chosen.format != "hub":
        print(im.export_model(model, chosen.to or path / f"model.{chosen.format}", input_shape=chosen.input_shape))
        return
    about: dict[str, Any] = {"license": chosen.license}
    if (path / "config.yaml").is_file():
        told_settings(path)  # raises where the card could not tell of it
        about["training"] = read_config(path)
    if chosen.best and (path / "evaluation.json").is_file():
        about["evaluation"] = read_evaluation(path / "evaluation.json")
    if chosen.push is not None:
        print(im.push_to_hub(model, chosen.push, private=chosen.private, **about))
        return
    folder = Path(chosen.to or path / "hub")
    im.save_pretrained(model, folder, **about)
    print(folder)


def _recipes(words: list[str]) -> None:
    """Lists the recipes, with the first line of each."""
    from innermax.settings import recipe_names, recipe_text

    if words and words[0] not in ("-h", "--help"):
        raise ValueError(f"recipes takes no arguments, came {' '.join(words)}")
    for name in recipe_names():
        print(f"{name:20} {recipe_text(name).splitlines()[0].removeprefix('# ')}")


def _reproduce(words: list[str]) -> None:
    """Makes tables and figures of the paper again."""
    from jsonargparse import ArgumentParser

    from innermax.reproduce.run import PIECES, reproduce

    names = list(takewhile(lambda word: not word.startswith("-"), words))
    parser = ArgumentParser(
        prog="innermax reproduce PIECE…",
        description=f"Make tables and figures of the paper again: {', '.join(PIECES)}, or all.",
        exit_on_error=False,
    )
    parser.add_function_arguments(reproduce, as_group=False, skip={"names", "say"})
    asks = "--help" in words or "-h" in words
    if not names and words and not asks:
        raise ValueError("reproduce takes what to make first, such as: innermax reproduce table1 --scale smoke")
    chosen = parser.parse_args(["--help"] if asks or not words else _spelled_out(words[len(names) :]))
    pages = reproduce(
        list(PIECES) if names == ["all"] else names, **vars(chosen), say=lambda line: print(line, flush=True)
    )
    for page in pages:
        print(page)


def _train_parser(recipe: dict[str, Any]) -> Any:
    """The parser of `innermax train`, from the same signatures as the library, with a recipe's values as defaults."""
    from jsonargparse import ArgumentParser

    from innermax import settings
    from innermax.loggers import LoggerName
    from innermax.training import train

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


def _sweep_parser(recipe: dict[str, Any]) -> Any:
    """The parser of one combination of a sweep: `innermax train`'s, and what is the whole sweep's."""
    from innermax.sweeping import SweepSettings

    parser = _train_parser(recipe)
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
            raise ValueError(f"sweep takes options after the recipe, came {word}")
        else:
            found[name].append(word)
    return {name: values or ["true"] for name, values in found.items()}


def _options() -> set[str]:
    """The options that go to the training as they are."""
    import inspect

    from innermax.training import train

    return set(inspect.signature(train).parameters) - _NOT_OPTIONS


def _recipe(name: str, recipe: object) -> dict[str, Any]:
    """A recipe's values. Raises ValueError where it is none or holds an unknown setting."""
    from innermax.checks import unknown

    if not isinstance(recipe, dict):
        raise ValueError(f"recipe {name} holds no settings")
    known = [action.dest for action in _train_parser({})._actions]
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


def _spelled_out(words: Sequence[str]) -> list[str]:
    """The words as the parser wants them: --run-dir as --run_dir, a bare --overwrite as true, 8/255 as a decimal."""

    def decimal(match: re.Match[str]) -> str:
        return repr(float(match[1]) / float(match[2])) if float(match[2]) else match[0]

    result: list[str] = []
    for word, following in pairwise([*words, "--"]):
        name, equals, value = word.partition("=")
        if not word.startswith("--") or word == "--help":
            result.append(re.sub(_FRACTION, decimal, word))
            continue
        if not equals and following.startswith("--"):
            equals, value = "=", "true"
        result.append(name.replace("-", "_").replace("__", "--", 1) + equals + re.sub(_FRACTION, decimal, value))
    return result


def _share_or_count(validation: float) -> float:
    """A validation split of 1 or more is a count."""
    return int(validation) if validation >= 1 or validation == 0 else validation


if __name__ == "__main__":
    sys.exit(main())
