"""A piece of the paper: what it asks, what it makes of the answers, and how both are shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from innermax.reproduce.cache import Answer, Question
from innermax.reproduce.scales import Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Known = Callable[[Question], Answer | None]  # the answer to a question, None where it was not measured
Numbers = Mapping[str, Any]  # JSON


@dataclass(frozen=True)
class Piece:
    """A table or a figure.

    Args:
        name: as on the command line.
        title: a line.
        questions: all that is to be measured at a scale.
        numbers: what the answers come to, as JSON; what is not known yet is None there.
        markdown: the numbers as a reader sees them.
        draw: the numbers on an empty figure.
    """

    name: str
    title: str
    questions: Callable[[Scale], Sequence[Question]]
    numbers: Callable[[Scale, Known], dict[str, Any]]
    markdown: Callable[[Numbers], str]
    draw: "Callable[[Numbers, Figure], None] | None" = None
