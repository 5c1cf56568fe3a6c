"""How many small faults the tests notice: mutation testing of the whole source.

    make mutants                                        # 100 mutants, an hour or two
    python checks/mutants.py --sample 1000000           # every place of every module, days
    python checks/mutants.py --only threat --sample 10 --seed 1
    python checks/mutants.py --again                    # what survived before, after new tests

cosmic-ray says how a module can be changed: another operator, number, comparison, exception; a loop that does not run.
Places are drawn with a fixed seed, and of each place one of its mutants; annotations are left out, which no test could
mistake. A mutant meets the tests of the module's folder, of them those that pass through its line, the quickest first,
until one fails or takes ten times its time and half a minute: then the mutant hangs. Tests that are marked as slow are
left out. Each mutant runs in a fork of a process that has loaded torch, on a copy of the source; results are kept as
they come, in results/mutants.json, and the same command goes on from them.
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
import coverage
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
    "training/weight_perturbation": ("training/test_weight_perturbation.py",),
    "models": ("models", "training/test_checkpoints.py"),
    "utils": ("utils", "training", "models", "test_recorded.py"),
}
_PATIENCE = 30.0  # seconds beside ten times what a test takes: then the mutant hangs
_LONGEST = 600.0  # seconds that a test of the source as it is may take


class Mutant(NamedTuple):
    """A module's source with one change, and the lines that it touches."""

    module: str
    place: str
    operator: str
    lines: tuple[int, int]
    source: str
    diff: str


class Timings:
    """A pytest plugin that takes down how long each test took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration


class Chosen:
    """A pytest plugin that runs tests in this order, each within its limit, and writes what fails first into a file."""

    def __init__(self, seconds: Mapping[str, float], file: Path) -> None:
        self.seconds, self.file = seconds, file
        self.place = {test: number for number, test in enumerate(seconds)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda item: self.place[item.nodeid])
        for item in items:
            item.add_marker(pytest.mark.timeout(_PATIENCE + 10 * self.seconds[item.nodeid]), append=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            hangs = "Failed: Timeout (>" in report.longreprtext
            found = {"outcome": "timeout" if hangs else "killed", "by": report.nodeid}
            self.file.write_text(json.dumps(found))


def tests_of(module: str) -> tuple[str, ...]:
    """The files and folders of tests/ that test a module."""
    folder, _, file = module.rpartition("/")
    own = TESTS.get(module) or TESTS.get(folder)
    return own or ((folder,) if folder else (f"test_{file}.py",))


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
    (first, column), (last, _) = place
    return Mutant(module, f"{first}:{column}", operator.removeprefix("core/"), (first, last), changed, diff)


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
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(ROOT / "pyproject.toml", folder)
        for path in ROOT.iterdir():  # which tests read
            if not path.name.startswith(".") and path.name not in ("build", "runs", "dist", *os.listdir(folder)):
                (folder / path.name).symlink_to(path)

    @functools.cache  # noqa: B019  # there is one bench
    def measured(self, tests: str) -> tuple[dict[str, float], dict[str, dict[int, list[str]]]]:
        """How long each test of a file or folder takes, and module → line → those that pass through it."""
        told, data = self.folder / "measured.json", self.folder / "lines.coverage"

        def measure() -> int:
            timings = Timings()
            words = [*self._words([tests]), f"--timeout={_LONGEST}", f"--cov={self.folder}/src/innermax", *_COVERED]
            status = pytest.main(words, [timings])
            told.write_text(json.dumps(timings.seconds))
            return int(status)

        os.environ["COVERAGE_FILE"] = str(data)
        status = self._forked(measure, None)
        if status != 0:
            raise SystemExit(f"{tests} of the source as it is ends with {status}: mend it first")
        found = coverage.CoverageData(str(data))
        found.read()
        passing = {}
        for file in found.measured_files():
            module = str(Path(file).relative_to(self.folder / "src/innermax").with_suffix(""))
            contexts = found.contexts_by_lineno(file).items()
            passing[module] = {line: [test.rpartition("|")[0] for test in tests if test] for line, tests in contexts}
        return json.loads(told.read_text()), passing

    def outcome(self, mutant: Mutant, seconds: Mapping[str, float]) -> dict[str, Any]:
        """What became of a mutant: "killed" by a test, "timeout", "import" where it does not start, or "survived".

        seconds: test → what it takes, in the order in which the tests run.
        """
        path, failed = self.folder / f"src/innermax/{mutant.module}.py", self.folder / "failed"
        failed.unlink(missing_ok=True)
        files = sorted({test.partition("::")[0].removeprefix("tests/") for test in seconds})
        path.write_text(mutant.source)
        try:
            status = self._forked(
                lambda: int(pytest.main([*self._words(files), "-x"], [Chosen(seconds, failed)])),
                _LONGEST + 3 * sum(seconds.values()),  # for what no signal interrupts
            )
        finally:
            shutil.copy2(ROOT / path.relative_to(self.folder), path)
        if status == 0:
            return {"outcome": "survived"}
        if failed.exists():
            return json.loads(failed.read_text())  # type: ignore[no-any-return]
        return {"outcome": "timeout" if status is None else "import"}

    def _words(self, tests: Sequence[str]) -> list[str]:
        files = [f"{self.folder}/tests/{name}" for name in tests]
        plain = [word for name in ("randomly", "xdist", "cacheprovider") for word in ("-p", f"no:{name}")]
        return [f"--rootdir={self.folder}", *files, *plain]

    def _forked(self, work: Any, patience: float | None) -> int | None:
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
            sys.dont_write_bytecode = patience is not None
            with contextlib.suppress(BaseException):
                os._exit(work())
            os._exit(70)
        began = time.monotonic()
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if patience is not None and time.monotonic() - began > patience:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
            time.sleep(0.05)


_COVERED = ["--cov-context=test", "--cov-report="]


def tested(bench: Bench, drawn: Sequence[Mutant], known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What became of each mutant, as it comes; what is known is not tried again."""
    for mutant in drawn:
        told = {"module": mutant.module, "place": mutant.place, "operator": mutant.operator, "diff": mutant.diff}
        if name(told) in known:
            yield known[name(told)]
            continue
        seconds: dict[str, float] = {}
        through: set[str] = set()
        for tests in tests_of(mutant.module):
            taken, passing = bench.measured(tests)
            seconds |= taken
            lines = passing.get(mutant.module, {})
            through |= {test for line in range(mutant.lines[0], mutant.lines[1] + 1) for test in lines.get(line, ())}
        # A line that runs at import alone, or in another process, is any test's matter.
        order = sorted(through or seconds, key=seconds.__getitem__)
        yield told | bench.outcome(mutant, {test: seconds[test] for test in order})


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
    bench, found = Bench(ROOT / "build/mutants"), []
    for told in tested(bench, drawn, known):
        found.append(told)
        kept = {name(told): told for told in [*before, *found]}
        chosen.write.write_text(json.dumps(list(kept.values()), indent=1, ensure_ascii=False) + "\n")
        if told["outcome"] == "survived" or name(told) not in known:
            print(f"{told['outcome']:9} {told['module']}:{told['place']} {told['operator']}", flush=True)
    print("\n".join(["", *table(found)]))


if __name__ == "__main__":
    main()
