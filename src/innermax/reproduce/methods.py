"""Every fast method of adversarial training and every strategy, each with a learning rate of its own."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import innermax as im
from innermax.attacks.autoattack import AutoAttack
from innermax.attacks.base import Attack
from innermax.evaluation.model_checks import trust_normalisation
from innermax.reproduce import plots
from innermax.reproduce.artifact import Artifact, Find, Numbers
from innermax.reproduce.cache import Cache, Experiment, Result, hash_name, load_data
from innermax.reproduce.comparison import (
    build_strongest,
    compare_all,
    format_differences,
    format_interval,
    mean_accuracy,
    sort_by_seed,
)
from innermax.reproduce.experiments import Trained, cost_of, pack_correct
from innermax.reproduce.scales import Scale, Setting, Training, find_scale
from innermax.reproduce.tables import TITLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRONGEST = "autoattack"
_SAMPLE_SEED = 0  # of the test images that are attacked
_EPOCHS, _SEEDS = 10, 3
_RATES = (0.01, 0.03, 0.1)
_TRIAL = 0.4  # of the epochs
_STRATEGIES = {
    "standard": "Standard",
    "warm-start": "WarmStart",
    "fgsm-rs": "FGSM-RS",
    "n-fgsm": "N-FGSM",
    "atta": "ATTA",
    "fgsm-pgi": "FGSM-PGI",
    "free": "Free",
    "fat": "FAT",
    "curriculum": "Curriculum",
    "dynamic": "Dynamic",
}
_UNDER_TRADES = ("standard", "warm-start", "atta", "fgsm-rs", "dynamic")  # on MNIST


@dataclass(frozen=True)
class Tuned:
    """A training with the learning rate whose trial was the most robust on the validation split, then attacked.

    Args:
        training: whose learning rate is replaced.
        rates: that are tried, with seed 0; a single one is taken untried.
        share: of the epochs, that a trial takes.
        attack: on a random sample of the test images, the same for all.
        images: how many.
    """

    training: Training
    rates: tuple[float, ...]
    share: float
    attack: Attack
    images: int

    def run(self, cache: Cache) -> Result:
        """{"lr", "trials": {lr: validation accuracy}, "history"}, and "clean" and "autoattack" as `Scored` has them."""
        trials = {rate: self._try(rate, cache) for rate in self.rates} if len(self.rates) > 1 else {}
        lr = max(trials, key=trials.__getitem__) if trials else self.rates[0]
        training = replace(self.training, setting=replace(self.training.setting, lr=lr))
        history = cache.measure(Trained(training))["history"]
        images = load_data(training.setting).test.sample(self.images, _SAMPLE_SEED)
        rows = cache.models / f"{hash_name(self)}-rows"  # an interrupted evaluation resumes from there
        with trust_normalisation():
            found = im.evaluate(
                cache.network(training), images, {STRONGEST: self.attack}, rows_dir=rows, audit=False, progress=False
            )
        spent = [{name: row[name] for name in ("gradients", "seconds", "validation_robust")} for row in history]
        scores = {name: pack_correct(found.correct(name)) | cost_of(found, name) for name in ("clean", STRONGEST)}
        return {"lr": lr, "trials": {str(rate): value for rate, value in trials.items()}, "history": spent} | scores

    def _try(self, rate: float, cache: Cache) -> float:
        """Accuracy on attacked validation images after a trial; 0 where the training diverged."""
        setting = self.training.setting
        epochs = max(1, round(self.share * setting.epochs))
        trial = replace(self.training, setting=replace(setting, epochs=epochs, lr=rate), seed=0)
        try:
            return float(cache.measure(Trained(trial))["history"][-1]["validation_robust"])
        except FloatingPointError:
            return 0.0


@dataclass(frozen=True)
class MethodRow:
    """One method in the table: a training and its test for each seed."""

    title: str
    tuned: tuple[Tuned, ...]

    def seeds(self, _attack: str) -> Sequence[Experiment]:
        """The experiments, one per seed."""
        return self.tuned

    def numbers(self, find: Find) -> dict[str, Any]:
        """{"title", "seeds": {seed: {"lr", "gradients", "updates", "seconds", "accuracy"}}}, of what was run."""
        seeds = {}
        for tuned in self.tuned:
            result = find(tuned)
            if result is not None:
                history = result["history"]
                seeds[str(tuned.training.seed)] = {
                    "lr": result["lr"],
                    "gradients": sum(row["gradients"] for row in history),
                    "updates": count_updates(tuned.training),
                    "seconds": round(sum(row["seconds"] for row in history), 1),
                    "accuracy": {
                        name: {key: result[name][key] for key in ("accuracy", "low", "high", "total")}
                        for name in ("clean", STRONGEST)
                    },
                }
        return {"title": self.title, "seeds": seeds}


def count_updates(training: Training) -> int:
    """How many updates a training takes."""
    setting = training.setting
    images = setting.train or len(load_data(setting).train)
    replays: int = getattr(training.strategy, "replays", 1)
    return setting.epochs * math.ceil(images / setting.batch_size) * replays


def _settings(scale: Scale) -> dict[str, Setting]:
    """By the data's name; CIFAR-10 with the network and the images of scale "cpu", whose training takes minutes."""
    settings = {"mnist": scale.mnist}
    if scale.name != "smoke":
        settings["cifar"] = find_scale("cpu").cifar
    return {
        data: replace(setting, epochs=min(_EPOCHS, setting.epochs), lr_schedule="cosine")
        for data, setting in settings.items()
    }


