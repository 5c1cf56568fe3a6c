"""Every kind of network that users bring: the same gradients, updates and verdicts as plain PyTorch."""

import re

import pytest
import torch
from torch import nn

from checks.networks import page, row
from tests.helpers import gallery, gallery_steps

kinds = pytest.mark.parametrize("kind", gallery.KINDS)


@pytest.fixture
def case(kind):
    return gallery_steps.Case.of(gallery.build(kind), gallery.SHAPE)


@kinds
def test_gradients_before_and_after_updates(case):
    gallery_steps.compare_gradients(case)


@kinds
def test_two_updates(case):
    gallery_steps.train(case)


@kinds
def test_evaluation(case):
    gallery_steps.evaluate(case)


@kinds
def test_autoattack(case):
    gallery_steps.run_autoattack(case)


@pytest.mark.slow
@kinds
def test_autoattack_with_survivors(case):
    gallery_steps.run_autoattack(case, eps=4 / 255)


@kinds
def test_export(case, tmp_path):
    gallery_steps.export(case, tmp_path)


class Refusing(nn.Module):
    """Computes by NumPy, which no gradient passes; and knows how many images come, which no exported program may."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 16 * 16, gallery.CLASSES)

    def forward(self, x):
        return self.layer(torch.from_numpy(x.detach().numpy() * 1).flatten(1))


@pytest.mark.filterwarnings("ignore")
def test_what_fails_is_on_the_page_with_its_reason():
    good = row(lambda: gallery_steps.Case.of(gallery.build("MLP-Mixer"), gallery.SHAPE))
    bad = row(lambda: gallery_steps.Case.of(Refusing(), gallery.SHAPE))
    assert good["failed"] == {}
    assert {"gradient", "exported"} <= set(bad["failed"])
    text = page({"good": good, "bad": bad, "absent": row(lambda: [][0])})
    assert "3 networks, 1 with nothing that fails" in text
    assert re.search(r"\| good \| \de[-+]\d\d \|", text)
    assert "| bad | **no** | **no** |" in text
    assert "- bad, exported: ValueError: torch.export cannot export the model" in text
    assert "- absent, built: IndexError: list index out of range" in text
