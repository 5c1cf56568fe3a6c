"""Makes pieces: measures what is missing, as time allows, and writes the pages."""

import _thread
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from innermax.reproduce import ablations, best, efficiency, figures, tables, theorem
from innermax.reproduce.answers import Answers
from innermax.reproduce.artifact import Piece
from innermax.reproduce.cache import Answer, Busy, Question, Workshop, fingerprint
from innermax.reproduce.scales import Scale, find_scale
from innermax.utils.files import write_bytes, write_json
from innermax.utils.validation import summarize_error, unknown

_ALL = (*tables.PIECES, *figures.PIECES, *theorem.PIECES, *ablations.PIECES, *efficiency.PIECES, *best.PIECES)
PIECES: dict[str, Piece] = {piece.name: piece for piece in _ALL}


def reproduce(
    names: Sequence[str],
    *,
    scale: str = "cpu",
    out: str | Path = "results/paper",
    cache: str | Path = "runs/paper",
    minutes: float | None = None,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Regenerates tables and figures of Wang et al. 2019; the pages, written into out/scale.

    Every answer is kept, so that nothing is trained or measured twice, for whatever piece; the same call goes on where
    another stopped, and several at the same time share the work.

    Args:
        names: of PIECES.
        scale: "smoke", "cpu" or "full", the paper's.
        out: folder of the pages and, packed, of their answers: out/scale/answers.json.xz, which is read first; at
            scale "full" also of the networks, in out/models. Answers in an out/answers of version 0.1 are read, too.
        cache: folder of the trained models, and of each new answer as a file in cache/answers.
        minutes: begin nothing new after so many and interrupt what is running; None: until all is done. 0 shows what
            is known.
        device: as for `train`.
        say: takes lines of progress.

    Raises:
        ValueError: an unknown piece or scale, minutes < 0, or no Matplotlib (pip install 'innermax[report]').
    """
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes must be ≥ 0 or None, got {minutes}")
    for name in names:
        if name not in PIECES:
            raise unknown("piece", name, PIECES)
    chosen, pieces = find_scale(scale), [PIECES[name] for name in names]
    if any(piece.draw is not None for piece in pieces):
        _require_matplotlib()
    shelf = Path(out) / "models" if scale == "full" else None
    pack, loose = Path(out) / chosen.name / "answers.json.xz", (Path(cache) / "answers", Path(out) / "answers")
    workshop = Workshop(Answers(pack, loose), Path(cache), device, say, shelf)
    asked = list(dict.fromkeys(question for piece in pieces for question in piece.questions(chosen)))
    with _until(minutes) as time_left:
        if not _answer(asked, workshop, time_left):
            say("The time is up: the same command goes on from here.")
    workshop.answers.pack_up(map(fingerprint, asked))
    return [_written(piece, chosen, workshop, Path(out)) for piece in pieces]


def _require_matplotlib() -> None:
    """Raises ValueError before hours are spent on numbers whose picture cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"pictures need pip install 'innermax[report]': {summarize_error(error)}") from error


def _answer(asked: Sequence[Question], workshop: Workshop, time_left: Callable[[], bool]) -> bool:
    """Answers what no other process is at, and what it is at once it is done; whether all was answered in time."""
    waiting = [question for question in asked if workshop.known(question) is None]
    try:
        while waiting and time_left():
            busy = []
            for question in waiting:
                try:
                    workshop.answered(question)
                except Busy:
                    busy.append(question)
            if len(busy) == len(waiting):
                threading.Event().wait(1.0)
            waiting = busy
    except KeyboardInterrupt:
        if time_left():  # a person's, not the clock's
            raise
        return False
    return not waiting


@contextmanager
def _until(minutes: float | None) -> Iterator[Callable[[], bool]]:
    """Inside, a Ctrl-C comes when the minutes are over, and the yielded question answers False."""
    over = threading.Event()

    def stop() -> None:
        over.set()
        _thread.interrupt_main()

    if minutes == 0:
        over.set()
    before = signal.getsignal(signal.SIGINT)
    if minutes and before == signal.SIG_IGN:  # as a script's background job has it
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


def _written(piece: Piece, scale: Scale, workshop: Workshop, out: Path) -> Path:
    """Writes a piece's page, its numbers and its picture; the page's path."""
    folder = out / scale.name
    folder.mkdir(parents=True, exist_ok=True)
    asked = list(dict.fromkeys(piece.questions(scale)))
    answers = [workshop.known(question) for question in asked]
    found = [answer for answer in answers if answer is not None]
    numbers = piece.numbers(scale, workshop.known)
    command = f"innermax reproduce {piece.name} --scale {scale.name}"
    missing = len(answers) - len(found)
    document: dict[str, Any] = {
        "piece": piece.name,
        "scale": scale.name,
        "command": command,
        "missing": missing,
        "made_on": _made_on(found),
        "numbers": numbers,
    }
    write_json(folder / f"{piece.name}.json", document)
    lines = [f"# {piece.title}", _provenance(command, document["made_on"], missing, len(answers))]
    if any(hasattr(question, "training") for question in asked):
        lines.insert(1, scale.note)
    if piece.draw is not None and found:
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained", dpi=150)
        piece.draw(numbers, figure)
        figure.savefig(folder / f"{piece.name}.png")
        lines.append(f"![{piece.title}]({piece.name}.png)")
    lines.append(piece.markdown(numbers))
    page = folder / f"{piece.name}.md"
    write_bytes(page, ("\n\n".join(lines) + "\n").encode())
    return page


def _made_on(found: Sequence[Answer]) -> dict[str, Any]:
    """The machines, versions, commits and days of the answers, and how long they took in all."""
    environments = [answer["environment"] for answer in found]
    machines = {f"{e['device']}, {e['threads']} threads, torch {e['versions']['torch']}" for e in environments}
    days = sorted(e["date"][:10] for e in environments)
    commits = {(e["commit"] or "unknown")[:10] for e in environments}
    return {
        "machines": sorted(machines),
        "commits": sorted(commits),
        "days": [days[0], days[-1]] if days else [],
        "hours": round(sum(answer["seconds"] for answer in found) / 3600, 2),
    }


def _provenance(command: str, made_on: dict[str, Any], missing: int, whole: int) -> str:
    """The sentence under a page's title."""
    if missing == whole:
        return f"`{command}`: **not run.**"
    days = " to ".join(dict.fromkeys(made_on["days"]))
    text = f"`{command}` on {'; '.join(made_on['machines'])} ({days}; {made_on['hours']} h in all)."
    if missing:
        text += f" **{missing} of {whole} measurements were not run**; the command fills them."
    return text
