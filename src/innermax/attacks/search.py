"""The search behind every gradient attack: projected steepest ascent that knows how converged it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from innermax.attacks.averaging import Averaged
from innermax.losses import Given, Loss, select
from innermax.oracle.oracle import Oracle, Response
from innermax.threat import FeasibleSet

Gauge = Literal["exact", "ball", "relative"]
Final = Literal["gradient", "loss", "none"]
Observer = Callable[[FeasibleSet, Tensor, Response], object]
_COARSE = 0.75  # share of the steps for which bf16 is precise enough


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, a row per example; every value belongs to the returned `x_adv`.

    Attributes:
        x_adv: (B, *features) inputs inside X(x).
        loss: (B,) the loss the attack maximised, at x_adv.
        logits: (B, classes) at x_adv.
        fosc: (B,) exact FOSC at x_adv, ≥ 0.
        relative_fosc: (B,) FOSC over the width of the linear model on X(x), in [0, 1]; NaN where the gradient is 0.
        zero_gradient: (B,) bool, the gradient at x_adv is 0: nothing to follow, which is not convergence.
        misclassified: (B,) bool, the predicted class is not y.
        steps: (B,) int64 steps that lead to x_adv from its start.
        gradient_calls: (B,) int64 gradients each example cost, over all restarts.
        forward_calls: (B,) int64 forward passes without a gradient each example cost.

    What was not computed for every example (see `final`) is None.
    """

    x_adv: Float[Tensor, "b ..."]
    loss: Float[Tensor, " b"] | None
    logits: Float[Tensor, "b classes"] | None
    fosc: Float[Tensor, " b"] | None
    relative_fosc: Float[Tensor, " b"] | None
    zero_gradient: Bool[Tensor, " b"] | None
    misclassified: Bool[Tensor, " b"] | None
    steps: Int[Tensor, " b"]
    gradient_calls: Int[Tensor, " b"]
    forward_calls: Int[Tensor, " b"]

    def map(self, change: Callable[[Tensor], Tensor]) -> "AttackResult":
        """The result with `change` applied to every value that was computed."""
        return replace(self, **{name: change(value) for name, value in vars(self).items() if value is not None})

    def __getitem__(self, rows: Tensor) -> "AttackResult":
        """Some of the examples."""
        return self.map(lambda value: value[rows])

    def with_rows(self, rows: Int[Tensor, " k"], part: "AttackResult") -> "AttackResult":
        """The result with some examples replaced by those of `part`; a value that either lacks is None."""
        pairs = {name: (value, getattr(part, name)) for name, value in vars(self).items()}
        values: dict[str, Any] = {
            name: None if old is None or new is None else old.index_copy(0, rows, new)
            for name, (old, new) in pairs.items()
        }
        return replace(self, **values)


