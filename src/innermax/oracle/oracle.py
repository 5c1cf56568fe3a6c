"""The network as the attacker sees it: frozen, in evaluation mode, and as fast as the machine allows.

Attacks ask an oracle, never the model. The oracle holds a copy of the model, so the learner's own flags, buffers and
gradients are never touched and nothing has to be restored.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from innermax.losses import Given, Loss, select
from innermax.models.neighbors import depends_on_neighbors
from innermax.models.wrappers import unwrap
from innermax.oracle.attributes import Snapshot
from innermax.oracle.comparison import break_ties
from innermax.oracle.compilation import COPIED, compile_network, difference_between, difference_in_use, is_close
from innermax.oracle.compiled import Compiled, floating_dtype, share
from innermax.oracle.cuda_graphs import Replayed
from innermax.oracle.draws import draws
from innermax.oracle.frozen import find_unkept_statistics, frozen_copy
from innermax.oracle.recurrent import NOTE
from innermax.oracle.threads import Workers
from innermax.oracle.timing import times_as_long
from innermax.utils.generators import cuda_devices, private_randomness, restore_randomness
from innermax.utils.validation import check_logits, summarize_error, unknown

Precision = Literal["auto", "float32", "bf16"]
T = TypeVar("T")
_AS_IS = "as the model is"
_FOR_SPEED = "float32 for speed"  # the clock has decided: bf16 is not tried again at every recheck
_ORDERS = "channels last", "channels first"
_WORTH_A_THREAD = 4  # examples
_CLOSE, _CLOSE_LOWERED = 1e-2, 0.1  # rounding differs with the size of a part, and may switch a ReLU
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Response:
    """An oracle's answer to a batch: (B, …) gradient of each example's own loss, (B,) loss, (B, classes) logits."""

    gradient: Float[Tensor, "b ..."]
    loss: Float[Tensor, " b"]
    logits: Float[Tensor, "b classes"]

    def __getitem__(self, rows: Tensor) -> "Response":
        """Some of the examples."""
        return replace(self, gradient=self.gradient[rows], loss=self.loss[rows], logits=self.logits[rows])


class Oracle:
    """Loss, logits and ∂loss/∂x of a frozen model, per example.

    `Oracle(model)` computes exactly what the model computes, on the model's own parameters. `Oracle.fast(model, …)` is
    compiled for attacking; call `refresh()` after the model has learned.

    Attributes:
        steps: how the network is computed, in words: what was done, each with what was measured or why no more was.
        classes: how many logits the model returns, once it has been asked.
        micro_batch: how many examples the network sees at a time, once a whole batch did not fit into memory.
        dtype: of logits and losses, where the inputs are no finer.
        doubt: by how much a difference of two logits can be off, as measured when the network was lowered to bf16.

    Args:
        model: any nn.Module that returns logits, in any mode; left exactly as found.
        network: what answers for the model; a frozen copy of it unless given.

    Raises:
        TypeError: the model is not an nn.Module or cannot be copied.
        ValueError: it has no weights yet; when it is first asked, where it mixes the examples of a batch (BatchNorm
            without running statistics).
    """

    def __init__(self, model: nn.Module, network: nn.Module | None = None) -> None:
        self._source = unwrap(model)
        self._compiled = share(self._source) if network is None else Compiled(network, floating_dtype(self._source))
        self._may_mix = find_unkept_statistics(self._source) if network is None else None  # a layer
        self.micro_batch: int | None = None
        self.classes: int | None = None
        self.steps: Mapping[str, str] = {_AS_IS: ""}
        self.dtype = torch.promote_types(torch.float32, floating_dtype(self._source) or torch.float32)
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

    @property
    def plan(self) -> str:
        """The steps and their notes in one line."""
        told = [f"{step} ({note})" if note else step for step, note in self.steps.items()]
        return ", ".join([*told, NOTE] if self._compiled.recurrent else told)

    @property
    def scheme(self) -> str:
        """The steps in one line, without what was measured."""
        return ", ".join(self.steps)

    def recheck(self) -> "Oracle":
        """This oracle if it still suits what the model has learned, else one that is compiled anew."""
        return self

    def recompile(self, scheme: str) -> "Oracle":
        """This oracle where it has the scheme, else one compiled to it, whatever the clock says."""
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

    def refresh(self) -> None:
        """Takes over what the model has learned since."""
        fits = self._compiled.fits(self._source)
        self._compiled = self._compiled.refresh(self._source) if fits else share(self._source)

    def logits(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b classes"]:
        """(B, classes) float32 logits."""
        return torch.cat(self._in_parts(lambda rows: self._logits(x[rows]), len(x)))

    def gradient(self, x: Float[Tensor, "b ..."], label: Int[Tensor, " b"], loss: Loss, given: Given = ()) -> Response:
        """The gradient of each example's loss(logits, label, *given) in its own input, with loss and logits.

        Non-finite entries of a gradient come back as 0: an attack cannot follow them.

        Raises:
            ValueError: the model does not take x, or does not return (B, classes); loss does not return (B,).
        """
        parts = self._in_parts(lambda rows: self._gradient(x[rows], label[rows], loss, select(given, rows)), len(x))
        if len(parts) == 1:
            return parts[0]
        return Response(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))

    def side_by_side(self, work: Callable[[Tensor], T], rows: Int[Tensor, " k"]) -> list[T]:
        """`work` of the rows of a batch: of all at once, or of a part for each core."""
        return [work(rows)]

    @contextmanager
    def private_randomness(self, seed: int) -> Iterator[None]:
        """Context manager: a model that draws random numbers draws them from `seed`.

        Included are the global generators of torch, NumPy and Python; afterwards they continue as if nothing had been
        drawn.
        """
        with private_randomness(seed, cuda_devices(self._source)):
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
        return self._forward(x)

    def _gradient(self, x: Tensor, label: Tensor, loss: Loss, given: Given) -> Response:
        with torch.inference_mode(False), torch.enable_grad():
            point = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
            known = [value.clone() if value.is_inference() else value for value in (label, *given)]
            logits = self._forward(point)
            value = loss(logits, *known)
            if value.shape != (len(x),):
                raise ValueError(f"loss must return one value an example ({len(x)},), got {tuple(value.shape)}")
            # A sum, not a mean: no example's gradient may depend on how many others there are.
            gradient = torch.autograd.grad(value.sum(), point, allow_unused=True)[0] if value.requires_grad else None
        if gradient is None:
            gradient = torch.zeros_like(x)
        gradient = gradient.to(x.dtype).contiguous()
        return Response(gradient.nan_to_num_(0.0, 0.0, 0.0), value.detach(), logits.detach())

    def _forward(self, x: Tensor) -> Tensor:
        if self._may_mix is not None and len(x) > 0:
            self._check_neighbors(x[0].detach(), self._may_mix)
        logits = self._ask(x)
        finest = torch.promote_types(self.dtype, x.dtype if x.is_floating_point() else self.dtype)
        checked = check_logits(logits, len(x)).to(finest)
        self.classes = checked.shape[1]
        return checked

    def _ask(self, x: Tensor) -> Any:
        """What the network returns; ValueError where it raises anything but that memory is full."""
        try:
            return self._compiled(x)
        except Exception as error:  # anything: it may be other people's code
            if is_out_of_memory(error):
                raise
            raise ValueError(f"the model fails on x of shape {tuple(x.shape)}: {summarize_error(error)}") from error

    def _check_neighbors(self, x: Tensor, layer: str) -> None:
        """Raises ValueError where the answer to x depends on the image beside it."""
        if depends_on_neighbors(self._ask, x):
            raise ValueError(
                f"model layer {layer} has no running statistics, so it mixes the examples of a batch even in "
                "evaluation mode; build it with track_running_stats=True"
            )
        self._may_mix = None


class FastOracle(Oracle):
    """An oracle compiled for attacks, see `Oracle.fast`: each step is taken where logits and gradients stay right."""

    def __init__(
        self, model: nn.Module, example: Float[Tensor, "b ..."], precision: Precision, scheme: str | None = None
    ) -> None:
        """Scheme: what to compile to; None: to what is fastest."""
        if precision not in get_args(Precision):
            raise unknown("precision", precision, get_args(Precision))
        with torch.inference_mode(False), restore_randomness(cuda_devices(unwrap(model))):
            super().__init__(model)
            self._precise: FastOracle | None = None  # where the network computes in bf16: one that does not
            self._replayed: Replayed | None = None
            self._threads = 1  # that may share a batch
            self._workers: Workers | None = None
            self._compiled_for = example, precision
            self._snapshot, self._unfelt = Snapshot.of(self._source), set[tuple[str, str]]()
            self.logits(example)  # raises where the model does not suit
            finer = self.dtype == torch.float64  # which the model has on purpose
            auto = precision == "auto" and not finer and has_fast_bf16(example.device)
            self._bf16 = precision == "bf16" or auto
            if scheme in (self.scheme, COPIED):
                self._keep_plain(scheme, "")
            else:
                told = "" if scheme is None else scheme
                self._compile(example, self._bf16 if scheme is None else "bf16" in told, "channels first" not in told)
                self._share_work(example)
                if scheme is None:
                    self._take_fastest(example)
                elif _FOR_SPEED in told:
                    self._leave_bf16("")
                self._bf16 &= COPIED not in self.steps
        _log.info("attack network: %s", self.plan)

    def recheck(self) -> Oracle:
        """This oracle if it still answers as the model does after all it has learned, else one compiled anew."""
        example, precision = self._compiled_for
        with torch.inference_mode(False), restore_randomness(cuda_devices(self._source)):
            difference = difference_in_use(self._compiled, self._source, example)
        right = is_close(difference, self.lowered)
        if right and self.lowered == self._bf16:
            return self
        fresh = FastOracle(self._source, example, precision)
        if fresh.scheme == self.scheme:
            same = difference_between(self._compiled, fresh._compiled, example)
            if right or is_close(same, lowered=False):
                return self
            # It keeps something from before the updates, which no refresh reaches.
            fresh = FastOracle(self._source, example, precision, COPIED)
        _log.warning("attack network: %s; it was: %s", fresh.plan, self.plan)
        return fresh

    def recompile(self, scheme: str) -> Oracle:
        """This oracle where it has the scheme, else one compiled to it, whatever the clock says."""
        return self if self.scheme == scheme else FastOracle(self._source, *self._compiled_for, scheme=scheme)

    @property
    def precise(self) -> Oracle:
        """The same network in float32, for what bf16 is too coarse for: itself, where it is not in bf16."""
        return self if self._precise is None else self._precise

    def refresh(self) -> None:
        """Takes over what the model has learned since."""
        fixed = self._compiled.folded is not None or self._replayed is not None  # a trace and a recording keep numbers
        if self._compiled.kept and not self._compiled.fits(self._source):
            self._leave_for_copies("a parameter or buffer has another shape")
        elif fixed and self._has_new_attributes():
            self._leave_for_copies("a number that is neither parameter nor buffer has changed")
        else:
            for one in {self, self._precise or self}:
                one._compiled = one._compiled.refresh(self._source)

    def _leave_for_copies(self, reason: str) -> None:
        self._keep_plain(COPIED, reason)
        _log.warning("attack network: %s", self.plan)

    def _has_new_attributes(self) -> bool:
        """Whether the model now answers by plain attributes that it did not have when it was compiled."""
        changed = self._snapshot.changed(self._source) - self._unfelt
        if changed and self._snapshot.is_felt(self._source, changed, self._compiled_for[0]):
            return True
        self._unfelt |= changed
        return False

    def side_by_side(self, work: Callable[[Tensor], T], rows: Int[Tensor, " k"]) -> list[T]:
        """`work` of the rows of a batch: of all at once, or of a part for each core."""
        if self._threads == 1 or len(rows) < _WORTH_A_THREAD * self._threads:
            return [work(rows)]
        if self._workers is None:
            self._workers = Workers(self._threads)
        return self._workers.map(work, rows.tensor_split(self._threads))

    def _gradient(self, x: Tensor, label: Tensor, loss: Loss, given: Given) -> Response:
        if self._replayed is None:
            return super()._gradient(x, label, loss, given)
        answer: Response = self._replayed(x, label, loss, given)
        return answer

    def _keep_plain(self, scheme: str, reason: str) -> None:
        own = frozen_copy(self._source, share=False)
        self._compiled = Compiled(own, floating_dtype(self._source), kept=scheme != COPIED)
        self._precise, self._replayed, self._threads, self.doubt, self._bf16 = None, None, 1, 0.0, False
        self.steps = {scheme: reason}

    def _leave_bf16(self, reason: str) -> None:
        left = {step: note for step, note in self.steps.items() if step not in ("bf16", "float32")}
        self._compiled, self._precise, self.doubt = self.precise._compiled, None, 0.0
        self.steps, self._bf16 = left | {_FOR_SPEED: reason}, False

    def _compile(self, example: Tensor, bf16: bool, channels_last: bool) -> None:
        done = compile_network(self._source, example, bf16, channels_last)
        self._compiled, self.steps, self.doubt = done.network, dict(done.steps), done.doubt
        if done.precise is not None:
            self._precise = copy.copy(self)
            self._precise._compiled, self._precise.doubt = done.precise, 0.0

    def _share_work(self, example: Tensor) -> None:
        """Records CUDA graphs on a GPU; on a processor several threads share a batch."""
        threads = torch.get_num_threads()
        if not self._compiled.kept if example.is_cuda else threads == 1:  # a recording would keep the first copy
            return
        # Threads would draw in any order, and a recording repeats what was drawn once.
        if draws(lambda: self.logits(example), cuda_devices(self._source)):
            return
        both = {self, self._precise or self}
        for one in both:
            if example.is_cuda:
                one._replayed = Replayed(partial(Oracle._gradient, one))
            else:
                one._threads = threads
        off = max(_difference_together(one, example) for one in both)
        if off <= (_CLOSE_LOWERED if self.lowered else _CLOSE):
            self.steps = {**self.steps, "CUDA graphs" if example.is_cuda else f"{threads} threads": ""}
            return
        for one in both:
            one._replayed, one._threads = None, 1
        shared = "CUDA graphs change" if example.is_cuda else "threads that share a batch change"
        self.steps = {**self.steps, "as a whole": f"{shared} logits or gradients by {off:.1e} of their size"}

    def _take_fastest(self, example: Tensor) -> None:
        """Leaves bf16, channels-last order, or all that was compiled, where a gradient takes longer so."""
        times = _times_as_long(self, self.precise, example)
        if times > 1:
            self._leave_bf16(f"in bf16 a gradient takes {times:.2f} times as long")
        plain = Oracle(self._source)
        over_plain = _times_as_long(self, plain, example)
        if _ORDERS[0] in self.steps and over_plain >= 1:
            first = FastOracle(self._source, *self._compiled_for, self.scheme.replace(*_ORDERS))
            times = _times_as_long(self, first, example)
            if times > 1:
                vars(self).update(vars(first))
                told = f"in the other order a gradient takes {times:.2f} times as long"
                self.steps = {**first.steps, _ORDERS[1]: told}
                over_plain = _times_as_long(self, plain, example)
        if over_plain > 1:
            self._keep_plain(_AS_IS, f"compiled, a gradient takes {over_plain:.2f} times as long")


def _times_as_long(one: Oracle, other: Oracle, example: Tensor) -> float:
    """How many times as long a gradient takes on one oracle as on another; 1 where that is not clear."""
    if one is other:
        return 1.0
    return times_as_long(partial(_gradient_together, one), partial(_gradient_together, other), break_ties(example))


def _margin(logits: Tensor, _label: Tensor) -> Tensor:
    best = logits.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def _gradient_together(oracle: Oracle, x: Tensor) -> Response:
    """The oracle's answer to a batch as an attack asks for it: in parts, side by side."""
    label = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    rows = torch.arange(len(x), device=x.device)
    parts = oracle.side_by_side(lambda some: oracle.gradient(x[some], label[some], _margin), rows)
    return Response(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))


def _difference_together(oracle: "FastOracle", example: Tensor) -> float:
    """The largest difference, over the size, of logits or gradients that the network gives alone and side by side."""
    copies = -(-_WORTH_A_THREAD * torch.get_num_threads() // len(example))
    x = break_ties(example).repeat(copies, *[1] * (example.ndim - 1))
    label = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    alone = Oracle._gradient(oracle, x, label, _margin, ())
    return max(
        float((found - truth).abs().max()) / (float(truth.abs().max()) or 1.0)
        for together in [_gradient_together(oracle, x) for _ in range(3)]
        for found, truth in ((together.logits, alone.logits), (together.gradient, alone.gradient))
    )


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
