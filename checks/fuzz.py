"""Damaged and rewritten files of every kind that innermax reads: how many load, and which error refuses the others.

    python checks/fuzz.py [--examples 800] [--kind "run's config"] [--keep FOLDER] [--write results/bad_files.json]

Each kind is tried in a process of its own with a limit on its memory, so that a crash of native code and a hang are
counted like any other failure. Anything but a load or a refusal is a failure; --keep keeps the files that cause one.
"""

import argparse
import contextlib
import hashlib
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOM = 4 * 2**30  # bytes of address space that loading may take
PATIENCE = 60  # seconds for one file


def work(kind_name: str, count: int, number: int, log: Path, current: Path) -> None:
    """Tries so many distinct files of a kind; a line an outcome, and the file under way kept as `current`."""
    import hypothesis
    from hypothesis import HealthCheck, Phase, given, settings

    from tests.helpers import hostile

    with tempfile.TemporaryDirectory(prefix="innermax-") as place:
        kind = hostile.kinds(Path(place) / "made")[kind_name]
        hostile.tried(kind, kind.content, Path(place) / "tried")  # what is imported late is imported now
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
        known = {hashlib.sha256(kind.content).digest()}

        @hypothesis.seed(number)
        @settings(
            max_examples=2 * count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(hostile.damaged(kind))
        def attempt(content: bytes) -> None:
            digest = hashlib.sha256(content).digest()
            if digest in known or len(known) > count:
                return
            known.add(digest)
            current.write_bytes(content)
            try:
                outcome = hostile.tried(kind, content, Path(place) / "tried")
            except AssertionError as error:
                outcome = f"FAILURE {error}"
                log.with_name(f"{digest.hex()[:12]}.bad").write_bytes(content)
                if "--trace" in sys.argv:
                    import traceback

                    traceback.print_exc()
            current.unlink()
            with log.open("a") as lines:
                lines.write(" ".join(outcome.split())[:300] + "\n")

        attempt()


def tried(kind: str, count: int, folder: Path) -> Counter[str]:
    """The outcomes of so many files of a kind."""
    log, current = folder / "log", folder / "current"
    log.write_text("")
    crashes: Counter[str] = Counter()
    started = 0
    while (done := len(log.read_text().splitlines())) + crashes.total() < count and started < 30:
        started += 1
        left = count - done - crashes.total()
        arguments = ["--worker", kind, str(left), str(started), str(log), str(current)]
        child = subprocess.Popen(
            [sys.executable, __file__, *arguments, *(["--trace"] if "--trace" in sys.argv else [])]
        )
        while child.poll() is None:
            time.sleep(0.2)
            with contextlib.suppress(FileNotFoundError):
                if time.time() - current.stat().st_mtime > PATIENCE:
                    child.kill()
                    child.wait()
                    crashes["FAILURE hang"] += 1
                    current.rename(folder / f"hang-{started}.bad")
        if child.returncode < 0 and current.exists():  # what hung has been taken away
            crashes[f"FAILURE signal {-child.returncode}"] += 1
            current.rename(folder / f"signal-{started}.bad")
        elif child.returncode > 0:
            raise SystemExit(f"the worker for {kind} failed")
    return Counter(log.read_text().splitlines()) + crashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=800, help="of each kind")
    parser.add_argument("--kind", action="append", help="only these")
    parser.add_argument("--keep", type=Path, help="folder for the files that cause a failure")
    parser.add_argument("--write", type=Path, help="file for the counts")
    parser.add_argument("--trace", action="store_true", help="print where a failure comes from")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        kind, count, number, log, current = chosen.worker
        work(kind, int(count), int(number), Path(log), Path(current))
        return
    from tests.helpers import hostile

    with tempfile.TemporaryDirectory(prefix="innermax-") as place:
        names = chosen.kind or list(hostile.kinds(Path(place) / "made"))
    counts: dict[str, Any] = {}
    began = time.monotonic()
    for name in names:
        with tempfile.TemporaryDirectory(prefix="innermax-") as place:
            counts[name] = dict(tried(name, chosen.examples, Path(place)).most_common())
            for file in Path(place).glob("*.bad"):
                if chosen.keep is not None:
                    chosen.keep.mkdir(parents=True, exist_ok=True)
                    (chosen.keep / f"{name.replace(' ', '-')}-{file.name}").write_bytes(file.read_bytes())
        print(f"{name}: {counts[name]}", flush=True)
    failures = sum(n for found in counts.values() for what, n in found.items() if what.startswith("FAILURE"))
    total = sum(sum(found.values()) for found in counts.values())
    print(f"{total} files, {failures} failures, {time.monotonic() - began:.0f} s")
    if chosen.write is not None:
        made = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": platform.machine(),
            "seconds": round(time.monotonic() - began),
        }
        chosen.write.write_text(
            json.dumps(made | {"files": total, "failures": failures, "counts": counts}, indent=1) + "\n"
        )
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
