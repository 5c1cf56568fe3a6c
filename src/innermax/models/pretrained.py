"""Robust models that come with innermax: small ones in the package, others on the Hugging Face Hub.

`models/weights/registry.json` lists them; bench/publish.py writes it, with a card for each model.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from innermax.utils.serialization import parse_json
from innermax.utils.validation import unknown

WEIGHTS = Path(__file__).parent / "weights"
PREFIX = "innermax/"


@dataclass(frozen=True)
class Measured:
    """An accuracy in [0, 1] with its 95 % interval, on so many test images."""

    accuracy: float
    low: float
    high: float
    images: int


@dataclass(frozen=True)
class HubFile:
    """A repository on the Hub at one commit."""

    repo: str
    revision: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(f"revision must be a commit of 40 hexadecimal digits, got {self.revision!r}")


@dataclass(frozen=True)
class Pretrained:
    """A model that comes with innermax.

    Attributes:
        name: behind "innermax/".
        network: what `build_model` calls it.
        data: the data set it was trained on.
        threat: "norm" and "eps" of the perturbations it was trained against.
        gradients: input gradients per training image over the whole training.
        clean: on all test images.
        pgd_20: under PGD-20, on some random ones.
        autoattack: None where it was not measured.
        license: as the Hub spells it.
        bytes: of model.safetensors.
        sha256: of model.safetensors.
        weights: fingerprint of the loaded weights, as evaluations record it.
        hub: where it is; None: in the package.
    """

    name: str
    network: str
    data: str
    threat: Mapping[str, Any]
    gradients: float
    clean: Measured
    pgd_20: Measured
    autoattack: Measured | None
    license: str
    bytes: int
    sha256: str
    weights: str
    hub: HubFile | None

    @property
    def folder(self) -> Path:
        """Where the package has its card and, unless they are on the Hub, its weights."""
        return WEIGHTS / self.name


def list_pretrained() -> dict[str, Pretrained]:
    """The models by their names, which begin with "innermax/"."""
    return dict(_read_registry(WEIGHTS / "registry.json"))


def find_pretrained(source: str) -> Pretrained | None:
    """The model of a source such as "innermax/digits-linf-0.15"; None for other sources.

    Raises ValueError where no model has a name that begins so; a folder of that name is another source.
    """
    known = _read_registry(WEIGHTS / "registry.json")
    if source in known or not source.startswith(PREFIX) or Path(source).exists():
        return known.get(source)
    raise unknown("model", source, known)


def check_file(path: Path, model: Pretrained) -> None:
    """Raises ValueError where a file's content is not what the registry says of the model."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != model.sha256:
        raise ValueError(f"{path} is damaged or another file: its SHA-256 must be {model.sha256}, got {found}")


def _read_registry(path: Path) -> Mapping[str, Pretrained]:
    return {PREFIX + entry["name"]: _read_entry(entry) for entry in parse_json(path.read_text(encoding="utf-8"))}


def _read_entry(entry: Mapping[str, Any]) -> Pretrained:
    inner = {"clean": Measured, "pgd_20": Measured, "autoattack": Measured, "hub": HubFile}
    made = {name: None if entry[name] is None else kind(**entry[name]) for name, kind in inner.items()}
    return Pretrained(**{**entry, **made})
