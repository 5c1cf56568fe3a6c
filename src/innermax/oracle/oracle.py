"""The network as the attacker sees it: frozen, in evaluation mode, and as fast as the machine allows.

Attacks ask an oracle, never the model. The oracle holds a copy of the model, so the learner's own flags, buffers and
gradients are never touched and nothing has to be restored.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from innermax.losses import Loss
from innermax.models.wrappers import unwrapped
from innermax.oracle.cuda_graphs import Replayed
from innermax.oracle.draws import draws
from innermax.oracle.folding import Folded, Unfoldable, fold_checked
from innermax.oracle.frozen import frozen_copy
from innermax.oracle.threads import Workers
from innermax.utils.copying import copy_model
from innermax.utils.generators import cuda_devices, private_randomness, restore_randomness
from innermax.utils.validation import summarize_error, unknown

Precision = Literal["auto", "float32", "bf16"]
T = TypeVar("T")
_WORTH_A_THREAD = 4  # examples
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """An oracle's answer to a batch: (B, …) gradient of each example's own loss, (B,) loss, (B, classes) logits."""

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

    Attributes:
        plan: how the network is computed, in words.
        micro_batch: how many examples the network sees at a time, once a whole batch did not fit into memory.
        doubt: by how much a difference of two logits can be off, as measured when the network was lowered to bf16.

    Args:
        model: any nn.Module that returns logits, in any mode; left exactly as found.
        network: what answers for the model; a frozen copy of it unless given.

    Raises:
        TypeError: the model is not an nn.Module or cannot be copied.
        ValueError: it mixes the examples of a batch (BatchNorm without running statistics).
    """

    def __init__(self, model: nn.Module, network: nn.Module | None = None) -> None:
        self._source = unwrapped(model)
        self._network: nn.Module = frozen_copy(self._source, share=True) if network is None else network
        self._memory_format = torch.preserve_format
        self._dtype = next((p.dtype for p in self._source.parameters() if p.is_floating_point()), None)
        self.micro_batch: int | None = None
        self.plan = "as the model is"
        self.doubt = 0.0

    @classmethod
    def of(cls, model: "nn.Module | Oracle") -> "Oracle":
        """The oracle itself, or the exact oracle of a model."""
        return model if isinstance(model, Oracle) else cls(model)

    @staticmethod
    def fast(model: nn.Module, example: Float[Tensor, "b ..."], precision: Precision = "auto") -> "FastOracle":
        """An oracle compiled for attacks: BatchNorm folded, channels last, bf16 where the hardware has it.

        Args:
            model: as for Oracle.
            example: (B, *features) a few inputs, on which the compiled network is compared with the model.
            precision: "auto" takes bf16 where the processor computes in it.
        """
        return FastOracle(model, example, precision)

    def recheck(self) -> "Oracle":
        """This oracle if it still suits what the model has learned, else one that is compiled anew."""
        return self

    @property
    def precise(self) -> "Oracle":
        """The same network in float32, for what bf16 is too coarse for: itself, where it is not in bf16."""
        return self

    @property
    def lowered(self) -> bool:
        """Whether it computes in bf16 what the model computes in another precision."""
        return self.precise is not self

    def settle(self) -> None:
        """Ends a search: a network that several processes share waits until all of them have ended theirs."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over what the model has learned since."""
        for mine, theirs in zip(_state(self._network), _state(self._source), strict=True):
            if mine.data_ptr() != theirs.data_ptr():  # else they are shared
                mine.copy_(theirs)

    def logits(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b classes"]:
        """(B, classes) float32 logits."""
        return torch.cat(self._in_parts(lambda rows: self._logits(x[rows]), len(x)))

    def gradient(self, x: Float[Tensor, "b ..."], label: Int[Tensor, " b"], loss: Loss) -> Answer:
        """The gradient of each example's loss in its own input, with loss and logits.

        Non-finite entries of a gradient come back as 0: an attack cannot follow them.

        Raises:
            ValueError: the model does not take x, or does not return (B, classes); loss does not return (B,).
        """
        parts = self._in_parts(lambda rows: self._gradient(x[rows], label[rows], loss), len(x))
        if len(parts) == 1:
            return parts[0]
        return Answer(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))

    def side_by_side(self, work: Callable[[Tensor], T], rows: Int[Tensor, " k"]) -> list[T]:
        """`work` of the rows of a batch: of all at once, or of a part for each core."""
        return [work(rows)]

    @contextmanager
    def private_randomness(self, seed: int) -> Iterator[None]:
        """Context manager: a model that draws random numbers draws them from `seed`.

        Included are the global generators of torch, NumPy and Python; afterwards they continue as if nothing had been
        drawn.
        """
        with private_randomness(seed, cuda_devices(self._network)):
            yield

    def _in_parts(self, ask: Callable[[slice], T], count: int) -> list[T]:
        """The answers to a batch as a whole, or in parts as large as memory holds."""
        while True:
            size = min(self.micro_batch or count, count)
            try:
                return [ask(slice(start, start + size)) for start in range(0, max(count, 1), max(size, 1))]
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or size < 2:
                    raise
            # Out of the handler, which holds on to what the failed attempt had made.
            self.micro_batch = -(-size // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            _log.warning("%d examples do not fit into memory: the network sees %d at a time", size, self.micro_batch)

    @torch.no_grad()
    def _logits(self, x: Tensor) -> Tensor:
        return self._forward(self._placed(x), len(x))

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

    def _placed(self, x: Tensor) -> Tensor:
        """A copy of x in the network's precision and memory format, which the network may change in place."""
        memory_format = self._memory_format if x.ndim == 4 else torch.preserve_format
        return x.to(self._dtype or x.dtype, memory_format=memory_format, copy=True)

    def _forward(self, x: Tensor, batch: int) -> Tensor:
        try:
            logits = self._network(x)
        except Exception as error:  # anything: it may be other people's code
            if is_out_of_memory(error):
                raise
            raise ValueError(f"the model fails on x of shape {tuple(x.shape)}: {summarize_error(error)}") from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the model must return logits of shape ({batch}, classes ≥ 2), got {found}")
        return logits.double() if logits.dtype == torch.float64 else logits.float()


class FastOracle(Oracle):
    """An oracle compiled for attacks, see `Oracle.fast`: each step is taken where its answers stay right."""

    def __init__(self, model: nn.Module, example: Float[Tensor, "b ..."], precision: Precision) -> None:
        if precision not in get_args(Precision):
            raise unknown("precision", precision, get_args(Precision))
        with torch.inference_mode(False), restore_randomness(cuda_devices(unwrapped(model))):
            super().__init__(model)
            self._folded: Folded | None = None
            self._precise: FastOracle | None = None  # where the network computes in bf16: one that does not
            self._replayed: Replayed | None = None
            self._threads = 1  # that may share a batch
            self._workers: Workers | None = None
            self._compiled_for = example, precision
            truth = self.logits(example)
            self._fold(example)
            self._put_channels_last()
            if precision == "bf16" or (precision == "auto" and has_fast_bf16(example.device)):
                self._lower(example, truth)
            else:
                self.plan += ", float32"
            self._share_work(example)
        _log.info("attack network: %s", self.plan)

    def recheck(self) -> Oracle:
        """This oracle if it still suits what the model has learned, else one that is compiled anew."""
        fresh = FastOracle(self._source, *self._compiled_for)
        if fresh.plan == self.plan:
            return self
        _log.warning("attack network: %s; it was: %s", fresh.plan, self.plan)
        return fresh

    @property
    def precise(self) -> Oracle:
        """The same network in float32, for what bf16 is too coarse for: itself, where it is not in bf16."""
        return self if self._precise is None else self._precise

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over what the model has learned since."""
        if self._precise is not None:
            self._precise.refresh()
        if self._folded is None:
            super().refresh()
        else:
            self._folded.refresh(self._source)

    def side_by_side(self, work: Callable[[Tensor], T], rows: Int[Tensor, " k"]) -> list[T]:
        """`work` of the rows of a batch: of all at once, or of a part for each core."""
        if self._threads == 1 or len(rows) < _WORTH_A_THREAD * self._threads:
            return [work(rows)]
        if self._workers is None:
            self._workers = Workers(self._threads)
        return self._workers.map(work, rows.tensor_split(self._threads))

    def _gradient(self, x: Tensor, label: Tensor, loss: Loss) -> Answer:
        if self._replayed is None:
            return super()._gradient(x, label, loss)
        answer: Answer = self._replayed(x, label, loss)
        return answer

    def _fold(self, example: Tensor) -> None:
        """Switches to the folded network where that computes the same logits, now and after learning."""
        try:
            self._folded = fold_checked(self._network, self._placed(example))
        except Unfoldable as reason:
            self._network = frozen_copy(self._source, share=False)
            self.plan = f"unfolded ({reason})"
            return
        self._network = self._folded.network
        self.plan = f"{len(self._folded.pairs)} BatchNorm folded"
        if self._folded.untraced is not None:
            self.plan += f" module by module ({self._folded.untraced})"

    def _put_channels_last(self) -> None:
        if any(isinstance(module, nn.Conv2d) for module in self._network.modules()):
            self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._memory_format = torch.channels_last
            self.plan += ", channels last"

    def _lower(self, example: Tensor, truth: Tensor) -> None:
        """Switches to bf16 where the network computes in it and its logits stay close."""
        before = copy.copy(self)
        try:
            self._network, self._dtype = copy_model(self._network).to(torch.bfloat16), torch.bfloat16
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

    def _share_work(self, example: Tensor) -> None:
        """Records CUDA graphs on a GPU; on a processor several threads share a batch."""
        threads, both = torch.get_num_threads(), {self, self._precise or self}
        if threads == 1 and not example.is_cuda:
            return
        # Threads would draw in any order, and a recording repeats what was drawn once.
        if draws(lambda: self.logits(example), cuda_devices(self._network)):
            return
        for one in both:
            if example.is_cuda:
                one._replayed = Replayed(partial(Oracle._gradient, one))
            else:
                one._threads = threads
        self.plan += ", CUDA graphs" if example.is_cuda else f", {threads} threads"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is full: a GPU's, or what the processor's allocator raises."""
    told = str(error) if isinstance(error, RuntimeError) else ""
    allocator = "not enough memory" in told or "can't allocate memory" in told
    return allocator or isinstance(error, torch.OutOfMemoryError | MemoryError)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def _state(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
