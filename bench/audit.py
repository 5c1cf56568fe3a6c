"""Does the audit find the evaluations that are wrong, for the right cause, and leave the right ones alone?

    python bench/audit.py --sets tuning unseen cost --write results/audit.md

An evaluation is wrong if the strongest attack at hand makes more than half a point of its examples fall. That attack is
what falls to any of: every suite run on the model, AutoAttack among them (honest models); the same searches on the
undefended model, shown to the defended one, and Square on the defended one (broken defences); of models that draw
random numbers, where the mean of 16 answers is wrong. The audit's own searches do not count. Models and rows are kept
in the folder --runs and not computed again.
"""

import argparse
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from broken import (
    Capped,
    Changed,
    Cosines,
    LogProbabilities,
    Median,
    Noisy,
    Pruned,
    Quantised,
    Resized,
    Signs,
    Thermometer,
    Times,
    Waves,
    WinnersTakeAll,
    cut,
    with_activation,
    wrong_way,
)
from torch import nn

import innermax as im
from innermax.data.image_set import ImageSet
from innermax.evaluation.audit import TOLERANCE
from innermax.threat import Threat

EPS = {("digits", "linf"): 0.15, ("digits", "l2"): 1.0, ("mnist", "linf"): 0.3, ("mnist", "l2"): 2.0}
NORMS = {"linf": im.Linf, "l2": im.L2}
FGSM_TRAINED = "fgsm-trained"


@dataclass(frozen=True)
class Base:
    """A training: (data, strategy, norm, seed), and what is changed in the network before it."""

    data: str
    strategy: str
    norm: str = "linf"
    seed: int = 0
    change: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.data, self.norm, self.strategy, str(self.seed), self.change)))

    @property
    def threat(self) -> Threat:
        return NORMS[self.norm](EPS[self.data, self.norm])


@dataclass(frozen=True)
class Case:
    """A broken defence or a weak evaluation: a change to a trained model, the attacks, and the cause to be named."""

    name: str
    base: Base
    cause: str  # words of which one must stand in the causes, separated by |
    change: Callable[[nn.Module], nn.Module] = lambda model: model
    attacks: Mapping[str, Any] = field(default_factory=dict)


def suite(threat: Threat) -> dict[str, Any]:
    """What people report."""
    return {"fgsm": im.FGSM(threat), "pgd-20": im.PGD(threat, steps=20)}


