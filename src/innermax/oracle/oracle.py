"""The network as the attacker sees it: frozen, in evaluation mode, and as fast as the machine allows.

Attacks ask an oracle, never the model. The oracle holds a shadow of the model, so the learner's own flags, buffers and
gradients are never touched and nothing has to be restored.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from innermax.losses import Loss
from innermax.models.wrappers import unwrapped
from innermax.oracle.cuda_graphs import Replayed
from innermax.oracle.folding import Folded, fold
from innermax.oracle.threads import Workers
from innermax.utils.validation import summarize_error, unknown

Precision = Literal["auto", "float32", "bf16"]
T = TypeVar("T")
_WORTH_A_THREAD = 4  # examples
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What the oracle says of a batch: (B, …) gradient of each example's own loss, (B,) loss, (B, classes) logits."""

    gradient: Float[Tensor, "b ..."]
    loss: Float[Tensor, " b"]
    logits: Float[Tensor, "b classes"]

    def __getitem__(self, rows: Tensor) -> "Answer":
        """Some of the examples."""
        return replace(self, gradient=self.gradient[rows], loss=self.loss[rows], logits=self.logits[rows])


class Oracle:
    """Loss, logits and ∂loss/∂x of a frozen model, per example.

    `Oracle(model)` computes exactly what the model computes, on the model's own parameters. `Oracle.fast(model, …)` is
    compiled for attacking; call `refresh()` after the model has learned.

    Args:
        model: any nn.Module that returns logits, in any mode; left exactly as found.

    Raises:
        TypeError: the model is not an nn.Module or cannot be copied.
        ValueError: it mixes the examples of a batch (BatchNorm without running statistics).
    """

    def __init__(self, model: nn.Module) -> None:
        self._source = unwrapped(model)
        self._network: nn.Module = _shadow(self._source, share=True)
        self._precise: Oracle | None = None  # where the network computes in bf16: one that does not
        self.doubt = 0.0  # where it does: by how much a difference of two logits was off, at most, when it was compiled
        self._folded: Folded | None = None
        self._memory_format = torch.preserve_format
        self._dtype = next((p.dtype for p in self._source.parameters() if p.is_floating_point()), None)
        self._replayed: Replayed | None = None
        self._threads = 1  # that may share a batch
        self._workers: Workers | None = None
        self._compiled_for: tuple[Tensor, Precision] | None = None
        self.micro_batch: int | None = None  # examples at a time, once a whole batch did not fit into memory
        self.plan = "as the model is"

    @classmethod
    def of(cls, model: "nn.Module | Oracle") -> "Oracle":
        """The oracle itself, or the exact oracle of a model."""
        return model if isinstance(model, Oracle) else cls(model)

    @classmethod
    def fast(cls, model: nn.Module, example: Float[Tensor, "b ..."], precision: Precision = "auto") -> "Oracle":
        """An oracle compiled for attacks: BatchNorm folded, channels last, bf16 where the hardware has it.

        Args:
            model: as for Oracle.
            example: (B, *features) a few inputs, on which the compiled network is held against the model.
            precision: "auto" takes bf16 where the processor computes in it.
        """
        if precision not in get_args(Precision):
            raise unknown("precision", precision, get_args(Precision))
        with torch.inference_mode(False):
            oracle = cls(model)
            truth = oracle.logits(example)
            oracle._fold(example)
            if any(isinstance(module, nn.Conv2d) for module in oracle._network.modules()):
                oracle._network = cast(nn.Module, oracle._network.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
                oracle._memory_format = torch.channels_last
                oracle.plan += ", channels last"
            if precision == "bf16" or (precision == "auto" and has_fast_bf16(example.device)):
                oracle._lower(example, truth)
            else:
                oracle.plan += ", float32"
            if example.is_cuda:
                for one in (oracle, oracle.precise):
                    one._replayed = Replayed(one._gradient)
                oracle.plan += ", CUDA graphs"
            elif torch.get_num_threads() > 1 and not oracle._draws(example):
                oracle._threads = oracle.precise._threads = torch.get_num_threads()
                oracle.plan += f", {oracle._threads} threads"
            oracle._compiled_for = example, precision
        _log.info("attack network: %s", oracle.plan)
        return oracle

    def rechecked(self) -> "Oracle":
        """Itself where the compiled network is still right for what the model has learned, else one compiled anew."""
        if self._compiled_for is None:
            return self
        fresh = Oracle.fast(self._source, *self._compiled_for)
        if fresh.plan == self.plan:
            return self
        _log.warning("attack network: %s; it was: %s", fresh.plan, self.plan)
        return fresh

    @property
    def precise(self) -> "Oracle":
        """The same network in float32, for what bf16 is too coarse for: itself, where it is not in bf16."""
        return self if self._precise is None else self._precise

    def settle(self) -> None:
        """To be called at the end of a search: a network that several processes share waits for the others' ends."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over what the model has learned since."""
        if self._precise is not None:
            self._precise.refresh()
        if self._folded is not None:
            self._folded.refresh(self._source)
            return
        for mine, theirs in zip(_state(self._network), _state(self._source), strict=True):
            if mine.data_ptr() != theirs.data_ptr():  # else they are shared
                mine.copy_(theirs)

    def logits(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b classes"]:
        """(B, classes) float32 logits."""
        with torch.no_grad():
            return torch.cat(self._in_parts(lambda rows: self._forward(self._placed(x[rows]), len(x[rows])), len(x)))

    @property
    def lowered(self) -> bool:
        """Whether it computes in bf16 what the model does not."""
        return self._precise is not None

    def gradient(self, x: Float[Tensor, "b ..."], label: Int[Tensor, " b"], loss: Loss) -> Answer:
        """The gradient of each example's loss in its own input, with loss and logits.

        Non-finite entries of a gradient come back as 0: an attack cannot follow them.

        Raises:
            ValueError: the model does not take x, or does not return (B, classes); loss does not return (B,).
        """
        ask = self._replayed or self._gradient
        parts: list[Answer] = self._in_parts(lambda rows: ask(x[rows], label[rows], loss), len(x))
        if len(parts) == 1:
            return parts[0]
        return Answer(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))

    def _in_parts(self, ask: Callable[[slice], T], count: int) -> list[T]:
        """What is answered of a batch at once, or in parts as large as memory holds."""
        while True:
            size = min(self.micro_batch or count, count)
            try:
                return [ask(slice(start, start + size)) for start in range(0, max(count, 1), max(size, 1))]
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error) or size < 2:
                    raise
            # Out of the handler, which holds on to what the failed attempt had made.
            self.micro_batch = -(-size // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            _log.warning("%d examples do not fit into memory: the network sees %d at a time", size, self.micro_batch)

    def _gradient(self, x: Tensor, label: Tensor, loss: Loss) -> Answer:
        with torch.inference_mode(False), torch.enable_grad():
            point = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
            label = label.clone() if label.is_inference() else label
            logits = self._forward(self._placed(point), len(x))
            value = loss(logits, label)
            if value.shape != (len(x),):
                raise ValueError(f"loss must return one value an example ({len(x)},), got {tuple(value.shape)}")
            # A sum, not a mean: no example's gradient may depend on how many others there are.
            gradient = torch.autograd.grad(value.sum(), point, allow_unused=True)[0] if value.requires_grad else None
        if gradient is None:
            gradient = torch.zeros_like(x)
        gradient = gradient.to(x.dtype).contiguous()
        return Answer(gradient.nan_to_num_(0.0, 0.0, 0.0), value.detach(), logits.detach())

    def side_by_side(self, work: Callable[[Tensor], T], rows: Int[Tensor, " k"]) -> list[T]:
        """`work` of the rows of a batch: of all at once, or of a part for each core."""
        if self._threads == 1 or len(rows) < _WORTH_A_THREAD * self._threads:
            return [work(rows)]
        if self._workers is None:
            self._workers = Workers(self._threads)
        return self._workers.map(work, rows.tensor_split(self._threads))

    @contextmanager
    def private_randomness(self, seed: int) -> Iterator[None]:
        """Inside, a model that draws random numbers draws them from `seed`; the global random state is left alone."""
        devices = {p.device.index for p in self._network.parameters() if p.device.type == "cuda"}
        generators = [torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)]
        with torch.random.fork_rng(devices=list(devices)):
            for generator in generators:  # torch.manual_seed would seed devices that were not put aside, too
                generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
            yield

    def _draws(self, example: Tensor) -> bool:
        """Whether the network draws random numbers, which threads would draw in any order."""
        with self.private_randomness(0):
            before = torch.get_rng_state()
            self.logits(example)
            return not torch.equal(before, torch.get_rng_state())

    def _placed(self, x: Tensor) -> Tensor:
        """A copy of x in the network's precision and memory format, which the network may change in place."""
        memory_format = self._memory_format if x.ndim == 4 else torch.preserve_format
        return x.to(self._dtype or x.dtype, memory_format=memory_format, copy=True)

    def _forward(self, x: Tensor, batch: int) -> Tensor:
        try:
            logits = self._network(x)
        except Exception as error:  # anything: it may be other people's code
            if out_of_memory(error):
                raise
            raise ValueError(f"the model fails on x of shape {tuple(x.shape)}: {summarize_error(error)}") from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the model must return logits of shape ({batch}, classes ≥ 2), got {found}")
        return logits.double() if logits.dtype == torch.float64 else logits.float()

    def _fold(self, example: Tensor) -> None:
        """Switches to the folded network where that computes the same logits, now and after learning."""
        exact = self._network
        try:
            folded = fold(_shadow(self._source, share=False))
            # In its present state last: that is the one to go on with.
            errors = [_difference(folded, network, self._placed(example)) for network in (_learned(exact), exact)]
        except Exception as failure:  # noqa: BLE001  whatever tracing raises, the unfolded network is right
            reason = summarize_error(failure)
        else:
            same = all(error <= 1e-4 for error in errors)
            reason = "" if same else f"folding changes logits by {max(errors):.1e} of their size"
        if reason:
            self.plan = f"unfolded ({reason})"
            self._network = _shadow(self._source, share=False)
            return
        self._folded, self._network = folded, folded.network
        self.plan = f"{len(folded.pairs)} BatchNorm folded"
        if folded.untraced is not None:
            self.plan += f" module by module ({folded.untraced})"

    def _lower(self, example: Tensor, truth: Tensor) -> None:
        """Switches to bf16 where the network computes in it and its logits stay close."""
        before = copy.copy(self)
        try:
            self._network, self._dtype = copy.deepcopy(self._network).to(torch.bfloat16), torch.bfloat16
            if self._folded is not None:
                self._folded = replace(self._folded, network=self._network)
            self.refresh()
            error = float((self.logits(example) - truth).abs().max())
            if error <= 0.05 * (1 + float(truth.abs().max())):
                self.plan += ", bf16"
                if before._dtype != torch.bfloat16:
                    self._precise, self.doubt = before, 2 * error
                return
            reason = f"bf16 changes logits by {error:.1e}"
        except ValueError as failure:
            reason = str(failure)
        self._network, self._folded, self._dtype = before._network, before._folded, before._dtype
        self.plan += f", float32 ({reason})"


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is full: a GPU's, or what the processor's allocator raises."""
    told = str(error) if isinstance(error, RuntimeError) else ""
    allocator = "not enough memory" in told or "can't allocate memory" in told
    return allocator or isinstance(error, torch.OutOfMemoryError | MemoryError)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def _shadow(model: nn.Module, share: bool) -> nn.Module:
    """A frozen copy in evaluation mode; share: on the model's own parameters."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"model layer {name!r} ({type(module).__name__}) has no running statistics, so it mixes the examples "
                "of a batch even in evaluation mode; build it with track_running_stats=True"
            )
    # What a hook computed from parameters (torch.nn.utils.weight_norm) can only be copied apart from its graph.
    computed = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    memo: dict[int, object] = {id(value): value.detach().clone() for value in computed if not value.is_leaf}
    if share:
        memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    try:
        with torch.inference_mode(False):
            shadow = copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(f"model cannot be copied for the attack: {type(error).__name__}: {error}") from error
    return shadow.requires_grad_(False).eval()


def _learned(model: nn.Module) -> nn.Module:
    """A shadow whose BatchNorm statistics are as after learning: on a new model's, a wrong fold goes unnoticed."""
    shadow = _shadow(model, share=False)
    for module in shadow.modules():
        if isinstance(module, _BatchNorm):
            spread = torch.linspace(0.6, 1.6, module.num_features).to(cast(Tensor, module.running_var))
            cast(Tensor, module.running_mean).sub_(spread)  # upwards, where ReLUs let a difference pass
            cast(Tensor, module.running_var).mul_(spread)
    return shadow


@torch.no_grad()
def _difference(folded: Folded, exact: nn.Module, x: Tensor) -> float:
    """By how much folding changes logits, over 1 + the largest."""
    folded.refresh(exact)
    truth = exact(x.clone())
    return float((folded.network(x.clone()) - truth).abs().max()) / (1 + float(truth.abs().max()))


def _state(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
