"""The problem an attack is given: a network to ask, the set X(x), and a label to leave or to reach."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from innermax.attacks.averaging import Averaged, average
from innermax.attacks.search import has_won
from innermax.losses import Given, Loss, likeliest_others, needs_clean, select
from innermax.oracle.oracle import Oracle, Response
from innermax.threat import FeasibleSet, Threat
from innermax.utils import randomness
from innermax.utils.validation import (
    are_classes,
    are_finite,
    check_input_shape,
    check_inputs,
    check_label_shape,
    check_labels,
)


@dataclass(frozen=True, eq=False)
class Problem:
    """What an attack is asked about a batch; rows are examples.

    Attributes:
        oracle: the network as the attack sees it.
        feasible: X(x).
        y: (B,) true labels.
        target: (B,) labels to reach; None: y is to be left.
        seed, index: an integer and (B,) example numbers, which together decide all that is random.
        pair: (B,) y · classes + the wrong class that a search heads for, where it heads for one: the label of a
            `losses.Paired` loss. Such a search has won wherever y is left.
        samples: answers of the network that are averaged each time it is asked (expectation over transformation).
        start: (B, *features) points of X(x) where the first search begins; None: where the attack chooses.
        given: what the loss of the search is given beside logits and label; a row per example.
    """

    oracle: Oracle
    feasible: FeasibleSet
    y: Int[Tensor, " b"]
    target: Int[Tensor, " b"] | None
    seed: int
    index: Int[Tensor, " b"]
    pair: Int[Tensor, " b"] | None = None
    samples: int = 1
    start: Float[Tensor, "b ..."] | None = None
    given: Given = ()

    @classmethod
    def of(
        cls,
        threat: Threat,
        model: nn.Module | Oracle,
        x: Tensor,
        y: Tensor,
        *,
        target: Tensor | None = None,
        seed: int = 0,
        index: Tensor | None = None,
        start: Tensor | None = None,
    ) -> "Problem":
        """An attack's arguments, checked; the start projected onto X(x).

        Raises:
            ValueError, TypeError: x, y, target, seed, index or start do not fit together.
        """
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        check_input_shape(x)
        oracle = Oracle.of(model)
        x = x.to(torch.promote_types(x.dtype, oracle.dtype))
        index = torch.arange(len(x), device=x.device) if index is None else index
        labels = {"y": y, "index": index} | ({} if target is None else {"target": target})
        classes = {"y" if target is None else "target": oracle.classes}  # None: not known yet
        for name, label in labels.items():
            check_label_shape(label, len(x), name)
        inputs = {"x": x} | ({} if start is None else {"start": start})
        if start is not None:
            check_input_shape(start, "start")
            if start.shape != x.shape:
                raise ValueError(f"start must have x's shape {tuple(x.shape)}, got {tuple(start.shape)}")
        feasible, fits = threat.enclose(x)
        # All values are looked at together, so that their device is waited for once.
        suit = [fits, *map(are_finite, inputs.values())]
        suit += [are_classes(label, classes.get(name)) for name, label in labels.items()]
        if not bool(torch.stack(suit).all()):
            _refuse(threat, inputs, labels, classes)
        if start is not None:
            start = feasible.project(start.to(feasible.x.dtype))
        return cls(oracle, feasible, y, target, seed, index, start=start)

    def __getitem__(self, rows: Tensor) -> "Problem":
        """The same problem for some of the examples."""
        optional = {name: getattr(self, name) for name in ("target", "pair", "start")}
        return replace(
            self,
            feasible=self.feasible[rows],
            y=self.y[rows],
            index=self.index[rows],
            given=select(self.given, rows),
            **{name: value[rows] for name, value in optional.items() if value is not None},
        )

    def prepare(self, loss: Loss, oracle: Oracle) -> "Problem":
        """The problem with what the loss is given, for which the oracle is asked once, if it depends on the clean
        inputs.
        """
        if not needs_clean(loss):
            return self
        known = self.oracle.classes is not None  # so that the labels are checked
        with torch.no_grad():
            clean = average(oracle, self.samples).logits(self.feasible.x)
            if not known:
                check_labels(self.label, len(clean), clean.shape[1], "target" if self.reach else "y")
            given = loss.prepare(clean, self.label)  # type: ignore[attr-defined]  # that is how it depends on them
        if not isinstance(given, tuple) or any(len(value) != len(clean) for value in given):
            raise ValueError(f"loss {loss!r} must prepare a tuple of tensors with {len(clean)} rows, one per example")
        return replace(self, given=given)

    def towards(self, targets: int, clean: Float[Tensor, "b classes"]) -> "Iterator[Problem]":
        """The problem with one wrong class after the other to head for, the most likely on the clean input first."""
        classes = clean.shape[1]
        for aim in likeliest_others(clean, self.y, min(targets, classes - 1)).unbind(1):
            yield replace(self, pair=self.y * classes + aim)

    @property
    def asked(self) -> Oracle | Averaged:
        """The network as the search asks it: each answer the mean of `samples`."""
        return average(self.oracle, self.samples)

    @property
    def reach(self) -> bool:
        """Whether a label is to be reached, not left."""
        return self.target is not None

    @property
    def label(self) -> Int[Tensor, " b"]:
        """The label to leave, or to reach."""
        return self.y if self.target is None else self.target

    def keys(self, *streams: int | Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """One key per example for random draws; streams: restart numbers and the like."""
        return randomness.hash_keys(self.seed, self.index, *streams)

    def won(self, point: Float[Tensor, "b ..."], logits: Float[Tensor, "b classes"]) -> Bool[Tensor, " b"]:
        """Where the adversary has what it wants, at points with these logits; bf16 logits are confirmed in float32."""
        won = has_won(logits, self.label, self.reach)
        if self.oracle.lowered and len(rows := won.nonzero()[:, 0]) > 0:
            confirmed = self.asked.precise.logits(point[rows])
            won[rows] = has_won(confirmed, self.label[rows], self.reach)
        return won

    def logits(self, point: Float[Tensor, "b ..."]) -> Float[Tensor, "b classes"]:
        """The logits at a point of each example, the mean of `samples` answers."""
        return self.asked.logits(point)

    def gradient(self, point: Float[Tensor, "b ..."], loss: Loss) -> Response:
        """Gradient, loss and logits at a point of each example, the means of `samples` answers."""
        label = self.label if self.pair is None else self.pair
        return self.asked.gradient(point, label, loss, self.given)


def _refuse(
    threat: Threat, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor], classes: Mapping[str, int | None]
) -> None:
    """Raises for the first argument, by name, whose values do not suit."""
    for name, value in inputs.items():
        check_inputs(value, name)
    threat.around(inputs["x"])
    for name, label in labels.items():
        check_labels(label, len(label), classes.get(name), name)