LINF, L2 = im.Linf(0.15), im.L2(1.0)
STANDARD, UNSECURED = Base("digits", "standard"), Base("digits", "unsecured")
TUNING = [
    Case("saturated logits ×1000", STANDARD, "saturate", lambda m: Changed(m, after=Times(1000))),
    Case("input rounded to 16 levels", STANDARD, "no gradient", lambda m: Changed(m, Quantised(15))),
    Case("random resize and noise", UNSECURED, "differ", lambda m: Changed(m, Resized(0.1))),
    Case("k-winners-take-all", Base("digits", "unsecured", change="kwta"), "shattered|do not follow"),
    Case("detached layer", STANDARD, "no gradient", lambda m: cut(m, 6)),
    Case("softmax outputs as logits", STANDARD, "probabilities", lambda m: Changed(m, after=nn.Softmax(1))),
    Case("PGD with 1 step", STANDARD, "few steps", attacks={"pgd-1": im.PGD(LINF, steps=1)}),
    Case("step size ε/100", STANDARD, "step size", attacks={"pgd-40": im.PGD(LINF, steps=40, step_size=0.0015)}),
    Case("saturated logits ×1000, unsecured", UNSECURED, "saturate", lambda m: Changed(m, after=Times(1000))),
    Case("input rounded to 16 levels, unsecured", UNSECURED, "no gradient", lambda m: Changed(m, Quantised(15))),
    Case("detached layer, unsecured", UNSECURED, "no gradient", lambda m: cut(m, 6)),
    Case(
        "softmax of logits ×20, unsecured",
        UNSECURED,
        "probabilities",
        lambda m: Changed(m, None, nn.Sequential(Times(20), nn.Softmax(1))),
    ),
]
L2_STANDARD = Base("digits", "standard", "l2")
UNSEEN = [
    Case("logits ×100", Base("digits", "dynamic", seed=1), "saturate", lambda m: Changed(m, after=Times(100))),
    Case(
        "rounded cosine coefficients",
        Base("digits", "standard", seed=1),
        "no gradient",
        lambda m: Changed(m, Cosines(0.2)),
    ),
    Case("thermometer encoding", Base("digits", "unsecured", seed=1, change="thermometer"), "no gradient"),
    Case("bit depth 2, L2", Base("digits", "standard", "l2", 1), "no gradient", lambda m: Changed(m, Quantised(3))),
    Case(
        "activations pruned at random",
        Base("digits", "standard", seed=1),
        "differ",
        lambda m: with_activation(m, nn.Sequential(nn.ReLU(), Pruned(0.2))),
    ),
    Case("noise on logits", Base("digits", "dynamic", seed=1), "differ", lambda m: Changed(m, after=Noisy(2.0))),
    Case(
        "a wave on the image",
        Base("digits", "standard", seed=1),
        "shattered|do not follow",
        lambda m: Changed(m, Waves(0.03, 300.0)),
    ),
    Case("sign activations", Base("digits", "unsecured", seed=1, change="signs"), "no gradient"),
    Case(
        "logits capped at ±2",
        Base("digits", "standard", seed=1),
        "no gradient|saturate",
        lambda m: Changed(m, after=Capped(2.0)),
    ),
    Case(
        "log of probabilities",
        Base("digits", "standard", seed=1),
        "no gradient|saturate",
        lambda m: Changed(m, after=LogProbabilities()),
    ),
    Case("median outside autograd", Base("digits", "standard", seed=1), "no gradient", lambda m: Changed(m, Median())),
    Case(
        "k-winners-take-all, adversarially trained",
        Base("digits", "standard", seed=1, change="kwta"),
        "shattered|do not follow",
    ),
    Case(
        "PGD-2 of ε/10 from x",
        Base("digits", "standard", seed=1),
        "few steps|step size",
        attacks={"pgd-2": im.PGD(LINF, 2, 0.015, random_start=False)},
    ),
    Case(
        "loss of the wrong sign",
        Base("digits", "standard", seed=1),
        "easier",
        attacks={"pgd-20": im.PGD(LINF, 20, loss=wrong_way)},
    ),
    Case("L2, step ε/200", Base("digits", "standard", "l2", 1), "step size", attacks={"pgd-50": im.PGD(L2, 50, 0.005)}),
    Case(
        "FGSM alone, trained on FGSM",
        Base("digits", FGSM_TRAINED, seed=1),
        "few steps|shattered|do not follow",
        attacks={"fgsm": im.FGSM(LINF)},
    ),
]
STRATEGIES = ("unsecured", "standard", "curriculum", "fgsm-pgd", "dynamic")
IMAGES = 200
HONEST = {
    "tuning": [UNSECURED, STANDARD, Base("digits", "dynamic"), L2_STANDARD],
    "unseen": [
        *(Base("digits", strategy, "linf", seed) for seed in (1, 2) for strategy in STRATEGIES),
        *(Base("digits", strategy, "l2", seed) for seed in (1, 2) for strategy in STRATEGIES[:2] + STRATEGIES[4:]),
        *(Base("mnist", strategy, norm) for norm in NORMS for strategy in ("standard", "dynamic")),
    ],
}


def trained(base: Base, folder: Path) -> nn.Module:
    """The trained model; read where it is done."""
    changes = {"kwta": lambda m: with_activation(m, WinnersTakeAll()), "signs": lambda m: with_activation(m, Signs())}
    mnist = base.data == "mnist"
    data = im.load_data(base.data, validation=0)
    shape = (8, *data.train.shape[1:]) if base.change == "thermometer" else data.train.shape
    torch.manual_seed(base.seed)
    model = im.build_model(f"{base.data}-cnn", input_shape=shape)
    model = changes[base.change](model) if base.change in changes else model
    wrapped = Changed(model, Thermometer()) if base.change == "thermometer" else model
    place = folder / "models" / base.name
    if (place / "model.pt").exists():
        wrapped.load_state_dict(torch.load(place / "model.pt", weights_only=True))
        return wrapped.eval()
    attack = im.PGD(base.threat, steps=7, step_size=base.threat.eps / 3, gauge="exact")
    strategies = {
        "unsecured": im.Unsecured(),
        "standard": im.Standard(attack),
        "curriculum": im.Curriculum(attack),
        "fgsm-pgd": im.FGSMThenPGD(attack),
        "dynamic": im.Dynamic(attack, c_max="auto"),
        FGSM_TRAINED: im.Standard(im.FGSM(base.threat)),
    }
    epochs = (6 if mnist else 20) if base.strategy != "unsecured" else (3 if mnist else 10)
    im.train(
        wrapped,
        data.train[:30000] if mnist else data.train,
        strategies[base.strategy],
        epochs=epochs,
        lr=0.02 if mnist else 0.05,
        lr_schedule="cosine",
        seed=0,
        progress=False,
    )
    place.mkdir(parents=True, exist_ok=True)
    torch.save(wrapped.state_dict(), place / "model.pt")
    return wrapped.eval()


def images(base: Base) -> ImageSet:
    """The test images."""
    return im.load_data(base.data, validation=0).test[:IMAGES]


