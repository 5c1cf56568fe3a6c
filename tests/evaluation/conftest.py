"""A robust model of digits and images of them, for the audit."""

import pytest
import torch

import innermax as im


@pytest.fixture(scope="session")
def images():
    return im.load_data("digits", validation=0).test[:60]


@pytest.fixture(scope="session")
def trained():
    """A robust model of digits, two seconds old."""
    data = im.load_data("digits", validation=0)
    torch.manual_seed(0)
    model = im.build_model("digits-cnn", input_shape=data.train.shape)
    attack = im.PGD(im.Linf(0.15), steps=5, step_size=0.05)
    return im.train(
        model, data.train, im.Standard(attack), epochs=4, lr=0.05, precision="float32", progress=False
    ).model.eval()
