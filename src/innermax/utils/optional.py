"""Libraries that a file of the user's own can hide: `datasets.py`, `wandb.py` and so on."""

import sys
from importlib import import_module
from types import ModuleType


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
