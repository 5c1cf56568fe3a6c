"""How src/innermax is laid out: which entries it has, which way imports run, how large functions and classes are."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import innermax

ROOT = Path(innermax.__file__).parent
# Top down: an import runs to a lower floor, or stays in its folder.
FLOORS = (
    ("cli",),
    ("reproduce",),
    ("__init__",),
    ("reporting",),
    ("training", "lightning"),
    ("evaluation", "strategies", "objectives"),
    ("attacks",),
    ("oracle",),
    ("threat", "losses", "models", "data", "distributed"),
    ("utils",),
)
FLOOR = {entry: floor for floor, entries in enumerate(FLOORS) for entry in entries}
FILES = {str(path.relative_to(ROOT).with_suffix("")): path for path in sorted(ROOT.rglob("*.py"))}
# Lines of code, at most, and what may be longer for the reason given.
FUNCTION, CLASS = 60, 250
LONGER: dict[str, str] = {}
# What changes while a training or an evaluation runs; every other dataclass is a value.
CHANGING = {"EpochMetrics", "EvaluationClock", "Loop", "State", "TrainingClock"}


@cache
def syntax(module):
    return ast.parse(FILES[module].read_text())


def imports(module):
    """The modules of innermax that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(syntax(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    paths = {name.replace(".", "/").removeprefix("innermax/") for name in found if name.split(".")[0] == "innermax"}
    return {next((p for p in (path, str(Path(path).parent)) if p in FILES), "__init__") for path in paths}


def lines_of_code(module, node):
    """Lines of a function or class without decorators, docstrings, comments and blank lines."""
    documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    inner = (n for n in ast.walk(node) if isinstance(n, documented) and ast.get_docstring(n) is not None)
    docstrings = {line for n in inner for line in range(n.body[0].lineno, n.body[0].end_lineno + 1)}
    lines = enumerate(FILES[module].read_text().splitlines()[node.lineno - 1 : node.end_lineno], node.lineno)
    return sum(1 for n, line in lines if n not in docstrings and line.strip() and not line.lstrip().startswith("#"))


def test_the_top_level_has_the_entries_of_the_floors_and_nothing_more():
    entries = {path.name.removesuffix(".py") for path in ROOT.iterdir()} - {"__pycache__"}
    assert entries == {*FLOOR, "py.typed", "recipes"}


def test_an_import_runs_downwards_or_stays_in_its_folder():
    edges = [(module, other) for module in FILES for other in imports(module)]
    entries = [(module, other, module.split("/")[0], other.split("/")[0]) for module, other in edges]
    assert len(edges) > 500
    assert [f"{m} imports {o}" for m, o, a, b in entries if a != b and FLOOR[a] >= FLOOR[b]] == []


def test_no_imports_run_in_a_circle():
    graph = {module: imports(module) - {module} for module in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def test_functions_and_classes_fit_their_screens():
    sizes = {ast.FunctionDef: FUNCTION, ast.AsyncFunctionDef: FUNCTION, ast.ClassDef: CLASS}
    nodes = [(module, node) for module in FILES for node in ast.walk(syntax(module)) if type(node) in sizes]
    longer = {f"{m}.{node.name}" for m, node in nodes if lines_of_code(m, node) > sizes[type(node)]}
    assert longer == set(LONGER), "too long, or an exception that is none"


def test_values_are_frozen():
    """A result that someone has changed is no result; what a hash names must not change under it."""
    changing = set()
    for node in (node for module in FILES for node in ast.walk(syntax(module)) if isinstance(node, ast.ClassDef)):
        for decorator in node.decorator_list:
            told = ast.unparse(decorator)
            if told.startswith("dataclass") and "frozen=True" not in told:
                changing.add(node.name)
    assert changing == CHANGING
