"""Random shifts and flips, drawn from one key per example."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from innermax.utils.randomness import uniform


def augment(
    x: Float[Tensor, "b c h w"],
    key: Int[Tensor, " b"],
    *,
    shift: int = 0,
    flip: bool = False,
    back: bool = False,
) -> Float[Tensor, "b c h w"]:
    """x with half of the examples mirrored (flip) and each moved by up to ±shift pixels; zeros move in.

    key: int64 (B,) from `randomness.hash_keys`, the only thing an example's draws depend on; shift: 0…min(H, W) − 1;
    back: undoes it, except for pixels that were moved out. Raises ValueError for other shapes and shifts.
    """
    if x.ndim != 4 or key.shape != x.shape[:1]:
        raise ValueError(f"augment takes x (B, C, H, W) and key (B,), got {tuple(x.shape)} and {tuple(key.shape)}")
    height, width = x.shape[2:]
    if not 0 <= shift < min(height, width):
        raise ValueError(f"shift must be in 0…{min(height, width) - 1}, got {shift!r}")
    draws = uniform(key, 3)
    mirrored = (draws[:, 2] < 0.5)[:, None, None, None]
    if flip and not back:
        x = torch.where(mirrored, x.flip(-1), x)
    if shift:
        offsets = (draws[:, :2] * (2 * shift + 1)).to(torch.int64)  # into the padded image
        rows, columns = (2 * shift - offsets if back else offsets).unbind(1)
        windows = functional.pad(x, (shift,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view, no copies
        x = windows[torch.arange(len(x), device=x.device), :, rows, columns]
    if flip and back:
        x = torch.where(mirrored, x.flip(-1), x)
    return x
