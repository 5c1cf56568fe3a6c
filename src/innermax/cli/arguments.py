"""What commands share: how words are split and parsed, how options are shown, and checks of what will be written."""

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence, Set
from itertools import pairwise, takewhile
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from innermax.utils.optional import extra

with extra("cli"):
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

SOURCES = (
    "a run folder, a model file or folder, a name from innermax models, a Hub id, timm:NAME or, with --allow-code, "
    "module:function or a .pt2 program of torch.export"
)
_FRACTION = re.compile(r"(?<![\w./])(\d+\.?\d*)/(\d+\.?\d*)(?![\w./])")
_OPTION = re.compile(r"(?<![\w-])--\w[\w.-]*")


def split_words(
    words: Sequence[str], what: str, example: str, least: int = 1, most: int | None = 1
) -> tuple[list[str], list[str]]:
    """The words a command begins with, such as a recipe's name, and its options.

    Where help is asked for, or there are no words, the options are --help alone.

    Args:
        words: those behind the command.
        what: the command takes first.
        example: of the whole command.
        least: so many of them, at least.
        most: so many, at most; None: any number.

    Raises:
        ValueError: there are fewer or more; it shows the example.
    """
    first = list(takewhile(lambda word: not word.startswith("-"), words))
    options = list(words[len(first) :])
    if not words or {"-h", "--help"} & set(options):
        return first, ["--help"]
    command = example.split()[1]
    if len(first) < least:
        raise ValueError(f"{command} takes {what} first, got {' '.join(first) or options[0]}: for example {example}")
    if most is not None and len(first) > most:
        raise ValueError(f"unexpected {first[most]!r}: {command} takes {what}, then options: for example {example}")
    return first, options


