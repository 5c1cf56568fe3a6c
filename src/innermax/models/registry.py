"""Networks by name; a new one is an entry in MODELS: (num_classes, input_shape, **options) → nn.Module."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from innermax.models.cnn import cifar_cnn, digits_cnn, mnist_cnn
from innermax.models.resnet import preact_resnet18, resnet50, wideresnet
from innermax.models.wrappers import Normalize
from innermax.utils.validation import unknown

_MOST_PIXELS = 4096 * 4096  # as for images that are read
MODELS: dict[str, Callable[..., nn.Module]] = {
    "mnist-cnn": mnist_cnn,
    "cifar-cnn": cifar_cnn,
    "digits-cnn": digits_cnn,
    "preact-resnet18": preact_resnet18,
    "wideresnet": wideresnet,
    "resnet50": resnet50,
}


def build_model(
    name: str,
    *,
    num_classes: int = 10,
    input_shape: Sequence[int],
    normalize: Sequence[Sequence[float]] | None = None,
    **options: Any,
) -> nn.Module:
    """A freshly initialised network: float images (B, C, H, W) in [0, 1] → logits (B, num_classes).

    The model's `config` is a JSON-serialisable dict {"model", "num_classes", "input_shape", options…}:
    `build_model(config.pop("model"), **config)` builds the network again.

    Args:
        name: "mnist-cnn" and "cifar-cnn", the paper's; "digits-cnn", a small one for 8×8 images; "preact-resnet18",
            "wideresnet" or "resnet50".
        num_classes: ≥ 2.
        input_shape: (C, H, W).
        normalize: (mean, std), one number per channel each, applied inside the model.
        options: the network's own; of "wideresnet" depth (34) and width (10).

    Raises:
        ValueError: the name or an option is unknown, a value is out of range, or the network cannot take the images.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    shape = list(input_shape)
    if len(shape) != 3 or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(f"input_shape must be (C, H, W), three positive integers, got {tuple(shape)}")
    if shape[1] * shape[2] > _MOST_PIXELS:
        raise ValueError(f"input_shape must be at most {_MOST_PIXELS:,} pixels, got {tuple(shape)}")
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"num_classes must be an integer ≥ 2, got {num_classes!r}")
    settings = _complete_options(name, options)
    model = MODELS[name](num_classes, shape, **settings)
    config: dict[str, Any] = {"model": name, "num_classes": num_classes, "input_shape": shape, **settings}
    if normalize is not None:
        mean, std = _read_normalize(normalize, channels=shape[0])
        model = nn.Sequential(OrderedDict(normalize=Normalize(mean, std), network=model))
        config["normalize"] = [mean, std]
    model.config = config  # type: ignore[assignment]  # a plain attribute; nn.Module declares tensors and modules only
    return model


def _complete_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The network's options, defaults included, so that a config keeps its meaning if defaults change."""
    parameters = list(inspect.signature(MODELS[name]).parameters.values())[2:]
    known = {parameter.name: parameter for parameter in parameters}
    for option, value in options.items():
        if option not in known:
            raise unknown(f"option of {name}", option, [*known, "normalize"])
        if known[option].annotation is int and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"{option} must be an integer, got {value!r}")
    return {key: options.get(key, parameter.default) for key, parameter in known.items()}


def _read_normalize(normalize: Sequence[Sequence[float]], channels: int) -> tuple[list[float], list[float]]:
    """(mean, std), with one number per channel each. Raises ValueError for other lengths."""
    if len(normalize) != 2:
        raise ValueError(f"normalize must be (mean, std), got {len(normalize)} values")
    mean, std = ([float(value) for value in values] for values in normalize)
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"normalize must hold {channels} means and stds, one per channel, got {len(mean)} and {len(std)}"
        )
    return mean, std
