"""Exports a model to a file that needs no innermax, ONNX or torch.export, and checks what the file computes."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from innermax.models.files import find_description
from innermax.models.wrappers import unwrap
from innermax.utils.copying import copy_model
from innermax.utils.optional import import_library
from innermax.utils.randomness import hash_keys, uniform
from innermax.utils.validation import check_logits, summarize_error, unknown

Predict = Callable[[Tensor], Tensor]
_BATCHES = (1, 2, 5)  # sizes at which the file must compute what the model does
_CLOSE = 1e-4  # of the largest logit


def export_model(model: nn.Module, path: str | Path, *, input_shape: Sequence[int] | None = None) -> Path:
    """Writes a model in evaluation mode, for batches of any size, and compares the file's logits with the model's.

    The file takes "images", float32 (B, *input_shape), and returns "logits", (B, classes).

    Args:
        model: any nn.Module with logits, in any mode; left exactly as found.
        path: ends in .pt2 for `torch.export.save`, or in .onnx, which needs pip install 'innermax[onnx]'.
        input_shape: of one input; None: as innermax built the model.

    Raises:
        ValueError: path has another ending, input_shape is not known, packages are missing, torch cannot export the
            model, or the file's logits differ from the model's. Then no file is left behind.
    """
    path = Path(path)
    formats = {".pt2": _write_program, ".onnx": _write_onnx}
    if path.suffix not in formats:
        raise unknown("ending of path", path.suffix, formats)
    shape = _find_shape(model, input_shape)
    network = _OnFloat32(copy_model(unwrap(model)).cpu().requires_grad_(False)).eval()
    partial = path.with_name(f"{path.stem}.part{path.suffix}")
    partial.unlink(missing_ok=True)  # writing through a link would change another file
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own code
            check_logits(network(_draw_images(2, shape)), 2)
            predict = formats[path.suffix](network, _draw_images(2, shape), partial)
            _compare(network, predict, shape, path)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _write_program(network: nn.Module, example: Tensor, path: Path) -> Predict:
    """Writes a program of torch.export; a function that runs the written program."""
    try:
        program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, path)
    except OSError:
        raise
    except Exception as error:  # whatever tracing raises
        raise ValueError(f"torch.export cannot export the model: {summarize_error(error)}") from error
    predict: Predict = torch.export.load(path).module()
    return predict


def _write_onnx(network: nn.Module, example: Tensor, path: Path) -> Predict:
    """Writes an ONNX file; a function that runs it in ONNX Runtime."""
    try:
        onnxruntime = import_library("onnxruntime", "InferenceSession")
        import_library("onnxscript", "onnx_opset")  # torch.onnx.export asks for it
    except ImportError as error:
        raise ValueError(f"ONNX needs pip install 'innermax[onnx]': {summarize_error(error)}") from error
    options: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "external_data": False}
    try:
        torch.onnx.export(
            network, (example,), path, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False, **options
        )
    except OSError:
        raise
    except Exception as error:  # whatever tracing raises
        raise ValueError(f"torch.onnx cannot export the model: {summarize_error(error)}") from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


class _OnFloat32(nn.Module):
    """A network of any precision for float32 images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)

    def forward(self, x: Tensor) -> Any:
        return self.network(x.to(self.dtype))


def _compare(network: nn.Module, predict: Predict, shape: Sequence[int], path: Path) -> None:
    """Raises ValueError unless the file computes the network's logits."""
    for size in _BATCHES:
        x = _draw_images(size, shape)
        try:
            theirs, ours = predict(x), network(x)
        except Exception as error:  # a fixed batch size raises anything
            raise ValueError(f"{path.name} does not take {size} images: {summarize_error(error)}") from error
        difference = float((theirs - ours).abs().max()) if theirs.shape == ours.shape else math.inf
        if not difference <= _CLOSE * (1 + float(ours.abs().max())):
            raise ValueError(f"{path.name} must have the model's logits, got a difference of {difference:.1e}")


def _draw_images(size: int, shape: Sequence[int]) -> Tensor:
    """(size, *shape) inputs in [0, 1]."""
    return uniform(hash_keys(0, torch.arange(size, device="cpu")), math.prod(shape)).reshape(size, *shape)


def _find_shape(model: nn.Module, told: Sequence[int] | None) -> tuple[int, ...]:
    shape = told if told is not None else (find_description(model) or {}).get("input_shape")
    if shape is None:
        raise ValueError("input_shape must be given for a model that innermax did not build, such as (3, 32, 32)")
    if not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(f"input_shape must be positive integers, got {tuple(shape)}")
    return tuple(shape)
