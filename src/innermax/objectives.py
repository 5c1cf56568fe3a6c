"""Objectives: what training minimises, a function of the network, the clean and the attacked batch."""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from innermax.utils.validation import check_logits, unknown

# (model, x, y, x_adv, epoch) → the scalar to minimise and the (B, classes) logits at x_adv
Objective = Callable[[nn.Module, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def cross_entropy(
    model: nn.Module, x: Float[Tensor, "b ..."], y: Int[Tensor, " b"], x_adv: Float[Tensor, "b ..."], epoch: int
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy on the attacked batch (Wang et al. 2019, Eq. 1)."""
    logits = check_logits(model(x_adv), len(y), "in training mode, the model")
    return F.cross_entropy(logits.float(), y), logits


def loss_weighted(
    model: nn.Module, x: Float[Tensor, "b ..."], y: Int[Tensor, " b"], x_adv: Float[Tensor, "b ..."], epoch: int
) -> tuple[Tensor, Tensor]:
    """From the second epoch on, weights each attacked example's cross-entropy by itself; weights get no gradient.

    This is in the code released with Wang et al. 2019, not in the paper.
    """
    logits = check_logits(model(x_adv), len(y), "in training mode, the model")
    losses = F.cross_entropy(logits.float(), y, reduction="none")
    return (losses if epoch == 0 else losses * losses.detach()).mean(), logits


# By name, for `im.train`, the command line and recipes.
OBJECTIVES: dict[str, Objective] = {"cross_entropy": cross_entropy, "loss_weighted": loss_weighted}


def find_objective(objective: str | Objective) -> Objective:
    """The objective of a name in OBJECTIVES, or the function itself.

    Raises:
        ValueError, TypeError: the name is unknown, or it is neither a name nor a function.
    """
    if callable(objective):
        return objective
    if not isinstance(objective, str):
        raise TypeError(f"objective must be a name or a function, got {objective!r}")
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    return OBJECTIVES[objective]
