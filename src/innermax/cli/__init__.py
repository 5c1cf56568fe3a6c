"""The command line: one module per command, each with `run(words)`; `main` calls it and turns errors into one line."""

import os
import select
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

_HELP = """usage: innermax COMMAND …

Train classifiers that withstand adversarial examples, and know whether a robustness number can be believed.

  innermax recipes                            list the recipes that come with innermax
  innermax models                             list the robust models that come with innermax
  innermax train digits                       train a robust classifier, in a minute on two cores
  innermax train mnist --strategy standard    the paper's setting, with another defence
  innermax sweep digits --seed 0 1 2          train once for each value, or combination of values, of the options
  innermax evaluate runs/digits               attack a trained model
  innermax transfer runs/other runs/digits    make adversarial images on one model, score them on others
  innermax verify runs/digits --claims 0.5    try to refute a claim; exit status 1 where it is refuted
  innermax report runs/digits -o report.html  write a page: how robust, why, and which images fool the model
  innermax export runs/digits --format onnx   write a model for ONNX Runtime, torch.export or the Hugging Face Hub
  innermax reproduce table1 --scale cpu       reproduce a table or figure of the paper

innermax COMMAND --help lists the options of a command. Fractions such as 8/255 are read as numbers; an option that is
true or false is true without a value.
"""
_COMPUTING = ("train", "sweep", "evaluate", "transfer", "verify", "report", "reproduce")
_COMMANDS = ("train", "sweep", "evaluate", "transfer", "verify", "report", "export", "recipes", "models", "reproduce")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status.

    It is 0, 1 where a claim is refuted, 2 for bad input, 130 when interrupted, and 141 where nobody reads the output
    any more, as behind `| head`: 128 and the number of SIGPIPE, as shells tell it of other programs.
    """
    from innermax.utils.encoding import accept_all_text

    accept_all_text()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _run(words, alone=arguments is None)
        _flush()  # here, where it can be told that it fails
        return status
    except OSError as error:  # of standard output or error: `_run` tells any other
        _discard_unwritten()
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"innermax: {_one_line(error)}", file=sys.stderr)
        return 2


def _run(words: Sequence[str], alone: bool) -> int:
    """Runs a command and turns errors into one line; its exit status. alone: in a process of its own.

    Raises OSError where standard output or error cannot be written to.
    """
    from innermax.utils.allocator import restart_keeping_memory
    from innermax.utils.optional import MissingLibrary

    if not words or words[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if words[0] == "--version":
        from innermax.utils.version import __version__

        print(f"innermax {__version__}")
        return 0
    try:
        if words[0] not in _COMMANDS:
            from innermax.utils.validation import unknown

            raise unknown("command", words[0], _COMMANDS)
        if alone and words[0] in _COMPUTING:
            restart_keeping_memory()
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]  # it takes the rest, and does not look
            import_module(f"innermax.cli.{words[0]}").run(words[1:])  # that command's imports alone
    except (ValueError, TypeError, ArithmeticError, OSError, MissingLibrary) as error:
        if isinstance(error, OSError):
            _flush()  # fails again where it was about an output that keeps what it could not write
        if isinstance(error, BrokenPipeError) and _is_unread():
            raise
        print(f"innermax: {_name_option(_one_line(error), words)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if _one_line(stop):
            print(f"innermax: {_one_line(stop)}", file=sys.stderr)
        return 130
    except SystemExit as stop:  # how the parser ends once it has printed a command's help
        return int(stop.code or 0)
    return 0


def _flush() -> None:
    """Writes what is left in standard output and error. Raises OSError where that cannot be."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as where it was closed from the start
            stream.flush()


def _is_unread() -> bool:
    """Whether standard output or error is a pipe that nobody reads any more, as far as the system tells."""
    if sys.platform == "win32":
        return False
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError):  # there is no file behind it, as in a notebook
                poll.register(stream.fileno(), 0)  # errors are told in any case
    return bool(poll.poll(0))


def _discard_unwritten() -> None:
    """Lets outputs that cannot be written to lead nowhere: Python would try again at its end, and print a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def _one_line(message: BaseException | str) -> str:
    """The text of an exception or warning, and its notes."""
    return " ".join(" ".join([str(message), *getattr(message, "__notes__", [])]).split())


def _name_option(message: str, words: Sequence[str]) -> str:
    """A message that begins with the name of an argument, such as batch_size, with the option that was typed for it."""
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        name = option.removeprefix("--").rpartition(".")[2].replace("-", "_")
        if option.startswith("--") and message.startswith(f"{name} "):
            return option + message.removeprefix(name)
    return message


def _warn(message: Warning | str, *_: object) -> None:
    """Prints a warning in the command line's form."""
    print(f"innermax: {_one_line(message)}", file=sys.stderr)