def row(name: str, kind: str, cause: str, scored: im.Evaluation, fallen: np.ndarray) -> dict[str, Any]:
    """An evaluation beside the truth."""
    survived = scored.correct("worst_case")
    gain = float((survived & fallen).mean())
    audit = scored.audit
    named = any(word in text for word in cause.split("|") for text in audit.causes) if cause else True
    return {
        "name": name,
        "kind": kind,
        "robust": scored.worst_case.value,
        "truth": scored.worst_case.value - gain,
        "wrong": gain > TOLERANCE,
        "verdict": audit.verdict,
        "flagged": audit.verdict != "no failure found",
        "named": named and audit.verdict != "no failure found",
        "causes": list(audit.causes),
        "audit": audit.to_dict(),
    }


def with_its_own(one: dict[str, Any]) -> dict[str, Any]:
    """A row whose truth also counts the images that the audit itself made fall."""
    made_fall = sum(one["audit"]["evidence"]["fallen"].values()) / IMAGES
    return one | {
        "truth": min(one["truth"], one["robust"] - made_fall),
        "wrong": one["wrong"] or made_fall > TOLERANCE,
    }


def exposed(case: Case, undefended: nn.Module, model: nn.Module, data: ImageSet) -> np.ndarray:
    """Who falls to attacks that know the defence: searches on the undefended model, and Square on the defended one."""
    x, y = data.batch(torch.arange(len(data)))
    threat = case.base.threat
    attacks = [
        im.PGD(threat, steps=50, loss="margin", restarts=2),
        im.APGD(threat, loss="margin"),
        im.APGD(threat, steps=50, loss="margin", targets=9),
    ]
    points = [attack(undefended, x, y).x_adv for attack in attacks] + [im.Square(threat, 1000)(model, x, y).x_adv]
    if case.attacks:
        points += [attack(model, x, y).x_adv for attack in attacks]
    fallen = torch.zeros(len(x), dtype=torch.bool)
    with torch.no_grad():
        for point in points:
            fallen |= torch.stack([model(point) for _ in range(16)]).mean(0).argmax(1) != y
    return fallen.numpy()


def broken_row(case: Case, folder: Path) -> dict[str, Any]:
    """A broken defence, scored and audited."""
    torch.manual_seed(0)
    base, data = trained(case.base, folder), images(case.base)
    model = case.change(base).eval()
    undefended = im.StraightThrough(base) if case.base.change else base
    scored = im.evaluate(model, data, case.attacks or suite(case.base.threat))
    return row(case.name, "broken", case.cause, scored, exposed(case, undefended, model, data))


def honest_rows(base: Base, folder: Path) -> list[dict[str, Any]]:
    """Three evaluations of an honest model: what people report, a long search, and AutoAttack."""
    model, data, threat = trained(base, folder), images(base), base.threat
    suites = {
        "FGSM and PGD-20": suite(threat),
        "PGD-100, C&W-100, APGD": {
            "pgd-100": im.PGD(threat, steps=100, step_size="annealed", restarts=3, stop_on_success=True),
            "cw-100": im.CW(threat, steps=100),
            "apgd-100": im.APGD(threat, restarts=3),
        },
        "AutoAttack": {"autoattack": im.AutoAttack(threat)},
    }
    scored = {
        name: im.evaluate(model, data, attacks, precision="auto" if base.data == "mnist" else "float32")
        for name, attacks in suites.items()
    }
    x, y = data.batch(torch.arange(len(data)))
    extra = im.APGD(threat, loss="margin", restarts=5)(model, x, y, seed=1).misclassified.numpy()
    fallen = extra | ~np.logical_and.reduce([one.correct("worst_case") for one in scored.values()])
    return [row(f"{base.name}: {name}", "honest", "", one, fallen) for name, one in scored.items()]


def kept(key: str, folder: Path) -> Path:
    """Where what was computed is kept."""
    return folder / "rows" / f"{key.replace('/', '|')}.json"


def cached(key: str, folder: Path, compute: Callable[[], Any]) -> Any:
    """What was computed once."""
    path = kept(key, folder)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(compute()))
        print(key, flush=True)
    return json.loads(path.read_text())


def rows(sets: list[str], folder: Path, known: bool) -> dict[str, list[dict[str, Any]]]:
    """Every row of the sets, or only those that are known."""
    cases = {"tuning": TUNING, "unseen": UNSEEN}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sets}
    for name in sets:
        for case in cases[name]:
            if not known or kept(f"{name} {case.name}", folder).exists():
                found[name].append(cached(f"{name} {case.name}", folder, partial(broken_row, case, folder)))
    for name in sets:
        for base in HONEST[name]:
            if not known or kept(f"{name} {base.name}", folder).exists():
                found[name] += cached(f"{name} {base.name}", folder, partial(honest_rows, base, folder))
    return found


