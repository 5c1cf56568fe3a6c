"""The Lightning callback, against a loop by hand and with strategies that measure."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import innermax as im

L = pytest.importorskip("pytorch_lightning")
from innermax.lightning import AdversarialTraining  # noqa: E402
from innermax.utils import randomness  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
DATA = im.load_data("digits").train[:96]
X, Y = DATA.batch(torch.arange(96))
ATTACK = im.PGD(im.Linf(0.15), steps=3)


class Classifier(L.LightningModule):
    """A module that remembers the batches it has seen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = im.build_model("digits-cnn", input_shape=DATA.shape)
        self.seen = []

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        x, y = batch.values() if isinstance(batch, dict) else batch
        self.seen.append(x.clone())
        return cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(callback, *, epochs=1, rows=None, module=None, **options):
    module = Classifier() if module is None else module
    quiet = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    settings = dict.fromkeys(quiet, False) | {"accelerator": "cpu", "log_every_n_steps": 2} | options
    trainer = L.Trainer(max_epochs=epochs, callbacks=[callback], **settings)
    rows = list(zip(X, Y, strict=True)) if rows is None else rows
    trainer.fit(module, DataLoader(rows, batch_size=32))
    return module, trainer


def test_the_module_trains_on_what_the_attack_finds():
    """Batch by batch and bit for bit what the same attack finds in a loop by hand."""
    module, _ = fit(AdversarialTraining(im.Standard(ATTACK), precision="float32", seed=4))
    ours = Classifier()
    ours.train()
    optimizer = ours.configure_optimizers()
    oracle = im.Oracle.fast(ours, X[:16], "float32")
    for number, index in enumerate(torch.arange(96).split(32)):
        oracle.refresh()
        x_adv = ATTACK(
            oracle, X[index], Y[index], seed=randomness.derive_seed(4, 0, 0), index=index, final="none"
        ).x_adv
        assert torch.equal(module.seen[number], x_adv)
        assert float((x_adv - X[index]).abs().max()) > 0.1
        optimizer.zero_grad()
        cross_entropy(ours(x_adv), Y[index]).backward()
        optimizer.step()
    for mine, theirs in zip(ours.parameters(), module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(DATA.batch(torch.arange(96))[0], X), "the data set keeps its images"


def test_a_dict_and_a_part_of_the_module():
    rows = [{"image": x, "label": y} for x, y in zip(X, Y, strict=True)]
    callback = AdversarialTraining(im.Standard(ATTACK), network="network")
    module, _ = fit(callback, rows=rows)
    assert float((torch.cat(module.seen) - X).abs().max()) == pytest.approx(0.15, abs=1e-6)
    assert callback.history == [{"epoch": 0, "gradients": 3.0, "threshold": None}]


def test_dynamic_measures_its_own_threshold():
    callback = AdversarialTraining(im.Dynamic(ATTACK, "auto", zero_at=1.0))
    _, trainer = fit(callback, epochs=3)
    first, second, third = callback.history
    assert first["gradients"] == 3
    assert first["halfway_gauge"] > 0
    assert second["threshold"] == pytest.approx(first["halfway_gauge"] * 2 / 3)
    assert third["threshold"] == pytest.approx(first["halfway_gauge"] / 3)
    assert 1 <= second["gradients"] <= 3
    told = trainer.callback_metrics
    assert told["adversarial/gradients"] == pytest.approx(third["gradients"])
    assert told["adversarial/threshold"] == pytest.approx(third["threshold"])
    assert told["adversarial/fosc"] >= 0


def test_the_measured_gauge_is_halfway_on_what_the_epoch_made():
    attack = replace(ATTACK, random_start=False)
    callback = AdversarialTraining(im.Dynamic(attack, "auto"), precision="float32")
    module, _ = fit(callback)
    found = replace(attack, steps=2)(module.network, X, Y, final="gradient")  # of three
    assert callback.history[0]["halfway_gauge"] == pytest.approx(float(found.fosc.median()), rel=1e-3)


def test_unsecured_leaves_batches_alone():
    module, _ = fit(AdversarialTraining(im.Unsecured()))
    assert torch.equal(torch.cat(module.seen), X)


def test_a_resumed_trainer_goes_on(tmp_path):
    callback = AdversarialTraining(im.Dynamic(ATTACK, "auto"))
    _, trainer = fit(callback, epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = AdversarialTraining(im.Dynamic(ATTACK, "auto"))
    options = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False)
    trainer = L.Trainer(max_epochs=2, callbacks=[again], accelerator="cpu", **options)
    rows = DataLoader(TensorDataset(X, Y), batch_size=32)
    trainer.fit(Classifier(), rows, ckpt_path=tmp_path / "last.ckpt")
    assert again.history[0] == callback.history[0]
    assert [row["epoch"] for row in again.history] == [0, 1]


@pytest.mark.parametrize(
    ("strategy", "error", "message"),
    [
        (ATTACK, TypeError, "strategy must have attack_at"),
        (
            im.WarmStart(ATTACK),
            ValueError,
            "strategy must not start attacks where the last epoch's ended, got WarmStart: .* use im.train",
        ),
        (
            im.Free(ATTACK),
            ValueError,
            "strategy must not change the updates, got Free: a Trainer makes them; use im.train",
        ),
    ],
)
def test_what_is_no_strategy_for_it(strategy, error, message, untyped):
    with pytest.raises(error, match=message):
        AdversarialTraining(strategy)


def test_what_cannot_be_attacked():
    with pytest.raises(TypeError, match=r"a batch must be \[images, labels\] or a dict with \('image', 'label'\)"):
        fit(AdversarialTraining(im.Standard(ATTACK)), rows=X)
    with pytest.raises(ValueError, match="history must hold 'accuracy', which this strategy needs"):
        fit(AdversarialTraining(im.Curriculum(ATTACK, patience=1)), epochs=2)
    with pytest.raises(ValueError, match="the Trainer's max_epochs must be at least 1"):
        fit(AdversarialTraining(im.Standard(replace(ATTACK, steps=1))), epochs=-1, max_steps=1)
    with pytest.raises(ValueError, match="unknown network 'netwrok'; did you mean 'network'"):
        fit(AdversarialTraining(im.Standard(ATTACK), network="netwrok"))
    with pytest.raises(ValueError, match=r"x must lie within the bounds, .*im\.Normalize"):
        fit(AdversarialTraining(im.Standard(ATTACK)), rows=list(zip(2 * X - 1, Y, strict=True)))


@pytest.mark.parametrize("strategy", [im.Standard(ATTACK), im.Unsecured()])
def test_robust_validation(strategy):
    class Validated(Classifier):
        def validation_step(self, batch, batch_idx):
            pass

    module = Validated()
    callback = AdversarialTraining(strategy, precision="float32", validation_attack=ATTACK)
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    trainer = L.Trainer(max_epochs=2, callbacks=[callback], accelerator="cpu", num_sanity_val_steps=0, **quiet)
    rows = list(zip(X, Y, strict=True))
    trainer.fit(module, DataLoader(rows, batch_size=32), DataLoader(rows, batch_size=48))
    told = float(trainer.callback_metrics["adversarial/validation_accuracy"])
    found = 0
    for number, index in enumerate(torch.arange(96).split(48)):
        seed = randomness.derive_seed(0, 0, number)
        found += int((~ATTACK(module, X[index], Y[index], seed=seed).misclassified).sum())
    assert abs(told - found / 96) <= 1 / 96
