"""What a training writes beside its run folder: TensorBoard, Weights & Biases, MLflow, or any logger of Lightning's.

The rows of metrics.jsonl go through the loggers of Lightning Fabric and PyTorch Lightning, with the distribution of
FOSC and a picture of attacked examples where the logger takes them.
"""

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from innermax.utils.files import write_json
from innermax.utils.optional import find_loaded, import_library
from innermax.utils.serialization import parse_json
from innermax.utils.validation import summarize_error

LoggerName = Literal["tensorboard", "wandb", "mlflow"]
FILE = "logger.json"  # in a run folder: the run's id at each logger, so that a resumed run is logged as the same one
_PICTURE = 64  # pixels: the least height of an image in a picture
_PERCENTILES = "_percentiles"  # the end of the name of a measure that is a list of percentiles


@runtime_checkable
class Logger(Protocol):
    """What a training asks of a logger, as Lightning Fabric's and PyTorch Lightning's have it."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...
    def log_hyperparams(self, params: dict[str, Any]) -> None: ...
    def finalize(self, status: str) -> None: ...


Picture = npt.NDArray[np.uint8]
Write = Callable[[Mapping[str, Any], Picture | None], None]


@contextmanager
def epoch_logger(
    logger: LoggerName | Logger | None, folder: Path | None, configuration: Mapping[str, Any]
) -> Iterator[Write]:
    """Context manager: yields a function that logs an epoch's row and a uint8 picture (H, W, C), or None.

    Args:
        logger: a name's logger writes into the run folder, or where the environment says (WANDB_…, MLFLOW_…).
        folder: the run folder.
        configuration: what identifies the run.

    Raises:
        ValueError: a name was given without a run folder, its packages are not installed, or it cannot be opened.
    """
    if logger is None:
        yield lambda row, picture: None
        return
    if not isinstance(logger, str):
        with _finalize(logger):
            yield _opened(logger, configuration)
        return
    if folder is None:
        raise ValueError(f"logger {logger!r} writes into the run folder: give run_dir")
    with ExitStack() as stack:
        opened = _open_logger(logger, folder, stack)
        stack.enter_context(_finalize(opened, partial(_warn_of_failures, logger)))
        write = _opened(opened, configuration)

        def write_or_warn(row: Mapping[str, Any], picture: Picture | None) -> None:
            with _warn_of_failures(logger):
                write(row, picture)

        yield write_or_warn


def _opened(logger: Logger, configuration: Mapping[str, Any]) -> Write:
    with suppress(NotImplementedError):  # Fabric's CSVLogger takes none
        logger.log_hyperparams(dict(configuration))
    return partial(_write, logger)


@contextmanager
def _finalize(logger: Logger, guard: Callable[[], AbstractContextManager[None]] = nullcontext[None]) -> Iterator[None]:
    """Context manager: the logger is told, within the guard, how it ended."""
    status = "failed"
    try:
        yield
        status = "success"
    finally:
        with guard():
            logger.finalize(status)


@contextmanager
def _warn_of_failures(name: str) -> Iterator[None]:
    """Context manager: a logger that fails, for want of a connection or of space, is no reason to lose a training."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  the logger's own
        told = f"logger {name!r} failed: {summarize_error(error)}; metrics.jsonl in the run folder has every epoch"
        warnings.warn(told, stacklevel=4)


