"""Did the search fail? A verdict on an evaluation, with causes and advice, from what the audit measured.

Gauges screen, they do not prove. Whatever they say, an evaluation has failed only where a stronger search gains, or
where the model draws random numbers that no attack averaged over.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from innermax.utils.intervals import wilson
from innermax.utils.serialization import convert

Verdict = Literal["no failure found", "not converged", "gradients masked", "randomised", "nothing to audit"]
TOLERANCE = 0.005  # of robust accuracy; an evaluation that is wrong by more has failed
UNCONVERGED = 0.02  # relative FOSC above which a search is not at a stationary point
SURROGATE = "surrogate "  # begins the name of a search on another model, whose own name follows
_PROXIES = ("straight-through", "smoothed", "score-based")
_DIFFERENT = 1e-3  # change of a logit, over the spread of the example's logits, beyond what rounding does
_NO_GRADIENT = 0.5  # share of examples
_VANISHING = 0.25  # share of examples
_FORETOLD = 0.5  # share of examples whose gradient predicts the effect of a small step, in sign and size
_FEW = 10  # steps
_RUN = "innermax evaluate RUN"  # how commands in advice begin
_ACROSS = 2.0  # in ε: from one end of the ball to the other


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of the known values; NaN where none is known."""

    p10: float
    median: float
    p90: float

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> "Quantiles":
        """The quantiles of the values that are not NaN."""
        values = values[~np.isnan(values)]
        return cls(*(map(float, np.quantile(values, (0.1, 0.5, 0.9))) if len(values) else (math.nan,) * 3))


@dataclass(frozen=True)
class SearchEvidence:
    """How far one attack got on its survivors, the examples it left correct; NaN where it does not report that.

    Attributes:
        fosc, relative_fosc: at the final iterates whose gradient is not zero.
        unconverged: share of survivors whose relative FOSC is above 0.02.
        zero_gradient: share of survivors whose gradient there is zero or not finite.
        steps: steps of one search; NaN unless PGD or APGD.
        reach: all step sizes together, in ε; NaN unless PGD. Below 2 a random start cannot cross the ball.
        late_gain: median share of a search's gain in loss that its last 10 % of steps brought; NaN unless PGD.
        travelled: median distance from start to end, in ε; NaN unless PGD.
        loss_gain: median cross-entropy of a survivor's attacked image minus its clean image's.
    """

    fosc: Quantiles
    relative_fosc: Quantiles
    unconverged: float
    zero_gradient: float
    steps: float = math.nan
    reach: float = math.nan
    late_gain: float = math.nan
    travelled: float = math.nan
    loss_gain: float = math.nan


@dataclass(frozen=True)
class Evidence:
    """What was measured on a sample of an evaluation's survivors, the examples that no attack made fall.

    Attributes:
        examples, survivors, sampled: how many of each.
        searches: each attack's own evidence, on all of its survivors.
        strongest: the attack with the fewest survivors.
        averaged: whether an attack averages a random model's answers.
        repeat_difference: largest change of a logit when the same image is shown twice, over the spread of its logits.
        probabilities: whether the model's answers are probabilities.
        zero_gradient: share of points in X(x) where the gradient of the cross-entropy is zero or not finite.
        zero_margin_gradient: the same for the margin, which is free of the logits' scale.
        float64_agreement: median cosine of float32 and float64 gradients of the cross-entropy.
        foretold: share of points whose gradient predicts what a small step does to the margin, within a half.
        passed: functions of the network that stop or dampen its gradient.
        fallen: by search, how many of the sample fell to it that had survived every search before it.
        gain: by search, the robust accuracy that it certainly takes away, as `certain_gain` counts it.
        total_gain: the same for all searches together.
        hidden_gain: the same for the searches that do not follow the model's own gradient.
        large_eps: share of the sample that survives a short search when ε is as large as the bounds.
        untried: by search that could not be tried, or failed, the reason.
        gradients, forwards: the cost of the audit, over all examples.
    """

    examples: int
    survivors: int
    sampled: int
    searches: dict[str, SearchEvidence]
    strongest: str
    averaged: bool
    repeat_difference: float = 0.0
    probabilities: bool = False
    zero_gradient: float = math.nan
    zero_margin_gradient: float = math.nan
    float64_agreement: float = math.nan
    foretold: float = math.nan
    passed: tuple[str, ...] = ()
    fallen: dict[str, int] = field(default_factory=dict)
    gain: dict[str, float] = field(default_factory=dict)
    total_gain: float = 0.0
    hidden_gain: float = 0.0
    large_eps: float = math.nan
    untried: dict[str, str] = field(default_factory=dict)
    gradients: int = 0
    forwards: int = 0


