"""ε = 0, the threat model that allows nothing: every attack returns x, and every accuracy is the clean one."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import innermax as im
from innermax.attacks.named import ATTACKS, build_attack
from innermax.reporting.tables import format_curve
from innermax.strategies import STRATEGIES, build_strategy
from tests.helpers.evaluation import examples, network

NORMS = {"linf": im.Linf, "l2": im.L2, "l1": im.L1}
NAMES = [name if attack.number is None or attack.optional else f"{name}-6" for name, attack in ATTACKS.items()]
NAMES = [name.replace("guided", "guided-40") for name in NAMES]


@pytest.fixture(scope="module")
def model():
    """A network that is right on most of the examples."""
    net, (images, labels) = network().eval(), examples(12)
    with torch.no_grad():
        right = net(images / 255).argmax(1)
    labels[2:] = right[2:]
    labels[:2] = (right[:2] + 1) % 4
    return net, images, labels


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NAMES)
def test_attacks_return_x(model, norm, name):
    net, images, labels = model
    if name.startswith("ddn") and norm != "l2":
        pytest.skip("DDN is for L2")
    attack = build_attack(name, NORMS[norm](0.0))
    if name == "autoattack":
        attack = replace(attack, version="rand")
    result = attack(net, images / 255, labels)
    assert torch.equal(result.x_adv, images / 255)
    assert result.misclassified.tolist() == [True] * 2 + [False] * 10
    assert result.fosc.tolist() == [0] * 12
    assert result.relative_fosc[~result.zero_gradient].tolist() == [0] * int((~result.zero_gradient).sum())
    assert not result.zero_gradient[2:].any()


@pytest.mark.parametrize("norm", NORMS)
def test_an_evaluation_is_the_clean_accuracy_and_nothing_is_left_to_audit(model, norm):
    net, images, labels = model
    threat = NORMS[norm](0.0)
    attacks = {"fgsm": im.FGSM(threat), "pgd": im.PGD(threat, 4), "fmn": im.FMN(threat, 30)}
    found = im.evaluate(net, (images, labels), attacks, quantize=8)
    assert {value.correct for value in found.accuracy.values()} == {10}
    assert found.worst_case.correct == 10
    assert found.audit.verdict == "nothing to audit"
    assert found.audit.sentence == "Audit: nothing to audit. With ε = 0 nothing may be changed."
    assert im.Evaluation.from_json(found.to_json()).audit == found.audit
    distances = found.distances()
    assert (distances[:2] == 0).all()
    assert (distances[2:] > 0).all()
    sizes = [row.split()[0] for row in _cells(format_curve(found, "fmn"))]
    assert len(set(sizes)) == len(sizes) > 1
    if norm != "linf":
        return
    shown = im.gallery(net, (images, labels), attacks, found, pictures=3)
    assert shown.sweep is None
    assert all(picture.largest == 0 for picture in shown.pictures)


def _cells(table):
    return list(table.columns[0].cells)


def test_beside_other_sizes_the_audit_leaves_it_out(model):
    net, images, labels = model
    attacks = {"pgd": im.PGD(im.Linf(0.01), 20), "fgsm-0": im.FGSM(im.Linf(0.0)), "pgd-0": im.PGD(im.Linf(0.0), 2)}
    found = im.evaluate(net, (images, labels), attacks)
    alone = im.evaluate(net, (images, labels), {"pgd": attacks["pgd"]})
    assert found.audit.evidence.strongest == "pgd"
    assert found.audit.evidence.fallen == alone.audit.evidence.fallen
    assert found.audit.verdict == alone.audit.verdict


def test_a_claim_is_held_against_the_clean_accuracy(model):
    net, images, labels = model
    for claim, verdict in {10 / 12: "not refuted", 11 / 12: "refuted"}.items():
        assert im.verify(net, (images, labels), im.Linf(0.0), claim=claim).verdict == verdict


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_against_nothing_is_training_on_clean_images(strategy, tmp_path):
    images, labels = examples(16)
    models = {}
    for name in (strategy, "unsecured"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        attack = im.PGD(im.Linf(0.0), steps=2)
        chosen = build_strategy(name, attack)
        options = {"epochs": 2, "batch_size": 8, "lr": 0.1, "precision": "float32", "progress": False}
        models[name] = im.train(net, (images, labels), chosen, **options).model
    for one, other in zip(models[strategy].parameters(), models["unsecured"].parameters(), strict=True):
        assert bool(torch.isfinite(one).all())
        if strategy != "free":  # it learns from each batch several times
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
