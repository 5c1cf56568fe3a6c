"""The report's page: six questions about robustness, answered in one file that needs nothing else."""

import base64
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from markupsafe import Markup

from innermax.evaluation.audit import Audit, Evidence
from innermax.evaluation.result import Evaluation
from innermax.reporting import charts
from innermax.reporting.contents import Story, stories
from innermax.reporting.gallery import Picture
from innermax.reporting.svg import Series, interval, legend, number_text, spark
from innermax.reporting.tables import shown_name
from innermax.threat import NORMS
from innermax.utils.environment import environment
from innermax.utils.files import write_bytes

_SYMBOLS = {norm.__name__: norm.symbol for norm in NORMS.values()}
_MARKS = {"no failure found": "✓", "not converged": "!", "gradients masked": "✕", "randomised": "~"}
_MATRIX = 20  # classes; with more of them the most frequent confusions are listed
_LISTED = 20


def report(
    evaluations_or_runs: Any, path: str | Path, *, pictures: int = 200, device: torch.device | str | None = None
) -> Path:
    """Writes the robustness report, one HTML page that loads nothing from anywhere; the path it was written to.

    Args:
        evaluations_or_runs: an Evaluation, a Run, an Exhibit, a run folder or the file of an evaluation's JSON; or
            several of them, as a sequence, or by the names the page shall call them.
        path: the page; its folder must exist.
        pictures: ≥ 0; at most so many are made from run folders, for which model and images are loaded and attacked
            again, as `innermax.gallery` does. 0: what the folders hold is shown, and nothing computed.
        device: where to make them; where models are loaded to unless told.

    Raises:
        ValueError, TypeError: evaluations_or_runs holds something else, or what is not readable; pictures is negative;
            path cannot be written.
    """
    if isinstance(pictures, bool) or not isinstance(pictures, int):
        raise TypeError(f"pictures must be an integer, got {pictures!r}")
    if pictures < 0:
        raise ValueError(f"pictures must be at least 0, got {pictures}")
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"path {path} cannot be written: it is a folder, or its folder does not exist")
    told = stories(evaluations_or_runs, pictures, device)
    write_bytes(path, _page(told).encode())
    return path


def _page(told: Sequence[Story]) -> str:
    """The HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    room = Environment(
        loader=PackageLoader("innermax.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    room.filters |= {"percent": _percent, "number": _number, "brief": _brief, "shown": shown_name}
    files = resources.files("innermax.reporting")
    seeds = [story.evaluation.settings.seed for story in told if story.evaluation is not None]
    made = environment(seeds[0] if seeds else 0)
    return room.get_template("page.html").render(
        style=Markup(files.joinpath("page.css").read_text(encoding="utf-8")),
        script=Markup(files.joinpath("page.js").read_text(encoding="utf-8")),
        models=[_model(number, story) for number, story in enumerate(told)],
        attacks=list(dict.fromkeys(name for story in told if story.evaluation for name in story.evaluation.rows)),
        differences=_differences(told),
        comparison=charts.comparison(told),
        training=charts.training(told),
        pictures=[_picture(story, picture) for story in told for picture in _pictures(story)],
        classes=_classes(told),
        made=made,
        command=shlex.join(made["command"]),
        numbers={story.name: None if story.evaluation is None else story.evaluation.summary() for story in told},
    )


def _model(number: int, story: Story) -> dict[str, Any]:
    """What the template says of one model."""
    found = story.evaluation
    return {
        "name": story.name,
        "swatch": legend([Series(story.name, [], [], number, kind="marks")]),
        "missing": story.missing,
        "threat": None if found is None else _threat(found),
        "rows": [] if found is None else _rows(found),
        "evaluation": found,
        "audit": None if found is None else found.audit,
        "sentence": "" if found is None or found.audit is None else _said(found.audit),
        "mark": _MARKS[found.audit.verdict] if found is not None and found.audit is not None else "–",
        "evidence": None if found is None or found.audit is None else _evidence(found.audit),
        "spent": charts.spent(story) if any("gradients" in row for row in story.history) else None,
        "history": story.history,
        "convergence": charts.convergence(story),
        "confusions": [] if found is None else [_confusions(story, found, name) for name in _strongest_first(found)],
        "configuration": yaml.safe_dump(dict(story.configuration), sort_keys=False, allow_unicode=True).strip()
        if story.configuration
        else "",
        "environment": _environment(story.environment),
        "command": shlex.join(map(str, story.environment.get("command", []))),
    }


def _rows(found: Evaluation) -> list[dict[str, Any]]:
    """The table of accuracies: clean, each attack, the worst case."""
    rows = []
    for name in ("clean", *found.rows, "worst_case"):
        value = found.worst_case if name == "worst_case" else found.accuracy[name]
        title = {"clean": "Clean", "worst_case": "Worst case"}.get(name, shown_name(name))
        bar = interval(value.value, value.low, value.high)
        rows.append({"key": name, "title": title, "accuracy": value, "bar": bar, "search": found.convergence.get(name)})
    return rows


def _threat(found: Evaluation) -> str:
    """The threat models of the attacks, as far as their descriptions tell."""
    told = [re.search(r"threat=(\w+)\(eps=(\d+(?:\.\d+)?(?:e-\d+)?)", text) for text in found.settings.attacks.values()]
    names = [f"{_SYMBOLS.get(match[1], match[1])}, ε = {eps_text(float(match[2]))}" for match in told if match]
    return " and ".join(dict.fromkeys(names))


def eps_text(eps: float) -> str:
    """A size of perturbations as people write it: in 255ths where it is whole ones."""
    levels = eps * 255
    return f"{levels:.0f}/255" if 1 <= round(levels) < 64 and abs(levels - round(levels)) < 1e-6 else f"{eps:g}"


def _differences(told: Sequence[Story]) -> dict[str, Any]:
    """By name, the worst case minus the first model's, paired, where both saw the same examples."""
    first = next((story for story in told if story.evaluation is not None), None)
    found = {}
    for story in told:
        if first is None or first.evaluation is None or story.evaluation is None or story is first:
            continue
        if np.array_equal(story.evaluation.label, first.evaluation.label):
            found[story.name] = story.evaluation.difference(first.evaluation, "worst_case")
    return found


