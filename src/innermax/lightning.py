"""Adversarial training inside a Lightning Trainer: a callback that attacks each batch before the module sees it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from innermax.attacks.pgd import PGD
from innermax.oracle.oracle import Oracle, Precision
from innermax.strategies import SAMPLE, Strategy, awaits_halfway_gauge, halfway_gauge
from innermax.utils import randomness

try:
    from pytorch_lightning.callbacks import Callback
except ImportError as error:
    raise ImportError(f"innermax.lightning needs pip install 'innermax[lightning]': {error}") from error


class AdversarialTraining(Callback):  # type: ignore[misc]  # the package is optional, and not looked into
    """Trains any LightningModule on attacked examples, as a strategy says; for `lightning` and `pytorch_lightning`.

    A batch is (images, labels) in a list, as torch's DataLoader gives it, or a mapping; images in it are replaced.
    Images are float (B, *features) within the threat model's bounds. Logged an epoch: "adversarial/gradients" an
    example and "adversarial/threshold", c_t; at the Trainer's log steps "adversarial/fosc".

    Args:
        strategy: which attack to train against at which moment; no WarmStart, which has to know the examples again.
        network: name of the module's attribute that takes images and returns logits; None: the module itself.
        keys: of images and labels in a mapping.
        precision: what attacks compute in, as for `im.train`.
        seed: decides the random starts.

    Raises:
        TypeError: the strategy is none, or a batch holds no images that could be replaced.
        ValueError: the strategy is a warm start, or wants to see the accuracy (Curriculum with patience).
    """

    def __init__(
        self,
        strategy: Strategy,
        network: str | None = None,
        keys: tuple[str, str] = ("image", "label"),
        precision: Precision = "auto",
        seed: int = 0,
    ) -> None:
        if not callable(getattr(strategy, "attack_at", None)):
            raise TypeError(f"strategy must have attack_at(progress, history), got {strategy!r}")
        if getattr(strategy, "warm_start", False):
            raise ValueError(f"strategy must not start where the last epoch ended, got {strategy!r}")
        self.strategy, self.network, self.keys = strategy, network, keys
        self.precision, self.seed = precision, seed
        self.history: list[dict[str, Any]] = []
        self._oracle: Oracle | None = None
        self._attack: PGD | None = None
        self._sample: list[tuple[Tensor, Tensor]] = []
        self._seen = self._gradients = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the Trainer keeps."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what a checkpoint kept."""
        self.history = list(state_dict["history"])

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The strategy says what this epoch trains against."""
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise ValueError(f"the Trainer must know max_epochs, which strategies go by, got {trainer.max_epochs}")
        self._attack = self.strategy.attack_at(trainer.current_epoch / trainer.max_epochs, self.history)
        self._oracle, self._sample, self._seen, self._gradients = None, [], 0, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Puts attacked images into the batch."""
        attack = self._attack
        if attack is None:
            return
        image, label = self._places(batch)
        x, y = batch[image], batch[label]
        oracle = self._refreshed(pl_module, x)
        index = torch.arange(self._seen, self._seen + len(x), device=x.device)
        seed = randomness.derive_seed(self.seed, trainer.current_epoch, trainer.global_rank)
        result = attack(oracle, x, y, seed=seed, index=index, final="none")
        self._keep(x, y)
        batch[image] = result.x_adv.to(x.dtype)
        self._seen, self._gradients = self._seen + len(x), self._gradients + int(result.gradient_calls.sum())
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # takes one gradient more
            gradient = oracle.gradient(result.x_adv, y, attack.objective()).gradient
            fosc = attack.threat.around(x).gap(gradient, result.x_adv).mean()
            pl_module.log("adversarial/fosc", fosc, on_step=True, on_epoch=False, batch_size=len(x))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measures what the strategy wants to know, and logs what the epoch took."""
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

    def _places(self, batch: Any) -> tuple[Any, Any]:
        """Where images and labels are in a batch. TypeError where they cannot be replaced there."""
        if isinstance(batch, list) and len(batch) == 2:
            return 0, 1
        if isinstance(batch, Mapping) and hasattr(batch, "__setitem__") and set(self.keys) <= batch.keys():
            return self.keys
        raise TypeError(f"a batch must be [images, labels] or a dict with {self.keys}, got {type(batch).__name__}")

    def _refreshed(self, pl_module: Any, x: Tensor) -> Oracle:
        """The network as it is now, compiled for attacks."""
        if self._oracle is None:
            network: nn.Module = pl_module if self.network is None else getattr(pl_module, self.network)
            self._oracle = Oracle.fast(network, x[:16], self.precision)
        else:
            self._oracle.refresh()
        return self._oracle

    def _keep(self, x: Tensor, y: Tensor) -> None:
        """Keeps clean examples of the first epoch where the strategy asks for their gauge at its end."""
        if awaits_halfway_gauge(self.strategy, self.history) and sum(len(kept) for _, kept in self._sample) < SAMPLE:
            self._sample.append((x, y))

    def _halfway_gauge(self, pl_module: Any) -> float:
        """The median of `halfway_gauge`, on the network as it is now."""
        oracle = self._refreshed(pl_module, self._sample[0][0])
        gauges = [halfway_gauge(self.strategy, oracle, x, y, seed=self.seed) for x, y in self._sample]
        self._sample = []
        return float(torch.cat(gauges).median())
