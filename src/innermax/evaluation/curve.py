"""Robust accuracy against the size of the perturbations, from one run of an attack that looks for the smallest."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from innermax.evaluation.store import AttackRows, Column, MinimalRows
from innermax.utils.intervals import Accuracy, accuracy

_POINTS = 101  # sizes, unless they are given
_TAIL = 0.98  # share of the distances that these sizes cover
_THREAT = re.compile(r"threat=(\w+)\(eps=([0-9.e+-]+), bounds=(\([^()]*\)|None|)")


@dataclass(frozen=True)
class Curve:
    """Robust accuracy by size of the perturbations.

    Attributes:
        attack: the attack that looked for the smallest perturbations, by name.
        norm: the class of its threat model, such as "Linf".
        own_eps: the ε of its threat model.
        eps: sizes, ascending.
        accuracy: at each of them the share of examples for which no attack found a perturbation of this size or less.
    """

    attack: str
    norm: str
    own_eps: float
    eps: tuple[float, ...]
    accuracy: tuple[Accuracy, ...]


@dataclass(frozen=True)
class _Described:
    """What an attack's description says of its threat model; bounds: empty where they are more than two numbers."""

    norm: str
    eps: float
    bounds: str


def list_minimal(rows: Mapping[str, AttackRows]) -> list[str]:
    """The attacks that looked for the smallest perturbation."""
    return [name for name, found in rows.items() if isinstance(found, MinimalRows)]


def find_distances(
    name: str, attacks: Mapping[str, str], rows: Mapping[str, AttackRows], clean_correct: Column
) -> Column:
    """(N,) size of the smallest perturbation that any attack found, in the threat model of one that looked for it.

    It is 0 where the clean image is misclassified, and infinite where nothing was found. An example that fell to an
    attack of the same norm and bounds has one of at most that attack's ε.

    Args:
        name: the attack that looked for it.
        attacks: what settings say of each attack.
        rows: of each attack.
        clean_correct: (N,) bool, whether the model is right on the clean image.
    """
    own = _read_threat(attacks[name])
    distance = cast(MinimalRows, rows[name]).distance.astype(float)
    for other, its in rows.items():
        threat = _read_threat(attacks[other])
        alike = own is not None and threat is not None and replace(own, eps=threat.eps) == threat
        if threat is not None and (other == name or (alike and threat.bounds != "")):
            distance = np.where(its.correct, distance, np.minimum(distance, threat.eps))
    smallest: Column = np.where(clean_correct, distance, 0.0)
    return smallest


def draw_curve(name: str, description: str, distance: Column, eps: Sequence[float] | None) -> Curve:
    """The curve of the smallest perturbations' sizes.

    description: what settings say of the attack. eps: sizes; None: 101 from 0 on that cover nearly all distances.

    Raises ValueError where a size is negative or no number.
    """
    threat = _read_threat(description) or _Described("", 0.0, "")
    if eps is None:
        known = distance[np.isfinite(distance)]
        eps = np.linspace(0, max([threat.eps, *np.quantile(known, [_TAIL] if len(known) else [])]), _POINTS).tolist()
    sizes = tuple(sorted(float(size) for size in eps))
    if not all(0 <= size < np.inf for size in sizes):
        raise ValueError(f"eps must hold finite numbers of at least 0, got {list(eps)}")
    left = tuple(accuracy(int((distance > size).sum()), len(distance)) for size in sizes)
    return Curve(name, threat.norm, threat.eps, sizes, left)


def _read_threat(description: str) -> _Described | None:
    """The threat model in an attack's description; None where its ε is more than a number."""
    match = _THREAT.search(description)
    return None if match is None else _Described(match[1], float(match[2]), match[3])
