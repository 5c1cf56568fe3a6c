"""Adds a trained model to those that come with innermax: weights, an entry in the registry, and a card.

    python bench/publish.py NAME SOURCE [--hub USER/NAME] [--command COMMAND] [--precision auto]
    python bench/publish.py NAME --autoattack scores.json

SOURCE is a run folder, or a folder of results/paper/models; COMMAND trains it again, where the recorded one does not.
The weights go into the package; with --hub they are pushed to the Hub, and the registry pins them by commit and hash.
The model is measured as it will be loaded. A model of the same name is replaced. AutoAttack takes long, and is measured
by itself, as the first command says when it is done; the second one puts the result into registry and card.
"""

import argparse
import hashlib
import json
import lzma
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import innermax as im
from innermax.attacks.named import parse_attacks
from innermax.cli.models import format_models
from innermax.data.load import load_test_set
from innermax.models import pretrained
from innermax.models.files import hash_weights
from innermax.models.pretrained import HubFile, Measured, Pretrained
from innermax.reporting.hub import model_card
from innermax.reproduce.cache import export_network
from innermax.threat import NORMS, build_threat, format_eps
from innermax.utils.files import read_config, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "how-to" / "robust-models.md"
FULL_PRECISION = 2_000_000  # bytes; of larger files, matrices and filters travel in bf16
IMAGES, SEED = 500, 0  # random test images, for the card and for tests
MANY = 1000  # for AutoAttack
ATTACKS = "pgd-20,cw-30"
LICENSE = "apache-2.0"


class Origin(NamedTuple):
    """How a model came about: its data, threat model, training and cost."""

    data: str
    threat: dict[str, Any]
    gradients: float  # input gradients per training image
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]


def read_origin(source: Path) -> Origin:
    """The origin of a run folder, or of a network that `innermax reproduce` trained."""
    if (source / "config.yaml").exists():
        config = read_config(source)
        history = [json.loads(line) for line in (source / "metrics.jsonl").read_text().splitlines()]
        known = config["settings"]
        environment = json.loads((source / "environment.json").read_text())
        return Origin(known["data"], known["threat"], _count(history), config["training"], environment)
    for pack in sorted((source.parents[1]).glob("*/answers.json.xz")):
        for record in json.loads(lzma.decompress(pack.read_bytes())).values():
            training = record["question"].get("training")
            described = json.dumps(training, sort_keys=True)
            name = "training-" + hashlib.sha256(described.encode()).hexdigest()[:12]
            if training and name == source.name and "history" in record["answer"]:
                setting = training["setting"]
                threat = {"norm": "linf", "eps": setting["eps"]}
                gradients = _count(record["answer"]["history"])
                return Origin(setting["data"], threat, gradients, training, record["environment"])
    raise SystemExit(f"{source} is no run folder, and no answers.json.xz beside it tells of its training")


def _count(history: list[dict[str, Any]]) -> float:
    return round(sum(row["gradients"] for row in history), 1)


def publish(
    name: str, source: Path, hub: str | None = None, command: str | None = None, precision: str = "float32"
) -> Pretrained:
    """Puts a model into package or Hub, measures it and writes entry and card."""
    origin = read_origin(source)
    if command is not None:
        origin = origin._replace(environment={**origin.environment, "command": command.split()})
    folder = pretrained.WEIGHTS / name
    shutil.rmtree(folder, ignore_errors=True)
    test = load_test_set(origin.data)[0]
    threat = build_threat(**origin.threat)
    about: dict[str, Any] = {"data": origin.data, "license": LICENSE, "training": _plain(origin.settings)}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / name if hub else folder
        best = source / "best.safetensors"  # on the validation split
        export_network(im.load_model(best if best.is_file() else source), place, FULL_PRECISION)
        model = im.load_model(place)
        clean = im.evaluate(model, test, {}, precision=precision).accuracy["clean"]
        attacks = parse_attacks(ATTACKS, threat)
        evaluation = im.evaluate(model, test.sample(IMAGES, SEED), attacks, seed=SEED, precision=precision)
        at, file = None, place / "model.safetensors"
        if hub:
            at, file = _push(model, hub, evaluation, about)
        content = file.read_bytes()
    entry = Pretrained(
        name=name,
        network=model.config["model"],
        data=origin.data,
        threat=origin.threat,
        gradients=origin.gradients,
        clean=_measured(clean),
        pgd_20=_measured(evaluation.accuracy["pgd-20"]),
        autoattack=None,
        license=LICENSE,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        weights=hash_weights(model.state_dict()),
        hub=at,
    )
    folder.mkdir(parents=True, exist_ok=True)
    card = model_card(evaluation, repo_id=pretrained.PREFIX + name, **about)
    write_text(folder / "README.md", card + describe_more(entry, origin, precision))
    _register(entry)
    return entry


def _push(model: Any, repo: str, evaluation: im.Evaluation, about: Mapping[str, Any]) -> tuple[HubFile, Path]:
    """The commit on the Hub, and the file that it holds."""
    from huggingface_hub import HfApi, hf_hub_download

    im.push_to_hub(model, repo, evaluation, **about)
    revision = str(HfApi().model_info(repo).sha)
    return HubFile(repo, revision), Path(hf_hub_download(repo, "model.safetensors", revision=revision))


