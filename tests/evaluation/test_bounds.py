"""A model that refuses values outside the bounds is evaluated like any other: nothing shows it such images."""

import pytest
import torch
from torch import nn

import innermax as im

X, Y = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 4
X = ((X - 0.5) * 1.4 + 0.5).clamp(0, 1)  # many pixels at either bound


class Guarded(nn.Module):
    """Raises outside [0, 1], without a rounding's grace."""

    def __init__(self, quantised=False):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        self.quantised = quantised

    def forward(self, x):
        if x.min() < 0 or x.max() > 1:
            raise ValueError(f"pixels must be in [0, 1], came {x.min():.4f} to {x.max():.4f}")
        return self.net(x + (16 * x).round() / 16 if self.quantised else x)


THREATS = {"linf": im.Linf(8 / 255), "l2": im.L2(0.5), "l1": im.L1(1.0)}
ATTACKS = {
    "fgsm": im.FGSM,
    "pgd": lambda threat: im.PGD(threat, steps=4, restarts=2),
    "jumps": lambda threat: im.PGD(threat, steps=3, step_size=10.0),
    "cw": lambda threat: im.CW(threat, steps=4),
    "apgd": lambda threat: im.APGD(threat, steps=8, loss="dlr"),
    "guided": lambda threat: im.GuidedPGD(threat, budget=2),
    "fab": lambda threat: im.FAB(threat, steps=4, targets=2),
    "square": lambda threat: im.Square(threat, queries=20),
}


@pytest.mark.parametrize("norm", THREATS)
def test_attacks_and_their_audit(norm):
    attacks = {name: make(THREATS[norm]) for name, make in ATTACKS.items()}
    evaluation = im.evaluate(Guarded(), (X, Y), attacks)
    assert evaluation.audit.evidence.untried == {}


@pytest.mark.parametrize("norm", THREATS)
def test_the_audit_of_a_model_whose_gradients_mislead(norm):
    """Noise is added, and gradients are passed straight through."""
    surrogates = {"other": Guarded()}
    evaluation = im.evaluate(Guarded(quantised=True), (X, Y), {"fgsm": im.FGSM(THREATS[norm])}, surrogates=surrogates)
    found = evaluation.audit.evidence
    assert {"smoothed", "straight-through", "surrogate other"} <= found.fallen.keys()
    assert found.untried == {}


def test_a_page_and_a_transfer(tmp_path):
    attacks = {"pgd": im.PGD(THREATS["linf"], steps=2)}
    evaluation = im.evaluate(Guarded(), (X, Y), attacks)
    shown = im.gallery(Guarded(), (X, Y), attacks, evaluation, pictures=10)
    im.report({"guarded": im.Exhibit(evaluation, gallery=shown)}, tmp_path / "report.html")
    im.transfer({"one": Guarded()}, {"two": Guarded(quantised=True)}, (X, Y), attacks)


@pytest.mark.parametrize("strategy", [im.Dynamic, im.WarmStart, im.FGSMThenPGD])
def test_training(strategy):
    attack = im.PGD(THREATS["linf"], steps=2)
    run = im.train(
        Guarded(), (X, Y), strategy(attack), epochs=3, batch_size=30, shift=2, flip=True, validation_set=(X, Y),
        progress=False,
    )  # fmt: skip
    assert len(run.history) == 3


class Fussy(Guarded):
    """Raises where only an audit's probes lead."""

    def forward(self, x):
        if torch.overrides._get_current_function_mode_stack():
            raise RuntimeError("not like this")
        return super().forward(x)


def test_an_audit_that_fails_leaves_the_results():
    attacks = {"fgsm": im.FGSM(THREATS["linf"])}
    with pytest.warns(UserWarning, match=r"^the audit failed \(.*not like this\): the results are whole"):
        found = im.evaluate(Fussy(), (X, Y), attacks)
    assert found.audit is None
    assert found.accuracy == im.evaluate(Guarded(), (X, Y), attacks, audit=False).accuracy