@dataclass(frozen=True)
class Audit:
    """Whether an evaluation can be believed.

    Attributes:
        verdict: "no failure found": nothing stronger gained more than half a point of robust accuracy; "not converged":
            something did; "gradients masked": something did, and the model's gradients mislead a search; "randomised":
            the model draws random numbers, and no attack averages over them; "nothing to audit": no example survived,
            or ε is 0.
        causes: what went wrong, in short; empty where no failure was found.
        advice: what to do about it; empty where no failure was found.
        evidence: what was measured.
    """

    verdict: Verdict
    causes: tuple[str, ...]
    advice: str
    evidence: Evidence

    @property
    def sentence(self) -> str:
        """The verdict in words, with the numbers it rests on."""
        found = self.evidence
        untried = _describe_untried(found.untried)
        if self.verdict == "nothing to audit":
            none = f"None of the {found.examples:,} images survived the attacks."
            return f"Audit: nothing to audit. {none if found.survivors == 0 else 'With ε = 0 nothing may be changed.'}"
        if self.verdict == "randomised":
            return f"Audit: the model is randomised; these attacks do not average over its answers.{untried}"
        sample = f"{found.sampled:,} of {found.survivors:,} survivors"
        searches = f"searches on {sample} made {sum(found.fallen.values())} more fall.{untried}"
        if self.verdict == "no failure found":
            return f"Audit: no failure found. Stronger {searches}"
        too_high = f"Robust accuracy is too high by at least {100 * found.total_gain:.1f} points"
        return f"Audit: {self.verdict}. {too_high}: stronger {searches}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Audit":
        """The audit in a document that `to_dict` made, NaN as null. Raises ValueError for any other document."""
        read: Audit = convert(cls, document, "audit")
        return read


def write_advice(audit: Audit, source: str | None = None) -> str:
    """The advice of an audit, whose commands are for RUN unless told for which run or model.

    source: as it is typed, with the options that it needs.
    """
    return audit.advice if source is None else audit.advice.replace(_RUN, f"innermax evaluate {source}")


def _describe_untried(untried: Mapping[str, str]) -> str:
    """A sentence on the searches that could not be tried, after a space; empty where all were."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in untried.items():
        by_reason.setdefault(reason, []).append(name)
    parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
    return f" Not tried: {'; '.join(parts)}." if parts else ""


def certain_gain(likeliest: int, others: int, others_tried: int, others_all: int, examples: int) -> float:
    """The share of all examples that, with 95 % confidence, would fall, judged by those of a sample that did.

    The sample is the survivors nearest to an error, of whom `likeliest` fell, and `others_tried` random ones of the
    `others_all` that are left, of whom `others` fell. These stand for the rest, by the lower end of Wilson's interval.
    """
    low = wilson(others, others_tried, 0.9)[0] if others_tried else 0.0
    return (likeliest + max(others, low * others_all)) / examples


def is_proxy(search: str) -> bool:
    """Whether the search of this name follows something other than the model's own gradient."""
    return search in _PROXIES or search.startswith(SURROGATE)


def is_randomised(evidence: Evidence) -> bool:
    """Whether the model answers the same image differently twice."""
    return evidence.repeat_difference > _DIFFERENT


