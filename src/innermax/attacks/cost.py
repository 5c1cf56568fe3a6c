"""The unit in which an attack tells its cost: the gradient of one example."""

import math

FORWARD = 0.45  # gradients' worth of time that a forward pass takes
SURVIVING = 0.5  # share of the examples that survivors are taken to be
UNKNOWN = 20.0  # gradients per example, of an attack that does not say


def search_cost(attack: object) -> float:
    """About how many gradients per example an attack takes: its own `cost`, or 20 where that is no number ≥ 0."""
    cost = getattr(attack, "cost", None)
    known = isinstance(cost, int | float) and math.isfinite(cost) and cost >= 0
    return float(cost) if known else UNKNOWN  # type: ignore[arg-type]
