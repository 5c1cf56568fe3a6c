"""The copy of a model that an attack asks: frozen, in evaluation mode."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from innermax.utils.copying import copy_model


def frozen_copy(model: nn.Module, share: bool) -> nn.Module:
    """A copy in evaluation mode whose parameters take no gradient; share: on the model's own parameters.

    Raises:
        TypeError: the model cannot be copied.
        ValueError: it has no weights yet.
    """
    check_weights(model)
    shared: dict[Tensor, Tensor] = {}
    if share:  # autograd refuses parameters that were made in inference mode
        own = (p for p in model.parameters() if not p.is_inference())
        shared = {p: nn.Parameter(p.detach(), requires_grad=False) for p in own}
    return copy_model(model, shared).requires_grad_(False).eval()


def check_weights(model: nn.Module) -> None:
    """Raises ValueError where a model has no weights yet."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"model must have its weights, got {name!r} of a lazy layer: pass it a batch first")
        if tensor.is_meta:
            raise ValueError(f"model must have its weights, got {name!r} on the meta device: load the weights first")


def find_unkept_statistics(model: nn.Module) -> str | None:
    """The first BatchNorm without running statistics, which may mix the examples of a batch; None: there is none."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            return f"{name!r} ({type(module).__name__})"
    return None
