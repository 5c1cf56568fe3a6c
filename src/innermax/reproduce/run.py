"""Reproduces tables and figures: runs the experiments that are missing, as time allows, and writes the pages."""

import _thread
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from innermax.reproduce import ablations, best, efficiency, figures, methods, tables, theorem
from innermax.reproduce.answers import Answers
from innermax.reproduce.artifact import Artifact
from innermax.reproduce.cache import Cache, Experiment, InUse, Result, hash_name
from innermax.reproduce.experiments import Trained
from innermax.reproduce.scales import Scale, find_scale
from innermax.reproduce.selection import select_experiments
from innermax.reproduce.unfinished import Begun, record_progress
from innermax.utils.files import write_json, write_text
from innermax.utils.optional import extra
from innermax.utils.validation import unknown

_MODULES = (tables, figures, theorem, ablations, efficiency, best, methods)
ARTIFACTS: dict[str, Artifact] = {artifact.name: artifact for module in _MODULES for artifact in module.ARTIFACTS}


def reproduce(
    names: Sequence[str],
    *,
    scale: str = "cpu",
    out: str | Path = "results/paper",
    cache: str | Path = "runs/paper",
    data: str | None = None,
    strategies: Sequence[str] | None = None,
    minutes: float | None = None,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Reproduces tables and figures of Wang et al. 2019; the pages, written into out/scale.

    Every result is kept, so that nothing is trained or measured twice, whatever it is for. The same call resumes one
    that was stopped, and several calls at the same time share the work.

    Args:
        names: of ARTIFACTS.
        scale: "smoke", "cpu" or "full", the paper's.
        out: Folder of the pages. Beside them the results are packed into answers.json.xz, which is read first; at scale
            "full" networks are copied into out/models. How far trainings are that have not finished stands in
            unfinished.json. Results in out/answers, of version 0.1, are read as well.
        cache: Folder of the trained networks, and of new results in cache/answers until they are packed.
        data: Runs only what is trained on this data set, such as cifar10. None: on any.
        strategies: Runs only what is trained with these, such as [warm-start, dynamic], the first of them first. None:
            with any.
        minutes: Time limit, at which what is running is interrupted. None: no limit; 0: only show what was measured.
        device: "auto", "cpu", "cuda" or "cuda:N".
        say: takes lines of progress.

    Raises:
        ValueError: an unknown name, scale, data set or strategy, or minutes < 0.
        MissingLibrary: Matplotlib is not installed.
    """
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes must be ≥ 0 or None, got {minutes}")
    for name in names:
        if name not in ARTIFACTS:
            raise unknown("table or figure", name, ARTIFACTS)
    chosen, artifacts = find_scale(scale), [ARTIFACTS[name] for name in names]
    if any(artifact.draw is not None for artifact in artifacts):
        _require_matplotlib()
    exports = Path(out) / "models" if scale == "full" else None
    pack, loose = Path(out) / chosen.name / "answers.json.xz", (Path(cache) / "answers", Path(out) / "answers")
    store = Cache(Answers(pack, loose), Path(cache), device, say, exports)
    experiments = list(dict.fromkeys(one for artifact in artifacts for one in artifact.experiments(chosen)))
    missing = select_experiments(experiments, data, strategies)
    with _limit_time(minutes) as has_time:
        if not _measure_all(missing, store, has_time):
            say("The time is up. The same command resumes from here.")
    store.answers.pack_up(map(hash_name, experiments))
    trainings = [experiment.training for experiment in experiments if isinstance(experiment, Trained)]
    begun = record_progress(Path(out) / chosen.name, store, trainings)

    def find(experiment: Experiment) -> Result | None:
        return begun.get(hash_name(experiment.training)) if isinstance(experiment, Begun) else store.find(experiment)

    return [_write_page(artifact, chosen, find, Path(out)) for artifact in artifacts]


def _require_matplotlib() -> None:
    """Raises MissingLibrary before hours are spent on numbers whose picture cannot be drawn."""
    with extra("report"):
        import matplotlib  # noqa: F401


def _measure_all(experiments: Sequence[Experiment], cache: Cache, has_time: Callable[[], bool]) -> bool:
    """Runs the missing experiments, waiting for those that another process runs; whether all were done in time."""
    waiting = [experiment for experiment in experiments if cache.find(experiment) is None]
    try:
        while waiting and has_time():
            in_use = []
            for experiment in waiting:
                try:
                    cache.measure(experiment)
                except InUse:
                    in_use.append(experiment)
            if len(in_use) == len(waiting):
                threading.Event().wait(1.0)
            waiting = in_use
    except KeyboardInterrupt:
        if has_time():  # a person's, not the clock's
            raise
        return False
    return not waiting


@contextmanager
def _limit_time(minutes: float | None) -> Iterator[Callable[[], bool]]:
    """Context manager: raises KeyboardInterrupt in it after so many minutes; yields whether there is time left."""
    over = threading.Event()

    def stop() -> None:
        over.set()
        _thread.interrupt_main()

    if minutes == 0:
        over.set()
    before = signal.getsignal(signal.SIGINT)
    if minutes and before == signal.SIG_IGN:  # as in a script's background job
        signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer((minutes or 0) * 60, stop)
    timer.daemon = True
    if minutes:
        timer.start()
    try:
        yield lambda: not over.is_set()
    finally:
        timer.cancel()
        if minutes and before == signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)


def _write_page(artifact: Artifact, scale: Scale, find: Callable[[Experiment], Result | None], out: Path) -> Path:
    """Writes an artifact's page, its numbers and its picture; the page's path."""
    folder = out / scale.name
    folder.mkdir(parents=True, exist_ok=True)
    experiments = list(dict.fromkeys(artifact.experiments(scale)))
    results = [result for result in map(find, experiments) if result is not None]
    numbers = artifact.numbers(scale, find)
    command = f"innermax reproduce {artifact.name} --scale {scale.name}"
    missing = len(experiments) - len(results)
    document: dict[str, Any] = {
        "name": artifact.name,
        "scale": scale.name,
        "command": command,
        "missing": missing,
        "made_on": _describe_origin(results),
        "numbers": numbers,
    }
    write_json(folder / f"{artifact.name}.json", document)
    lines = [f"# {artifact.title}", _describe_provenance(command, document["made_on"], missing, len(experiments))]
    if any(hasattr(experiment, "training") for experiment in experiments):
        lines.insert(1, scale.note)
    if artifact.draw is not None and results:
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained", dpi=150)
        artifact.draw(numbers, figure)
        figure.savefig(folder / f"{artifact.name}.png")
        lines.append(f"![{artifact.title}]({artifact.name}.png)")
    lines.append(artifact.markdown(numbers))
    page = folder / f"{artifact.name}.md"
    write_text(page, "\n\n".join(lines) + "\n")
    return page


def _describe_origin(results: Sequence[Result]) -> dict[str, Any]:
    """The machines, versions, commits and days of the results, and how long they took in all."""
    environments = [result["environment"] for result in results]
    machines = {f"{e['device']}, {e['threads']} threads, torch {e['versions']['torch']}" for e in environments}
    days = sorted(e["date"][:10] for e in environments)
    commits = {(e["commit"] or "unknown")[:10] for e in environments}
    return {
        "machines": sorted(machines),
        "commits": sorted(commits),
        "days": [days[0], days[-1]] if days else [],
        "hours": round(sum(result["seconds"] for result in results) / 3600, 2),
    }


def _describe_provenance(command: str, made_on: dict[str, Any], missing: int, total: int) -> str:
    """The sentence under a page's title."""
    if missing == total:
        return f"`{command}`: **not run.**"
    days = " to ".join(dict.fromkeys(made_on["days"]))
    text = f"`{command}` on {'; '.join(made_on['machines'])} ({days}; {made_on['hours']} h in all)."
    if missing:
        text += f" **{missing} of {total} experiments were not run**; the same command runs them."
    return text
