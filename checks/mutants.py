"""How many small faults the tests notice: mutation testing of the whole source.

    make mutants                                        # 100 mutants, an hour or two
    python checks/mutants.py --sample 1000000           # every place of every module, days
    python checks/mutants.py --only threat --sample 10 --seed 1
    python checks/mutants.py --again                    # what survived before, after new tests

cosmic-ray says how a module can be changed: another operator, number, comparison, exception; a loop that does not run.
Places are drawn with a fixed seed, and of each place one of its mutants; annotations are left out, which no test could
mistake. A mutant meets the module's own test file, then the rest of its folder's, until a test fails or takes longer
than it may: then the mutant hangs. The same test must pass on the source as it is. Tests that are marked as slow are
left out. Each mutant runs in a fork of a process that has loaded torch, on a copy of the source; results are kept as
they come, in results/mutants.json, and the same command continues from them.
"""

import argparse
import ast
import contextlib
import difflib
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cosmic_ray.plugins
import numpy  # noqa: F401  # loaded once, before the forks
import pytest
import torch
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/innermax"
MODULES = sorted(str(path.relative_to(SOURCE).with_suffix("")) for path in SOURCE.rglob("*.py"))
# Module or folder → the files and folders of tests/ that test it, where they are not those of its own name.
TESTS = {
    "__init__": ("test_packaging.py",),
    "losses": ("test_losses.py", "attacks"),
    "objectives": ("test_objectives.py", "training/test_objectives.py"),
    "models": ("models", "training/test_checkpoints.py"),
    "reproduce": ("reproduce", "test_recorded.py"),
    "utils": ("utils", "training", "models", "test_recorded.py"),
}
_LONGEST = 300.0  # seconds that a test may take, on a busy machine
_WHOLE = 3000.0  # seconds that all tests of a mutant may take, for what no signal interrupts


class Mutant(NamedTuple):
    """A module's source with one change."""

    module: str
    place: str
    operator: str
    source: str
    diff: str


class FirstFailure:
    """A pytest plugin that writes the first test that fails into a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.file.exists():
            hangs = "Failed: Timeout (>" in report.longreprtext
            self.file.write_text(json.dumps({"outcome": "timeout" if hangs else "killed", "by": report.nodeid}))


def tests_of(module: str) -> list[list[str]]:
    """The files of tests/ that test a module: its own, then those of its folder."""
    folder, _, file = module.rpartition("/")
    places = TESTS.get(module) or TESTS.get(folder) or ((folder,) if folder else (f"test_{file}.py",))
    files = [path for place in places for path in _files(ROOT / "tests" / place)]
    own = [path for path in files if Path(path).name == f"test_{file}.py"]
    return [own, [path for path in files if path not in own]]


def _files(place: Path) -> list[str]:
    found = [place] if place.is_file() else sorted(place.rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in found]


def mutants(modules: Sequence[str], sample: int, seed: int) -> list[Mutant]:
    """One mutant each of `sample` places of modules, in random order, or of all where they have no more."""
    every = [(module, place, kinds) for module in modules for place, kinds in sorted(_places(module).items())]
    chance = random.Random(seed)
    drawn = chance.sample(every, min(sample, len(every)))
    made = [_mutant(module, place, *chance.choice(kinds)) for module, place, kinds in drawn]
    return [mutant for mutant in made if mutant is not None]


def _places(module: str) -> dict[Any, list[tuple[str, int]]]:
    """Where a module can be changed → operators, and which of their occurrences that place is."""
    source = (SOURCE / f"{module}.py").read_text()
    nodes, ignored = list(ast_nodes(get_ast(source))), _annotations(source)
    places: dict[Any, list[tuple[str, int]]] = {}
    for name in cosmic_ray.plugins.operator_names():
        kind = cosmic_ray.plugins.get_operator(name)
        if kind.arguments():  # it wants to be told variables
            continue
        operator = kind()
        found = (place for node in nodes for place in operator.mutation_positions(node))
        for occurrence, place in enumerate(found):
            if not any(low <= place[0] and place[1] <= high for low, high in ignored):
                places.setdefault(place, []).append((name, occurrence))
    return places


def _mutant(module: str, place: Any, operator: str, occurrence: int) -> Mutant | None:
    """The mutant, None where cosmic-ray stumbles (over an exception with a dot in its name)."""
    source = (SOURCE / f"{module}.py").read_text()
    try:
        changed = mutate_code(source, cosmic_ray.plugins.get_operator(operator)(), occurrence)
    except AttributeError:
        return None
    lines = difflib.unified_diff(source.splitlines(), changed.splitlines(), lineterm="", n=0)
    diff = "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))
    first, column = place[0]
    return Mutant(module, f"{first}:{column}", operator.removeprefix("core/"), changed, diff)


def _annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations begin and end."""
    nodes: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        nodes += [node.annotation] if isinstance(node, ast.arg | ast.AnnAssign) else []
        nodes += [node.returns] if isinstance(node, ast.FunctionDef) else []
    lines = source.splitlines()

    def place(line: int, column: int) -> tuple[int, int]:  # ast counts bytes, cosmic-ray letters
        return line, len(lines[line - 1].encode()[:column].decode())

    return [
        (place(n.lineno, n.col_offset), place(n.end_lineno or 0, n.end_col_offset or 0)) for n in nodes if n is not None
    ]


