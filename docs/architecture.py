"""The picture of docs/architecture.md: the floors of the code, and the ways of a batch and of a model through them.

python docs/architecture.py
"""

from html import escape
from pathlib import Path
from typing import NamedTuple

WIDTH, LEFT, FLOOR, GAP = 1000, 44, 62, 8
DARK, MIDDLE = "#1f2430", "#7d8590"  # of writing in boxes; of what stands on the page, light or dark
FILLS = {"ways in": "#d9d4ee", "training": "#c3daf3", "evaluation": "#f8d9b0", "shared": "#c6e5cf", "plain": "#dfe3e8"}
BATCH, MODEL = "#1f5fae", "#b3590a"


class Box(NamedTuple):
    """A folder or file of src/innermax, what it holds, its share of the floor, its fill and the steps in it."""

    name: str
    holds: str
    share: int
    fill: str
    batch: str = ""
    model: str = ""


FLOORS = (
    (Box("cli/", "one file per command", 1, "ways in"),),
    (Box("reproduce/", "the paper's tables, figures and theorem, as declarations", 1, "ways in"),),
    (Box("__init__.py", "the public names: im.train, im.evaluate, im.PGD, …", 1, "ways in"),),
    (Box("reporting/", "the report page, tables, the Hub's card", 1, "ways in", model="F"),),
    (
        Box("training/", "Algorithm 1: epochs, updates, checkpoints", 3, "training", batch="6"),
        Box("lightning.py", "for Lightning's Trainer", 2, "training"),
    ),
    (
        Box("strategies.py", "which attack", 6, "training", batch="2"),
        Box("objectives.py", "what to minimise", 6, "training", batch="5"),
        Box("evaluation/", "scores, rows of examples, audit, transfer", 12, "evaluation", model="CE"),
    ),
    (Box("attacks/", "searches over a threat model, which know how converged they are", 1, "shared", "3", "D"),),
    (Box("oracle/", "the network as attackers see it: BatchNorm folded, bf16, CUDA graphs", 1, "shared", "4", "B"),),
    (
        Box("data/", "images", 5, "plain", batch="1"),
        Box("threat.py", "the set X(x)", 5, "plain"),
        Box("losses.py", "for attacks", 5, "plain"),
        Box("models/", "networks", 6, "plain", model="A"),
        Box("distributed/", "processes", 6, "plain"),
    ),
    (Box("utils/", "files, validation, randomness, intervals, serialization", 1, "plain"),),
)


def box(here: Box, x: float, y: float, width: float) -> str:
    """A box with its name, what it holds below or beside, and its badges on the right."""
    narrow = here.share > 3
    beside = x + 14 if narrow else x + 24 + 10.9 * len(here.name)
    drawn = [
        f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{FLOOR}" rx="9" fill="{FILLS[here.fill]}"/>',
        f'<text class="name" x="{x + 14:.0f}" y="{y + (25 if narrow else 38)}">{escape(here.name)}</text>',
        f'<text class="holds" x="{beside:.0f}" y="{y + (48 if narrow else 37.5)}">{escape(here.holds)}</text>',
    ]
    marks = [(mark, BATCH) for mark in here.batch] + [(mark, MODEL) for mark in here.model]
    for number, (mark, colour) in enumerate(reversed(marks)):
        drawn.append(badge(mark, colour, x + width - 20 - 27 * number, y + (FLOOR - 19 if narrow else FLOOR / 2)))
    return "\n".join(drawn)


def badge(mark: str, colour: str, x: float, y: float) -> str:
    """A step of a way, in a circle."""
    circle = f'<circle cx="{x:.0f}" cy="{y:.0f}" r="11.5" fill="{colour}"/>'
    return f'{circle}<text class="mark" x="{x:.0f}" y="{y + 5:.0f}">{mark}</text>'


def picture() -> str:
    """The drawing as SVG, on no ground of its own."""
    drawn, y = [], 4
    for floor in FLOORS:
        x, shares = float(LEFT), sum(here.share for here in floor)
        room = WIDTH - LEFT - 4 - GAP * (len(floor) - 1)
        for here in floor:
            width = room * here.share / shares
            drawn.append(box(here, x, y, width))
            x += width + GAP
        y += FLOOR + GAP
    bottom = y - GAP
    drawn += [
        f'<path d="M16 8 V{bottom - 8} m-6 -10 l6 10 l6 -10" fill="none" stroke="{MIDDLE}" stroke-width="2"/>',
        f'<text class="aside" transform="translate(35 {bottom / 2:.0f}) rotate(-90)">imports run downwards</text>',
        badge("1", BATCH, LEFT + 12, bottom + 28),
        f'<text class="legend" x="{LEFT + 32}" y="{bottom + 33}">the way of a batch through a training</text>',
        badge("A", MODEL, LEFT + 420, bottom + 28),
        f'<text class="legend" x="{LEFT + 440}" y="{bottom + 33}">the way of a model through an evaluation</text>',
    ]
    height = bottom + 48
    style = (
        "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Liberation Sans',sans-serif;font-size:17px}"
        ".name{font-family:ui-monospace,Menlo,Consolas,'Liberation Mono',monospace;font-size:18px;font-weight:700}"
        f".name,.holds{{fill:{DARK}}}.mark{{fill:#fff;font-weight:700;font-size:14px;text-anchor:middle}}"
        f".aside,.legend{{fill:{MIDDLE}}}.aside{{text-anchor:middle}}"
    )
    title = "The folders and files of src/innermax, one floor per row; the steps of a batch and of a model through them"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">',
            f"<title>{title}</title>",
            f"<style>{style}</style>",
            *drawn,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("assets").joinpath("architecture.svg").write_text(picture(), encoding="utf-8")