def draw_picture(x: Tensor, x_adv: Tensor) -> Picture | None:
    """Draws a row per example: the clean image, the perturbation (grey is none), and the adversarial image.

    x, x_adv: float (B, C, H, W) in [0, 1]. The picture is uint8 (B·H', 3·W', C), small images enlarged; None where x
    are not images of one or three channels.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        return None
    added = x_adv - x
    largest = added.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    rows = torch.cat([x, 0.5 + added / (2 * largest), x_adv], dim=3)
    pixels: Picture = (rows.clamp(0, 1) * 255).round().byte().cpu().permute(0, 2, 3, 1).flatten(0, 1).numpy()
    scale = -(-_PICTURE // x.shape[2])
    return pixels.repeat(scale, 0).repeat(scale, 1)


def _open_logger(name: LoggerName, folder: Path, stack: ExitStack) -> Logger:
    """The logger of a name, on the run to which this folder was logged before, if it was.

    stack: closed once the logger has ended.
    """
    known = None if name == "tensorboard" else _known_run(folder, name)
    try:
        match name:
            case "tensorboard":
                with suppress(ModuleNotFoundError):  # tensorboardX will do, too
                    import_library("tensorboard", "__version__")
                from lightning_fabric.loggers.tensorboard import TensorBoardLogger

                return cast(Logger, TensorBoardLogger(folder, "tensorboard", "", default_hp_metric=False))
            case "wandb":
                logger = _wandb(folder, known, stack)
            case "mlflow":
                logger = _mlflow(folder, known, stack)
    except ImportError as error:
        raise ValueError(f"logger {name!r} needs pip install 'innermax[loggers]': {summarize_error(error)}") from error
    except Exception as error:  # the logger's own: no such server, run, or permission
        reason = f"logger {name!r} cannot be opened: {summarize_error(error)}"
        where = f"; {folder / FILE} names the run to go on with: without it, a new one is made" if known else ""
        raise ValueError(reason + where) from error
    write_json(folder / FILE, {name: logger.version})
    return cast(Logger, logger)


def _known_run(folder: Path, name: str) -> str | None:
    """The id of the folder's run at that logger."""
    path = folder / FILE
    ids = parse_json(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = ids.get(name) if isinstance(ids, dict) else None
    if known is not None and not isinstance(known, str):
        raise ValueError(f"{path} is damaged: the run's id at {name} is no text")
    return known


def _wandb(folder: Path, known: str | None, stack: ExitStack) -> Any:
    wandb = import_library("wandb", "init")
    from pytorch_lightning.loggers import WandbLogger

    if wandb.run is None:  # otherwise a run of the caller's is logged to, and stays open
        stack.callback(wandb.finish)  # else the next run of this process would be logged as this one
    project = os.environ.get("WANDB_PROJECT", "innermax")
    logger = WandbLogger(folder.resolve().name, save_dir=folder, id=known, project=project)
    logger.experiment  # noqa: B018  opens the run, which has no id before
    return logger


def _mlflow(folder: Path, known: str | None, stack: ExitStack) -> Any:
    import_library("mlflow", "set_tracking_uri")
    from pytorch_lightning.loggers import MLFlowLogger

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    artifacts = None
    if uri is None:
        uri, artifacts = _database(folder.absolute() / "mlflow.db", stack), (folder.absolute() / "mlflow").as_uri()
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "innermax")
    name = folder.resolve().name
    logger = MLFlowLogger(experiment, name, run_id=known, tracking_uri=uri, artifact_location=artifacts)
    with _tracking_kept():
        logger.experiment  # noqa: B018  opens the run
    return logger


def _database(file: Path, stack: ExitStack) -> str:
    """The URI of a SQLite file, at its own path or, until the stack is closed, at one that fits into a URI."""
    make_url = importlib.import_module("sqlalchemy").make_url
    if make_url(f"sqlite:///{file}").database != str(file):  # it holds ? or %
        link = Path(stack.enter_context(TemporaryDirectory(prefix="innermax-"))) / "run"
        link.symlink_to(file.parent, target_is_directory=True)
        file = link / file.name
    return f"sqlite:///{file}"


@contextmanager
def _tracking_kept() -> Iterator[None]:
    """Context manager: afterwards MLflow's own place of tracking, and its variable, are as they were."""
    service = "mlflow.tracking._tracking_service.utils"
    told, variable = find_loaded(service, "_tracking_uri"), os.environ.get("MLFLOW_TRACKING_URI")
    try:
        yield
    finally:
        importlib.import_module("mlflow").set_tracking_uri(told)
        if variable is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = variable


def _write(logger: Logger, row: Mapping[str, Any], picture: Picture | None) -> None:
    """Logs numbers to any logger, distributions and the picture to those that take them."""
    step = int(row["epoch"])
    numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
    logger.log_metrics({name: value for name, value in numbers.items() if name != "epoch"}, step=step)
    samples = {name.removesuffix(_PERCENTILES): np.array(v) for name, v in row.items() if name.endswith(_PERCENTILES)}
    experiment: Any = getattr(logger, "experiment", None)
    match type(experiment).__module__.split(".")[0], experiment:
        case (("torch" | "tensorboardX"), writer):
            for name, sample in samples.items():
                writer.add_histogram(f"{name} distribution", sample, step)
            if picture is not None:
                writer.add_image("attacked", picture, step, dataformats="HWC")
        case "wandb", run:
            import wandb

            more: dict[str, Any] = {f"{name} distribution": wandb.Histogram(s) for name, s in samples.items()}
            more |= {} if picture is None else {"attacked": wandb.Image(picture)}
            run.log(more | {"trainer/global_step": step})
        case "mlflow", client if picture is not None:
            client.log_image(cast(Any, logger).run_id, picture, key="attacked", step=step)
