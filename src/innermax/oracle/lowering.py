"""bf16, but for the layers that see the images: it would round a small perturbation away."""

from typing import Any

import torch
from torch import Tensor, nn

from innermax.utils.copying import copy_model


def image_layers(network: nn.Module, x: Tensor) -> tuple[str, ...]:
    """The names of the layers that are given images, as they are or transformed without parameters.

    x: (B, *features) a few inputs.

    Raises:
        ValueError: there is no such layer with parameters.
        Exception: whatever the network raises.
    """
    probe = copy_model(network)
    for parameter in probe.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    seen: list[nn.Module] = []

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        given = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
        if given and not any(value.requires_grad for value in given):  # it depends on no parameter
            seen.append(module)

    names = {module: name for name, module in probe.named_modules() if not list(module.children())}
    for leaf in names:
        leaf.register_forward_pre_hook(look)
    with torch.inference_mode(False), torch.enable_grad():
        probe(x.clone())
    if not any(list(module.parameters()) for module in seen):
        raise ValueError("no layer with parameters is given the images")
    return tuple(names[module] for module in dict.fromkeys(seen))


def lower(network: nn.Module, x: Tensor) -> nn.Module:
    """The network converted to bf16, but for the layers that see images; their weights are to be set anew.

    x: as for `image_layers`, which says what is raised.
    """
    names = image_layers(network, x)
    network.bfloat16()
    for module in map(network.get_submodule, names):
        module.float()
        if list(module.parameters()):
            module.register_forward_hook(answer_in_bf16)
    return network


def answer_in_bf16(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """A forward hook: what follows the module computes in bf16."""
    return output.bfloat16() if isinstance(output, Tensor) and output.dtype == torch.float32 else output
