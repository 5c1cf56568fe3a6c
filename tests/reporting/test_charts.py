"""The report's figures."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import innermax as im
from innermax.reporting import charts
from innermax.reporting.contents import Entry
from tests.helpers.evaluation import examples, network


def test_the_heat_maps_columns_are_shares_of_examples():
    percentiles = np.linspace(0, 1, 101).tolist()  # uniform
    edges = np.linspace(0, 2, 9)
    assert charts._bin_percentiles([percentiles, None], edges) == pytest.approx([0.25] * 4 + [0] * 4)
    halves = charts._bin_percentiles([[0.5] * 101], edges)
    assert halves[1] + halves[2] == pytest.approx(1)


def test_no_accuracy_goes_beyond_100():
    """Models of equal accuracies, clean, robust and in each epoch."""
    perfect = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images = torch.zeros(6, 1, 2, 2)
    labels = perfect(images).argmax(1)
    evaluation = im.evaluate(perfect, (images, labels), {"fgsm": im.FGSM(im.Linf(0.0))}, audit=False)
    history = [{"epoch": epoch, "validation_clean": 1.0, "validation_robust": 1.0} for epoch in range(2)]
    entries = [Entry(name, evaluation, history=history) for name in ("one", "two")]
    figures = {one.title: one.chart for one in (*charts.draw_comparison(entries), *charts.draw_training(entries))}
    for title in ("Robust against clean accuracy", "Accuracy on the validation split"):
        numbers = [float(text) for text in re.findall(r'class="tick"[^>]*>([\d.]+)<', figures[title])]
        assert 100 in numbers
        assert max(numbers) == 100


def test_a_curve_is_drawn_for_each_norm():
    attacks = {"fmn-9": im.FMN(im.Linf(0.1), 9), "fmn-l2": im.FMN(im.L2(0.5), 9), "ddn-9": im.DDN(im.L2(0.5), 9)}
    evaluation = im.evaluate(network(), examples(), attacks, audit=False)
    entries = [Entry(name, evaluation) for name in ("one", "two")]
    figures = [one for one in charts.draw_comparison(entries) if one.title.startswith("Smallest")]
    assert [one.title for one in figures] == ["Smallest L∞ perturbations", "Smallest L2 perturbations"]
    assert "neither fmn-l2 nor ddn-9 nor" in figures[1].text
    assert figures[0].chart.count('class="band') == 2
    assert figures[1].chart.count('class="band') == 4
    assert "ε = 0.1" in figures[0].chart
    assert len({line.split('"')[1] for line in figures[1].chart.split("<path ") if 'class="band' in line}) == 4
    assert not [one for one in charts.draw_comparison([Entry("none")]) if one.title.startswith("Smallest")]
