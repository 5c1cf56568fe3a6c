"""Adversarial training in a Lightning Trainer: python examples/lightning_trainer.py

Needs pip install 'innermax[lightning]'. With the package `lightning`, write `import lightning as L` instead.
"""

import pytorch_lightning as L
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import innermax as im
from innermax.lightning import AdversarialTraining


class Classifier(L.LightningModule):
    """An ordinary module, written for clean images."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = cross_entropy(self.network(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


L.seed_everything(0)
data, threat = im.load_data("digits"), im.Linf(0.15)
model = Classifier(im.build_model("digits-cnn", input_shape=data.train.shape))
loader = DataLoader(TensorDataset(*data.train.batch(torch.arange(len(data.train)))), batch_size=64, shuffle=True)
adversary = AdversarialTraining(im.Dynamic(im.PGD(threat, steps=5)), network="network")
trainer = L.Trainer(
    max_epochs=4,
    callbacks=[adversary],
    accelerator="cpu",
    log_every_n_steps=5,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, loader)
for row in adversary.history:
    print(f"epoch {row['epoch'] + 1}: {row['gradients']:.1f} gradients per example, c_t {row['threshold']}")
evaluation = im.evaluate(model.network, data.test, {"pgd-20": im.PGD(threat, steps=20)}, audit=False)
print(f"clean {evaluation.accuracy['clean'].value:.1%}, under PGD-20 {evaluation.accuracy['pgd-20'].value:.1%}")
