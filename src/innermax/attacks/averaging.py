"""A network that draws random numbers, as the mean of several answers: expectation over transformation."""

from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from innermax.losses import Given, Loss
from innermax.oracle.oracle import Oracle, Response


@dataclass(frozen=True, eq=False)
class Averaged:
    """An oracle each of whose answers is the mean of several (Athalye et al. 2018, EOT)."""

    oracle: Oracle
    samples: int

    @property
    def precise(self) -> "Averaged":
        """The same in float32: itself, where the oracle is not in bf16."""
        return replace(self, oracle=self.oracle.precise) if self.lowered else self

    @property
    def lowered(self) -> bool:
        """Whether it computes in bf16 what the model computes in another precision."""
        return self.oracle.lowered

    def logits(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b classes"]:
        """The mean logits."""
        total = self.oracle.logits(x)
        for _ in range(1, self.samples):
            total = total + self.oracle.logits(x)
        return total / self.samples

    def gradient(self, x: Float[Tensor, "b ..."], label: Int[Tensor, " b"], loss: Loss, given: Given = ()) -> Response:
        """The mean gradient, loss and logits."""
        total = self.oracle.gradient(x, label, loss, given)
        for _ in range(1, self.samples):
            more = self.oracle.gradient(x, label, loss, given)
            total = Response(total.gradient + more.gradient, total.loss + more.loss, total.logits + more.logits)
        return Response(total.gradient / self.samples, total.loss / self.samples, total.logits / self.samples)


def average(oracle: Oracle, samples: int) -> Oracle | Averaged:
    """The oracle whose answers are means of so many; the oracle itself for one."""
    return oracle if samples == 1 else Averaged(oracle, samples)
