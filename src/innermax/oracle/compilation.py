"""A model's network made cheap for attacks: each step is taken where logits and gradients stay the same."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from innermax.oracle.comparison import Difference, Reference, break_ties
from innermax.oracle.compiled import Compiled, floating_dtype, put_in_order
from innermax.oracle.draws import depends_on_python
from innermax.oracle.folding import Folded, fold
from innermax.oracle.frozen import frozen_copy
from innermax.oracle.lowering import lower
from innermax.utils.copying import copy_model
from innermax.utils.generators import read_randomness
from innermax.utils.validation import summarize_error

COPIED = "copied anew after each update"  # what cannot take over what the model learns
_EXAMPLES = 2  # that a rewritten network is compared on
_SAME_LOGITS, _SAME_GRADIENTS = 1e-6, 1e-4  # in float64: of the largest logit, of a gradient's largest entry
_CLOSE_LOGITS, _CLOSE_COSINE = 1e-4, 0.999  # where float64 is not to be had: a ReLU may switch by rounding alone
# Of a network in bf16. The cosine lies below what untrained networks have, 0.944 to 0.957 in six of the 8-layer CNN.
_LOW_LOGITS, _LOW_COSINE = 0.05, 0.92


@dataclass(frozen=True)
class Compilation:
    """What a model's network was compiled to.

    Attributes:
        network: answers for the model.
        precise: the same in the model's own precision, where `network` is in bf16.
        steps: what was done, in order, each with what was measured or why nothing more was done.
        doubt: by how much a difference of two logits can be off in bf16.
    """

    network: Compiled
    precise: Compiled | None
    steps: Mapping[str, str]
    doubt: float = 0.0


class Inexact(Exception):
    """Why a step is not taken."""


def compile_network(model: nn.Module, example: Tensor, bf16: bool, channels_last: bool = True) -> Compilation:
    """The cheapest network found that computes the model's logits and gradients.

    example: (B, *features) inputs on which each step is judged; bf16, channels_last: whether to try it.
    """
    x = break_ties(example)
    try:
        precise, steps = _rewrite(model, x[:_EXAMPLES], channels_last)
    except Inexact as reason:
        copied = Compiled(frozen_copy(model, share=False), floating_dtype(model), kept=False)
        return Compilation(copied, None, {COPIED: str(reason)})
    precise = precise.refresh(model)
    own = str(precise.dtype or torch.float32).removeprefix("torch.")
    if not bf16 or precise.dtype == torch.bfloat16:
        return Compilation(precise, None, steps | {own: ""})
    try:
        lowered, difference = _lower(precise, model, x)
    except Inexact as reason:
        return Compilation(precise, None, steps | {own: str(reason)})
    steps["bf16"] = f"mean cosine of the gradients {difference.cosine:.3f}"
    return Compilation(lowered, precise, steps, 2 * difference.logits)


def difference_in_use(network: Compiled, model: nn.Module, example: Tensor) -> Difference:
    """Between the network's answers and the model's, in the precision that each computes in."""
    return difference_between(network, Compiled(frozen_copy(model, share=True), floating_dtype(model)), example)


def difference_between(network: Compiled, other: Compiled, example: Tensor) -> Difference:
    """Between two networks' answers, in the precision that each computes in."""
    return Reference.of(other, break_ties(example)).difference(network)


def is_close(difference: Difference, lowered: bool) -> bool:
    """Whether answers are as close as those of a network that computes the same, or the same in bf16.

    A network in use may be twice as far off in bf16 as one that is taken, or it would be left and taken in turns.
    """
    logits, cosine = (2 * _LOW_LOGITS, 2 * _LOW_COSINE - 1) if lowered else (10 * _CLOSE_LOGITS, _CLOSE_COSINE)
    return difference.logits <= logits * difference.scale and difference.cosine >= cosine


def _rewrite(model: nn.Module, x: Tensor, channels_last: bool) -> tuple[Compiled, dict[str, str]]:
    """The model's network folded and in channels-last order, where it computes the same so; and the steps."""
    judge = _Judge(model, x)
    plain = Compiled(frozen_copy(model, share=False), floating_dtype(model))
    try:
        folded = _fold(plain, x)
        found = replace(plain, network=folded.network, folded=folded)
    except Inexact as reason:
        return _reorder(plain, judge, {"unfolded": str(reason)}, channels_last)
    name = f"{len(folded.pairs)} BatchNorm folded"
    steps = {name if folded.untraced is None else f"{name} module by module": folded.untraced or ""}
    try:
        return _reorder(found, judge, steps, channels_last)
    except Inexact as reason:
        return _reorder(plain, judge, {"unfolded": str(reason)}, channels_last)