def search(
    oracle: Oracle | Averaged,
    feasible: FeasibleSet,
    start: Float[Tensor, "b ..."],
    label: Int[Tensor, " b"],
    loss: Loss,
    step_sizes: Sequence[float],
    *,
    given: Given = (),
    reach: bool = False,
    gauge: Gauge = "exact",
    stop_at: float | None = None,
    stop_on_success: bool = False,
    steps_after_success: int = 0,
    warm: bool = False,
    final: Final = "gradient",
    observe: Observer | None = None,
) -> AttackResult:
    """Climbs the loss from `start` over X(x), one step size after the other.

    Finished examples leave the batch that is sent through the network. The gradient that measures an iterate's FOSC
    also gives its next step, so an example that stops at its k-th iterate has cost k + 1 gradients. Where the end is to
    be scored, an oracle that computes in bf16 is asked in float32 for the last quarter of the steps and for the end,
    which makes up for rounding in the steps before. An example that stops before is scored by float32 for one forward
    pass, so that it counts as fallen only where float32 confirms it.

    In the result `misclassified` says where the adversary has what it wants.

    Args:
        oracle: what answers for the network.
        feasible: X(x).
        start: (B, *features) points of X(x).
        label: (B,) the label to leave, or to reach.
        loss: (logits, label, *given) → (B,), maximised.
        step_sizes: one per step, in the threat's norm.
        given: what the loss is given beside logits and label; a row per example.
        reach: the adversary wants the label predicted, not left.
        gauge: how far from stationary an iterate is: FOSC "exact" over X(x), over the "ball" alone, or "relative".
        stop_at: an example stops at its first iterate after a step whose gauge is ≤ this, unless its gradient is 0.
        stop_on_success: an example stops where the adversary has what it wants.
        steps_after_success: so many iterates where it has what it wants are passed by first.
        warm: the start is where an earlier search ended, so an example may stop there, before any step.
        final: what is computed where the steps end: "gradient" (loss, logits, FOSC), "loss" (loss, logits) or "none".
        observe: called with X(x), the iterates and the oracle's answer there, of the examples that are still searching:
            at the start, after each step and, where `final` is "gradient", at the end.
    """
    rows, x_adv = torch.arange(len(start), device=start.device), start
    pieces: list[tuple[Tensor, AttackResult]] = []
    confirmations, fallen = torch.zeros_like(label), torch.zeros_like(label)
    coarse = len(step_sizes) if final == "none" else int(_COARSE * len(step_sizes))
    for step, step_size in enumerate(step_sizes):
        asked = oracle if step < coarse else oracle.precise
        answer = asked.gradient(x_adv, label, loss, given)
        gradient = answer.gradient
        if observe is not None:
            observe(feasible, x_adv, answer)
        stopping = torch.zeros_like(label, dtype=torch.bool)
        if stop_at is not None and (step > 0 or warm):
            stopping |= _has_converged(feasible, gradient, x_adv, gauge, stop_at)
        if asked.lowered and (stop_on_success or (stop_at is not None and final != "none")):
            unsure = (stopping & (final != "none")) | (has_won(answer.logits, label, reach) & stop_on_success)
            seen = unsure.nonzero()[:, 0]
            answer = _confirm(asked.precise, x_adv, answer, label, loss, given, seen)
            confirmations[rows[seen]] += 1
        if stop_on_success:
            fallen = fallen + (won := has_won(answer.logits, label, reach))
            stopping |= won & (fallen > steps_after_success)
        if (stop_at is not None or stop_on_success) and (leaving := int(stopping.sum())):
            going, done = split_rows(stopping, leaving)
            pieces.append(
                (rows[done], _end_gauged(feasible[done], x_adv[done], answer[done], label[done], reach, step))
            )
            if len(going) == 0:
                break
            rows, x_adv, label, gradient, fallen = select((rows, x_adv, label, gradient, fallen), going)
            feasible, given = feasible[going], select(given, going)
        x_adv = feasible.step(x_adv, gradient, step_size)
    else:
        if final == "gradient":
            answer = oracle.precise.gradient(x_adv, label, loss, given)
            if observe is not None:
                observe(feasible, x_adv, answer)
            pieces.append((rows, _end_gauged(feasible, x_adv, answer, label, reach, len(step_sizes))))
        else:
            scored = oracle.precise if final == "loss" else None
            pieces.append((rows, _end_ungauged(scored, x_adv, label, loss, given, reach, len(step_sizes))))
    result = reassemble(pieces)
    return replace(result, forward_calls=result.forward_calls + confirmations)


def measure(
    feasible: FeasibleSet, gradient: Float[Tensor, "b ..."], x_adv: Float[Tensor, "b ..."], gauge: Gauge
) -> Float[Tensor, " b"]:
    """The gauge of each iterate: FOSC "exact" over X(x), over the "ball" alone (the paper's), or "relative"."""
    if gauge == "ball":
        return feasible.without_bounds().gap(gradient, x_adv)
    return feasible.gap(gradient, x_adv, relative=gauge == "relative")


def split_rows(leaving: Bool[Tensor, " b"], count: int) -> tuple[Int[Tensor, " s"], Int[Tensor, " l"]]:
    """The rows of those that stay and of the `count` that leave, each in their order.

    A device that computes the rows is not waited for again: with their count, it has been already.
    """
    order = leaving.byte().argsort(stable=True)
    return order[: len(order) - count], order[len(order) - count :]


def concatenate(results: Sequence[AttackResult]) -> AttackResult:
    """The examples of several results, one after the other; a value that one lacks is None."""
    values = {field.name: [getattr(result, field.name) for result in results] for field in fields(results[0])}
    columns: dict[str, Any] = {
        name: None if any(part is None for part in parts) else torch.cat(parts) for name, parts in values.items()
    }
    whole: AttackResult = replace(results[0], **columns)
    return whole


