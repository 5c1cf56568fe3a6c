"""A network in evaluation mode rewritten into a cheaper one that computes the same function."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from innermax.models.wrappers import Normalize
from innermax.oracle.input_convolution import InputConvolution
from innermax.utils.copying import write_into
from innermax.utils.generators import read_randomness
from innermax.utils.validation import summarize_error

_AFFINE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


@dataclass(frozen=True)
class Folded:
    """The rewritten network, and the (layer, BatchNorm) pairs, by name in the original, that became one layer.

    `untraced`: why the network could be rewritten only module by module, if so.
    """

    network: nn.Module
    pairs: tuple[tuple[str, str], ...]
    untraced: str | None = None

    @torch.no_grad()
    def refresh(self, source: nn.Module) -> None:
        """Takes over the parameters and buffers that `source`, the original network, has now."""
        merged = dict(self.pairs)
        here = dict(_tensors(self.network))
        there = dict(_tensors(source))
        for layer, norm in merged.items():
            weight, bias = _merge(source.get_submodule(layer), cast(_BatchNorm, source.get_submodule(norm)))
            there[f"{layer}.weight"], there[f"{layer}.bias"] = weight, bias
        names = [name for name in here if name in there]
        dense = [name for name in names if 0 not in here[name].stride()]
        torch._foreach_copy_([here[name] for name in dense], [there[name] for name in dense])
        for name in set(names) - set(dense):
            write_into(here[name], there[name])

    def fits(self, source: nn.Module) -> bool:
        """Whether the parameters and buffers of `source` have the shapes that they had."""
        here, there = dict(_tensors(self.network)), dict(_tensors(source))
        own = {name for layer in dict(self.pairs) for name in (f"{layer}.weight", f"{layer}.bias")}
        return all(here[name].shape == there[name].shape for name in here.keys() & there.keys() - own)


def fold(network: nn.Module) -> Folded:
    """Merges BatchNorm into the convolution or linear layer before it and pools before the ReLU instead of after.

    Where the network as a whole cannot be traced, its modules are rewritten that can be, each for itself.

    Args:
        network: in evaluation mode; its own copy, which the result may share tensors with.

    Raises:
        Exception: whatever torch.fx raises where neither the network nor any of its modules can be traced.
    """
    try:
        return Folded(*_rewrite(network))
    except Exception as failure:
        pairs = tuple(_fold_modules(network, ""))
        if not pairs:
            raise
        return Folded(network, pairs, untraced=summarize_error(failure))


def _rewrite(network: nn.Module) -> tuple[fx.GraphModule, tuple[tuple[str, str], ...]]:
    before = read_randomness()
    traced = _Rewritten(network, _Tracer().trace(network))
    after = read_randomness()
    if before.torch != after.torch or before.numpy != after.numpy:
        raise ValueError("it draws random numbers, which a trace keeps as constants")
    _drop_assertions(traced)
    pairs = tuple(_fold_norms(traced, network))
    _pool_first(traced)
    _few_channels(traced)
    traced.graph.lint()
    traced.recompile()
    _fail_quietly(traced)
    return traced, pairs


class _Rewritten(fx.GraphModule):
    """A traced network whose copies keep the plain values that it has as attributes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        copied: fx.GraphModule = super().__deepcopy__(memo)
        _keep_plain_values(self, copied)
        _fail_quietly(copied)
        return copied


def _fail_quietly(traced: fx.GraphModule) -> None:
    """Lets a traced network, whose class is its own, raise its errors alone: fx prints each to stderr, too."""
    type(traced).__call__ = nn.Module.__call__  # type: ignore[method-assign]


def _keep_plain_values(module: nn.Module, rewritten: nn.Module) -> None:
    """Sets numbers, texts and tuples that are attributes of a module, and that a network around it may read."""
    for name, value in vars(module).items():
        if name not in vars(rewritten) and isinstance(value, int | float | str | tuple | None):
            setattr(rewritten, name, value)


