"""A run, its gallery and its page, which tests share."""

import pytest
import torch

import innermax as im
from tests.helpers.reporting import ATTACKS, CLASSES, HOSTILE, THREAT


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run folder of two epochs on some digits, and its evaluation."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    data = im.load_data("digits")
    torch.manual_seed(0)
    model = im.build_model("digits-cnn", input_shape=data.train.shape)
    strategy = im.Dynamic(im.PGD(THREAT, 3))
    settings = {"data": "digits", "threat": {"norm": "linf", "eps": 0.15}}
    few = data.train[:600]
    options = {"epochs": 3, "batch_size": 64, "lr": 0.05, "progress": False, "settings": settings}
    run = im.train(model, few, strategy, validation_set=data.validation, run_dir=folder, **options)
    evaluation = im.evaluate(run.model, data.test[:160], ATTACKS)
    return run, data, evaluation


@pytest.fixture(scope="session")
def gallery(trained):
    run, data, evaluation = trained
    return im.gallery(run.model, data.test[:160], ATTACKS, evaluation, pictures=120, class_names=CLASSES)


@pytest.fixture(scope="session")
def page(trained, gallery, tmp_path_factory):
    """The report of two models, one of which is only an evaluation."""
    run, _, evaluation = trained
    path = tmp_path_factory.mktemp("page") / "report.html"
    shown = {HOSTILE: im.Exhibit(evaluation, run, gallery), "numbers alone": evaluation}
    assert im.report(shown, path) == path
    return path
