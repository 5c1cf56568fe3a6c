"""What an audit measures: how a model behaves under attack, and whether stronger searches make its survivors fall.

All of it is done on a sample of the survivors, with bounded searches, for at most a tenth of AutoAttack's cost.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from innermax.attacks.apgd import APGD
from innermax.attacks.base import BaseAttack, looks_like_probabilities
from innermax.attacks.bpda import StraightThrough
from innermax.attacks.pgd import PGD
from innermax.attacks.search import AttackResult
from innermax.attacks.square import Square
from innermax.attacks.targeted import Targeted
from innermax.attacks.trace import trace_search
from innermax.data.image_set import ImageSet
from innermax.evaluation.audit import (
    SURROGATE,
    UNCONVERGED,
    Audit,
    Evidence,
    Quantiles,
    SearchEvidence,
    certain_gain,
    is_proxy,
    is_randomised,
    judge,
)
from innermax.evaluation.store import AttackRows, Column
from innermax.losses import cross_entropy, margin
from innermax.oracle.oracle import Oracle, Response
from innermax.threat import FeasibleSet, Linf, LinfBox, Threat
from innermax.utils import randomness
from innermax.utils.copying import copy_model

_LARGEST = 100  # survivors in a sample; one in 50 examples where that is more
_PROBED = 32  # of the sample, where a few are enough
_OWN = 40  # gradients per survivor, on average, for an attack's own steps and starts; half as many for its trace
_STREAM = 0xA0D17
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Subject:
    """An evaluation under audit.

    Attributes:
        model, exact: the model, and its exact oracle, which decides.
        oracle: what searches attack.
        images: the test set.
        attacks, rows: the attacks, and what each found.
        survived: (N,) bool, correct under every attack.
        surrogates: oracles of other models, by name, whose images may mislead this one.
        admit: makes the images that count from an attack's result and X(x).
        seed, batch_size, device: the evaluation's.
    """

    model: nn.Module
    exact: Oracle
    oracle: Oracle
    images: ImageSet
    attacks: Mapping[str, Any]
    rows: Mapping[str, AttackRows]
    survived: Column
    surrogates: Mapping[str, Oracle]
    admit: Callable[[AttackResult, FeasibleSet], Tensor]
    seed: int
    batch_size: int
    device: torch.device

    @property
    def strongest(self) -> str:
        """The attack with the fewest survivors, of several the last."""
        left = {name: int(rows.correct.sum()) for name, rows in self.rows.items()}
        return min(reversed(left), key=lambda name: left[name])

    @property
    def threats(self) -> list[Threat]:
        """The distinct threat models."""
        return list({repr(attack.threat): attack.threat for attack in self.attacks.values()}.values())


@dataclass(frozen=True, eq=False)
class Sample:
    """A sample of the survivors: first the `likeliest` that are nearest to an error, then random ones."""

    x: Float[Tensor, "n ..."]
    y: Int[Tensor, " n"]
    index: Int[Tensor, " n"]
    likeliest: int

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Tensor) -> "Sample":
        """Some of them."""
        return replace(self, x=self.x[rows], y=self.y[rows], index=self.index[rows])


@dataclass(frozen=True, eq=False)
class StrongerSearch:
    """A search on some `rows` of the sample; the mean of `shown` answers to each of its images decides."""

    name: str
    attack: Any
    oracle: Oracle
    rows: Int[Tensor, " k"]
    shown: int = 1


@dataclass(frozen=True)
class Untried:
    """A search that the audit could not try, and why."""

    name: str
    reason: str


def run_audit(subject: Subject) -> Audit:
    """The audit of an evaluation with at least one attack."""
    evidence = Evidence(
        examples=len(subject.survived),
        survivors=int(subject.survived.sum()),
        sampled=0,
        searches={name: _summarize_gauges(rows) for name, rows in subject.rows.items()},
        strongest=subject.strongest,
        averaged=any(getattr(attack, "samples", 1) > 1 for attack in subject.attacks.values()),
    )
    subject = _leave_out_empty(subject)
    if evidence.survivors == 0 or not subject.attacks:
        return judge(evidence)
    sample = _draw_sample(subject)
    evidence = replace(evidence, sampled=len(sample), strongest=subject.strongest)
    evidence = _probe_model(subject, sample, evidence)
    evidence = _trace_attacks(subject, sample, evidence)
    return judge(_search_further(subject, sample, evidence))


def _leave_out_empty(subject: Subject) -> Subject:
    """The subject without attacks of ε = 0, which have nothing to search."""
    attacks = {name: attack for name, attack in subject.attacks.items() if attack.threat.eps > 0}
    return replace(subject, attacks=attacks, rows={name: subject.rows[name] for name in attacks})


def _summarize_gauges(rows: AttackRows) -> SearchEvidence:
    """The evidence of an attack's own gauges on its survivors."""
    left = rows.correct.astype(bool)
    zero, relative = rows.zero_gradient[left].astype(float), rows.relative_fosc[left]
    known = ~np.isnan(relative)
    return SearchEvidence(
        fosc=Quantiles.of(np.where(zero == 1, math.nan, rows.fosc[left])),
        relative_fosc=Quantiles.of(relative),
        unconverged=float((relative[known] > UNCONVERGED).mean()) if known.any() else math.nan,
        zero_gradient=float(zero.mean()) if len(zero) else math.nan,
    )


