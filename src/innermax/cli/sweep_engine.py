"""Many runs of one recipe: each in its own folder, started by an engine and resumed where it was stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from innermax.utils.files import LOCK, LockHeld, lock_file, write_json
from innermax.utils.optional import import_library
from innermax.utils.serialization import differences, parse_json
from innermax.utils.validation import check_count

EngineName = Literal["local", "submitit"]
_INDEX = "sweep.json"  # run → its settings
_JOBS = "jobs.json"  # run → the engine's number of its job
_LOGS = "logs"
_UNFIT = re.compile(r"[^\w.+-]+")  # in the name of a folder
_PACE = 0.2  # seconds between two looks at the runs
# A run of the local engine saves and ends when this process does, however that ends.
_CHILD = """
import sys
from innermax.cli.sweep_engine import end_with_parent
end_with_parent()
from innermax.cli import main
sys.argv[0] = "innermax"
sys.exit(main())
"""


@dataclass(frozen=True)
class SweepSettings:
    """How the runs of a sweep are run.

    Args:
        workers: Runs at a time. By default one on this machine, and as many as a cluster takes.
        engine: local: processes on this machine; submitit: jobs on SLURM.
        submitit: What submitit asks the cluster for, by its own names, such as --submitit.timeout_min 600,
            --submitit.gpus_per_node 1 or --submitit.slurm_partition gpu.
    """

    workers: int | None = None
    engine: EngineName = "local"
    submitit: dict[str, Any] | None = None


@dataclass(frozen=True)
class SweepRun:
    """One run: its name in the sweep, the words of `innermax train` but --run-dir, and its identifying settings."""

    name: str
    words: Sequence[str]
    settings: Mapping[str, Any]


@runtime_checkable
class Running(Protocol):
    """A run that has been started."""

    def status(self) -> int | None:
        """Its exit status, None while it runs."""

    def interrupt(self) -> None:
        """Lets a local run save its state and end; a cluster's job goes on."""


Start = Callable[[SweepRun], Running]


