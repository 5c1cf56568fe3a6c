"""The same attacks at several sizes of the perturbation, each an evaluation of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from innermax.attacks.base import Attack, BaseAttack
from innermax.attacks.targeted import Targeted
from innermax.data.readers import as_image_set
from innermax.evaluation.arguments import check_arguments, check_images
from innermax.evaluation.evaluate import evaluate
from innermax.evaluation.result import Evaluation
from innermax.utils.validation import is_number


def evaluate_each_eps(
    model: nn.Module,
    test_set: Any,
    attacks: Mapping[str, Attack],
    eps: Sequence[float],
    *,
    rows_dir: str | Path | None = None,
    **options: Any,
) -> dict[float, Evaluation]:
    """`im.evaluate` at each of several ε: the attacks search within each, one evaluation after the other.

    Of the attacks only the threat model's ε changes: step sizes of None or "annealed" follow it, numbers stay as they
    are. Each ε is searched afresh. For accuracy at every ε from one search there are FMN and `Evaluation.curve`.

    Args:
        model: as for `im.evaluate`.
        test_set: as for `im.evaluate`.
        attacks: attacks by name, at least one, whatever their ε; dataclasses with a field `threat`, as all attacks of
            innermax are.
        eps: at least one size; each only once.
        rows_dir: folder for the rows, in which each ε has a folder such as eps-0.1.
        **options: others of `im.evaluate`.

    Returns:
        The evaluation at each ε, in their order.

    Raises:
        ValueError, TypeError: an argument is none of these, an ε does not fit the images' bounds, or as `im.evaluate`.
    """
    images = as_image_set(test_set)
    found = resize_attacks(attacks, eps)
    x, _ = images.batch(torch.arange(1, device=images.images.device))
    for sized in found.values():  # before the first long search
        check_images(x, sized, None)
    return {
        size: evaluate(
            model, images, sized, rows_dir=None if rows_dir is None else name_folder(rows_dir, size), **options
        )
        for size, sized in found.items()
    }


def resize_attacks(attacks: Mapping[str, Attack], eps: Sequence[float]) -> dict[float, dict[str, Attack]]:
    """The attacks at each ε. Raises as `evaluate_each_eps`."""
    check_arguments(attacks, 1, 0, None, "float32")
    if not attacks:
        raise ValueError("attacks must hold at least one attack, got none")
    check_sizes(eps, "eps")
    for name, attack in attacks.items():
        if not is_dataclass(attack):
            raise TypeError(f"attacks[{name!r}] must be a dataclass, whose threat can be replaced, got {attack!r}")
    found = {}
    for size in eps:
        sized = {name: _resize(attack, size) for name, attack in attacks.items()}
        found[next(iter(sized.values())).threat.eps] = sized
    return found


def check_sizes(eps: Sequence[float], name: str) -> None:
    """Raises unless eps holds at least one number, and none twice."""
    if isinstance(eps, str) or not hasattr(eps, "__len__") or not all(map(is_number, eps)):
        raise TypeError(f"{name} must be a list of numbers, got {eps!r}")
    if len(eps) == 0 or len({float(size) for size in eps}) < len(eps):
        raise ValueError(f"{name} must hold at least one number and none twice, got {list(eps)}")


def name_folder(folder: str | Path, eps: float) -> Path:
    """Where the rows of an ε are, in the folder of all."""
    return Path(folder) / f"eps-{float(eps)!r}"


def _resize(attack: Attack, eps: float) -> Attack:
    if isinstance(attack, Targeted):
        return replace(attack, attack=cast(BaseAttack, _resize(attack.attack, eps)))
    threat = replace(attack.threat, eps=eps)
    return cast(Attack, replace(cast(Any, attack), threat=threat))
