"""`innermax recipes`, and recipes as YAML: the settings that come with innermax, or a file of one's own."""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from innermax.utils.serialization import parse_yaml
from innermax.utils.validation import unknown


def run(words: list[str]) -> None:
    """Lists the recipes, with the first line of each."""
    if words and words[0] not in ("-h", "--help"):
        raise ValueError(f"recipes takes no arguments, got {' '.join(words)}")
    for name in recipe_names():
        print(f"{name:20} {recipe_text(name).splitlines()[0].removeprefix('# ')}")


def recipe_names() -> list[str]:
    """The recipes that come with innermax."""
    folder = resources.files("innermax") / "recipes"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a recipe by its name, or of a file. Raises ValueError where there is none."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"recipe {name} is not readable: {error}") from error
    if name not in recipe_names():
        raise unknown("recipe", name, recipe_names())
    return (resources.files("innermax") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def read_yaml(text: str) -> Any:
    """The plain values of a YAML text, in which 1e-4 is a number. Raises ValueError where it holds anything else."""
    return parse_yaml(text, _Loader)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
