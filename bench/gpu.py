"""What a GPU session is for, in one command: is it right, how fast is it, and the paper's tables for CIFAR-10.

    python bench/gpu.py --minutes 10 --out FOLDER --data DATA   # DATA: a folder that holds cifar10/*.parquet
    python bench/gpu.py --smoke --out FOLDER                    # every part on a processor, in a minute

In this order, each within its share of the minutes: a self-check (bench/gpu_checks.py), throughput and the share of the
bf16 peak (bench/gpu_speed.py), and `innermax reproduce table1 table2 --scale full --data cifar10`. What one does not
need is left to the next. Each is a process of its own, so that one that fails takes nothing along. All of it is written
into the folder as it goes, and page.md anew each time: it can be read at any moment, whatever has been cut off. The
same command on the same folder goes on with the tables.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_checks import check
from gpu_speed import measure
from timing import machine

from innermax.data.load import load_data
from innermax.reproduce.run import reproduce
from innermax.utils.files import write_json, write_text
from innermax.utils.validation import summarize_error

SHARES = {"checks": 0.2, "speed": 0.35, "tables": 1.0}  # of the minutes that are left when it begins
_GRACE = 30.0  # seconds beyond its time after which a part is ended
_EVERY = 15.0  # seconds after which the page shows how far the trainings are
_TABLES = ("table1", "table2")
_IMAGES = {"train": 50_000, "test": 10_000}


def main() -> None:
    told = _arguments()
    if told.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU; --smoke runs every part on a processor")
    told.out.mkdir(parents=True, exist_ok=True)
    if told.part is None:
        _run_parts(told)
    else:
        _run_part(told)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of all parts together")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/train*.parquet and test*.parquet")
    parser.add_argument("--device", help="cuda, unless --smoke")
    parser.add_argument("--smoke", action="store_true", help="small networks and few images, on a processor")
    parser.add_argument("--part", choices=SHARES, help=argparse.SUPPRESS)  # what this process does
    told = parser.parse_args()
    told.device = told.device or ("cpu" if told.smoke else "cuda")
    return told


def _run_parts(told: argparse.Namespace) -> None:
    """One process after the other; the page after each."""
    deadline = time.monotonic() + 60 * told.minutes
    command = ["--out", told.out, "--device", told.device, *(["--smoke"] if told.smoke else [])]
    for part, share in SHARES.items():
        seconds = max(share * (deadline - time.monotonic()), 1.0)
        words = [sys.executable, __file__, "--part", part, "--minutes", seconds / 60, *command]
        words += [] if told.data is None else ["--data", told.data]
        try:
            code = subprocess.run(list(map(str, words)), timeout=seconds + _GRACE).returncode
            ended = "" if code == 0 else f"ended with exit status {code}"
        except subprocess.TimeoutExpired:
            ended = "was ended by the clock"
        _note(told.out, part, ended=ended)
    print((told.out / "page.md").read_text(encoding="utf-8"))


def _run_part(told: argparse.Namespace) -> None:
    """Writes what a part finds as soon as it does."""
    deadline = time.monotonic() + 60 * told.minutes
    about = {"machine": machine(), "torch": str(torch.__version__), "date": time.strftime("%Y-%m-%d")}
    found: dict[str, Any] = {}

    def note(title: str, value: Any) -> None:
        found[title] = value
        print(f"{title}: {value}", flush=True)
        _note(told.out, told.part, about=about, found=found, ended="")

    if told.part == "checks":
        check(note, deadline, told.device, told.smoke, told.out / "checks")
    elif told.part == "speed":
        measure(note, deadline, told.device, told.smoke)
    else:
        _reproduce(note, deadline, told)


def _reproduce(note: Callable[[str, Any], None], deadline: float, told: argparse.Namespace) -> None:
    """The tables' experiments, as far as the time goes."""
    if told.data is not None:
        os.environ["INNERMAX_DATA"] = str(told.data)
    if not told.smoke and (lacking := _lack(told.data)):
        note("data", lacking)
        return
    scale, data = ("smoke", None) if told.smoke else ("full", "cifar10")
    began = time.monotonic()
    with _repeat(lambda: write_page(told.out)):
        reproduce(
            _TABLES,
            scale=scale,
            data=data,
            out=told.out / "paper",
            cache=told.out / "runs",
            minutes=max(deadline - time.monotonic(), 0.0) / 60,
            device=told.device,
            say=lambda line: note("now", f"{line} ({time.monotonic() - began:,.0f} s)"),
        )


