"""The command line: a thin door to training and evaluation."""

import sys
import warnings
from collections.abc import Callable, Sequence

from innermax.cli import evaluate, export, report, reproduce, sweep, train, transfer

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status: 0, 2 for bad input (one line on stderr), 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if words[0] == "--version":
        from innermax.utils.version import __version__

        print(f"innermax {__version__}")
        return 0
    from jsonargparse import ArgumentError

    commands: dict[str, Callable[[list[str]], None]] = {
        "train": train.run,
        "sweep": sweep.run,
        "evaluate": evaluate.run,
        "transfer": transfer.run,
        "report": report.run,
        "export": export.run,
        "recipes": _recipes,
        "reproduce": reproduce.run,
    }
    try:
        if words[0] not in commands:
            from innermax.utils.validation import unknown

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


def _recipes(words: list[str]) -> None:
    """Lists the recipes, with the first line of each."""
    from innermax.cli.settings import recipe_names, recipe_text

    if words and words[0] not in ("-h", "--help"):
        raise ValueError(f"recipes takes no arguments, got {' '.join(words)}")
    for name in recipe_names():
        print(f"{name:20} {recipe_text(name).splitlines()[0].removeprefix('# ')}")
