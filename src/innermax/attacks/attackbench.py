"""Attacks as AttackBench calls them (Cinà et al. 2025)."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from innermax.attacks.minimal import MinimalAttack, MinimalResult
from innermax.threat import Threat, build_threat

_EPS = 1.0  # decides nothing but DDN's first norm: what counts is the distance


@runtime_checkable
class AttackBenchAttack(Protocol):
    """What `attackbench.run_attack` takes for an attack."""

    def __call__(
        self,
        model: nn.Module,
        inputs: Float[Tensor, "b ..."],
        labels: Int[Tensor, " b"],
        *,
        targeted: bool = False,
        targets: Int[Tensor, " b"] | None = None,
        threat_model: str = "linf",
    ) -> Float[Tensor, "b ..."]:
        """The nearest adversarial inputs; the inputs themselves where none was found."""


def adapt_to_attackbench(build: Callable[[Threat], MinimalAttack]) -> AttackBenchAttack:
    """An attack that looks for the smallest perturbation, for `attackbench.run_attack(model, data, attack, "linf")`.

    Every query goes to AttackBench's own model, which counts them. An example that is classified correctly takes 9
    forward passes beyond its steps' forward and backward ones; one more decides who is.

    Args:
        build: the attack in a threat model, such as `im.FMN` or `partial(im.FMN, steps=990)`.
    """

    def attack(
        model: nn.Module,
        inputs: Float[Tensor, "b ..."],
        labels: Int[Tensor, " b"],
        *,
        targeted: bool = False,
        targets: Int[Tensor, " b"] | None = None,
        threat_model: str = "linf",
    ) -> Float[Tensor, "b ..."]:
        if targeted and targets is None:
            raise ValueError("targets must be given where targeted is true")
        search = build(build_threat(threat_model, _EPS))
        result = search(_Asked(lambda x: model(x)), inputs, labels, target=targets if targeted else None, final="none")
        if not isinstance(result, MinimalResult):
            raise TypeError(f"build must make an attack that looks for the smallest perturbation, got {search!r}")
        return result.nearest.to(inputs.dtype)

    return attack


class _Asked(nn.Module):
    """A model that somebody else keeps: copies of this one, which attacks ask, ask that one."""

    def __init__(self, ask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.ask = ask  # a function, which copies share

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b classes"]:
        return self.ask(x)
