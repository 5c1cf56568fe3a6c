"""Whether a network draws random numbers on the processor, which no trace, recording or thread may do for it."""

import random
from collections.abc import Callable, Collection

from torch import Tensor

from innermax.utils.generators import private_randomness, read_randomness

_SEEDS = 8
_CLOSE = 1e-4  # of the largest logit


def draws(answer: Callable[[], Tensor], devices: Collection[int] = ()) -> bool:
    """Whether what a function answers takes random numbers from the global generators of the processor.

    devices: the GPUs whose generators it may use; they are restored, too.
    """
    with private_randomness(0, devices):
        before = read_randomness()
        answer()
        after = read_randomness()
    if before.torch != after.torch or before.numpy != after.numpy:
        return True
    return before.python != after.python and depends_on_python(answer, devices)


def depends_on_python(answer: Callable[[], Tensor], devices: Collection[int] = ()) -> bool:
    """Whether an answer differs with the seed of Python's generator.

    That the generator has moved says little: runtime type checkers take from it which item of a list they look at.
    """
    answers = []
    for seed in range(_SEEDS):
        with private_randomness(0, devices):
            random.seed(seed)
            answers.append(answer())
    first, *others = answers
    return any(float((first - other).abs().max()) > _CLOSE * (1 + float(first.abs().max())) for other in others)