def combinations(options: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    """Every combination of the options' values, by a name made of the options that vary: option → value.

    Raises ValueError where two combinations have the same name: an option has a value twice.
    """
    # Sorted, so that a run's name does not depend on the order in which options are typed.
    varied = sorted(
        (name for name, values in options.items() if len(values) > 1), key=lambda name: (name == "seed", name)
    )
    found: dict[str, dict[str, str]] = {}
    for values in product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        name = ",".join(f"{option}={_UNFIT.sub('_', chosen[option])}" for option in varied) or "run"
        if name in found:
            raise ValueError(f"two runs of the sweep would be {name}: give each value once")
        found[name] = chosen
    return found


def sweep(
    folder: Path, runs: Sequence[SweepRun], chosen: SweepSettings, say: Callable[[str], None] = print
) -> dict[str, str]:
    """Runs what is not finished; of the runs that failed, name → last line of the log.

    A run whose settings the folder knows under another name is that run.

    Raises:
        ValueError: the folder holds something else or a run of that name with other settings, another process works in
            it, or the engine is not installed.
        KeyboardInterrupt: local runs have saved their states and ended; a cluster's jobs go on.
    """
    if chosen.workers is not None:
        check_count(chosen.workers, "workers")
    if not (folder / _INDEX).exists() and folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise ValueError(f"run_dir {folder} exists and holds no sweep of innermax; choose another folder")
    runs = _use_known_names(folder, runs)
    with lock_file(folder / LOCK, f"run_dir {folder}"):
        waiting = [run for run in runs if not is_finished(folder / run.name)]
        if chosen.engine == "submitit":
            start, workers = _submitit(folder, chosen.submitit or {}), chosen.workers or max(1, len(waiting))
        else:
            start, workers = _local(folder, chosen.workers or 1), chosen.workers or 1
        (folder / _LOGS).mkdir(exist_ok=True)
        write_json(folder / _INDEX, known_runs(folder) | {run.name: run.settings for run in runs})
        say(f"{len(runs)} runs in {folder}, {len(runs) - len(waiting)} of them finished")
        return _run_all(folder, waiting, start, workers, say)


def known_runs(folder: Path) -> dict[str, Any]:
    """Run → settings, of all that a sweep's folder knows. Raises ValueError where its index is not readable."""
    return _read(folder / _INDEX)


def _use_known_names(folder: Path, runs: Sequence[SweepRun]) -> list[SweepRun]:
    """The runs by the names that the folder knows for their settings.

    Raises ValueError where the folder has other settings for a name.
    """
    known = known_runs(folder)
    names = {json.dumps(settings, sort_keys=True): name for name, settings in known.items()}
    kept = [replace(run, name=names.get(json.dumps(run.settings, sort_keys=True), run.name)) for run in runs]
    for run in kept:
        differing = differences(known.get(run.name, run.settings), run.settings)
        if differing:
            raise ValueError(
                f"run {run.name} of {folder} belongs to another configuration ({'; '.join(differing[:4])}); "
                "choose another folder"
            )
    return kept


def is_finished(run: Path) -> bool:
    """Whether a run's last file is there; it is written whole or not at all."""
    return (run / "evaluation.json").is_file()


def end_with_parent() -> None:
    """Makes the end of standard input, which the parent holds open, a Ctrl-C for the main thread."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    # A background job of a script ignores SIGINT, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=watch, daemon=True).start()


def _run_all(
    folder: Path, runs: Sequence[SweepRun], start: Start, workers: int, say: Callable[[str], None]
) -> dict[str, str]:
    """Keeps `workers` runs going until all have ended; of those that failed, in order, name → last line of the log."""
    waiting, running, failed = list(runs), dict[str, Running](), dict[str, str]()
    try:
        while waiting or running:
            for run in list(waiting):
                # A run that an earlier sweep left running ends by itself, and is then resumed.
                if len(running) < workers and not _is_held(folder / run.name):
                    running[run.name] = start(run)
                    waiting.remove(run)
                    say(f"{run.name}: started")
            for name, started in list(running.items()):
                status = started.status()
                if status is None:
                    continue
                del running[name]
                if status != 0:
                    failed[name] = _last_line(folder, name) or f"exit status {status}"
                say(f"{name}: {'finished' if status == 0 else f'failed: {failed[name]}'}")
            if waiting or running:
                time.sleep(_PACE)
    except KeyboardInterrupt:
        for started in running.values():
            started.interrupt()
        raise KeyboardInterrupt(f"Interrupted: the same command continues {folder} where it stopped.") from None
    return {run.name: failed[run.name] for run in runs if run.name in failed}


def _command(folder: Path, run: SweepRun) -> list[str]:
    """The words of the `innermax` command that makes a run."""
    return ["train", *run.words, f"--run_dir={folder / run.name}"]


def _is_held(run: Path) -> bool:
    """Whether a process holds the lock of a run folder."""
    if not (run / LOCK).exists():
        return False
    try:
        with lock_file(run / LOCK, str(run)):
            return False
    except LockHeld:
        return True


def _last_line(folder: Path, name: str) -> str:
    """The last line of a run's log."""
    log = folder / _LOGS / f"{name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.removeprefix("innermax: ") for line in reversed(lines) if line.strip()), "")


class _LocalProcess:
    """A process on this machine."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def status(self) -> int | None:
        status = self._process.poll()
        if status is not None:
            self._close()
        return status

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait()
        self._close()

    def _close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()


def _local(folder: Path, workers: int) -> Start:
    """Starts processes on this machine, which share its cores."""
    # With a thread per core each, they would wait for one another.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))} if workers > 1 else {}

    def start(run: SweepRun) -> Running:
        with (folder / _LOGS / f"{run.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, *_command(folder, run)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=threads | os.environ,
                start_new_session=True,  # the terminal's Ctrl-C reaches this process alone, which passes it on
            )
        return _LocalProcess(process)

    return start


class Call:
    """An `innermax` command as a job, in a process of its own; one that SLURM stops at its time limit is resumed."""

    def __call__(self, words: Sequence[str], log: Path) -> int:
        """Runs the command with its output in the log; its exit status."""
        with log.open("ab") as output:
            command = [sys.executable, "-m", "innermax.cli", *words]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            return process.wait()
        except BaseException:
            _LocalProcess(process).interrupt()
            raise

    def checkpoint(self, words: Sequence[str], log: Path) -> Any:
        """What submitit submits again when the job's time is over."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, words, log)


class _ClusterJob:
    """A cluster's job."""

    def __init__(self, job: Any) -> None:
        self._job = job

    def status(self) -> int | None:
        if not self._job.done():
            return None
        failure = self._job.exception()
        return int(self._job.result()) if failure is None else 1

    def interrupt(self) -> None:
        """Does nothing: a cluster's job does not end with the process that submitted it."""


def _submitit(folder: Path, parameters: Mapping[str, Any]) -> Start:
    """Submits jobs to SLURM, or to what submitit's `cluster` names."""
    try:
        submitit = import_library("submitit", "AutoExecutor")
    except ImportError as error:
        raise ValueError(f"the engine submitit needs an extra: pip install 'innermax[slurm]' ({error})") from error
    asked = {"name": "innermax"} | dict(parameters)
    cluster = asked.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder / "jobs", cluster=cluster)
        executor.update_parameters(**asked)
    except (RuntimeError, NameError, AssertionError) as error:
        raise ValueError(f"submitit: {error}") from error
    known = _read(folder / _JOBS)

    def start(run: SweepRun) -> Running:
        if cluster == "slurm" and run.name in known:
            before: Any = submitit.SlurmJob(executor.folder, known[run.name])
            if not before.done(force_check=True):  # submitted by an earlier sweep, and still queued or running
                return _ClusterJob(before)
        job = executor.submit(Call(), _command(folder, run), (folder / _LOGS / f"{run.name}.log").absolute())
        known[run.name] = job.job_id
        write_json(folder / _JOBS, known)
        return _ClusterJob(job)

    return start


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found
