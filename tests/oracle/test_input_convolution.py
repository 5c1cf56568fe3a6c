"""The cheaper input gradient is the input gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from innermax.oracle.input_convolution import InputConvolution

sides = st.integers(1, 3)


@settings(max_examples=60)
@given(
    batch=st.integers(1, 4),
    channels=st.integers(1, 3),
    kernel=st.tuples(sides, sides),
    stride=st.tuples(sides, sides),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    bias=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_gradient_is_autograds(batch, channels, kernel, stride, padding, dilation, size, bias, channels_last, seed):
    torch.manual_seed(seed)
    layer = nn.Conv2d(channels, 5, kernel, stride, padding, dilation, bias=bias).double().requires_grad_(False)
    x = torch.rand(batch, channels, *size, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    assert InputConvolution.fits(layer)
    mine, truth = InputConvolution(layer)(x), layer(x)
    assert torch.equal(mine, truth)
    weights = torch.randn_like(truth)
    torch.testing.assert_close(
        torch.autograd.grad(mine, x, weights)[0], torch.autograd.grad(truth, x, weights)[0], rtol=1e-12, atol=1e-12
    )


def test_bf16_rounds_hardly_more_than_the_general_kernel():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 64, 3, padding=1).requires_grad_(False)
    x, weights = torch.rand(8, 3, 16, 16, requires_grad=True), torch.randn(8, 64, 16, 16)
    truth = torch.autograd.grad(layer(x), x, weights)[0]
    layer, weights = layer.bfloat16(), weights.bfloat16()

    def error(module):
        point = x.detach().bfloat16().requires_grad_()
        return float((torch.autograd.grad(module(point), point, weights)[0].float() - truth).abs().mean())

    assert error(InputConvolution(layer)) <= 1.3 * error(layer)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Conv2d(1, 4, 3, padding="same"),
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(1, 4, 3),
        nn.Linear(3, 2),
        parametrizations.weight_norm(nn.Conv2d(1, 4, 3)),
        nn.utils.spectral_norm(nn.Conv2d(1, 4, 3)),
    ],
)
def test_other_layers_are_left_alone(layer):
    assert not InputConvolution.fits(layer)


def test_a_layer_with_a_hook_is_left_alone():
    layer = nn.Conv2d(1, 4, 3)
    layer.register_forward_hook(lambda *_: None)
    assert not InputConvolution.fits(layer)
