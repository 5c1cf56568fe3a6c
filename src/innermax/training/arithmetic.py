"""How an update computes: in bf16 and in channels-last order, where the network takes them."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from innermax.models.wrappers import unwrap
from innermax.oracle.comparison import center
from innermax.oracle.compiled import find_filters, floating_dtype, put_in_order
from innermax.oracle.frozen import frozen_copy
from innermax.oracle.lowering import answer_in_bf16, image_layers
from innermax.oracle.oracle import Precision, has_fast_bf16, is_out_of_memory
from innermax.oracle.recurrent import pass_gradients, uses_cudnn
from innermax.utils.copying import copy_model
from innermax.utils.generators import cuda_devices, private_randomness, restore_randomness
from innermax.utils.validation import summarize_error

_LOST = 0.5  # of the largest logit: a difference above which bf16 has rounded away what tells the classes apart
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arithmetic:
    """How an update computes.

    Attributes:
        bf16: whether operations that can are done in bf16 (torch.autocast).
        channels_last: whether parameters and images (B, C, H, W) are in channels-last order.
        image_layers: names of the layers with parameters that see the images, which compute in float32 in any case.
    """

    bf16: bool = False
    channels_last: bool = False
    image_layers: tuple[str, ...] = ()

    @contextmanager
    def keep_images(self, network: nn.Module, device: str) -> Iterator[None]:
        """Context manager: autocast leaves the layers that see the images alone, so that nothing rounds the images."""
        with ExitStack() as stack:
            for module in map(network.get_submodule, self.image_layers):
                for undo in _without_autocast(module, device):
                    stack.callback(undo)
            yield

    def plainer(self) -> list["Arithmetic"]:
        """Those without channels-last order, without bf16, and without both."""
        without_bf16 = replace(self, bf16=False, image_layers=())
        found = replace(self, channels_last=False), without_bf16, replace(without_bf16, channels_last=False)
        return [one for one in dict.fromkeys(found) if one != self]

    def __str__(self) -> str:
        order = "channels-last order" if self.channels_last else "channels-first order"
        return f"{'bf16' if self.bf16 else 'float32'} and {order}"


def choose_arithmetic(
    model: nn.Module, example: Tensor, precision: Precision, device: torch.device, sharded: bool = False
) -> Arithmetic:
    """The fastest arithmetic in which the network passes gradients back; where a faster one fails, a warning says why.

    example: (B, *features) a few images; sharded: whether the network may not fit on the device as a whole: it is tried
    where it is.
    """
    source = unwrap(model)
    x = example.to(next((p.device for p in source.parameters()), device) if sharded else device)
    lower = precision == "bf16" or (precision == "auto" and has_fast_bf16(device))
    found = Arithmetic()
    with restore_randomness(range(torch.cuda.device_count())):
        if lower and floating_dtype(source) == torch.float32:
            try:
                layers = image_layers(frozen_copy(source, share=False).to(device), x)
                lowered = Arithmetic(bf16=True, image_layers=tuple(name for name in layers if not layers[name]))
                _check_logits(_pass_back(source, x, lowered), _pass_back(source, x, found))
                found = lowered
            except Exception as failure:  # noqa: BLE001  anything: it may be other people's code
                _warn("float32", failure)
        if x.ndim == 4 and not sharded:  # FSDP takes no other memory format than the usual
            try:
                _pass_back(source, x, last := replace(found, channels_last=True))
                found = last
            except Exception as failure:  # noqa: BLE001
                _warn("channels-first order", failure)
    return found


@contextmanager
def order_restored(network: nn.Module) -> Iterator[None]:
    """Context manager: what has four dimensions and lies in the usual order does so afterwards, too."""
    usual = {name for name, tensor in find_filters(network).items() if tensor.is_contiguous()}
    try:
        yield
    finally:
        for name, tensor in find_filters(network).items():
            if name in usual and not tensor.is_contiguous():
                tensor.data = tensor.data.contiguous()


def _warn(plain: str, failure: Exception) -> None:
    if is_out_of_memory(failure):
        raise failure
    _log.warning("updates compute in %s (%s)", plain, summarize_error(failure))


def _pass_back(source: nn.Module, x: Tensor, arithmetic: Arithmetic) -> Any:
    """What a copy of the network answers in evaluation mode; raises what it raises in passes forward and back.

    Not in training mode: what a network counts or collects there is about the batches that it learns from.
    """
    network = copy_model(source).to(x.device).eval()
    kind = x.device.type
    if arithmetic.channels_last:
        _check_strided(network, kind)
        _check_shared(source)
        put_in_order(network, channels_last=True)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        private_randomness(0, cuda_devices(network)),
        arithmetic.keep_images(network, kind),
        pass_gradients(uses_cudnn(network)),
        torch.autocast(kind, torch.bfloat16, enabled=arithmetic.bf16),
    ):
        logits = network(x.to(floating_dtype(network) or x.dtype, copy=True))
    if isinstance(logits, Tensor) and logits.requires_grad:
        logits.float().sum().backward()  # type: ignore[no-untyped-call]
    return logits


def _check_logits(lowered: Any, exact: Any) -> None:
    """Raises ValueError where bf16 does not tell the classes apart as float32 does, as where logits are all large."""
    if not isinstance(exact, Tensor) or exact.ndim != 2:
        return
    found, truth = (center(logits.detach().float()) for logits in (lowered, exact))
    off, largest = float((found - truth).abs().max()), float(truth.abs().max())
    if off > _LOST * largest:
        raise ValueError(f"bf16 changes logits, less what they have in common, by {off:.2g} of {largest:.2g}")


def _check_strided(network: nn.Module, device: str) -> None:
    """Raises RuntimeError where, on a processor, the weight gradient would corrupt memory in channels-last order.

    oneDNN writes past a buffer for strided 1×1 convolutions of fewer channels than a vector register holds (oneDNN
    issue 6035): 8 with AVX2, 16 with AVX-512. It may crash, hang or give wrong weights, which no trial run shows.
    """
    for name, module in network.named_modules():
        if (
            device == "cpu"
            and isinstance(module, nn.Conv2d)
            and (module.kernel_size, module.groups) == ((1, 1), 1)
            and module.in_channels < 16
            and module.stride != (1, 1)
        ):
            raise RuntimeError(f"oneDNN corrupts memory in {name}, a strided 1×1 convolution of few channels")


def _check_shared(network: nn.Module) -> None:
    """Raises RuntimeError where tensors share memory: in another order each would have its own."""
    filters = [tensor for tensor in find_filters(network).values() if tensor.numel() > 0]
    spans = sorted((one.data_ptr(), one.data_ptr() + one.numel() * one.element_size()) for one in filters)
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise RuntimeError("two of its tensors share their memory")


def _without_autocast(module: nn.Module, device: str) -> Iterator[Callable[[], None]]:
    """Adds hooks that leave autocast for the module's forward passes; yields what takes them back."""
    stack = ExitStack()

    def enter(_module: nn.Module, _inputs: Any) -> None:
        stack.enter_context(torch.autocast(device, enabled=False))

    def leave(module: nn.Module, inputs: Any, output: Any) -> Any:
        stack.close()
        # An objective may ask the network itself, in its own precision.
        return answer_in_bf16(module, inputs, output) if torch.is_autocast_enabled(device) else output

    yield stack.close  # after a KeyboardInterrupt, at which torch calls no hook
    yield module.register_forward_pre_hook(enter).remove
    yield module.register_forward_hook(leave, always_call=True).remove
