"""What an epoch measures: sums over its batches, gauges of single examples, and the row that metrics.jsonl keeps."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from innermax.attacks.pgd import PGD
from innermax.data.image_set import ImageSet
from innermax.data.streaming import ORDER
from innermax.distributed.process_group import Ranks
from innermax.oracle.oracle import Oracle
from innermax.strategies import SAMPLE, Strategy, halfway_gauge
from innermax.utils import randomness

_EXPLOSION = 10  # a FOSC that grows by this factor is warned of


@dataclass
class EpochMetrics:
    """What the batches of an epoch have measured so far.

    Attributes:
        totals: sums over its batches, of "examples", their "loss", "correct" and "gradients", and "skipped" batches.
        gauges: the values of single examples, by gauge, for their distribution.
    """

    totals: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, list[float]] = field(default_factory=dict)

    def add(self, sums: Mapping[str, float]) -> None:
        """Adds a batch's sums."""
        for name, value in sums.items():
            self.totals[name] = self.totals.get(name, 0.0) + value

    def add_gauges(self, measured: Iterable[Mapping[str, list[float]]]) -> None:
        """Adds the gauges that each process measured of a batch."""
        for own in measured:
            for name, values in own.items():
                self.gauges.setdefault(name, []).extend(values)

    @property
    def fosc(self) -> float | None:
        """The mean FOSC; None where no batch was gauged."""
        return fmean(self.gauges["fosc"]) if self.gauges else None

    def row(self, epoch: int, lr: float, attack: PGD | None, attack_network: str, examples: int) -> dict[str, Any]:
        """The epoch as a row of metrics.jsonl; examples: of an epoch.

        Raises:
            FloatingPointError: every batch was skipped.
        """
        totals, learned = self.totals, self.totals.get("examples", 0.0)
        if learned == 0:
            raise FloatingPointError(
                f"all {totals.get('skipped', 0):.0f} batches of epoch {epoch + 1} were skipped; lower lr"
            )
        row: dict[str, Any] = {
            "epoch": epoch,
            "lr": lr,
            "loss": totals["loss"] / learned,
            "accuracy": totals["correct"] / learned,
            "attack_steps": 0 if attack is None else attack.steps,
            "threshold": None if attack is None else attack.stop_at,
            "gradients": totals.get("gradients", 0.0) / examples,
            "attack_network": attack_network,
        }
        if "skipped" in totals:
            row["skipped_batches"] = int(totals["skipped"])
        if self.gauges:
            row["fosc"] = self.fosc
            row["zero_gradients"] = fmean(self.gauges["zero_gradient"])
            for name in ("fosc", "relative_fosc", "ball_fosc"):
                row[f"{name}_percentiles"] = _percentiles(self.gauges[name])
        return row


def measure_gauges(
    oracle: Oracle, attack: PGD, x: Tensor, x_adv: Tensor, y: Tensor, seed: int
) -> dict[str, list[float]]:
    """How converged the attack on each example is, for one gradient per example.

    "fosc" over ball and bounds, which may be no finite number; "relative_fosc", 0 where it is undefined; "ball_fosc",
    the paper's closed form, which ignores the bounds; "zero_gradient", 1 or 0.
    """
    feasible = attack.threat.around(x)
    x_adv = attack.gauged_point(feasible, x_adv)
    gradient = attack.gradient_at(oracle, x, y, x_adv, seed).gradient
    values = {
        "fosc": feasible.gap(gradient, x_adv),
        "relative_fosc": feasible.gap(gradient, x_adv, relative=True).nan_to_num(0.0),
        "ball_fosc": feasible.without_bounds().gap(gradient, x_adv),
        "zero_gradient": (gradient == 0).flatten(1).all(1),
    }
    return dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))


def median_halfway_gauge(
    strategy: Strategy, oracle: Oracle, data: ImageSet, ranks: Ranks, *, seed: int, batch_size: int
) -> float:
    """The median of `halfway_gauge` over a sample of the training examples, which all processes share."""
    chosen = randomness.permutation(seed, len(data), ORDER)[:SAMPLE].to(data.labels.device)
    gauges: list[float] = []
    for batch in chosen.tensor_split(math.ceil(len(chosen) / batch_size)):
        index = ranks.share(batch)
        if len(index) > 0:
            x, y = data.batch(index)
            gauges += halfway_gauge(strategy, oracle, x, y, seed=seed, index=index).tolist()
    oracle.settle()
    return float(torch.tensor([value for own in ranks.gather(gauges) for value in own], device="cpu").median())


def warn_of_fosc(row: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
    """Warns if FOSC explodes: if it is far above the loss, and above FOSC in every epoch before."""
    before = [past["fosc"] for past in history if past.get("fosc")]
    if before and row.get("fosc") is not None and row["fosc"] > _EXPLOSION * max(*before, abs(row["loss"])):
        warnings.warn(
            f"FOSC is {row['fosc']:.3g} on average in epoch {row['epoch'] + 1}, more than {_EXPLOSION} times the loss "
            f"and what it was in any epoch before ({max(before):.3g} at most); lower lr",
            stacklevel=3,
        )


def _percentiles(values: Sequence[float]) -> list[float]:
    """The 0th to the 100th percentile, to five digits."""
    levels = torch.linspace(0, 1, 101, dtype=torch.float64, device="cpu")
    quantiles = torch.tensor(values, dtype=torch.float64, device="cpu").quantile(levels)
    return [float(f"{value:.5g}") for value in quantiles.tolist()]
