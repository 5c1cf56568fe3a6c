"""A model as a file that needs no innermax: ONNX, or a program of torch.export; checked before it is there."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from innermax.models.files import find_description
from innermax.models.wrappers import unwrapped
from innermax.utils.copying import copy_model
from innermax.utils.randomness import hash_keys, uniform
from innermax.utils.validation import summarize_error, unknown

Answer = Callable[[Tensor], Tensor]
_BATCHES = (1, 2, 5)  # sizes at which the file has to answer as the model does
_CLOSE = 1e-4  # of the largest logit


def export_model(model: nn.Module, path: str | Path, *, input_shape: Sequence[int] | None = None) -> Path:
    """Writes a model for batches of any size, in evaluation mode, and compares its logits with the model's.

    The file takes float32 images (B, *input_shape), "images", and returns logits (B, classes), "logits".

    Args:
        model: any nn.Module with logits, in any mode; left exactly as found.
        path: ends in .pt2 for `torch.export.save`, or in .onnx, which needs pip install 'innermax[onnx]'.
        input_shape: of one input; known of models that innermax built.

    Raises:
        ValueError: path has another ending, input_shape is not known, packages are missing, torch cannot export the
            model, or the file answers otherwise than the model. Nothing is left behind then.
    """
    path = Path(path)
    formats = {".pt2": _to_program, ".onnx": _to_onnx}
    if path.suffix not in formats:
        raise unknown("ending of path", path.suffix, formats)
    shape = _shape(model, input_shape)
    network = copy_model(unwrapped(model)).cpu().requires_grad_(False).eval()
    partial = path.with_name(f"{path.stem}.part{path.suffix}")
    partial.unlink(missing_ok=True)  # a link there would lead elsewhere
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about torch's own
            answer = formats[path.suffix](network, _images(2, shape), partial)
            _compare(network, answer, shape, path)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _to_program(network: nn.Module, example: Tensor, path: Path) -> Answer:
    """Writes a program of torch.export; how the written one answers."""
    try:
        program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, path)
    except OSError:
        raise
    except Exception as error:  # whatever tracing raises
        raise ValueError(f"torch.export cannot export the model: {summarize_error(error)}") from error
    answer: Answer = torch.export.load(path).module()
    return answer


def _to_onnx(network: nn.Module, example: Tensor, path: Path) -> Answer:
    """Writes an ONNX file; how ONNX Runtime answers."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx.export asks for it
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


def _compare(network: nn.Module, answer: Answer, shape: Sequence[int], path: Path) -> None:
    """Raises ValueError unless the file answers as the network does."""
    for size in _BATCHES:
        x = _images(size, shape)
        try:
            theirs, ours = answer(x), network(x)
        except Exception as error:  # a batch size that was fixed comes as anything
            raise ValueError(f"{path.name} does not take {size} images: {summarize_error(error)}") from error
        difference = float((theirs - ours).abs().max()) if theirs.shape == ours.shape else math.inf
        if not difference <= _CLOSE * (1 + float(ours.abs().max())):
            raise ValueError(f"{path.name} would answer otherwise than the model: logits differ by {difference:.1e}")


def _images(size: int, shape: Sequence[int]) -> Tensor:
    """(size, *shape) inputs in [0, 1]."""
    return uniform(hash_keys(0, torch.arange(size)), math.prod(shape)).reshape(size, *shape)


def _shape(model: nn.Module, told: Sequence[int] | None) -> tuple[int, ...]:
    shape = told if told is not None else (find_description(model) or {}).get("input_shape")
    if shape is None:
        raise ValueError("input_shape must be given for a model that innermax did not build, such as (3, 32, 32)")
    if not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(f"input_shape must be positive integers, got {tuple(shape)}")
    return tuple(shape)