class _HelpFormatter(DefaultHelpFormatter):
    """An option with its help and its default, without the name of its Python type."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        metavar = self._format_args(action, self._get_default_metavar_for_optional(action))
        return ", ".join(name for name in action.option_strings if not name.endswith("+")) + f" {metavar}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = (action.help or "").removesuffix("."), action.default
        if not re.match(r"[\w-]+[,:]", text):  # else it begins with a value
            text = text[:1].upper() + text[1:]
        if default is None or default == argparse.SUPPRESS:
            return f"{text}."
        shown = f"{default:.4g}" if isinstance(default, float) else str(default)
        return f"{text} (default: {shown.lower() if isinstance(default, bool) else shown})."


class Parser(ArgumentParser):
    """A parser whose options are shown as --run-dir. It takes --run_dir, too, and 8/255 where a number is expected.

    An error is a ValueError in one line that names the option.

    Attributes:
        elsewhere: options that other commands take, by name, with the command.
    """

    elsewhere: Mapping[str, str] = MappingProxyType({})

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """The values of the options. Raises ValueError where one is unknown or does not fit."""
        words = None if args is None else self._spell_out(args)
        return super().parse_args(words, *more, **options)

    def format_help(self, *more: Any, **options: Any) -> str:
        """The help, with the names of options as they are typed."""
        named = "|".join(action.dest for action in self._actions if "_" in action.dest and "." not in action.dest)
        for action in self._actions:
            if named and action.help is not None:  # from Python's docstrings
                action.help = re.sub(rf"(?<![\w./-])({named})(?![\w/])", r"--\1", action.help)
                action.help = re.sub(r"\bNone\b", "null", action.help)
        return show_options(super().format_help(*more, **options))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(self._explain(message)) from ex

    def type_of(self, option: str) -> Any:
        """The type of an option's value by its name, such as threat.eps; None where there is no such option."""
        action = self._option_string_actions.get(f"--{option}")
        return getattr(action, "_typehint", None)

    def _spell_out(self, words: Sequence[str]) -> list[str]:
        """--run-dir as --run_dir, --overwrite alone as --overwrite=true, and 8/255 as a decimal for a number."""
        result: list[str] = []
        name = ""  # of the option that the next word is for
        for word, following in pairwise([*words, "--"]):
            if not word.startswith("--"):
                result.append(self._read_number(name, word))
                continue
            name, equals, value = word.partition("=")
            name = option_name(name)
            if self.type_of(name) is bool and not equals and following.startswith("-"):
                equals, value = "=", "true"
            result.append(f"--{name}{equals}{self._read_number(name, value)}")
        return result

    def _read_number(self, option: str, value: str) -> str:
        """A value with its fractions as decimals where the option takes numbers."""
        try:
            return _decimal(value, self.type_of(option))
        except ValueError as error:
            raise ValueError(f"{show_options('--' + option)}: {error}") from error

    def _explain(self, message: str) -> str:
        """An error of the parser in words that name the option as it is typed."""
        found = re.search(r'Parser key "([\w.]+)":(?:.*?(?:Got|Given) value: ([^\n]*)$)?', message, re.DOTALL)
        if found and (kind := self.type_of(found[1])) is not None:
            text, value = f"{show_options('--' + found[1])} must be {describe_type(kind)}", found[2]
            if value is None:  # not every version of jsonargparse tells it
                return text
            close = difflib.get_close_matches(value, [str(choice) for choice in _choices(kind)], n=1, cutoff=0.5)
            return f"{text}, got {value}" + (f"; did you mean {close[0]!r}?" if close else "")
        if found := re.match(r"argument (--[\w.]+): expected one argument", message):
            return f"{show_options(found[1])} needs a value"
        if found := re.match(r"unrecognized arguments: ((--?[a-z][\w.]*).*|.*)", message, re.IGNORECASE | re.DOTALL):
            if found[2] is None:
                return f"unexpected {found[1]!r}: an option such as --seed takes one value"
            if (name := option_name(found[2])) in self.elsewhere:
                return show_options(f"--{name} is an option of innermax {self.elsewhere[name]}, not of {self.prog}")
            close = difflib.get_close_matches(found[2], list(self._option_string_actions), n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else f"; {self.prog} --help lists them"
            return show_options(f"unknown option {found[2]!r}{hint}")
        if found := re.match(r"the following arguments are required: ([\w., ]+)", message):
            return " and ".join(show_options(f"--{option}") for option in found[1].split(", ")) + " must be given"
        return show_options(message)


def build_parser(usage: str, description: str) -> Parser:
    """The parser of a command, such as "innermax train RECIPE"."""
    return Parser(
        prog=" ".join(usage.split()[:2]),
        usage=f"{usage} [OPTIONS]",
        description=description,
        exit_on_error=False,
        formatter_class=_HelpFormatter,
    )


def option_name(word: str) -> str:
    """An option's name in the parser: run_dir for --run-dir."""
    return word.removeprefix("--").replace("-", "_")


def is_given(option: str, words: Sequence[str]) -> bool:
    """Whether an option, by its name in the parser, is among the words."""
    return any(option_name(word.partition("=")[0]) == option for word in words if word.startswith("--"))


def leave_out(options: Set[str], words: Sequence[str]) -> list[str]:
    """The words without some options, by their names in the parser, and the values of these."""
    kept, keeps = [], True
    for word in words:
        if word.startswith("--"):
            keeps = option_name(word.partition("=")[0]) not in options
        kept += [word] * keeps
    return kept


def show_options(text: str) -> str:
    """A text with hyphens in the names of options."""
    return _OPTION.sub(lambda match: match[0].replace("_", "-"), text)


def read_fractions(value: Any, kind: Any) -> Any:
    """A value, or list of values, with its fractions as numbers where its type holds numbers.

    Raises ValueError where one divides by zero.
    """
    if float not in _parts(kind):
        return value
    if isinstance(value, list):
        return [read_fractions(inner, kind) for inner in value]
    return float(_decimal(value, kind)) if isinstance(value, str) and _FRACTION.fullmatch(value) else value


def describe_type(kind: Any) -> str:
    """What a value of a type must be, as an error says it."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(describe_type(part) for part in get_args(kind) if part is not type(None))
    if choices := _choices(kind):
        return " or ".join(map(str, choices)) if len(choices) < 3 else f"one of {', '.join(map(str, choices))}"
    if get_origin(kind) is not None:
        if get_origin(get_args(kind)[0]) is not None:
            return "a list of lists such as [[0.5],[0.25]]"
        return "a list of numbers such as [0.5,0.75]" if float in _parts(kind) else "a list such as [1,2]"
    return {int: "an integer", float: "a number", bool: "true or false"}.get(kind, "text")


def check_given_count(option: str, count: int | None) -> None:
    """Raises ValueError where a count that was given is not positive."""
    if count is not None and count < 1:
        raise ValueError(f"{option} must be at least 1, got {count}")


def check_file(option: str, path: str | None) -> None:
    """Raises ValueError where a file cannot be written, before the work that goes into it."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{option} {path} cannot be written: its folder does not exist")
    if path is not None and Path(path).is_dir():
        raise ValueError(f"{option} {path} cannot be written: it is a folder")


def _decimal(word: str, kind: Any) -> str:
    """A word with its fractions as decimals where its type holds numbers."""

    def decimal(match: re.Match[str]) -> str:
        if float(match[2]) == 0:
            raise ValueError(f"{match[0]} divides by zero")
        return repr(float(match[1]) / float(match[2]))

    return _FRACTION.sub(decimal, word) if float in _parts(kind) else word


def _parts(kind: Any) -> set[Any]:
    """A type and all types in it; not the values of a Literal."""
    inner = () if get_origin(kind) is Literal else get_args(kind)
    return {kind, *(part for each in inner for part in _parts(each))}


def _choices(kind: Any) -> tuple[Any, ...]:
    """The values of a Literal, None among them or not."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    literals = [part for part in get_args(kind) if get_origin(part) is Literal]
    return get_args(literals[0]) if len(literals) == 1 and len(get_args(kind)) == 2 else ()