class _Tracer(fx.Tracer):
    """Leaves `Normalize` whole: its numbers are not rounded where the network is in bf16."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalize) or super().is_leaf_module(m, module_qualified_name)


def _fold_modules(network: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """Puts a rewritten module in the place of each largest one that can be traced."""
    for name, module in list(network.named_children()):
        if not any(isinstance(inner, _BatchNorm) for inner in module.modules()) or isinstance(module, _BatchNorm):
            continue
        try:
            rewritten, pairs = _rewrite(module)
        except Exception:  # noqa: BLE001  whatever tracing raises, its own modules may still be traced
            yield from _fold_modules(module, f"{prefix}{name}.")
            continue
        _keep_plain_values(module, rewritten)
        setattr(network, name, rewritten)
        for layer, norm in pairs:
            yield f"{prefix}{name}.{layer}", f"{prefix}{name}.{norm}"


def _drop_assertions(traced: fx.GraphModule) -> None:
    """Removes what only asserts something, such as the number of dimensions between a layer and its BatchNorm."""
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and node.target is torch._assert:
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()


def _fold_norms(traced: fx.GraphModule, network: nn.Module) -> Iterator[tuple[str, str]]:
    modules = dict(traced.named_modules())
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    for node in list(traced.graph.nodes):
        name = _batch_norm(node, network)
        before = node.args[0] if node.args else None
        if name is None or not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        layer, norm = modules[str(before.target)], cast(_BatchNorm, network.get_submodule(name))
        alone = len(before.users) == 1 and calls.count(before.target) == 1
        own = type(layer) in _AFFINE and isinstance(layer._parameters.get("weight"), Tensor)  # not computed from others
        if not own or not alone or layer.weight.shape[0] != norm.num_features:
            continue
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(norm.num_features), requires_grad=False)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
        yield str(before.target), name


def _batch_norm(node: fx.Node, network: nn.Module) -> str | None:
    """The name of the BatchNorm module that a node computes, itself or by its function; None: it is none."""
    if node.op == "call_module":
        name = str(node.target)
        return name if isinstance(network.get_submodule(name), _BatchNorm) else None
    if node.op != "call_function" or node.target is not nn.functional.batch_norm:
        return None
    given = inspect.signature(nn.functional.batch_norm).bind(*node.args, **node.kwargs)
    given.apply_defaults()
    values = given.arguments
    names = {key: value.target for key, value in values.items() if isinstance(value, fx.Node)}
    name = str(names.get("running_mean", "")).rpartition(".")[0]
    norm = network.get_submodule(name)
    if not isinstance(norm, _BatchNorm) or values["training"] is not False or values["eps"] != norm.eps:
        return None
    needed = ["running_mean", "running_var", *(["weight", "bias"] if norm.affine else [])]
    taken = {key: target for key, target in names.items() if key != "input"}
    return name if taken == {key: f"{name}.{key}" for key in needed} else None


def _pool_first(traced: fx.GraphModule) -> None:
    """max-pool(relu(z)) = relu(max-pool(z)): the same numbers, with the ReLU on a quarter of them."""
    modules = dict(traced.named_modules())
    for pool in list(traced.graph.nodes):
        if pool.op != "call_module" or not isinstance(modules[pool.target], _POOLS):
            continue
        relu = pool.args[0]
        if modules[pool.target].return_indices or not _is_relu(relu, modules) or len(relu.users) != 1:
            continue
        pool.replace_all_uses_with(relu)
        pool.args = (relu.args[0],)
        relu.args = (pool,)
        pool.append(relu)


def _few_channels(traced: fx.GraphModule) -> None:
    """Convolutions over few channels get the kernel made for them."""
    for name, layer in list(traced.named_modules()):
        if InputConvolution.fits(layer):
            traced.set_submodule(name, InputConvolution(cast(nn.Conv2d, layer)))


def _is_relu(node: object, modules: dict[str, nn.Module]) -> bool:
    return (
        isinstance(node, fx.Node)
        and (
            (node.op == "call_module" and isinstance(modules[str(node.target)], nn.ReLU))
            or (node.op == "call_function" and node.target in (torch.relu, nn.functional.relu))
            or (node.op == "call_method" and node.target == "relu")
        )
        and len(node.args) == 1
    )


def _merge(layer: nn.Module, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of norm ∘ layer."""
    weight, bias = attrgetter("weight", "bias")(layer)
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = torch.rsqrt(variance + norm.eps)
    if norm.affine:
        scale = scale * norm.weight
    shift = -mean if bias is None else bias - mean
    shift = shift * scale
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), shift + norm.bias if norm.affine else shift


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)
