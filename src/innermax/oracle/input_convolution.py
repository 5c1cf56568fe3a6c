"""Layers whose input gradient the general kernels compute slowly on a processor, written so that it is cheap."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class InputConvolution(nn.Module):
    """A convolution over few channels, such as a network's first: the same layer, with a cheaper input gradient.

    The general kernel works on blocks of input channels and wastes most of a block where there are but one or three.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether the layer is a plain convolution over so few values that this is faster."""
        return (
            type(layer) is nn.Conv2d
            and isinstance(layer._parameters.get("weight"), Tensor)  # a weight that a hook computes is its own matter
            and not (layer._forward_hooks or layer._forward_pre_hooks)
            and layer.weight.device.type == "cpu"
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
            and layer.weight[0].numel() <= 32
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k i j"]:
        """What the layer returns."""
        convolve: Callable[..., Tensor] = _InputConvolution.apply
        return convolve(x, self.weight, self.bias, self.stride, self.padding, self.dilation)


class _InputConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        context.save_for_backward(weight)
        context.geometry = x.shape, stride, padding, dilation
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = context.saved_tensors
        return (_input_gradient(gradients[0], weight, *context.geometry), None, None, None, None, None)


def _input_gradient(
    gradient: Tensor,
    weight: Tensor,
    shape: torch.Size,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """What every output sends to each pixel under it by one matrix product, added up where the pixels lie."""
    batch, channels, height, width = shape
    kernels, _, rows, columns = weight.shape
    down, right = gradient.shape[2:]
    sent = weight.permute(1, 2, 3, 0).reshape(-1, kernels) @ gradient.permute(0, 2, 3, 1).reshape(-1, kernels).t()
    # Sums over a kernel's overlaps are kept in float32: bf16 would round each of them.
    sent = sent.to(torch.promote_types(sent.dtype, torch.float32)).reshape(channels, rows, columns, batch, down, right)
    canvas = sent.new_zeros((channels, batch, height + 2 * padding[0], width + 2 * padding[1]))
    for i in range(rows):
        for j in range(columns):
            top, left = i * dilation[0], j * dilation[1]
            canvas[:, :, top : top + stride[0] * down : stride[0], left : left + stride[1] * right : stride[1]] += sent[
                :, i, j
            ]
    inner = canvas[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width]
    return inner.transpose(0, 1).to(gradient.dtype)
