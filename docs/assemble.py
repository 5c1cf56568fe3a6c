"""Assembles what the site is built from: docs/ at its root, results/ and notebooks beside it, with links to match.

    python docs/assemble.py FOLDER

Links between pages are written for whoever reads the repository; the site's places differ by the folder docs/. A link
to a file that is no part of the site becomes its text; one to a file that does not exist stays, for the strict build to
find. A picture is a link to itself, which shows it in full size; blocks with columns say so, and are not wrapped.
"""

import posixpath
import re
import shutil
import sys
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[([^\[\]]*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
PICTURE = re.compile(r"!\[[^\[\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```([^\n]*)\n(.*?^```)$", re.DOTALL | re.MULTILINE)
COLUMNS = re.compile(r"\S {3,}\S")
FOLDERS = ("docs", "results", "examples")
SHOWN = {".md", ".css", ".png", ".svg", ".ipynb"}


def site_place(path: PurePosixPath) -> PurePosixPath | None:
    """Where the site has a file of the repository, if it has it."""
    if path.suffix not in SHOWN or path.parts[0] not in FOLDERS:
        return None
    return path.relative_to("docs") if path.parts[0] == "docs" else path


def linked(text: str, page: PurePosixPath, place: PurePosixPath) -> str:
    """A page's text with its relative links as the site wants them; page, place: its path in repository and site."""

    def moved(match: re.Match[str]) -> str:
        words, target, anchor = match[1], (ROOT / page.parent / match[2]).resolve(), match[3] or ""
        if not target.exists() or not target.is_relative_to(ROOT):
            return match[0]
        there = site_place(PurePosixPath(target.relative_to(ROOT)))
        return words if there is None else f"[{words}]({posixpath.relpath(there, place.parent)}{anchor})"

    return LINK.sub(moved, text)


def shown(text: str) -> str:
    """A page's text with its pictures as links to themselves, and blocks of aligned text of the class columns."""

    def aligned(match: re.Match[str]) -> str:
        told = match[1] in ("", "text") and COLUMNS.search(match[2])
        return f"```{{ .text .columns }}\n{match[2]}" if told else match[0]

    return BLOCK.sub(aligned, PICTURE.sub(r"[\g<0>](\1)", text))


def assemble(target: Path) -> None:
    """Writes the folder anew."""
    shutil.rmtree(target, ignore_errors=True)
    for path in [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]:
        page = PurePosixPath(path.relative_to(ROOT))
        place = site_place(page)
        if place is None:
            continue
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            (target / place).write_text(shown(linked(path.read_text(), page, place)))
        else:
            shutil.copyfile(path, target / place)


if __name__ == "__main__":
    assemble(Path(sys.argv[1]))
