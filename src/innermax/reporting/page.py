"""The report: six questions about robustness, answered on one HTML page that needs no other file."""

import base64
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from innermax.attacks.named import display_name
from innermax.evaluation.audit import Audit, Evidence, write_advice
from innermax.evaluation.result import Evaluation
from innermax.reporting import charts
from innermax.reporting.contents import Entry
from innermax.reporting.gallery import Picture
from innermax.reporting.svg import Series, draw_interval, draw_legend, draw_spark, format_number
from innermax.threat import NORMS, format_eps
from innermax.utils.environment import environment

_SYMBOLS = {norm.__name__: norm.symbol for norm in NORMS.values()}
_TONES = {"no failure found": "good", "nothing to audit": "none"}  # of a verdict; all others are bad
_MARKS = {
    "no failure found": "✓",
    "not converged": "!",
    "gradients masked": "✕",
    "randomised": "~",
    "nothing to audit": "–",
}
_MATRIX = 20  # classes; with more of them the most frequent confusions are listed
_LISTED = 20


def render(entries: Sequence[Entry]) -> str:
    """The HTML of a report of these models."""
    templates = Environment(
        loader=PackageLoader("innermax.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"percent": _percent, "points": _points, "number": _number, "brief": _brief}
    templates.filters["shown"] = display_name
    files = resources.files("innermax.reporting")
    seeds = [entry.evaluation.settings.seed for entry in entries if entry.evaluation is not None]
    made = environment(seeds[0] if seeds else 0)
    return templates.get_template("page.html").render(
        style=Markup(files.joinpath("page.css").read_text(encoding="utf-8")),
        script=Markup(files.joinpath("page.js").read_text(encoding="utf-8")),
        models=[_describe_model(number, entry) for number, entry in enumerate(entries)],
        attacks=list(dict.fromkeys(name for entry in entries if entry.evaluation for name in entry.evaluation.rows)),
        differences=_compare_worst_cases(entries),
        comparison=charts.draw_comparison(entries),
        training=charts.draw_training(entries),
        pictures=[_describe_picture(entry, picture) for entry in entries for picture in _pictures(entry)],
        classes=_classes(entries),
        made=made,
        command=shlex.join(made["command"]),
        numbers={entry.name: None if entry.evaluation is None else entry.evaluation.summary() for entry in entries},
    )


def _describe_model(number: int, entry: Entry) -> dict[str, Any]:
    """One model, as the template shows it."""
    found = entry.evaluation
    return {
        "name": entry.name,
        "swatch": draw_legend([Series(entry.name, [], [], number, kind="marks")]),
        "missing": entry.missing,
        "threat": None if found is None else _describe_threat(found),
        "rows": [] if found is None else _rows(found, number),
        "evaluation": found,
        "audit": None if found is None else found.audit,
        "sentence": "" if found is None or found.audit is None else _audit_sentence(found.audit),
        "advice": "" if found is None or found.audit is None else write_advice(found.audit, entry.source),
        "tone": "none" if found is None or found.audit is None else _TONES.get(found.audit.verdict, "bad"),
        "mark": _MARKS[found.audit.verdict] if found is not None and found.audit is not None else "–",
        "evidence": None if found is None or found.audit is None else _describe_evidence(found.audit),
        "spent": charts.sum_gradients(entry) if any("gradients" in row for row in entry.history) else None,
        "history": entry.history,
        "convergence": charts.draw_convergence(entry),
        "confusions": []
        if found is None
        else [_count_confusions(entry, found, name) for name in _strongest_first(found)],
        "configuration": yaml.safe_dump(dict(entry.configuration), sort_keys=False, allow_unicode=True).strip()
        if entry.configuration
        else "",
        "environment": _list_environment(entry.environment),
        "command": shlex.join(map(str, entry.environment.get("command", []))),
    }


def _rows(found: Evaluation, style: int) -> list[dict[str, Any]]:
    """The table of accuracies: clean, each attack, the worst case; style: number of the model's colour."""
    rows = []
    for name in ("clean", *found.rows, "worst_case"):
        value = found.worst_case if name == "worst_case" else found.accuracy[name]
        title = {"clean": "Clean", "worst_case": "Worst case"}.get(name, display_name(name))
        bar = draw_interval(value.value, value.low, value.high, style)
        rows.append({"key": name, "title": title, "accuracy": value, "bar": bar, "search": found.convergence.get(name)})
    return rows


def _describe_threat(found: Evaluation) -> str:
    """The threat models of the attacks, read from their descriptions."""
    matches = [
        re.search(r"threat=(\w+)\(eps=(\d+(?:\.\d+)?(?:e-\d+)?)", text) for text in found.settings.attacks.values()
    ]
    names = [f"{_SYMBOLS.get(match[1], match[1])}, ε = {format_eps(float(match[2]))}" for match in matches if match]
    return " and ".join(dict.fromkeys(names))


def _compare_worst_cases(entries: Sequence[Entry]) -> dict[str, Any]:
    """By name, the paired difference of the worst case from the first model's, where both saw the same examples."""
    first = next((entry for entry in entries if entry.evaluation is not None), None)
    found = {}
    for entry in entries:
        if first is None or first.evaluation is None or entry.evaluation is None or entry is first:
            continue
        if np.array_equal(entry.evaluation.label, first.evaluation.label):
            found[entry.name] = entry.evaluation.difference(first.evaluation, "worst_case")
    return found


def _describe_evidence(audit: Audit) -> dict[str, Any]:
    """The evidence for the audit's verdict: stronger searches, gauges, and checks of the model's gradients."""
    found = audit.evidence
    tried = [(name, count, found.gain.get(name, 0.0)) for name, count in found.fallen.items()]
    checks = [(name, value) for name, value in _checks(found).items() if value is not None]
    return {"tried": tried, "searches": found.searches, "checks": checks}


def _checks(found: Evidence) -> dict[str, str | None]:
    def share(value: float) -> str | None:
        return None if math.isnan(value) else f"{100 * value:.1f} %"

    agreement = None if math.isnan(found.float64_agreement) else f"{found.float64_agreement:.4f}"
    return {
        "Survivors attacked again": f"{found.sampled:,} of {found.survivors:,}",
        "The same image twice: change of a logit over the spread of logits": f"{found.repeat_difference:.2g}",
        "Points without a gradient (cross-entropy)": share(found.zero_gradient),
        "Points without a gradient (margin)": share(found.zero_margin_gradient),
        "Points whose gradient predicts a small step": share(found.foretold),
        "Cosine of float32 and float64 gradients": agreement,
        "Share that withstands ε as large as the bounds": share(found.large_eps),
        "Functions that stop or dampen the gradient": ", ".join(found.passed) or "none found",
        "Outputs are probabilities": "yes" if found.probabilities else "no",
        "Cost, over all examples": f"{found.gradients:,} gradients, {found.forwards:,} forward passes",
    }


def _strongest_first(found: Evaluation) -> list[str]:
    return sorted(found.rows, key=lambda name: found.accuracy[name].correct)


def _count_confusions(entry: Entry, found: Evaluation, name: str) -> dict[str, Any]:
    """How often each class is taken for each other under an attack: a matrix, or of many classes the frequent pairs."""
    predicted = found.rows[name].prediction
    names = entry.gallery.class_names if entry.gallery else None
    count = max(int(found.label.max()), int(predicted.max()), len(names or ()) - 1) + 1
    pairs, often = np.unique(np.stack([found.label, predicted]), axis=1, return_counts=True)
    wrong = np.flatnonzero(pairs[0] != pairs[1])
    listed = wrong[np.argsort(-often[wrong], kind="stable")][:_LISTED]
    matrix = []
    if count <= _MATRIX:
        counts = np.zeros((count, count), dtype=int)
        counts[pairs[0], pairs[1]] = often
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        called = [_class(number, names) for number in range(count)]
        matrix = list(zip(called, counts.tolist(), shares.tolist(), strict=True))
    return {
        "attack": name,
        "called": [row[0] for row in matrix],
        "matrix": matrix,
        "pairs": [(*(_class(int(number), names) for number in pairs[:, place]), int(often[place])) for place in listed],
    }


def _pictures(entry: Entry) -> Sequence[Picture]:
    return () if entry.gallery is None else entry.gallery.pictures


def _describe_picture(entry: Entry, picture: Picture) -> dict[str, Any]:
    """A picture as the template shows it."""
    names = entry.gallery.class_names if entry.gallery else None
    files = {key: _data_url(getattr(picture, key)) for key in ("clean", "change", "attacked")}
    return {
        "model": entry.name,
        "index": picture.index,
        "attack": picture.attack,
        "label": picture.label,
        "class_name": _class(picture.label, names),
        "before": _class(picture.before, names),
        "after": _class(picture.after, names),
        "outcome": picture.outcome,
        "unconverged": picture.unconverged,
        "zero_gradient": picture.zero_gradient,
        "largest": picture.largest,
        "relative_fosc": picture.relative_fosc,
        "lines": [
            (title, draw_spark(values, style, logs), values[0], values[-1])
            for title, values, style, logs in (("loss", picture.loss, 1, False), ("FOSC", picture.fosc, 0, True))
            if values
        ],
        **files,
    }


def _classes(entries: Sequence[Entry]) -> list[tuple[int, str]]:
    """The classes in the gallery, by number, with their names."""
    found = {
        picture.label: _class(picture.label, entry.gallery.class_names if entry.gallery else None)
        for entry in entries
        for picture in _pictures(entry)
    }
    return sorted(found.items())


def _class(number: int, names: Sequence[str] | None) -> str:
    return str(number) if names is None or number >= len(names) else names[number]


def _list_environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Versions and machine of a run, as pairs."""
    flat = {
        **environment.get("versions", {}),
        **{key: environment[key] for key in ("device", "threads", "seed", "commit", "date") if key in environment},
    }
    return [(str(key), "–" if value is None else str(value)) for key, value in flat.items()]


def _data_url(content: bytes) -> str:
    """A PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _audit_sentence(audit: Audit) -> str:
    """The audit's sentence without the verdict, which is shown beside it."""
    sentence = audit.sentence.removeprefix("Audit: ").removeprefix(f"{audit.verdict}. ")
    return sentence[:1].upper() + sentence[1:]


def _percent(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else format_number(value)


def _brief(value: float) -> str:
    """A number in two digits."""
    return "–" if math.isnan(value) else f"{value:.2g}".replace("-", "−")
