"""Adversarial training in a Lightning Trainer: a callback that attacks each batch before the module sees it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from innermax.attacks.base import Attack
from innermax.attacks.pgd import PGD
from innermax.oracle.oracle import Oracle, Precision
from innermax.strategies import SAMPLE, Strategy, awaits_halfway_gauge, halfway_gauge
from innermax.utils import randomness
from innermax.utils.validation import unknown

try:
    from pytorch_lightning.callbacks import Callback
except ImportError as error:
    raise ImportError(f"innermax.lightning needs pip install 'innermax[lightning]': {error}") from error


class AdversarialTraining(Callback):  # type: ignore[misc]  # the package is optional, and not looked into
    """Trains any LightningModule on adversarial examples, as a strategy says.

    It works with `lightning` and `pytorch_lightning`. A batch is a list [images, labels], as torch's DataLoader gives
    it, or a mapping; the callback replaces its images, float (B, *features) within the threat model's bounds. Each
    epoch it logs "adversarial/gradients", per example, and "adversarial/threshold", c_t; at the Trainer's log steps
    "adversarial/fosc"; and with a validation attack "adversarial/validation_accuracy", in [0, 1], for a checkpoint
    callback to watch.

    Args:
        strategy: which attack to train against at which moment. Not WarmStart, ATTA and FGSMPGI, which have to
            recognise the examples, and not Free, which changes the updates.
        network: the module's attribute that takes images and returns logits; None: the module itself.
        keys: of images and labels in a mapping.
        precision: of the attacks, as for `im.train`.
        seed: decides the random starts.
        validation_attack: the attack on the Trainer's validation batches; None: they are not attacked.

    Raises:
        TypeError: strategy is not a strategy, or the images of a batch cannot be replaced.
        ValueError: the strategy is a warm start, changes the updates, or needs the accuracy of each epoch (Curriculum
            with patience); the module has no such network, or the threat model's bounds do not hold a batch.
    """

    def __init__(
        self,
        strategy: Strategy,
        network: str | None = None,
        keys: tuple[str, str] = ("image", "label"),
        precision: Precision = "auto",
        seed: int = 0,
        validation_attack: Attack | None = None,
    ) -> None:
        if not callable(getattr(strategy, "attack_at", None)):
            raise TypeError(f"strategy must have attack_at(progress, history), got {strategy!r}")
        if getattr(strategy, "warm_start", False):
            raise ValueError(
                f"strategy must not start attacks where the last epoch's ended, got {type(strategy).__name__}: a "
                "Trainer's batches do not say which examples they hold; use im.train, or another strategy"
            )
        if hasattr(strategy, "replays"):
            raise ValueError(
                f"strategy must not change the updates, got {type(strategy).__name__}: a Trainer makes them; use "
                "im.train, or another strategy"
            )
        self.strategy, self.network, self.keys = strategy, network, keys
        self.precision, self.seed, self.validation_attack = precision, seed, validation_attack
        self.history: list[dict[str, Any]] = []
        self._oracle: Oracle | None = None
        self._attack: PGD | None = None
        self._sample: list[tuple[Tensor, Tensor]] = []
        self._seen = self._gradients = 0

    def state_dict(self) -> dict[str, Any]:
        """What the Trainer's checkpoints keep."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what a checkpoint kept."""
        self.history = list(state_dict["history"])

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Checks that the module has the network."""
        known = dict(pl_module.named_children())
        if self.network is not None and not isinstance(getattr(pl_module, self.network, None), nn.Module):
            raise unknown("network", self.network, known)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Asks the strategy for the epoch's attack."""
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise ValueError(f"the Trainer's max_epochs must be at least 1, got {trainer.max_epochs}")
        self._attack = self.strategy.attack_at(trainer.current_epoch / trainer.max_epochs, self.history)
        self._sample, self._seen, self._gradients = [], 0, 0
        if self._oracle is not None:
            self._oracle.refresh()
            self._oracle = self._oracle.recheck()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Replaces the batch's images by adversarial ones."""
        attack = self._attack
        if attack is None:
            return
        image, label = self._find_keys(batch)
        x, y = batch[image], batch[label]
        oracle = self._refresh_oracle(pl_module, x)
        index = torch.arange(self._seen, self._seen + len(x), device=x.device)
        seed = randomness.derive_seed(self.seed, trainer.current_epoch, trainer.global_rank)
        result = attack(oracle, x, y, seed=seed, index=index, final="none")
        self._keep(x, y)
        batch[image] = result.x_adv.to(x.dtype)
        self._seen, self._gradients = self._seen + len(x), self._gradients + int(result.gradient_calls.sum())
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # costs one more gradient
            feasible = attack.threat.around(x)
            point = attack.gauged_point(feasible, result.x_adv)
            fosc = feasible.gap(attack.gradient_at(oracle, x, y, point).gradient, point).mean()
            pl_module.log("adversarial/fosc", fosc, on_step=True, on_epoch=False, batch_size=len(x))

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Attacks the batch, and logs the share that stays correctly classified."""
        if self.validation_attack is None:
            return
        image, label = self._find_keys(batch)
        x, y = batch[image], batch[label]
        seed = randomness.derive_seed(self.seed, trainer.global_rank, batch_idx)
        x_adv = self.validation_attack(self._refresh_oracle(pl_module, x), x, y, seed=seed, final="none").x_adv
        correct = (Oracle(self._find_network(pl_module)).logits(x_adv).argmax(1) == y).float().mean()
        pl_module.log("adversarial/validation_accuracy", correct, batch_size=len(x), sync_dist=trainer.world_size > 1)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measures what the strategy asks for, and logs the epoch's cost and threshold."""
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "gradients": self._gradients / max(self._seen, 1),
            "threshold": None if self._attack is None else self._attack.stop_at,
        }
        if self._sample and not self.history:
            row["halfway_gauge"] = self._halfway_gauge(pl_module)
        self.history.append(row)
        for name in ("gradients", "threshold"):
            if row[name] is not None:
                pl_module.log(f"adversarial/{name}", float(row[name]))

    def _find_keys(self, batch: Any) -> tuple[Any, Any]:
        """The indices or keys of images and labels in a batch. Raises TypeError where images cannot be replaced."""
        if isinstance(batch, list) and len(batch) == 2:
            return 0, 1
        if isinstance(batch, Mapping) and hasattr(batch, "__setitem__") and set(self.keys) <= batch.keys():
            return self.keys
        raise TypeError(f"a batch must be [images, labels] or a dict with {self.keys}, got {type(batch).__name__}")

    def _refresh_oracle(self, pl_module: Any, x: Tensor) -> Oracle:
        """The oracle of the network as it is now."""
        if self._oracle is None:
            self._oracle = Oracle.fast(self._find_network(pl_module), x[:16], self.precision)
        else:
            self._oracle.refresh()
        return self._oracle

    def _find_network(self, pl_module: Any) -> nn.Module:
        network: nn.Module = pl_module if self.network is None else getattr(pl_module, self.network)
        return network

    def _keep(self, x: Tensor, y: Tensor) -> None:
        """Keeps clean examples of the first epoch if the strategy asks for their gauge at its end."""
        if awaits_halfway_gauge(self.strategy, self.history) and sum(len(kept) for _, kept in self._sample) < SAMPLE:
            self._sample.append((x, y))

    def _halfway_gauge(self, pl_module: Any) -> float:
        """The median of `halfway_gauge`, on the network as it is now."""
        oracle = self._refresh_oracle(pl_module, self._sample[0][0])
        gauges = [halfway_gauge(self.strategy, oracle, x, y, seed=self.seed) for x, y in self._sample]
        self._sample = []
        return float(torch.cat(gauges).median())
