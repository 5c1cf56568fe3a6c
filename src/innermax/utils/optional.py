"""Libraries that not everybody has: those of the extras, and those that a file of the user's own can hide."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

_SOLD_AS = {"PIL": "Pillow"}  # the module's name, where another one is installed


class MissingLibrary(ModuleNotFoundError):
    """A library that comes with an extra of innermax is not installed; the message says how to install it."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Context manager around the import of what an extra brings, such as "data".

    Raises MissingLibrary where that is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "a library").partition(".")[0]
        library = _SOLD_AS.get(module, module)
        told = f"{library} is needed here and not installed: pip install 'innermax[{name}]'"
        raise MissingLibrary(told, name=error.name) from error


def import_library(name: str, attribute: str) -> ModuleType:
    """The library of this name.

    Args:
        name: of the module to import.
        attribute: what the library has, and another module of the same name has not.

    Raises:
        ImportError: the library is missing, or another module goes by its name.
    """
    module = import_module(name)
    if not hasattr(module, attribute):
        raise ImportError(f"{_place(module)} goes by the name of the library {name}: rename it")
    return module


def find_loaded(name: str, attribute: str) -> object | None:
    """An attribute of a library, if that has been imported; None for another module of the same name."""
    return getattr(sys.modules.get(name), attribute, None)


def _place(module: ModuleType) -> str:
    return str(getattr(module, "__file__", None) or module)
