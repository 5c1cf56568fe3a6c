"""JSON and YAML from untrusted files as plain values, and values as plain YAML.

Nothing in a file is executed, and its size is bounded.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import yaml
from torch import Tensor

# Metadata of a field added to a dataclass whose values already name files: `describe` leaves it out at its default.
ADDED_FIELD = {"added": True}
_DEEPEST = 64  # levels of nesting
_LARGEST = 20_000  # values of a YAML document, each alias counted in full; they take some seconds to read
_LONGEST = 2**20  # characters of a YAML document


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises ValueError, in one line, where it is not JSON or is nested more than 64 levels deep.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not readable as JSON: {' '.join(str(error).split())[:200]}") from error
    level = [value]
    for _ in range(_DEEPEST):
        level = [part for whole in level for part in _parts(whole) if isinstance(part, dict | list)]
        if not level:
            return value
    raise ValueError(f"not readable as JSON: values are nested deeper than {_DEEPEST}")


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The value of a YAML text of plain values.

    Raises ValueError, in one line, where it is not YAML, is longer than 1 Mi characters, holds more than 20,000 values,
    or is nested more than 64 levels deep. An alias counts as much as what it refers to.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"not readable as YAML: {len(text):,} characters are more than the {_LONGEST:,} allowed")
    try:
        reading = loader(text)
        _limit(reading)
        node = reading.get_single_node()
        if node is None:
            return None
        _measure_node(node, {})
        return reading.construct_document(node)
    # PyYAML's constructors of numbers, dates and mappings let through what Python's own raise.
    except (yaml.YAMLError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"not readable as YAML: {' '.join(str(error).split())[:200]}") from error
    except RecursionError as error:
        raise ValueError(f"not readable as YAML: values are nested deeper than {_DEEPEST}") from error


def _parts(whole: Any) -> Any:
    return whole.values() if isinstance(whole, dict) else whole if isinstance(whole, list) else ()


def _limit(reading: yaml.SafeLoader) -> None:
    """Makes a loader raise ValueError as soon as it meets too many values or levels."""
    compose, count, depth = reading.compose_node, 0, 0

    def compose_limited(parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        nonlocal count, depth
        count, depth = count + 1, depth + 1
        _check(count, depth)
        node = compose(parent, index)
        depth -= 1
        return node

    reading.compose_node = compose_limited  # type: ignore[method-assign]


def _check(size: int, depth: int) -> None:
    if size > _LARGEST:
        raise ValueError(f"it holds more than {_LARGEST:,} values")
    if depth > _DEEPEST:
        raise ValueError(f"values are nested deeper than {_DEEPEST}")


def _measure_node(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node expands to, and how deep; raises ValueError above the limits."""
    if id(node) not in known:
        known[id(node)] = (_LARGEST + 1, 0)  # for an alias of itself, inside it
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = isinstance(node, yaml.MappingNode)
        found = [_measure_node(part, known) for part in ([one for pair in parts for one in pair] if pairs else parts)]
        size, depth = 1 + sum(size for size, _ in found), 1 + max((depth for _, depth in found), default=0)
        _check(size, depth)
        known[id(node)] = size, depth
    return known[id(node)]


def convert(kind: Any, value: Any, name: str) -> Any:
    """A plain value as the type `kind`: dataclasses from mappings, tuples from lists, NaN for a float that is null.

    Raises ValueError, which names the value, where it does not fit.
    """
    arguments = get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        missing = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        if not set(missing) <= value.keys() <= hints.keys():
            raise ValueError(f"{name} must hold {', '.join(hints)}, got {', '.join(value)[:200]}")
        return kind(**{key: convert(hints[key], part, f"{name}.{key}") for key, part in value.items()})  # type: ignore[operator]
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: convert(arguments[1], part, f"{name}.{key[:60]}") for key, part in value.items()}
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(convert(arguments[0], part, name) for part in value)
    if get_origin(kind) is Literal and isinstance(value, str) and value in arguments:
        return value
    if isinstance(kind, UnionType) and (value is None or type(value) in arguments):
        return value
    if kind is float and (value is None or type(value) in (int, float)):
        if value is not None and not is_finite_number(value):
            raise ValueError(f"{name} must be a finite number, got {str(value)[:20]}")
        return math.nan if value is None else value
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise ValueError(f"{name} must be {getattr(kind, '__name__', kind)}, got {type(value).__name__}")


def is_row(value: Any) -> bool:
    """Whether a value is one epoch's row of metrics.jsonl: numbers, null, and lists of numbers."""
    return isinstance(value, dict) and all(map(_is_measure, value, value.values()))


def is_finite_number(value: Any) -> bool:
    """Whether a value is a finite float or a 64-bit integer."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


def _is_measure(name: str, value: Any) -> bool:
    if name == "attack_network":
        return isinstance(value, str)
    if name == "epoch":
        return isinstance(value, int) and 0 <= value < 10**9
    if name.endswith("_percentiles"):
        return isinstance(value, list) and len(value) > 0 and all(map(is_finite_number, value))
    return value is None or is_finite_number(value)


def described_fields(value: Any) -> list[Field[Any]]:
    """The fields of a dataclass that its description holds: all but those with `ADDED_FIELD` at their default."""
    return [f for f in fields(value) if not (f.metadata.get("added") and getattr(value, f.name) == f.default)]


def describe(value: object) -> Any:
    """A value as plain YAML: dataclasses by name and fields, functions by name, arrays and NumPy's numbers as lists
    and numbers.

    Answers, run folders and folders of rows are recognised by it: it is the same in every process, and stays the same
    when the value's class gains a field with `ADDED_FIELD`.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {"name": type(value).__name__} | {
            f.name: describe(getattr(value, f.name)) for f in described_fields(value)
        }
    if isinstance(value, Mapping):
        return {str(name): describe(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, partial):
        return {"name": describe(value.func), "arguments": describe(value.args)} | describe(value.keywords)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = getattr(value, "__qualname__", None)
    if name is None and type(value).__repr__ is object.__repr__:
        name = type(value).__qualname__  # its str would hold an address
    return str(value) if name is None else name


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The settings in which two configurations differ, each with both values."""
    found: list[str] = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {old} there, {new} here")
    return found