def _rows(scale: Scale, data: str) -> list[MethodRow]:
    setting, smoke = _settings(scale)[data], scale.name == "smoke"
    attack = dict(build_strongest(scale, setting.eps))["guided"] if smoke else AutoAttack(setting.threat)
    rates, images = ((setting.lr,), 10) if smoke else (_RATES, 1000 if scale.name == "full" else 200)

    def row(title: str, strategy: str, objective: str) -> MethodRow:
        trainings = (
            Training(setting, setting.strategy(strategy), seed, objective) for seed in range(1 if smoke else _SEEDS)
        )
        return MethodRow(title, tuple(Tuned(training, rates, _TRIAL, attack, images) for training in trainings))

    found = [row(title, strategy, "cross_entropy") for strategy, title in _STRATEGIES.items()]
    found.append(row("FGSM-RS, GradAlign", "fgsm-rs", "grad_align"))
    if data == "mnist":
        found += [row(f"{_STRATEGIES[strategy]}, TRADES", strategy, "trades") for strategy in _UNDER_TRADES]
    return found[::5] if smoke else found  # of every kind one


def _experiments(scale: Scale) -> list[Experiment]:
    return sort_by_seed([row.tuned for data in _settings(scale) for row in _rows(scale, data)])


def _numbers(scale: Scale, find: Find) -> dict[str, Any]:
    found = {}
    for data in _settings(scale):
        rows = _rows(scale, data)
        differences = compare_all(find, rows, rows[0], ("clean", STRONGEST))
        found[data] = {"rows": [row.numbers(find) for row in rows], "differences": differences}
    return found


def _text(numbers: Numbers) -> str:
    rates = ", ".join(map(str, _RATES))
    parts = [
        "Accuracy in %, AutoAttack on a random sample of the test images, the same for all. Each method was tried with "
        f"learning rates of {rates} for {_TRIAL:.0%} of the epochs, seed 0, and took the one with the highest accuracy "
        "on attacked validation images; all rates fall along a cosine. *Gradients*: input gradients per training image "
        "over the whole training, without the updates' own passes, which [the methods' "
        "table](../../../docs/concepts/strategies.md) lists; *seconds*: of the training, whatever else ran.",
    ]
    for data, found in numbers.items():
        parts += [
            f"## {TITLES[data]}",
            _table(found["rows"]),
            *format_differences(found["differences"], "Standard", ("clean", STRONGEST)),
        ]
    return "\n\n".join(parts)


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        "| method | seeds | rate | gradients | updates | seconds | Clean | AutoAttack |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        seeds = list(row["seeds"].values())
        if not seeds:
            lines.append(f"| {row['title']} | not run | | | | | | |")
            continue
        spent = [
            f"{statistics.mean(seed[name] for seed in seeds):,.0f}" for name in ("gradients", "updates", "seconds")
        ]
        scores = [format_interval(mean_accuracy(row, name)) for name in ("clean", STRONGEST)]
        cells = [row["title"], str(len(seeds)), f"{seeds[0]['lr']:g}", *spent, *scores]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _draw(numbers: Numbers, figure: "Figure") -> None:
    """Draws robust accuracy under AutoAttack against gradients spent, of each data set."""
    plots.draw_methods({TITLES[data]: _points(found["rows"]) for data, found in numbers.items()}, figure)


def _points(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, tuple[float, float, float]]]:
    found = {}
    for row in rows:
        value = mean_accuracy(row, STRONGEST)
        if value is not None:
            found[row["title"]] = statistics.mean(seed["gradients"] for seed in row["seeds"].values()), value
    return found


ARTIFACTS = (Artifact("methods", "Fast methods of adversarial training", _experiments, _numbers, _text, _draw),)
