"""What loggers are given: the rows of metrics.jsonl, distributions of FOSC, pictures of attacked images."""

import json
import os
import sqlite3
import sys
import time
from types import ModuleType

import numpy as np
import pytest
import torch
from lightning_fabric.loggers import CSVLogger

import innermax as im
from innermax.training.loggers import draw_picture, epoch_logger

DATA = im.load_data("digits")
STRATEGY = im.Standard(im.PGD(im.Linf(0.15), steps=2))


def train(**options):
    torch.manual_seed(0)
    model = im.build_model("digits-cnn", input_shape=DATA.train.shape)
    options = {"epochs": 2, "batch_size": 64, "lr": 0.05, "progress": False} | options
    return im.train(model, DATA.train[:128], STRATEGY, **options)


def scalars(row):
    return {name: value for name, value in row.items() if isinstance(value, int | float) and name != "epoch"}


def test_any_logger_gets_every_number_and_how_it_ended(tmp_path):
    """CSVLogger is Fabric's own and takes nothing but numbers."""
    run = train(logger=CSVLogger(tmp_path, "mine", ""))
    lines = (tmp_path / "mine" / "metrics.csv").read_text().splitlines()
    assert set(lines[0].split(",")) == {"step", *scalars(run.history[0])}
    assert len(lines) == 3


class Recorded:
    """A logger of a user's own."""

    def __init__(self):
        self.told = []

    def log_metrics(self, metrics, step=None):
        self.told.append((step, metrics))

    def log_hyperparams(self, params):
        self.told.append(params["training"]["epochs"])

    def finalize(self, status):
        self.told.append(status)


def test_a_logger_of_ones_own():
    logger = Recorded()
    run = train(logger=logger)
    assert logger.told == [2, (0, scalars(run.history[0])), (1, scalars(run.history[1])), "success"]