def gauges(feasible: FeasibleSet, gradient: Tensor, x_adv: Tensor) -> dict[str, Any]:
    """What an AttackResult says of the gradient at x_adv."""
    return {
        "fosc": feasible.gap(gradient, x_adv),
        "relative_fosc": feasible.gap(gradient, x_adv, relative=True),
        "zero_gradient": ~_is_nonzero(gradient),
    }


def choose_better(one: AttackResult, other: AttackResult) -> AttackResult:
    """Of two searches the better for each example: the one that made it fall, then the higher loss; costs add up."""
    if one.loss is None or other.loss is None or one.misclassified is None or other.misclassified is None:
        raise ValueError("searches are compared by their loss: final must be 'gradient' or 'loss'")
    same = one.misclassified == other.misclassified
    take = torch.where(same, other.loss > one.loss, other.misclassified)
    pairs = {name: (value, getattr(other, name)) for name, value in vars(one).items()}
    chosen: dict[str, Any] = {
        name: None if old is None or new is None else choose_rows(take, new, old) for name, (old, new) in pairs.items()
    }
    chosen["gradient_calls"] = one.gradient_calls + other.gradient_calls
    chosen["forward_calls"] = one.forward_calls + other.forward_calls
    return replace(one, **chosen)


def choose_rows(take: Bool[Tensor, " b"], one: Tensor, other: Tensor) -> Tensor:
    """The rows of `one` where `take` is true, else those of `other`."""
    return torch.where(take.reshape(-1, *[1] * (one.ndim - 1)), one, other)


def _has_converged(feasible: FeasibleSet, gradient: Tensor, x_adv: Tensor, gauge: Gauge, stop_at: float) -> Tensor:
    """Whose gauge is at or below the threshold; a zero gradient is nothing to follow, not convergence."""
    converged = measure(feasible, gradient, x_adv, gauge) <= stop_at
    if converged.is_cuda or bool(converged.any()):  # usually none; on a GPU the check costs less than waiting
        converged &= _is_nonzero(gradient)
    return converged


def has_won(logits: Tensor, label: Tensor, reach: bool) -> Tensor:
    """Where the adversary has what it wants."""
    predicted = logits.argmax(1)
    return predicted == label if reach else predicted != label


def _confirm(
    precise: Oracle | Averaged,
    x_adv: Tensor,
    answer: Response,
    label: Tensor,
    loss: Loss,
    given: Given,
    rows: Int[Tensor, " k"],
) -> Response:
    """An answer in bf16 whose logits and loss are float32's in some rows."""
    if len(rows) == 0:
        return answer
    logits = precise.logits(x_adv[rows])
    return replace(
        answer,
        logits=answer.logits.index_copy(0, rows, logits.to(answer.logits)),
        loss=answer.loss.index_copy(0, rows, loss(logits, label[rows], *select(given, rows)).to(answer.loss)),
    )


def _end_ungauged(
    oracle: Oracle | Averaged | None, x_adv: Tensor, label: Tensor, loss: Loss, given: Given, reach: bool, steps: int
) -> AttackResult:
    """The result of examples that took every step, without FOSC; without an oracle, without loss and logits, too."""
    count, nothing = torch.full_like(label, steps), torch.zeros_like(label)
    if oracle is None:
        return AttackResult(x_adv, None, None, None, None, None, None, count, count, nothing)
    logits = oracle.logits(x_adv)
    won = has_won(logits, label, reach)
    return AttackResult(x_adv, loss(logits, label, *given), logits, None, None, None, won, count, count, nothing + 1)


def _end_gauged(
    feasible: FeasibleSet, x_adv: Tensor, answer: Response, label: Tensor, reach: bool, steps: int
) -> AttackResult:
    """The result of examples that end at an iterate whose gradient is known."""
    count = torch.full_like(label, steps)
    return AttackResult(
        x_adv=x_adv,
        loss=answer.loss,
        logits=answer.logits,
        **gauges(feasible, answer.gradient, x_adv),
        misclassified=has_won(answer.logits, label, reach),
        steps=count,
        gradient_calls=count + 1,
        forward_calls=torch.zeros_like(count),
    )


def _is_nonzero(gradient: Tensor) -> Tensor:
    return (gradient != 0).flatten(1).any(1)


def reassemble(pieces: Sequence[tuple[Tensor, AttackResult]]) -> AttackResult:
    """The result of a batch from pieces, each with the numbers of its rows."""
    rows, results = zip(*pieces, strict=True)
    return concatenate(results)[torch.cat(rows).argsort()]