def _reorder(
    network: Compiled, judge: "_Judge", steps: dict[str, str], channels_last: bool
) -> tuple[Compiled, dict[str, str]]:
    """The network in channels-last order where that is right, else as it is; Inexact where neither is."""
    if not channels_last:
        steps |= {"channels first": ""}
    elif any(isinstance(module, nn.Conv2d) for module in network.network.modules()):
        last = replace(
            network.of(put_in_order(copy_model(network.network), channels_last=True)), memory_format=torch.channels_last
        )
        try:
            judge.check(last)
        except Inexact as reason:
            steps |= {"channels first": str(reason)}
        else:
            return last, steps | {"channels last": ""}
    judge.check(network)
    return network, steps


def _fold(exact: Compiled, x: Tensor) -> Folded:
    """A copy of a network, folded; Inexact where it cannot be."""
    before = read_randomness()
    try:
        folded = fold(copy_model(exact.network))
        if before.python != read_randomness().python and depends_on_python(lambda: exact(x)):
            raise ValueError("it draws random numbers, which a trace keeps as constants")
    except Exception as failure:
        raise Inexact(summarize_error(failure)) from failure
    return folded


class _Judge:
    """What a model answers after an update, which a network has to answer that was compiled, and asked, before it.

    On a new model's BatchNorm statistics a wrong fold goes unnoticed, and before an update a value kept from then.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        own, self._x = floating_dtype(model), x
        for dtype in (torch.float64, own):
            try:
                for self._state in (_simulate_update(model), frozen_copy(model, share=False)):
                    network = Compiled(copy_model(self._state), dtype).to(dtype)
                    self._reference = Reference.of(network, x.to(dtype or x.dtype))
                    if self._reference.finite:
                        break
            except Exception:
                if dtype == own:  # the model's own failure
                    raise
            else:
                break
        self._dtype, self._exact = dtype, dtype == torch.float64

    def check(self, candidate: Compiled) -> None:
        """Raises Inexact where the network answers something else."""
        try:
            network = candidate.to(self._dtype)
            with torch.no_grad():
                network(self._x)
            self._judge(self._reference.difference(network.refresh(self._state)))
        except Inexact:
            raise
        except Exception as failure:
            raise Inexact(summarize_error(failure)) from failure

    def _judge(self, difference: Difference) -> None:
        logits = difference.logits / difference.scale
        if not logits <= (_SAME_LOGITS if self._exact else _CLOSE_LOGITS):
            raise Inexact(f"logits change by {logits:.1e} of their size")
        if self._exact and not difference.gradient <= _SAME_GRADIENTS:
            raise Inexact(f"gradients change by {difference.gradient:.1e} of their size")
        if not difference.cosine >= _CLOSE_COSINE:
            raise Inexact(f"the mean cosine of the gradients is {difference.cosine:.3f}")


@torch.no_grad()
def _simulate_update(model: nn.Module) -> nn.Module:
    """A copy such as an update might leave: other weights, other BatchNorm statistics, nothing kept from before it."""
    network = copy_model(model).train()
    for parameter in network.parameters():
        if parameter.is_floating_point():
            steps = torch.linspace(-0.2, 0.2, parameter.numel(), device="cpu").reshape(parameter.shape).to(parameter)
            parameter.mul_(1 + steps).add_((parameter == 0) * steps / 10)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            spread = torch.linspace(0.6, 1.6, module.num_features, device="cpu").to(module.running_var)
            module.running_mean.sub_(spread)  # upwards, where ReLUs let a difference pass
            module.running_var.mul_(spread)
    return frozen_copy(network, share=False)


def _lower(precise: Compiled, model: nn.Module, x: Tensor) -> tuple[Compiled, Difference]:
    """The network in bf16, with how much its answers differ. Raises Inexact where that is too much for an attack."""
    try:
        lowered = precise.of(lower(copy_model(precise.network), precise.place(x.float())))
        lowered = replace(lowered, dtype=torch.float32)
        lowered = lowered.refresh(model)
        difference = difference_in_use(lowered, model, x)
    except Exception as failure:
        raise Inexact(summarize_error(failure)) from failure
    if not difference.logits <= _LOW_LOGITS * difference.scale:
        raise Inexact(f"bf16 changes logits by {difference.logits:.1e}")
    if not difference.cosine >= _LOW_COSINE:
        raise Inexact(f"in bf16 the mean cosine of the gradients is {difference.cosine:.3f}")
    return lowered, difference
