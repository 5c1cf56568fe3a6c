"""The attack on a batch: where its searches start, and what they keep for later ones."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from innermax.attacks.pgd import PGD
from innermax.attacks.problem import Problem
from innermax.data.augmentation import augment
from innermax.data.streaming import Batch, TrainingSet
from innermax.distributed.process_group import Ranks
from innermax.oracle.oracle import Oracle
from innermax.threat import FeasibleSet
from innermax.training.options import TrainingOptions
from innermax.utils import randomness

_AUGMENT, _ATTACK = 1, 2  # streams of random numbers; 0 is the order's


class Attacked(NamedTuple):
    """What an attack on a batch found.

    Attributes:
        x_adv: (B, *features) adversarial inputs.
        calls: how many gradients of an example it took; None: there was no attack.
        prior: (B, *features) where its searches started, if the answers to x_adv are to stay close to those.
    """

    x_adv: Float[Tensor, "b ..."]
    calls: Int[Tensor, ""] | None = None
    prior: Float[Tensor, "b ..."] | None = None


@dataclass(frozen=True, eq=False)
class Kept:
    """Tensors that a strategy keeps from one batch to another; checkpoints hold them by their names.

    Attributes:
        options: of the training.
        ranks: this process in its group; all keep the same.
        tensors: "kept", float16 (examples, *features), the perturbation at which each example's next search starts,
            without augmentation; "momentum", bfloat16 of the same shape, of its gradients; "replayed", float32 (batch,
            *features), the perturbations of the batch before.
    """

    options: TrainingOptions
    ranks: Ranks
    tensors: dict[str, Tensor]

    @classmethod
    def start(cls, data: TrainingSet, options: TrainingOptions, ranks: Ranks) -> "Kept":
        """What the strategy keeps before the first batch: zeros."""
        strategy, every = options.strategy, (len(data), *data.shape)
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if getattr(strategy, "warm_start", False):
            wanted["kept"] = every, torch.float16
        if hasattr(strategy, "momentum"):
            wanted["momentum"] = every, torch.bfloat16
        if hasattr(strategy, "replays"):
            wanted["replayed"] = (options.batch_size, *data.shape), torch.float32
        zeros = {n: torch.zeros(shape, dtype=dtype, device=ranks.device) for n, (shape, dtype) in wanted.items()}
        return cls(options, ranks, zeros)

    @property
    def plan(self) -> str:
        """What is kept, and how much memory it takes, in one line; empty where nothing is kept."""
        names = {"kept": "perturbations", "momentum": "their momentum", "replayed": "one batch's perturbations"}
        parts = [f"{names[name]} {value.nbytes / 1e6:,.1f} MB" for name, value in self.tensors.items()]
        return f"kept in memory and in checkpoints: {', '.join(parts)}" if parts else ""

    def augment(self, images: Tensor, index: Int[Tensor, " b"], epoch: int, back: bool = False) -> Tensor:
        """The epoch's augmentation of the examples, or what undoes it."""
        if not (self.options.shift or self.options.flip):
            return images
        keys = randomness.hash_keys(self.options.seed, index, _AUGMENT, epoch)
        return augment(images, keys, shift=self.options.shift, flip=self.options.flip, back=back)

    def read(self, name: str, x: Tensor, batch: Batch, epoch: int) -> Tensor:
        """What is kept of this process's share of a batch, augmented as in the epoch, in the type of x."""
        return self.augment(self.tensors[name][batch.mine].to(x.dtype), batch.mine, epoch)

    def write(self, name: str, values: Tensor, batch: Batch, epoch: int) -> None:
        """Keeps values of the batch, of which each process has those of its share."""
        tensor = self.tensors[name]
        own = self.augment(values, batch.mine, epoch, back=True).to(tensor.dtype)
        tensor[batch.whole] = self.ranks.gather_rows(own, len(batch.whole))

    def read_replayed(self, x: Tensor, batch: Batch) -> Tensor:
        """The perturbations of the batch before, in the order of this one."""
        places = torch.arange(len(batch.whole), device=x.device)
        return self.tensors["replayed"][self.ranks.share(places)].to(x.dtype)

    def write_replayed(self, values: Tensor, batch: Batch) -> None:
        """Keeps the perturbations for the next batch."""
        count = len(batch.whole)
        self.tensors["replayed"][:count] = self.ranks.gather_rows(values.to(torch.float32), count)


def attack_batch(oracle: Oracle, attack: PGD, x: Tensor, batch: Batch, kept: Kept, epoch: int) -> Attacked:
    """The epoch's attack on a batch, as the strategy has it start; keeps what a later one starts from.

    x: (B, *features) this process's share, augmented.
    """
    strategy, seed = kept.options.strategy, randomness.derive_seed(kept.options.seed, _ATTACK, epoch)
    if hasattr(strategy, "replays"):  # the updates move the perturbations
        told = x + kept.read_replayed(x, batch)
        problem = Problem.of(attack.threat, oracle, x, batch.y, seed=seed, index=batch.mine, start=told)
        return Attacked(attack.start(problem, attack.objective(), 0), torch.zeros_like(batch.y[:1]).sum())
    fresh = epoch == 0 or getattr(strategy, "resets", lambda epoch: False)(epoch)
    if hasattr(strategy, "momentum"):
        return _attack_with_momentum(oracle, attack, x, batch, kept, epoch, seed, fresh)
    start = x + kept.read("kept", x, batch, epoch) if "kept" in kept.tensors and not fresh else None
    found = attack(oracle, x, batch.y, seed=seed, index=batch.mine, start=start, final="none")
    if "kept" in kept.tensors:
        kept.write("kept", found.x_adv - x, batch, epoch)
    return Attacked(found.x_adv, found.gradient_calls.sum())


def _attack_with_momentum(
    oracle: Oracle, attack: PGD, x: Tensor, batch: Batch, kept: Kept, epoch: int, seed: int, fresh: bool
) -> Attacked:
    """One step along the gradient; the next search starts where a step along its momentum leads (Jia et al. 2022, MEP).

    Searches that start afresh do so at a step from x in a random direction.
    """
    feasible, (size,) = attack.threat.around(x), attack.step_sizes()
    if fresh:
        start, before = _random_step(feasible, randomness.hash_keys(seed, batch.mine, 0), size), torch.zeros_like(x)
    else:
        start = feasible.project(x + kept.read("kept", x, batch, epoch))
        before = kept.read("momentum", x, batch, epoch)
    gradient = attack.gradient_at(oracle, x, batch.y, start, seed).gradient
    length = gradient.flatten(1).abs().sum(1).reshape(-1, *[1] * (x.ndim - 1))
    decay: float = kept.options.strategy.momentum  # type: ignore[attr-defined]  # the caller has seen it
    momentum = gradient / length.clamp(min=torch.finfo(length.dtype).tiny) + decay * before
    kept.write("momentum", momentum, batch, epoch)
    kept.write("kept", feasible.step(start, momentum, size) - x, batch, epoch)
    return Attacked(feasible.step(start, gradient, size), torch.ones_like(batch.y).sum(), start)


def _random_step(feasible: FeasibleSet, key: Int[Tensor, " b"], size: float) -> Tensor:
    x = feasible.x
    direction = feasible.threat._draw(key, x[0].numel()).to(x.dtype).reshape(x.shape)
    return feasible.step(x, direction, size)