def judge(evidence: Evidence) -> Audit:
    """The audit of what was measured: its verdict, causes and advice."""
    if evidence.survivors == 0 or evidence.sampled == 0:
        return Audit("nothing to audit", (), "", evidence)
    if is_randomised(evidence) and not (evidence.averaged and evidence.total_gain <= TOLERANCE):
        cause = f"the same image twice gives logits that differ by {evidence.repeat_difference:.2g} of their spread"
        advice = (
            "average over the model's answers (EOT): innermax evaluate RUN --attacks autoattack-rand, or "
            'im.AutoAttack(threat, version="rand")'
        )
        return Audit("randomised", (cause,), advice, evidence)
    if evidence.total_gain <= TOLERANCE:
        return Audit("no failure found", (), "", evidence)
    masks = _find_masks(evidence)
    if masks:
        return Audit("gradients masked", tuple(masks), masks[next(iter(masks))], evidence)
    causes = _find_shortcomings(evidence)
    return Audit("not converged", tuple(causes), causes[next(iter(causes))], evidence)


def _find_masks(found: Evidence) -> dict[str, str]:
    """How the model's gradients mislead a search, each with advice; the most certain first."""
    masks = {}
    stopped = f" (stopped by {', '.join(found.passed)})" if found.passed else ""
    if found.probabilities:
        masks["the model returns probabilities, not logits: their gradient vanishes"] = "leave the softmax out"
    elif found.zero_margin_gradient >= _NO_GRADIENT:
        masks[f"no gradient reaches the input{stopped}"] = (
            "attack the model with a straight-through gradient (BPDA): im.StraightThrough(model); or without gradients:"
            " innermax evaluate RUN --attacks square-5000"
        )
    elif found.zero_gradient >= _VANISHING:
        masks["the logits saturate: the gradient of the cross-entropy vanishes"] = (
            "attack the margin, which has no scale: innermax evaluate RUN --attacks cw-100,autoattack"
        )
    if not masks and found.foretold < _FORETOLD:
        masks[
            "gradients are shattered: they foretell the effect of a small step at only "
            f"{100 * found.foretold:.0f} % of points"
        ] = "average gradients over nearby points, or attack without them: innermax evaluate RUN --attacks square-5000"
    if not masks and found.hidden_gain > TOLERANCE:
        won = ", ".join(name for name, count in found.fallen.items() if count and is_proxy(name))
        masks[f"searches that do not follow the model's own gradient gain more ({won})"] = (
            "attack without gradients, or through a surrogate: innermax evaluate RUN --attacks autoattack,square-5000"
        )
    return masks


def _find_shortcomings(found: Evidence) -> dict[str, str]:
    """Why the search fell short of what a stronger one finds, each with advice; the most certain first."""
    search, causes = found.searches[found.strongest], {}
    name, stronger = found.strongest, "innermax evaluate RUN --attacks apgd-100,autoattack"
    if search.loss_gain < 0:
        causes[f"{name} makes its images easier: their cross-entropy is below the clean images'"] = (
            f"maximise the cross-entropy or the margin: {stronger}"
        )
    if search.steps < _FEW:
        causes[f"too few steps: {name} takes {search.steps:.0f}"] = f"take 100 steps or more: {stronger}"
    elif search.reach < _ACROSS:
        causes[f"the step size is too small: all steps of {name} together reach {search.reach:.2g} ε"] = (
            f"let steps reach across the ball, 2 ε in all: {stronger}"
        )
    elif found.gain.get("more steps", 0.0) > TOLERANCE:
        causes[f"too few steps: four times as many as the {search.steps:.0f} of {name} gain"] = f"take more: {stronger}"
    if not causes and found.gain.get("restarts", 0.0) > TOLERANCE:
        causes[f"one start is not enough: {name} gains from others"] = f"start again from other points: {stronger}"
    if not causes:
        causes[f"{name} is too weak a search here: another loss, other targets and its own step sizes gain"] = (
            f"{stronger}"
            if "autoattack" not in found.searches
            else f"{stronger} --seed 1, and count an example that falls to either"
        )
    return causes
