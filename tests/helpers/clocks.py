"""Clocks for tests, and how far an estimate of the time left is from the truth."""


def worst(told):
    """The largest factor between estimate and truth, when between 10 and 95 per cent of the time have passed."""
    return max(max(ratio, 1 / ratio) for share, ratio in told if 0.1 <= share <= 0.95)


class Time:
    """A clock that only moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now
