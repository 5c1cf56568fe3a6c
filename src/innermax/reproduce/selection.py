"""Which of the missing experiments to run, and in what order."""

from collections.abc import Sequence

from innermax.reproduce.cache import Experiment
from innermax.reproduce.scales import Training
from innermax.strategies import STRATEGIES
from innermax.utils.validation import unknown


def select_experiments(
    experiments: Sequence[Experiment], data: str | None = None, strategies: Sequence[str] | None = None
) -> list[Experiment]:
    """The experiments on a network that was trained on a data set with one of several strategies; None: with any.

    Strategies are names in STRATEGIES; what was trained with the first of them comes first.

    Raises:
        ValueError: a strategy is unknown, or none of the experiments is on that data set.
    """
    for name in strategies or ():
        if name not in STRATEGIES:
            raise unknown("strategy", name, STRATEGIES)
    trained = [(one, training) for one in experiments if (training := _training(one)) is not None]
    sets = sorted({training.setting.data for _, training in trained})
    if data is not None and data not in sets:
        raise unknown("data", data, sets)
    if data is None and strategies is None:
        return list(experiments)
    chosen = [(one, training) for one, training in trained if data in (None, training.setting.data)]
    kinds = [None] if strategies is None else [STRATEGIES[name] for name in strategies]
    return [one for kind in kinds for one, training in chosen if kind in (None, type(training.strategy))]


def _training(experiment: Experiment) -> Training | None:
    return getattr(experiment, "training", None)
