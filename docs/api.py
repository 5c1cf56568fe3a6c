"""Writes what version 0.1 promises into docs/reference/api.md: python docs/api.py

Names and parameters are the code's; members are those that the pages of the reference show.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import innermax

REFERENCE = Path(__file__).parent / "reference"
PAGE = REFERENCE / "api.md"


def write() -> str:
    """The page, with the list as it is now."""
    shown = _read_members()
    lines = "".join(_describe(name, getattr(innermax, name), shown.get(name, [])) for name in innermax.__all__)
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(r"```text\n.*?```\n", lambda _: f"```text\n{lines}```\n", text, flags=re.DOTALL)


def _read_members() -> dict[str, list[str]]:
    """The members of each public name that a page of the reference lists."""
    text = "".join(page.read_text(encoding="utf-8") for page in sorted(REFERENCE.glob("*.md")))
    listed = re.findall(r"^::: innermax\.(\w+)\n    options:\n      members: \[(.*?)\]$", text, re.MULTILINE)
    return {name: re.findall(r"\w+", members) for name, members in listed}


def _describe(name: str, value: Any, members: list[str]) -> str:
    """A line for a name with its parameters, and one for each member."""
    protocol = getattr(value, "_is_protocol", False)  # which is not called
    lines = [name if protocol else f"{name}({', '.join(_list_parameters(value))})"]
    for member in members:
        found = inspect.getattr_static(value, member)
        called = inspect.isfunction(found) or isinstance(found, classmethod | staticmethod)
        parameters = [one for one in _list_parameters(getattr(value, member)) if one != "self"] if called else []
        lines.append(f"    .{member}" + (f"({', '.join(parameters)})" if called else ""))
    return "".join(f"{line}\n" for line in lines)


def _list_parameters(call: Any) -> list[str]:
    """The parameters without their types; of a default only that there is one."""
    parameters = list(inspect.signature(call).parameters.values())
    shown = []
    for one in parameters:
        if one.kind is one.KEYWORD_ONLY and not any(before.startswith("*") for before in shown):
            shown.append("*")
        star = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
        shown.append(f"{star}{one.name}" + ("" if one.default is one.empty else "=…"))
    return shown


if __name__ == "__main__":
    PAGE.write_text(write(), encoding="utf-8")
