"""Assembles build/docs, what the site is built from: docs/ at its root, and results/ beside it, with links to match.

Links between pages are written for whoever reads the repository; the site's places differ by the folder docs/.
"""

import re
import shutil
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")
PICTURES = {".png", ".svg"}


def site_place(path: PurePosixPath) -> PurePosixPath:
    """Where the site has a file of the repository. Raises ValueError for one that is no part of the site."""
    if path.parts[0] == "docs":
        return path.relative_to("docs")
    if path.parts[0] == "results":
        return path
    raise ValueError(f"{path} is no part of the site, so no page may link to it")


def linked(text: str, page: PurePosixPath) -> str:
    """A page's text with its relative links as the site wants them; page: its path in the repository."""

    def moved(match: re.Match[str]) -> str:
        target = (ROOT / page.parent / match[2]).resolve().relative_to(ROOT.resolve())
        here, there = site_place(page).parent, site_place(PurePosixPath(target))
        return match[1] + str(relative(there, here))

    return LINK.sub(moved, text)


def relative(there: PurePosixPath, here: PurePosixPath) -> PurePosixPath:
    """The way from a folder to a file, both from the same root."""
    common = 0
    while common < min(len(there.parts), len(here.parts)) and there.parts[common] == here.parts[common]:
        common += 1
    return PurePosixPath(*[".."] * (len(here.parts) - common), *there.parts[common:])


def assemble(target: Path) -> None:
    """Writes the folder anew."""
    shutil.rmtree(target, ignore_errors=True)
    files = [path for folder in ("docs", "results") for path in sorted((ROOT / folder).rglob("*"))]
    for path in files:
        if path.suffix not in {".md", ".css", *PICTURES}:
            continue
        source = PurePosixPath(path.relative_to(ROOT))
        place = target / site_place(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            place.write_text(linked(path.read_text(), source))
        else:
            shutil.copyfile(path, place)


if __name__ == "__main__":
    assemble(ROOT / "build" / "docs")