class Bench:
    """A copy of the source beside the repository's, on which tests run in forks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broken: list[str] = []
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(ROOT / "pyproject.toml", folder)
        for path in ROOT.iterdir():  # which tests read
            if not path.name.startswith(".") and path.name not in ("build", "runs", "dist", *os.listdir(folder)):
                (folder / path.name).symlink_to(path)

    def outcome(self, mutant: Mutant) -> dict[str, Any]:
        """What became of a mutant: "killed" by a test, "timeout", "import" where it does not start, or "survived"."""
        for files in filter(None, tests_of(mutant.module)):
            status, failure = self.first_failure(files, mutant)
            while failure is not None and not self.passes(failure["by"]):
                print(f"{failure['by']} fails on the source as it is, and is left out", flush=True)
                self.broken.append(failure["by"])
                status, failure = self.first_failure(files, mutant)
            if failure is not None:
                return failure
            if status not in (0, _NO_TESTS):
                return {"outcome": "timeout" if status is None else "import"}
        return {"outcome": "survived"}

    @functools.cache  # noqa: B019  # there is one bench
    def passes(self, test: str) -> bool:
        """Whether a test passes on the source as it is."""
        return self.first_failure([test])[1] is None

    def first_failure(
        self, tests: Sequence[str], mutant: Mutant | None = None
    ) -> tuple[int | None, dict[str, Any] | None]:
        """pytest's exit status, None where it took too long; and which test failed first."""
        failed = self.folder / "failed"
        failed.unlink(missing_ok=True)
        plain = [word for name in ("randomly", "xdist", "cacheprovider") for word in ("-p", f"no:{name}")]
        words = [f"--rootdir={self.folder}", *plain, "-x", f"--timeout={_LONGEST}"]
        words += [f"{self.folder}/{test}" for test in tests] + [f"--deselect={test}" for test in self.broken]
        path = "" if mutant is None else f"src/innermax/{mutant.module}.py"
        try:
            if mutant is not None:
                (self.folder / path).write_text(mutant.source)
            status = self._forked(lambda: int(pytest.main(words, [FirstFailure(failed)])))
        finally:
            if mutant is not None:
                shutil.copy2(ROOT / path, self.folder / path)
        return status, json.loads(failed.read_text()) if failed.exists() else None

    def _forked(self, work: Any) -> int | None:
        """The exit status of work in a fork that sees the copy; None where it was not done in time."""
        child = os.fork()
        if child == 0:
            os.setsid()
            os.chdir(self.folder)
            with (self.folder / "output").open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            sys.path.insert(0, str(self.folder / "src"))
            os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:1] + [p for p in sys.path[1:] if p])
            sys.dont_write_bytecode = True
            with contextlib.suppress(BaseException):
                os._exit(work())
            os._exit(70)
        began = time.monotonic()
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() - began > _WHOLE:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
            time.sleep(0.05)


_NO_TESTS = 5  # pytest's exit status where all are marked as slow


def tested(bench: Bench, drawn: Sequence[Mutant], known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What became of each mutant, as it comes; what is known is not tried again."""
    for mutant in drawn:
        told = {"module": mutant.module, "place": mutant.place, "operator": mutant.operator, "diff": mutant.diff}
        yield known.get(name(told)) or told | bench.outcome(mutant)


def name(told: Mapping[str, Any]) -> str:
    """What a mutant is known by."""
    return f"{told['module']} {told['place']} {told['diff']}"


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Kill rates, one line per folder, with Wilson's 95 % intervals, of the mutants that start."""
    from innermax.utils.intervals import accuracy

    lines = ["| folder | do not start | mutants | killed | of them hang | % | 95 % interval |", "|" + " --- |" * 7]
    for folder in [*sorted({_folder(told) for told in found}), "all"]:
        here = [told for told in found if folder in (_folder(told), "all")]
        counts = {kind: sum(told["outcome"] == kind for told in here) for kind in ("survived", "timeout", "import")}
        started = len(here) - counts["import"]
        rate = accuracy(started - counts["survived"], started)
        shown = f"{100 * rate.value:.1f} | {100 * rate.low:.1f}–{100 * rate.high:.1f}"
        lines.append(f"| {folder} | {counts['import']} | {started} | {rate.correct} | {counts['timeout']} | {shown} |")
    return lines


def _folder(told: Mapping[str, Any]) -> str:
    return str(told["module"]).rpartition("/")[0] or "innermax"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=MODULES, default=MODULES)
    parser.add_argument("--sample", type=int, default=100, help="places in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="try what survived before again")
    parser.add_argument("--write", type=Path, default=ROOT / "results/mutants.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(chosen.write.read_text()) if chosen.write.exists() else []
    known = {name(told): told for told in before if not (chosen.again and told["outcome"] == "survived")}
    drawn = mutants(chosen.only, chosen.sample, chosen.seed)
    sample = [name(mutant._asdict()) for mutant in drawn]
    bench, found = Bench(ROOT / "build/mutants"), []
    for told in tested(bench, drawn, known):
        found.append(told)
        kept = known | {name(told): told for told in found}
        record = [kept[mutant] for mutant in sample if mutant in kept]
        chosen.write.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        if told["outcome"] == "survived" or name(told) not in known:
            print(f"{told['outcome']:9} {told['module']}:{told['place']} {told['operator']}", flush=True)
    print("\n".join(["", *table(found)]))


if __name__ == "__main__":
    main()
