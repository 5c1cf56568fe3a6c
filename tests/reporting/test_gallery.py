"""The gallery."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import innermax as im
from innermax.attacks.trace import trace_search
from innermax.reporting.gallery import select_images
from tests.helpers.reporting import THREAT


def test_pictures_show_what_was_evaluated(trained, gallery):
    _, data, evaluation = trained
    assert len(gallery.pictures) == 120
    for picture in gallery.pictures:
        rows = evaluation.rows[picture.attack]
        assert picture.label == evaluation.label[picture.index]
        assert picture.before == evaluation.clean_prediction[picture.index]
        assert picture.after == rows.prediction[picture.index]
        assert (picture.outcome == "survived") <= bool(rows.correct[picture.index])
        assert picture.relative_fosc == pytest.approx(rows.relative_fosc[picture.index], abs=1e-4, nan_ok=True)
        clean, attacked = (
            np.asarray(Image.open(io.BytesIO(png)), dtype=int) for png in (picture.clean, picture.attacked)
        )
        assert np.array_equal(clean, data.test.images[picture.index, 0].numpy())
        assert np.abs(attacked - clean).max() == pytest.approx(255 * picture.largest, abs=0.51)
        change = np.asarray(Image.open(io.BytesIO(picture.change)), dtype=int)
        darker, brighter = attacked - clean < -1, attacked - clean > 1
        assert (change[darker][:, 2] > change[darker][:, 0]).all(), "blue"
        assert (change[brighter][:, 0] > change[brighter][:, 2]).all(), "orange"


def test_a_trace_ends_where_its_attack_ends(trained):
    run, data, _ = trained
    x, y = data.test.batch(torch.arange(40))
    index = torch.arange(100, 140)
    for attack in (im.PGD(THREAT, 6), im.FGSM(THREAT), im.PGD(im.L2(0.5), 5, "annealed", random_start=False)):
        result = attack(run.model, x, y, seed=3, index=index)
        trace = trace_search(attack, run.model, x, y, seed=3, index=index)
        assert trace.loss.shape == (attack.steps + 1, 40)
        for name in ("loss", "fosc", "relative_fosc"):
            assert torch.allclose(getattr(trace, name)[-1], getattr(result, name), atol=1e-5, equal_nan=True)
    start = im.PGD(im.L2(0.5), 1, random_start=False)
    clean = nn.functional.cross_entropy(run.model(x), y, reduction="none")
    assert torch.allclose(trace_search(start, run.model, x, y).loss[0], clean, atol=1e-5)


def test_the_gallery_holds_every_class_and_fate(trained):
    evaluation = trained[2]
    chosen = select_images(evaluation, 60)
    assert len(set(chosen.tolist())) == 60
    assert set(evaluation.label[chosen]) == set(range(10))
    clean, survived = evaluation.correct("clean")[chosen], evaluation.correct("worst_case")[chosen]
    assert (clean & survived).sum() >= 10
    assert (clean & ~survived).sum() >= 10
    assert (~clean).sum() <= 15
    assert len(select_images(evaluation, 10_000)) == len(evaluation.label)


def test_what_was_wrong_already_is_shown_a_quarter_as_often(trained):
    evaluation = trained[2]
    label, clean = evaluation.label, evaluation.clean_prediction
    third = np.arange(len(label)) % 3 == 0
    evaluation = replace(evaluation, clean_prediction=np.where(third, (label + 1) % 10, clean))
    chosen = select_images(evaluation, 60)
    assert third.sum() > 50
    assert 0 < (~evaluation.correct("clean")[chosen]).sum() <= 15


def test_robustness_against_eps_of_a_linear_model():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(12, generator=generator), 0.3 + 0.4 * torch.rand(120, 12, generator=generator)
    y = torch.randint(0, 2, (120,), generator=generator)
    model = nn.Linear(12, 2)
    with torch.no_grad():
        model.weight.copy_(torch.stack([-weight, weight]) / 2)
        model.bias.copy_(torch.tensor([0.5, -0.5]) * (x @ weight).mean())
    margin = (x @ weight - (x @ weight).mean()) * (2 * y - 1)
    attacks = {"fgsm": im.FGSM(im.Linf(0.02))}
    shown = im.gallery(model, (x, y), attacks, im.evaluate(model, (x, y), attacks))
    assert shown.pictures == (), "these are no images"
    assert shown.sweep.eps == (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04)
    expected = [int((margin > eps * weight.abs().sum()).sum()) for eps in shown.sweep.eps]
    assert [value.correct for value in shown.sweep.accuracy] == expected
    assert len(set(expected)) > 3
