"""The arguments of an evaluation or a transfer, checked before the first search."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import get_args

import torch
from torch import Tensor, nn

from innermax.attacks.base import Attack
from innermax.data.image_set import ImageSet
from innermax.distributed.launch import check_devices
from innermax.distributed.process_group import Ranks, find_members
from innermax.evaluation.store import CLEAN, AttackRows
from innermax.models.wrappers import unwrap
from innermax.oracle.frozen import check_weights
from innermax.oracle.oracle import Precision
from innermax.threat import Threat
from innermax.utils.copying import copy_model
from innermax.utils.validation import check_count, summarize_error, unknown

TOLERANCE = 1e-6  # of a pixel: what `contains` allows
_RESERVED = (CLEAN, "worst_case")


def check_arguments(
    attacks: Mapping[str, Attack], batch_size: int, seed: int, quantize: int | None, precision: Precision
) -> None:
    """Raises ValueError or TypeError for an argument that is wrong whatever the others are."""
    if not isinstance(attacks, Mapping):
        raise TypeError(f"attacks must map names to attacks, got {type(attacks).__name__}")
    taken = dict.fromkeys(("index", "label", "clean_prediction", "clean_correct", "seed"), "")
    for name, attack in attacks.items():
        if not isinstance(name, str) or name == "" or name in _RESERVED:
            raise ValueError(f"an attack's name must be a text other than {', '.join(_RESERVED)}, got {name!r}")
        if not callable(attack) or not isinstance(getattr(attack, "threat", None), Threat):
            raise TypeError(f"attacks[{name!r}] must be an attack such as PGD(Linf(8 / 255)), got {attack!r}")
        for field in ("success", *(field.name for field in fields(AttackRows))):
            column = f"{name}_{field}"
            if column in taken:
                raise ValueError(f"attacks {taken[column]!r} and {name!r} would share the column {column}: rename one")
            taken[column] = name
    for argument, value in {
        "batch_size": batch_size,
        "quantize": 1 if quantize is None else quantize,
        "seed": seed,
    }.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{argument} must be an integer, got {value!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if quantize is not None and not 1 <= quantize <= 16:
        raise ValueError(f"quantize must be in 1…16 or None, got {quantize}")
    if precision not in get_args(Precision):
        raise unknown("precision", precision, get_args(Precision))


def check_models(argument: str, models: Mapping[str, nn.Module]) -> None:
    """Raises unless models maps at least one name to a model."""
    if not isinstance(models, Mapping):
        raise TypeError(f"{argument} must map names to models, got {type(models).__name__}")
    if not models:
        raise ValueError(f"{argument} must hold at least one model, got none")
    for name, model in models.items():
        if not isinstance(name, str) or name == "":
            raise ValueError(f"a model's name must be a text, got {name!r} in {argument}")
        with name_errors(argument.removesuffix("s"), name):
            unwrap(model)


@contextmanager
def name_errors(role: str, name: str) -> Iterator[None]:
    """Context manager that names the model in the errors raised inside."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{role} {name!r}: {error}") from error


def check_images(x: Tensor, attacks: Mapping[str, Attack], quantize: int | None) -> None:
    """Raises ValueError where clean images lie outside an attack's bounds or have more bits than `quantize` allows."""
    for name, attack in attacks.items():
        try:
            attack.threat.around(x)
        except ValueError as error:
            raise ValueError(f"attack {name!r} does not fit the images of test_set (x): {error}") from error
    if quantize is not None:
        levels = 2**quantize - 1
        if bool(((x * levels).round() / levels - x).abs().max() > TOLERANCE):
            raise ValueError(f"quantize={quantize} needs images of test_set whose values are multiples of 1/{levels}")


def place_model(
    model: nn.Module, images: ImageSet, device: torch.device | str | None
) -> tuple[nn.Module, torch.device]:
    """The model on its device, or a copy on the given one; and that device."""
    model = unwrap(model)
    check_weights(model)
    here = next((p.device for p in (*model.parameters(), *model.buffers())), None)
    if device is None:
        return model, here if here is not None else images.images.device
    try:
        device = torch.empty(0, device=device).device  # "cuda" is "cuda:0", or whichever is current
    except (RuntimeError, AssertionError, TypeError) as error:
        told = summarize_error(error).partition(": ")[2]
        raise ValueError(
            f"device must be None, where the model is, or one that torch has here, got {device!r}: {told}"
        ) from error
    if here in (None, device):
        return model, device
    return copy_model(model).to(device), device


def find_ranks(devices: int, device: torch.device) -> Ranks:
    """This process among those that share the batches. Raises ValueError where processes or devices are too few."""
    check_count(devices, "devices")
    ranks = find_members(devices, device)
    if ranks.count == 1:
        check_devices(devices, device)
    return ranks
