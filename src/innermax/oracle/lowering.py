"""bf16, but for the layers that see the images: it would round a small perturbation away."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from innermax.utils.copying import copy_model


def image_layers(network: nn.Module, x: Tensor) -> dict[str, bool]:
    """The names of the layers that are given images, each with whether it gives images on: as they are, or normalised.

    x: (B, *features) a few inputs.

    Raises:
        ValueError: there is no such layer with parameters.
        Exception: whatever the network raises.
    """
    probe = copy_model(network)
    for parameter in probe.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    names = {
        module: name
        for name, module in probe.named_modules()
        if not list(module.children()) or nn.utils.parametrize.is_parametrized(module)
    }
    seen: dict[str, bool] = {}

    def look(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        given = [one for one in (*args, *named.values()) if isinstance(one, Tensor) and one.is_floating_point()]
        if not given or any(one.requires_grad for one in given):  # it depends on a parameter
            return output
        seen[names[module]] = gives = not list(module.parameters()) or _gives_images(module, given[0])
        return output.detach() if gives and isinstance(output, Tensor) else output

    for leaf in names:
        leaf.register_forward_hook(look, with_kwargs=True)
    with torch.inference_mode(False), torch.enable_grad():
        probe(x.clone())
    if all(seen.values()):
        raise ValueError("no layer with parameters is given the images")
    return seen


def _gives_images(module: nn.Module, x: Tensor) -> bool:
    """Whether a layer normalises images: each entry of what it returns depends on the same entry of x alone.

    Layers that normalise an image by its own mean do not, and are known by their class.
    """
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | _InstanceNorm):
        return True
    point = x.detach().clone().requires_grad_()
    try:
        output = module.forward(point)
        if output.shape != point.shape:
            return False
        some = (torch.arange(output.numel(), device=x.device).reshape(output.shape) % 2).to(output)
        every, half = (
            torch.autograd.grad(output, point, weights, retain_graph=True)[0]
            for weights in (torch.ones_like(output), some)
        )
    except Exception:  # noqa: BLE001  other people's code, asked in another way than they ask it
        return False
    return bool(torch.equal(half, every * some))


def lower(network: nn.Module, x: Tensor) -> nn.Module:
    """The network converted to bf16, but for the layers that see images; their weights are to be set anew.

    x: as for `image_layers`, which says what is raised.
    """
    layers = image_layers(network, x)
    network.bfloat16()
    for name, gives_images in layers.items():
        module = network.get_submodule(name).float()
        if not gives_images:
            module.register_forward_hook(answer_in_bf16)
    return network


def answer_in_bf16(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """A forward hook: what follows the module computes in bf16."""
    return output.bfloat16() if isinstance(output, Tensor) and output.dtype == torch.float32 else output