def missing(found: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """The honest models of the sets that have no row."""
    there = {one["name"].partition(":")[0] for rows in found.values() for one in rows}
    return [base.name for name in found for base in HONEST[name] if base.name not in there]


def summary(found: list[dict[str, Any]]) -> list[str]:
    """The confusion table of a set, and each broken defence."""
    broken = [one for one in found if one["kind"] == "broken"]
    honest = [one for one in found if one["kind"] == "honest"]
    right, wrong = [one for one in honest if not one["wrong"]], [one for one in honest if one["wrong"]]
    lines = ["| evaluations | how many | flagged | with the right cause |", "| --- | --- | --- | --- |"]
    for name, group in (
        ("broken", broken),
        ("of honest models, wrong", wrong),
        ("of honest models, right", right),
    ):
        named = sum(one["named"] for one in group) if group is broken else "–"
        lines.append(f"| {name} | {len(group)} | {sum(one['flagged'] for one in group)} | {named} |")
    lines += [
        "",
        "| broken | reported % | truth % | verdict | cause | right |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in broken:
        numbers = f"{100 * one['robust']:.1f} | {100 * one['truth']:.1f}"
        cause = "; ".join(one["causes"]) or "–"
        lines.append(f"| {one['name']} | {numbers} | {one['verdict']} | {cause} | {'yes' if one['named'] else 'no'} |")
    lines += [
        "",
        "| honest | reported % | truth % | verdict | audit's own gain, points |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in honest:
        numbers = f"{100 * one['robust']:.1f} | {100 * one['truth']:.1f}"
        gain = 100 * one["audit"]["evidence"]["total_gain"]
        lines.append(f"| {one['name']} | {numbers} | {one['verdict']} | {gain:.1f} |")
    return lines


def cost(folder: Path) -> dict[str, float]:
    """Gradients, half a one for each query without one, of the audit and of AutoAttack, on MNIST images."""
    base = Base("mnist", "standard")
    model, threat = trained(base, folder), base.threat
    scored = im.evaluate(model, images(base), {"autoattack": im.AutoAttack(threat)}, precision="auto")
    search, found = scored.convergence["autoattack"], scored.audit.evidence
    count = len(scored.label)
    return {
        "audit": found.gradients + found.forwards / 2,
        "autoattack": count * (search.gradients + search.forwards / 2),
        "survivors": found.survivors,
    }


def page(found: Mapping[str, list[dict[str, Any]]], costs: Mapping[str, float] | None, known: bool) -> str:
    lines = [
        "# Does the audit find what is wrong, and leave alone what is right?",
        "",
        f"`python bench/audit.py --sets {' '.join(found)}{' --cost' if costs else ''}` on {platform.machine()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads.",
        f"{IMAGES} test images each, half a point is one image. Thresholds were set on the tuning set, then frozen.",
        "A row: what the evaluation reported, what the strongest attack at hand left of it, the audit's verdict.",
        "Images that the audit itself made fall count, too: each is there to be seen.",
        *(["Not run yet: " + ", ".join(missing(found)) + "."] if known and missing(found) else []),
    ]
    for name, one in found.items():
        lines += ["", f"## {name.capitalize()} set", "", *summary(one)]
    if costs:
        share = 100 * costs["audit"] / costs["autoattack"]
        lines += [
            "",
            "## Cost",
            "",
            f"On {IMAGES} MNIST images (Standard, {costs['survivors']:.0f} survivors) the audit cost "
            f"{costs['audit']:,.0f} gradients, a query counted as half a one, "
            f"AutoAttack {costs['autoattack']:,.0f}: {share:.1f} %.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=["tuning", "unseen"], choices=["tuning", "unseen"])
    parser.add_argument("--runs", type=Path, default=Path("runs/audit"))
    parser.add_argument("--cost", action="store_true", help="measure the audit's cost beside AutoAttack's")
    parser.add_argument("--write", type=Path, help="Markdown file; the numbers go into a .json beside it")
    parser.add_argument("--known", action="store_true", help="take only the rows that are there")
    arguments = parser.parse_args()
    measured = rows(arguments.sets, arguments.runs, arguments.known)
    measured = {name: [with_its_own(one) for one in found] for name, found in measured.items()}
    costs = cached("cost", arguments.runs, partial(cost, arguments.runs)) if arguments.cost else None
    text = page(measured, costs, arguments.known)
    print(text)
    if arguments.write is not None:
        arguments.write.write_text(text)
        arguments.write.with_suffix(".json").write_text(json.dumps({"rows": measured, "cost": costs}, indent=1) + "\n")
