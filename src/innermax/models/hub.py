"""The Hugging Face Hub where it may not be reachable: its client would try again for half a minute."""

from collections.abc import Iterator
from contextlib import contextmanager

from innermax.utils.optional import extra
from innermax.utils.validation import summarize_error

_PATIENCE = 5  # seconds


@contextmanager
def reach_hub() -> Iterator[str | None]:
    """Context manager: None, or why the Hub cannot be reached; then its client looks into nothing but its cache."""
    fault = find_fault()
    if fault is None:
        yield None
        return
    with extra("data"):
        from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield fault
    finally:
        constants.HF_HUB_OFFLINE = before


def find_fault() -> str | None:
    """Why the Hub cannot be reached, found within seconds; None: it can be."""
    with extra("data"):
        from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as error:  # noqa: BLE001  its HTTP client's, or the system's
        return summarize_error(error)
    return None