def _evidence(audit: Audit) -> dict[str, Any]:
    """What the audit's verdict rests on: stronger searches, gauges, and checks of the model's gradients."""
    found = audit.evidence
    tried = [(name, count, found.gain.get(name, 0.0)) for name, count in found.fallen.items()]
    checks = [(said, value) for said, value in _checks(found).items() if value is not None]
    return {"tried": tried, "searches": found.searches, "checks": checks}


def _checks(found: Evidence) -> dict[str, str | None]:
    def share(value: float) -> str | None:
        return None if math.isnan(value) else f"{100 * value:.1f} %"

    agreement = None if math.isnan(found.float64_agreement) else f"{found.float64_agreement:.4f}"
    return {
        "Survivors tried": f"{found.sampled:,} of {found.survivors:,}",
        "The same image twice: change of a logit, over their spread": f"{found.repeat_difference:.2g}",
        "Points without a gradient (cross-entropy)": share(found.zero_gradient),
        "Points without a gradient (margin)": share(found.zero_margin_gradient),
        "Points whose gradient foretells a small step": share(found.foretold),
        "Cosine of float32 and float64 gradients": agreement,
        "Sample that withstands ε as large as the bounds": share(found.large_eps),
        "Functions that stop or dampen the gradient": ", ".join(found.passed) or "none found",
        "Answers are probabilities": "yes" if found.probabilities else "no",
        "Cost, over all examples": f"{found.gradients:,} gradients, {found.forwards:,} forward passes",
    }


def _strongest_first(found: Evaluation) -> list[str]:
    return sorted(found.rows, key=lambda name: found.accuracy[name].correct)


def _confusions(story: Story, found: Evaluation, name: str) -> dict[str, Any]:
    """How often each class was taken for each under an attack: a matrix, or of many classes the most frequent."""
    predicted = found.rows[name].prediction
    names = story.gallery.class_names if story.gallery else None
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


def _pictures(story: Story) -> Sequence[Picture]:
    return () if story.gallery is None else story.gallery.pictures


def _picture(story: Story, picture: Picture) -> dict[str, Any]:
    """A picture as the template shows it."""
    names = story.gallery.class_names if story.gallery else None
    files = {key: _data(getattr(picture, key)) for key in ("clean", "change", "attacked")}
    return {
        "model": story.name,
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
            (title, spark(values, style, logs), values[0], values[-1])
            for title, values, style, logs in (("loss", picture.loss, 1, False), ("FOSC", picture.fosc, 0, True))
            if values
        ],
        **files,
    }


def _classes(told: Sequence[Story]) -> list[tuple[int, str]]:
    """The classes in the gallery, by number, with their names."""
    found = {
        picture.label: _class(picture.label, story.gallery.class_names if story.gallery else None)
        for story in told
        for picture in _pictures(story)
    }
    return sorted(found.items())


def _class(number: int, names: Sequence[str] | None) -> str:
    return str(number) if names is None or number >= len(names) else names[number]


def _environment(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Versions and machine of a run, as pairs."""
    flat = {
        **told.get("versions", {}),
        **{key: told[key] for key in ("device", "threads", "seed", "commit", "date") if key in told},
    }
    return [(str(key), "–" if value is None else str(value)) for key, value in flat.items()]


def _data(content: bytes) -> str:
    """A PNG file as an address that needs no other file."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _said(audit: Audit) -> str:
    """The audit's sentence without the verdict, which stands beside it."""
    sentence = audit.sentence.removeprefix("Audit: ").removeprefix(f"{audit.verdict}. ")
    return sentence[:1].upper() + sentence[1:]


def _percent(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else number_text(value)


def _brief(value: float) -> str:
    """A number in two digits."""
    return "–" if math.isnan(value) else f"{value:.2g}"