def _lack(folder: Path | None) -> str:
    """What a data folder lacks of CIFAR-10, such as shards that were not copied yet; "" where it is whole."""
    if folder is None:
        return "--data was not given"
    try:
        data = load_data("cifar10", validation=0)
    except ValueError as error:
        return summarize_error(error)
    for split, count in _IMAGES.items():
        if len(getattr(data, split)) != count:
            return f"{split} has {len(getattr(data, split)):,} of {count:,} images: copy the other shards"
    return ""


@contextmanager
def _repeat(work: Callable[[], object]) -> Iterator[None]:
    """Context manager: the work is done every few seconds, beside what goes on in it, and once more at its end."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(_EVERY):
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        work()


def _note(out: Path, part: str, **news: Any) -> None:
    """Adds to what is known of a part, and writes the page."""
    path = out / f"{part}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, known | news)
    write_page(out)


def write_page(out: Path) -> None:
    """page.md, of all that the folder holds."""
    known = {part: _read(out / f"{part}.json") for part in SHARES}
    about = next((told["about"] for told in known.values() if "about" in told), None)
    lines = ["# GPU", "", "`python bench/gpu.py`" + _origin(about)]
    for part, write in (("checks", _checks), ("speed", _speed), ("tables", _tables)):
        told = known[part]
        lines += ["", f"## {part.capitalize()}", ""]
        lines += write(told.get("found", {}), out) if told else ["Not run."]
        if told.get("ended"):
            lines += ["", f"**This part {told['ended']}.**"]
    write_text(out / "page.md", "\n".join(lines) + "\n")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}  # type: ignore[no-any-return]


def _origin(about: dict[str, Any] | None) -> str:
    return "." if about is None else f" on {about['machine']}, torch {about['torch']}, {about['date']}."


def _checks(found: dict[str, Any], out: Path) -> list[str]:
    rows = [f"| {name} | {verdict} | {told} |" for name, (verdict, told) in found.items()]
    return ["| check | verdict | measured |", "| --- | --- | --- |", *rows]


def _speed(found: dict[str, Any], out: Path) -> list[str]:
    """One row a case; parts as shares of the step."""
    lines = [
        "PGD-10 adversarial training. Shares of a step: the attack's gradients, its steps between them, the update, "
        f"and the rest (data, augmentation, waiting). bf16 matrix peak, measured: {found.get('peak', 'not yet')}.",
        "",
        "| network | images/s | TFLOP/s | of the peak | gradients | steps | update | rest | memory | plan |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for title, case in found.items():
        if title == "peak":
            continue
        if isinstance(case, str):
            lines.append(f"| {title} | {case} | | | | | | | | |")
            continue
        shares = (case["gradients"], case["attack"] - case["gradients"], case["update"])
        rest = case["step"] - case["attack"] - case["update"]
        cells = " | ".join(f"{max(share / case['step'], 0):.0%}" for share in (*shares, rest))
        speed = f"{case['images/s']:,.0f} | {case['FLOP/s'] / 1e12:,.1f} | {case['of peak']:.0%}"
        lines.append(f"| {title} | {speed} | {cells} | {case['memory']} | {case['plan']} |")
    return lines


def _tables(found: dict[str, Any], out: Path) -> list[str]:
    """The tables' pages as far as they are written, then how far the trainings are."""
    lines = [f"- {title}: {line}" for title, line in found.items()]
    histories = sorted((out / "runs").glob("training-*/metrics.jsonl"))
    for path in histories:
        rows = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
        if rows:
            last = rows[-1]
            robust = last.get("validation_robust")
            told = "" if robust is None else f", validation {100 * robust:.1f} % under attack"
            lines.append(f"- {path.parent.name}: {len(rows)} epochs, {last['images_per_second']:,.0f} images/s{told}")
    for path in sorted((out / "paper").glob("*/table*.md")):
        lines += ["", path.read_text(encoding="utf-8").replace("# ", "### ", 1).replace("\n## ", "\n#### ")]
    return lines


if __name__ == "__main__":
    main()