def test_a_failed_training_is_told():
    logger = Recorded()
    with pytest.raises(FloatingPointError):
        train(logger=logger, lr=1e30)
    assert logger.told[-1] == "failed"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_is_trained(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning.loggers", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ValueError, match=rf"logger '{name}' needs pip install 'innermax\[loggers\]'"):
        train(logger=name, run_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_picture():
    x = torch.tensor([[[[0.0, 0.5], [1.0, 0.25]]], [[[1.0, 1.0], [0.0, 0.0]]]])
    x_adv = x + torch.tensor([[[[0.1, 0.0], [-0.05, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    shown = draw_picture(x, x_adv)
    assert shown.shape == (2 * 64, 3 * 64, 1)
    small = shown[::32, ::32, 0]
    assert small[:2].tolist() == [[0, 128, 255, 128, 26, 128], [255, 64, 64, 128, 242, 64]]
    assert small[2:].tolist() == [[255, 255, 128, 128, 255, 255], [0, 0, 128, 128, 0, 0]]
    assert draw_picture(torch.rand(2, 3, 100, 70), torch.rand(2, 3, 100, 70)).shape == (200, 210, 3)
    assert draw_picture(torch.rand(2, 2, 8, 8), torch.rand(2, 2, 8, 8)) is None
    assert draw_picture(torch.rand(2, 5), torch.rand(2, 5)) is None


def test_pictures_and_logging_change_no_number(tmp_path):
    pytest.importorskip("tensorboard")
    plain, logged = train(), train(run_dir=tmp_path / "run", logger="tensorboard")
    timings = {"seconds", "images_per_second"}
    for one, other in zip(plain.history, logged.history, strict=True):
        assert {k: v for k, v in one.items() if k not in timings} == {
            k: v for k, v in other.items() if k not in timings
        }


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(run_dir=tmp_path / "run", logger="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"histograms": 0, "images": 0}).Reload()
    assert set(scalars(run.history[0])) <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Histograms("fosc distribution")] == [0, 1]
    told = events.Histograms("fosc distribution")[1].histogram_value
    percentiles = run.history[1]["fosc_percentiles"]
    assert (told.min, told.max, told.num) == (pytest.approx(percentiles[0]), pytest.approx(percentiles[-1]), 101)
    image = events.Images("attacked")[0]
    assert (image.height, image.width) == (8 * 64, 3 * 64)
    assert "hp_metric" not in events.Tags()["scalars"]


@pytest.mark.filterwarnings("default")
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("pytorch_lightning")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    train(run_dir=folder, logger="wandb", epochs=1)
    name = json.loads((folder / "logger.json").read_text())["wandb"]
    (written,) = folder.glob("wandb/offline-run-*")
    assert written.name.endswith(name)
    (log,) = written.glob("run-*.wandb")
    words = (b"fosc distribution", b"attacked", b"images_per_second")
    until = time.monotonic() + 20  # another process writes it
    while not all(word in log.read_bytes() for word in words) and time.monotonic() < until:
        time.sleep(0.1)
    assert all(word in log.read_bytes() for word in words)
    assert list(written.glob("files/media/images/attacked_*.png"))
    # A training that goes on logs to the same run.
    with epoch_logger("wandb", folder, {}) as write:
        write({"epoch": 1, "loss": 0.25}, None)
    assert all(path.name.endswith(name) for path in folder.glob("wandb/offline-run-*"))
    assert json.loads((folder / "logger.json").read_text())["wandb"] == name


@pytest.mark.filterwarnings("default")
def test_mlflow_in_a_file(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("pytorch_lightning")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "run"
    run = train(run_dir=folder, logger="mlflow", epochs=1)
    name = json.loads((folder / "logger.json").read_text())["mlflow"]
    with sqlite3.connect(folder / "mlflow.db") as database:
        found = dict(database.execute("SELECT key, value FROM metrics WHERE run_uuid = ?", (name,)))
        (status,) = database.execute("SELECT status FROM runs WHERE run_uuid = ?", (name,)).fetchone()
    database.close()
    assert found == pytest.approx(scalars(run.history[0]))
    assert status == "FINISHED"
    assert list((folder / "mlflow").rglob("*attacked*.png"))
    # A training that goes on logs to the same run.
    with epoch_logger("mlflow", folder, {}) as write:
        write({"epoch": 1, "loss": 0.25}, np.zeros((8, 8, 1), np.uint8))
    with sqlite3.connect(folder / "mlflow.db") as database:
        rows = database.execute("SELECT step FROM metrics WHERE key = 'loss' AND run_uuid = ?", (name,)).fetchall()
    database.close()
    assert sorted(step for (step,) in rows) == [0, 1]


@pytest.fixture
def no_tracking(monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("pytorch_lightning")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.filterwarnings("default")
def test_mlflow_keeps_each_run_in_its_own_folder(no_tracking, tmp_path):
    """Whatever the folder is called; one opened after the other, and a first one again."""
    import mlflow

    place = mlflow.get_tracking_uri()
    names = ("robust?", "50%25 of ε")
    for number, name in enumerate((*names, names[0])):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        with epoch_logger("mlflow", folder, {}) as write:
            write({"epoch": number, "loss": 0.5}, np.zeros((8, 8, 1), np.uint8))
        assert "MLFLOW_TRACKING_URI" not in os.environ
    assert mlflow.get_tracking_uri() == place
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(names)
    for name, steps in zip(names, ([0, 2], [1]), strict=True):
        with sqlite3.connect(tmp_path / "runs" / name / "mlflow.db") as database:
            assert sorted(step for (step,) in database.execute("SELECT step FROM metrics")) == steps
        database.close()
        assert list((tmp_path / "runs" / name / "mlflow").rglob("*attacked*.png"))


@pytest.mark.filterwarnings("default")
def test_mlflow_runs_that_are_not_there(no_tracking, tmp_path):
    (tmp_path / "logger.json").write_text('{"mlflow": "0123456789abcdef0123456789abcdef"}')
    message = r"logger 'mlflow' cannot be opened: .*0123456789abcdef.*; .*logger.json names the run to go on with"
    with pytest.raises(ValueError, match=message), epoch_logger("mlflow", tmp_path, {}):
        pass
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_file_of_the_users_own_with_a_loggers_name(name, tmp_path, monkeypatch):
    own = ModuleType(name)
    own.__file__ = f"/home/me/{name}.py"
    monkeypatch.setitem(sys.modules, name, own)
    message = rf"logger '{name}' needs .*/home/me/{name}\.py goes by the name of the library {name}: rename it"
    with pytest.raises(ValueError, match=message):
        train(logger=name, run_dir=tmp_path / "run")


def test_a_named_logger_that_fails_does_not_end_the_training(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    def fails(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(TensorBoardLogger, "log_metrics", fails)
    with pytest.warns(UserWarning, match=r"^logger 'tensorboard' failed: OSError: no space left; metrics.jsonl"):
        run = train(logger="tensorboard", run_dir=tmp_path / "run")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(run.history) == 2
