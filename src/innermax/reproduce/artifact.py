"""A table, figure or theorem of the paper: its experiments, the numbers made of their results, and how it is shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from innermax.reproduce.cache import Experiment, Result
from innermax.reproduce.scales import Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Find = Callable[[Experiment], Result | None]  # the stored result of an experiment, None where it was not run
Numbers = Mapping[str, Any]  # JSON


@dataclass(frozen=True)
class Artifact:
    """A table, figure or theorem.

    Args:
        name: as on the command line.
        title: one line.
        experiments: all that it needs at a scale.
        numbers: what is computed from the results, as JSON; None where an experiment was not run.
        markdown: the numbers as text and tables.
        draw: draws the numbers on an empty figure.
    """

    name: str
    title: str
    experiments: Callable[[Scale], Sequence[Experiment]]
    numbers: Callable[[Scale, Find], dict[str, Any]]
    markdown: Callable[[Numbers], str]
    draw: "Callable[[Numbers, Figure], None] | None" = None