def _draw_sample(subject: Subject) -> Sample:
    """Half of the survivors, up to a limit: three quarters nearest to an error, the others at random."""
    survivors = np.flatnonzero(subject.survived)
    size = min(-(-len(survivors) // 2), max(_LARGEST, len(subject.survived) // 50))
    size = max(size // len(subject.threats), 1)
    loss = np.max([np.nan_to_num(rows.loss[survivors], nan=0.0) for rows in subject.rows.values()], axis=0)
    order = survivors[np.argsort(-loss, kind="stable")]
    likeliest = size - size // 4
    drawn = randomness.permutation(subject.seed, len(order) - likeliest, _STREAM).numpy()[: size - likeliest]
    chosen = torch.from_numpy(np.concatenate([order[:likeliest], order[likeliest:][drawn]]))
    x, y = subject.images.batch(chosen.to(subject.images.images.device))
    return Sample(x.to(subject.device), y.to(subject.device), chosen.to(subject.device), likeliest)


def _probe_model(subject: Subject, sample: Sample, evidence: Evidence) -> Evidence:
    """Checks the model's answers, and its gradients at random points of X(x)."""
    some = sample[_spread_rows(len(sample), _PROBED, subject.device)]
    exact, feasible = subject.exact, subject.threats[0].around(some.x)
    point = feasible.sample(randomness.hash_keys(subject.seed, some.index, _STREAM))
    logits, again = exact.logits(some.x), exact.logits(some.x)
    spread = (logits.amax(1) - logits.amin(1)).clamp(min=1e-30)
    own, free = exact.gradient(point, some.y, cross_entropy), exact.gradient(point, some.y, margin)
    passed: set[str] = set()
    Oracle(StraightThrough(subject.model, passed.add)).gradient(point, some.y, margin)
    return replace(
        evidence,
        repeat_difference=float(((logits - again).abs().amax(1) / spread).max()),
        probabilities=bool(looks_like_probabilities(logits)),
        zero_gradient=_share_zero(own),
        zero_margin_gradient=_share_zero(free),
        float64_agreement=_compare_float64(subject.model, point, some.y, own),
        foretold=_share_foretold(exact, feasible, point, some.y, free),
        passed=tuple(sorted(passed)),
        gradients=4 * len(some),
        forwards=3 * len(some),
    )


def _share_zero(answer: Response) -> float:
    """Share of examples whose gradient is zero."""
    return float((answer.gradient == 0).flatten(1).all(1).float().mean())


def _compare_float64(model: nn.Module, point: Tensor, y: Tensor, single: Response) -> float:
    """Median cosine of the gradients in float32 and in float64; NaN where the model does not compute in float64."""
    try:
        double = Oracle(copy_model(model).double()).gradient(point.double(), y, cross_entropy)
    except ValueError as error:
        _log.info("audit: no float64 gradients (%s)", error)
        return math.nan
    pair = (single.gradient.flatten(1).double(), double.gradient.flatten(1))
    one, other = (rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-300) for rows in pair)
    return float(torch.cosine_similarity(one, other, dim=1, eps=1e-30).median())


def _share_foretold(exact: Oracle, feasible: FeasibleSet, point: Tensor, y: Tensor, answer: Response) -> float:
    """Share of points whose gradient predicts, within a half, what a step of ε/20 along it does to the margin."""
    moved = feasible.step(point, answer.gradient, feasible.threat.eps / 20)
    expected = (answer.gradient * (moved - point)).flatten(1).sum(1)
    found = margin(exact.logits(moved), y) - answer.loss
    moving = expected > 0
    close = (found - expected).abs() <= expected / 2
    return float(close[moving].float().mean()) if bool(moving.any()) else math.nan


def _trace_attacks(subject: Subject, sample: Sample, evidence: Evidence) -> Evidence:
    """Adds how the attacks' searches went; PGD's are traced step by step on a few examples of the sample."""
    clean = cross_entropy(subject.exact.logits(sample.x), sample.y).double().cpu().numpy()
    index = sample.index.cpu().numpy()
    searches, gradients = {}, evidence.gradients
    for name, attack in subject.attacks.items():
        found = evidence.searches[name]
        found = replace(found, loss_gain=float(np.median(subject.rows[name].loss[index] - clean)))
        if isinstance(attack, APGD):
            found = replace(found, steps=float(attack.steps))
        if isinstance(attack, PGD):
            count = min(_PROBED, max(_OWN // 2 * len(sample) // ((attack.steps + 2) * attack.eot), 1))
            some = sample[_spread_rows(len(sample), count, subject.device)]
            found = _trace_pgd(attack, subject, some, found)
            gradients += (attack.steps + 1) * attack.eot * len(some)
        searches[name] = found
    return replace(evidence, searches=searches, gradients=gradients, forwards=evidence.forwards + len(sample))


def _trace_pgd(attack: PGD, subject: Subject, some: Sample, found: SearchEvidence) -> SearchEvidence:
    """Adds what PGD's own search does on some examples."""
    trace = trace_search(attack, subject.exact, some.x, some.y, seed=subject.seed, index=some.index)
    late = max(attack.steps // 10, 1)
    first, before, last = trace.loss[0], trace.loss[-1 - late], trace.loss[-1]
    share = (last - before) / (last - first)
    share = share[(last > first) & torch.isfinite(share)]
    way = attack.threat.norm((trace.end - trace.start).flatten(1))
    return replace(
        found,
        steps=float(attack.steps),
        reach=sum(attack.step_sizes()) / attack.threat.eps,
        late_gain=float(share.median()) if len(share) else math.nan,
        travelled=float((way / attack.threat.eps).median()),
    )


def _search_further(subject: Subject, sample: Sample, evidence: Evidence) -> Evidence:
    """Adds whom stronger searches make fall, one search after the other on those still standing."""
    standing = torch.ones(len(sample), dtype=torch.bool, device=subject.device)
    fallen: dict[str, Tensor] = {}
    untried: dict[str, str] = {}
    gradients, forwards = evidence.gradients, evidence.forwards
    for one in _plan_searches(subject, sample, evidence):
        if isinstance(one, Untried):
            untried[one.name] = one.reason
            continue
        rows = one.rows[standing[one.rows]]
        fell, results, failure = _run_search(subject, sample, replace(one, rows=rows))
        if failure is not None:
            untried[one.name] = failure
        standing = standing & ~fell
        fallen[one.name] = fallen.get(one.name, torch.zeros_like(standing)) | fell
        gradients += sum(int(result.gradient_calls.sum()) for result in results)
        forwards += sum(int(result.forward_calls.sum()) for result in results) + one.shown * len(rows)

    def gain(names: tuple[str, ...]) -> float:
        fell = torch.stack([torch.zeros_like(standing), *(fallen[name] for name in names if name in fallen)]).any(0)
        likeliest, others = int(fell[: sample.likeliest].sum()), int(fell[sample.likeliest :].sum())
        tried, left = len(sample) - sample.likeliest, evidence.survivors - sample.likeliest
        return certain_gain(likeliest, others, tried, left, evidence.examples)

    evidence = replace(
        evidence,
        fallen={name: int(rows.sum()) for name, rows in fallen.items()},
        gain={name: gain((name,)) for name in fallen},
        total_gain=gain(tuple(fallen)),
        hidden_gain=gain(tuple(filter(is_proxy, fallen))),
        untried=untried,
        gradients=gradients,
        forwards=forwards,
    )
    return evidence if is_randomised(evidence) else _add_large_eps(subject, sample[standing.nonzero()[:, 0]], evidence)


def _plan_searches(subject: Subject, sample: Sample, evidence: Evidence) -> Iterator[StrongerSearch | Untried]:
    """The searches; those most like the evaluation's own come first."""
    everyone = torch.arange(len(sample), device=subject.device)
    if is_randomised(evidence):
        for threat in subject.threats:
            yield StrongerSearch("averaged", APGD(threat, steps=20, loss="margin", eot=10), subject.oracle, everyone, 8)
            yield from _search_surrogates(subject, threat, everyone, 8)
        return
    yield from _search_longer(subject, sample)
    for threat in subject.threats:
        yield StrongerSearch("margin", APGD(threat, steps=50, loss="margin"), subject.oracle, everyone)
        yield StrongerSearch("targeted", APGD(threat, steps=40, loss="margin", targets=3), subject.oracle, everyone)
        if evidence.passed:
            through = Oracle(StraightThrough(subject.model))
            yield StrongerSearch("straight-through", APGD(threat, steps=40, loss="margin"), through, everyone)
        if evidence.foretold < 0.9:
            smooth = Oracle(_Smoothed(subject.model, threat))
            yield StrongerSearch("smoothed", APGD(threat, steps=15, loss="margin", eot=8), smooth, everyone)
        if not Square.supports(threat):
            yield Untried("score-based", f"Square does not support {type(threat).__name__}")
        else:
            yield StrongerSearch("score-based", Square(threat, queries=300), subject.oracle, everyone)
        yield from _search_surrogates(subject, threat, everyone)


def _search_surrogates(
    subject: Subject, threat: Threat, everyone: Int[Tensor, " n"], shown: int = 1
) -> Iterator[StrongerSearch]:
    """Searches on the surrogates. They go on where a surrogate errs, because its boundary is not the model's."""
    for name, oracle in subject.surrogates.items():
        yield StrongerSearch(SURROGATE + name, PGD(threat, steps=20), oracle, everyone, shown)


def _search_longer(subject: Subject, sample: Sample) -> Iterator[StrongerSearch | Untried]:
    """The strongest attack itself with four times the steps, and from four other starts; on the unconverged first."""
    attack = subject.attacks[subject.strongest]
    if not isinstance(attack, BaseAttack):
        for name in ("more steps", "restarts"):
            reason = "heads for one label" if isinstance(attack, Targeted) else "is not an attack of innermax"
            yield Untried(name, f"{subject.strongest} {reason}")
    if not isinstance(attack, PGD | APGD):
        return
    index = sample.index.cpu().numpy()
    gauge = np.nan_to_num(subject.rows[subject.strongest].relative_fosc[index], nan=1.0)
    order = torch.from_numpy(np.argsort(gauge <= UNCONVERGED, kind="stable")).to(subject.device)
    targets = (attack.targets or 1) if isinstance(attack, APGD) else 1
    cost = 4 * attack.steps * attack.restarts * targets * attack.eot
    rows = order[: max(_OWN * len(sample) // cost, 1)]
    for name, stronger in (("more steps", _with_more_steps(attack)), ("restarts", _with_restarts(attack))):
        yield StrongerSearch(name, stronger, subject.oracle, rows)


def _with_more_steps(attack: PGD | APGD) -> PGD | APGD:
    """The attack with four times the steps; a sequence of step sizes goes on with its last one."""
    if isinstance(attack, APGD):
        return replace(attack, steps=4 * attack.steps)
    size = attack.step_size
    if isinstance(size, int | float) and math.isinf(size):
        size = attack.threat.eps / 2
    elif not isinstance(size, str | int | float | None):
        size = (*attack.step_sizes(), *attack.step_sizes()[-1:] * (3 * attack.steps))
    return replace(attack, steps=4 * attack.steps, step_size=size, stop_on_success=True)


def _with_restarts(attack: PGD | APGD) -> PGD | APGD:
    """The attack with four times the random starts."""
    if isinstance(attack, APGD):
        return replace(attack, restarts=4 * attack.restarts)
    return replace(attack, restarts=4 * attack.restarts, random_start=True, stop_on_success=True)


def _run_search(subject: Subject, sample: Sample, one: StrongerSearch) -> tuple[Tensor, list[AttackResult], str | None]:
    """(n,) which examples a search makes fall, its results, and why a part of it failed, if one did."""
    fell, results = torch.zeros(len(sample), dtype=torch.bool, device=subject.device), []
    failure = None
    seed = randomness.derive_seed(subject.seed, _STREAM) if one.name != "more steps" else subject.seed
    for start in range(0, len(one.rows), subject.batch_size):
        rows = one.rows[start : start + subject.batch_size]
        part = sample[rows]
        try:
            result = one.attack(one.oracle, part.x, part.y, seed=seed, index=part.index, final="none")
        except ValueError as error:
            failure = f"it failed: {' '.join(str(error).split())}"
            continue
        image = subject.admit(result, one.attack.threat.around(part.x))
        logits = torch.stack([subject.exact.logits(image) for _ in range(one.shown)]).mean(0)
        fell[rows] = logits.argmax(1) != part.y
        results.append(result)
    return fell, results, failure


def _add_large_eps(subject: Subject, standing: Sample, evidence: Evidence) -> Evidence:
    """Adds the share that survives a search over all images. It is above 0 only where the search itself fails."""
    some = standing[_spread_rows(len(standing), _PROBED, subject.device)]
    if len(some) == 0:
        return replace(evidence, large_eps=0.0)
    threat = subject.threats[0]
    low, high = threat.box(some.x)
    width = float(threat.norm(high - low).max())
    everything = replace(threat, eps=width if math.isfinite(width) else 16 * threat.eps)
    attack = PGD(everything, steps=10, step_size="annealed", loss="margin", stop_on_success=True)
    result = attack(subject.oracle, some.x, some.y, seed=subject.seed, index=some.index, final="loss")
    withstood = int((~cast(Tensor, result.misclassified)).sum())
    return replace(
        evidence,
        large_eps=withstood / evidence.sampled * len(standing) / len(some),
        gradients=evidence.gradients + int(result.gradient_calls.sum()),
        forwards=evidence.forwards + int(result.forward_calls.sum()),
    )


def _spread_rows(count: int, most: int, device: torch.device) -> Int[Tensor, " k"]:
    """At most `most` of the numbers 0…count − 1, evenly spread."""
    size = min(count, most)
    return (torch.arange(size, device=device) * count) // max(size, 1)


class _Smoothed(nn.Module):
    """A model that sees its images, within the bounds, with noise of half the ball's size: averaged, its gradients are
    smoother.
    """

    def __init__(self, model: nn.Module, threat: Threat) -> None:
        super().__init__()
        self.model, self.threat = model, threat

    def forward(self, x: Float[Tensor, "b ..."]) -> Tensor:
        noise = torch.randn_like(x)
        if isinstance(self.threat, Linf):
            noise = noise.sign()
        elif isinstance(self.threat, LinfBox):
            noise = self.threat.scale(noise.sign().flatten(1)).reshape(x.shape)
        else:
            noise = noise / self.threat.norm(noise.flatten(1)).reshape(-1, *[1] * (x.ndim - 1))
        low, high = (side.reshape(x.shape) for side in self.threat.box(x))
        answer: Tensor = self.model((x + self.threat.eps / 2 * noise).clamp(low, high))
        return answer
