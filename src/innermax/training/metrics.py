"""What an epoch measures."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

_EXPLOSION = 10  # a FOSC that grows by this factor is warned of
SAMPLE = 1000  # examples on which an automatic c_max is measured


def warn_of_fosc(row: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
    """Warns of a FOSC that explodes: far above what it was and above the loss, which it would raise by as much."""
    before = [past["fosc"] for past in history if past.get("fosc")]
    if before and row.get("fosc") is not None and row["fosc"] > _EXPLOSION * max(*before, abs(row["loss"])):
        warnings.warn(
            f"FOSC is {row['fosc']:.3g} on average in epoch {row['epoch'] + 1}, more than {_EXPLOSION} times the loss "
            f"and what it was in any epoch before ({max(before):.3g} at most); lower lr",
            stacklevel=3,
        )