def add_autoattack(name: str, scores: Path) -> Pretrained:
    """Puts AutoAttack's accuracy into entry and card. Raises SystemExit where it is of other weights, ε or images."""
    entry = pretrained.list_pretrained()[pretrained.PREFIX + name]
    evaluation = im.Evaluation.from_json(scores.read_text(encoding="utf-8"))
    if evaluation.weights != entry.weights:
        raise SystemExit(f"{scores} measured the weights {evaluation.weights}, not {entry.weights}")
    (attack,) = parse_attacks("autoattack", build_threat(**entry.threat)).values()
    if evaluation.settings.attacks != {"autoattack": repr(attack)}:
        raise SystemExit(f"{scores} must hold {attack!r}, got {dict(evaluation.settings.attacks)}")
    entry = replace(entry, autoattack=_measured(evaluation.worst_case))
    card, told = entry.folder / "README.md", _describe_autoattack(entry, evaluation)
    write_text(card, re.sub(r"## AutoAttack\n.*?(?=## )", lambda _: told, card.read_text(), flags=re.DOTALL))
    _register(entry)
    return entry


def describe_more(entry: Pretrained, origin: Origin, precision: str) -> str:
    """The sections of a card behind those of every model on the Hub."""
    made = origin.environment
    versions = ", ".join(f"{key} {value}" for key, value in made["versions"].items())
    searched = _option(precision)
    norm, eps = NORMS[entry.threat["norm"]].symbol, format_eps(entry.threat["eps"])
    command = " ".join(Path(word).name if word.startswith("/") else word for word in made["command"])
    return f"""
## How it was made

- Command: `{command}`
- {entry.gradients:,.1f} input gradients per training image, seed {made["seed"]}
- {made["date"][:10]}, commit `{made["commit"]}`
- {made["device"]}, {made["threads"]} threads; {versions}

Of all {entry.clean.images:,} test images {_percent(entry.clean)} % are classified correctly. The table above is from
`innermax evaluate {pretrained.PREFIX}{entry.name} --attacks {ATTACKS} --limit {IMAGES}{searched}`.

{_describe_autoattack(entry, None)}## Limits

The numbers are for perturbations in {norm} by at most {eps} of the test images of {entry.data}, and for no others: not
for another norm or size, for rotations, blur or noise, or for images from elsewhere. Every attack gives an upper bound;
none is a proof. There is one training, with one seed. The model is for research and teaching, and nothing that matters
should depend on its answers.
"""


def _describe_autoattack(entry: Pretrained, evaluation: im.Evaluation | None) -> str:
    count = MANY if evaluation is None else evaluation.settings.count
    option = "" if evaluation is None else _option(evaluation.settings.precision)
    command = f"innermax evaluate {pretrained.PREFIX}{entry.name} --attacks autoattack --limit {count}{option}"
    if entry.autoattack is None or evaluation is None:
        return f"## AutoAttack\n\nNot measured. (`{command}`)\n\n"
    found, audit = entry.autoattack, evaluation.audit
    which = "random test images" if evaluation.index is not None else "test images, all of them"
    judged = "" if audit is None else f" {audit.sentence}"
    cost = evaluation.convergence["autoattack"].gradients
    return (
        f"## AutoAttack\n\nThe standard ensemble leaves {_percent(found)} % of {found.images:,} {which} "
        f"({100 * found.low:.1f} to {100 * found.high:.1f}), for {cost:,.0f} gradients per image.{judged}\n"
        f"(`{command}`)\n\n"
    )


def _option(precision: str) -> str:
    return "" if precision == "float32" else f" --precision {precision}"


def _percent(measured: Measured) -> str:
    return f"{100 * measured.accuracy:.2f}"


def _measured(accuracy: Any) -> Measured:
    return Measured(round(accuracy.value, 6), round(accuracy.low, 6), round(accuracy.high, 6), accuracy.total)


def _plain(settings: Mapping[str, Any]) -> Any:
    return yaml.safe_load(yaml.safe_dump(dict(settings)))


def _register(entry: Pretrained) -> None:
    """Writes the registry with this entry, and the table in the documentation."""
    others = [other for other in pretrained.list_pretrained().values() if other.name != entry.name]
    entries = sorted([*others, entry], key=lambda one: one.name)
    write_json(pretrained.WEIGHTS / "registry.json", [asdict(one) for one in entries])
    table = f"```text\n{format_models()}```\n"
    text = re.sub(r"```text\nname .*?```\n", lambda _: table, PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    write_text(PAGE, text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--hub")
    parser.add_argument("--command")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--autoattack", type=Path)
    chosen = parser.parse_args()
    if (chosen.source is None) == (chosen.autoattack is None):
        parser.error("give SOURCE or --autoattack")
    if chosen.autoattack is not None:
        add_autoattack(chosen.name, chosen.autoattack)
    else:
        publish(chosen.name, chosen.source, chosen.hub, chosen.command, chosen.precision)
        print(f"innermax evaluate innermax/{chosen.name} --attacks autoattack --limit {MANY} --json scores.json")
