"""Many runs of one recipe: handed to an engine, each in its own folder, gone on with where they were stopped."""

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
    """How many runs are run.

    Args:
        workers: runs at a time; empty for one on this machine, and for as many as the cluster takes.
        engine: local, processes of this machine; or submitit, jobs on SLURM.
        submitit: what submitit asks the cluster for, in its own names, such as --submitit.timeout_min 600,
            --submitit.gpus_per_node 1 or --submitit.slurm_partition gpu.
    """

    workers: int | None = None
    engine: EngineName = "local"
    submitit: dict[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """One run: its name in the sweep, the words of `innermax train` but --run-dir, and what settings identify it."""

    name: str
    words: Sequence[str]
    settings: Mapping[str, Any]


@runtime_checkable
class Running(Protocol):
    """A run that has been started."""

    def status(self) -> int | None:
        """Its exit status, None while it runs."""

    def interrupt(self) -> None:
        """Lets it save and end where it ends with this process."""


Start = Callable[[Plan], Running]


def combinations(options: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    """The product of options given in lists: a name made of what varies → a value an option.

    Raises ValueError where two combinations would have one name, which is where an option has a value twice.
    """
    # In an order of its own, so that a run's name does not depend on what was typed first.
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
    folder: Path, plans: Sequence[Plan], chosen: SweepSettings, say: Callable[[str], None] = print
) -> dict[str, str]:
    """Runs what is not finished; run → what its log ends with, of those that failed.

    A run whose settings the folder knows under another name is that run.

    Raises:
        ValueError: the folder holds something else, a run of that name with other settings or another process's sweep,
            or the engine is not there.
        KeyboardInterrupt: local runs have saved and ended; jobs of a cluster go on.
    """
    if chosen.workers is not None:
        check_count(chosen.workers, "workers")
    if not (folder / _INDEX).exists() and folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise ValueError(f"run_dir {folder} exists and holds no sweep of innermax; choose another folder")
    plans = _named_as_known(folder, plans)
    with lock_file(folder / LOCK, f"run_dir {folder}"):
        waiting = [plan for plan in plans if not is_finished(folder / plan.name)]
        if chosen.engine == "submitit":
            start, workers = _submitit(folder, chosen.submitit or {}), chosen.workers or max(1, len(waiting))
        else:
            start, workers = _local(folder, chosen.workers or 1), chosen.workers or 1
        (folder / _LOGS).mkdir(exist_ok=True)
        write_json(folder / _INDEX, known_runs(folder) | {plan.name: plan.settings for plan in plans})
        say(f"{len(plans)} runs in {folder}, {len(plans) - len(waiting)} of them finished")
        return _run(folder, waiting, start, workers, say)


def known_runs(folder: Path) -> dict[str, Any]:
    """Run → settings, of all that a sweep's folder knows. Raises ValueError where its index is not readable."""
    return _read(folder / _INDEX)


def _named_as_known(folder: Path, plans: Sequence[Plan]) -> list[Plan]:
    """The plans, by the names that the folder knows their settings by. Raises ValueError for a name of others."""
    known = known_runs(folder)
    names = {json.dumps(settings, sort_keys=True): name for name, settings in known.items()}
    kept = [replace(plan, name=names.get(json.dumps(plan.settings, sort_keys=True), plan.name)) for plan in plans]
    for plan in kept:
        differing = differences(known.get(plan.name, plan.settings), plan.settings)
        if differing:
            raise ValueError(
                f"run {plan.name} of {folder} belongs to another configuration ({'; '.join(differing[:4])}); "
                "choose another folder"
            )
    return kept


def is_finished(run: Path) -> bool:
    """Whether a run's last file is there; it is written whole or not at all."""
    return (run / "evaluation.json").is_file()


def end_with_parent() -> None:
    """From here on, the end of standard input, which the parent holds, is a Ctrl-C; for the main thread."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it, and its children
    threading.Thread(target=watch, daemon=True).start()


def _run(folder: Path, plans: Sequence[Plan], start: Start, workers: int, say: Callable[[str], None]) -> dict[str, str]:
    """Keeps `workers` runs going until all have ended; run → what its log ends with, of those that failed, in order."""
    waiting, running, failed = list(plans), dict[str, Running](), dict[str, str]()
    try:
        while waiting or running:
            for plan in list(waiting):
                # What an earlier sweep left running ends by itself, and is then gone on with.
                if len(running) < workers and not _is_held(folder / plan.name):
                    running[plan.name] = start(plan)
                    waiting.remove(plan)
                    say(f"{plan.name}: started")
            for name, run in list(running.items()):
                status = run.status()
                if status is None:
                    continue
                del running[name]
                if status != 0:
                    failed[name] = _last_line(folder, name) or f"exit status {status}"
                say(f"{name}: {'finished' if status == 0 else f'failed: {failed[name]}'}")
            if waiting or running:
                time.sleep(_PACE)
    except KeyboardInterrupt:
        for run in running.values():
            run.interrupt()
        raise KeyboardInterrupt(f"Interrupted: the same command continues {folder} where it stopped.") from None
    return {plan.name: failed[plan.name] for plan in plans if plan.name in failed}


def _command(folder: Path, plan: Plan) -> list[str]:
    """The words of a run's `innermax` command."""
    return ["train", *plan.words, f"--run_dir={folder / plan.name}"]


def _is_held(run: Path) -> bool:
    """Whether a process works in a run folder."""
    if not (run / LOCK).exists():
        return False
    try:
        with lock_file(run / LOCK, str(run)):
            return False
    except LockHeld:
        return True


def _last_line(folder: Path, name: str) -> str:
    """What a run said last."""
    log = folder / _LOGS / f"{name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.removeprefix("innermax: ") for line in reversed(lines) if line.strip()), "")


class _Process:
    """A process of this machine."""

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
    """Processes of this machine, which share its cores."""
    # Each would use all of them, and wait for the others.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))} if workers > 1 else {}

    def start(plan: Plan) -> Running:
        with (folder / _LOGS / f"{plan.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, *_command(folder, plan)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=threads | os.environ,
                start_new_session=True,  # a Ctrl-C comes from this process, once
            )
        return _Process(process)

    return start


class Call:
    """An `innermax` command in a process of its own, as a job; what SLURM stops for its time goes on from its state."""

    def __call__(self, words: Sequence[str], log: Path) -> int:
        """Its exit status; the log takes what it says."""
        with log.open("ab") as output:
            command = [sys.executable, "-m", "innermax.cli", *words]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            return process.wait()
        except BaseException:
            _Process(process).interrupt()
            raise

    def checkpoint(self, words: Sequence[str], log: Path) -> Any:
        """What submitit hands in again where the job's time is over."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, words, log)


class _Job:
    """A job of a cluster."""

    def __init__(self, job: Any) -> None:
        self._job = job

    def status(self) -> int | None:
        if not self._job.done():
            return None
        failure = self._job.exception()
        return int(self._job.result()) if failure is None else 1

    def interrupt(self) -> None:
        """It goes on: the cluster's jobs do not end with the process that handed them in."""


def _submitit(folder: Path, parameters: Mapping[str, Any]) -> Start:
    """Jobs that submitit hands to SLURM, or to whatever its `cluster` says."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError("the engine submitit needs an extra: pip install 'innermax[slurm]'") from error
    asked = {"name": "innermax"} | dict(parameters)
    cluster = asked.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder / "jobs", cluster=cluster)
        executor.update_parameters(**asked)
    except (RuntimeError, NameError, AssertionError) as error:
        raise ValueError(f"submitit: {error}") from error
    known = _read(folder / _JOBS)

    def start(plan: Plan) -> Running:
        if cluster == "slurm" and plan.name in known:
            before: Any = submitit.SlurmJob(executor.folder, known[plan.name])
            if not before.done(force_check=True):  # an earlier sweep's, still in the queue or running
                return _Job(before)
        job = executor.submit(Call(), _command(folder, plan), (folder / _LOGS / f"{plan.name}.log").absolute())
        known[plan.name] = job.job_id
        write_json(folder / _JOBS, known)
        return _Job(job)

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
        raise ValueError(f"{path} is not what a sweep writes")
    return found
