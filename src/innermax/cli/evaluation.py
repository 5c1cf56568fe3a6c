"""What `innermax evaluate` and `innermax transfer` share: options, data set, threat model and attacks."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import innermax as im
from innermax.attacks.base import Attack
from innermax.attacks.named import aim_attacks, list_names, parse_attacks
from innermax.cli.arguments import Parser, build_parser, check_file, check_given_count
from innermax.cli.settings import TABLE, EvaluateSettings, NormName, ThreatSettings
from innermax.data.class_names import match_classes, read_classes
from innermax.data.image_set import ImageSet
from innermax.data.load import load_test_set
from innermax.distributed.launch import count_processes, find_device
from innermax.evaluation.sizes import check_sizes
from innermax.models.pretrained import find_pretrained
from innermax.models.wrappers import IMAGENET_STATISTICS
from innermax.oracle.oracle import Oracle
from innermax.threat import NORMS
from innermax.training.run_folder import read_settings

_PASSED_ON = ("batch_size", "seed", "quantize", "precision")
_OF_VERIFY = {"claims": "verify", "images": "verify"}


def evaluation_parser(usage: str, description: str, skip: set[str | int], *, sizes: bool = False) -> Parser:
    """The parser of a command that attacks trained models, without the options to skip; sizes: ε may be several.

    Where ε may not, `choose_attacks` says what to do instead.
    """
    parser = build_parser(usage, description)
    parser.elsewhere = _OF_VERIFY | {str(name): "evaluate" for name in skip}
    parser.add_class_arguments(EvaluateSettings, as_group=False, skip=skip | {"attacks"})
    parser.add_argument("--attacks", type=str, default=TABLE, help=f"Attacks, separated by commas: {list_names()}.")
    norm = f"Norm of the perturbations: {', '.join(NORMS)}. Without it, the run's own."
    parser.add_argument("--threat.norm", type=NormName | None, help=norm)
    eps = "Largest size of a perturbation, such as 8/255. Without it, the run's own."
    if sizes:
        eps += " Several, such as [0.1,0.2], are evaluated one after the other."
    parser.add_argument("--threat.eps", type=float | list[float] | None, help=eps)
    return parser


def choose_data(sources: Sequence[str], chosen: Any) -> str:
    """The data set that was asked for, or else that of the sources. Raises ValueError where there is neither."""
    data: str | None = chosen.data or find_setting(sources, "data", "--data")
    if data is None:
        folders = f"{sources[0]} is no run folder" if len(sources) == 1 else "none of the sources is a run folder"
        raise ValueError(f"{folders}, so the data set is not known: give --data")
    return data


class TestImages(NamedTuple):
    """The images to attack, labelled as the models number their classes, and the names of those."""

    images: ImageSet
    class_names: tuple[str, ...] | None


def load_source(source: str, chosen: Any) -> nn.Module:
    """The model of a source, of a run its last or best epoch, with a normalisation in front where one is asked for."""
    path = Path(source) / "best.safetensors" if chosen.best else source
    model: nn.Module = im.load_model(path, allow_code=chosen.allow_code)
    if chosen.normalize is None:
        return model
    pair = IMAGENET_STATISTICS if chosen.normalize == "imagenet" else chosen.normalize
    if len(pair) != 2:
        raise ValueError(f"--normalize must be imagenet or [MEAN,STD], got {chosen.normalize}")
    return nn.Sequential(im.Normalize(*pair), model)


def load_images(data: str, sources: Sequence[str], chosen: Any) -> TestImages:
    """As many of the test images of a data set as were asked for. Raises as `load_all_images`."""
    images, names = load_all_images(data, sources, chosen)
    count, first = read_limit(chosen.limit)
    some = images[:count] if count is None or first else images.sample(count, chosen.seed)
    there, all_there = (len(set(part.labels.tolist())) for part in (some, images))
    if there < min(len(some), all_there) / 2:
        told = f"--limit {chosen.limit}: these {len(some)} test images are of {there} of {all_there} classes alone"
        warnings.warn(told, stacklevel=2)
    return TestImages(some, names)


def load_all_images(data: str, sources: Sequence[str], chosen: Any) -> TestImages:
    """The test images of a data set.

    Raises ValueError where the data set, or the file that names the models' classes, is not readable, or they do not
    fit each other.
    """
    label_column = chosen.label_column or find_setting(sources, "label_column", "--label-column")
    images, names = load_test_set(data, label_column=label_column)
    if chosen.classes is not None:
        if names is None:
            raise ValueError(f"--classes needs classes that have names, and {data} names none")
        classes = read_classes(chosen.classes)
        numbers = torch.tensor(match_classes(names, classes), device=images.labels.device)
        images, names = ImageSet(images.images, numbers[images.labels]), tuple(name for name, *_ in classes)
    return TestImages(images, names)


def read_limit(limit: int | str | None) -> tuple[int | None, bool]:
    """How many images, None for all, and whether they are the first ones instead of a random sample: 500 or first:500.

    Raises:
        ValueError: it is neither of these, or below 1.
    """
    if limit is None:
        return None, True
    first, _, number = str(limit).rpartition(":")
    if first not in ("", "first") or not number.lstrip("-").isdigit():
        raise ValueError(f"--limit must be a number such as 500, for a random sample, or first:500, got {limit}")
    check_given_count("--limit", int(number))
    return int(number), first == "first"


def check_classes(model: nn.Module, test: TestImages, chosen: Any) -> None:
    """Raises ValueError where --classes names another number of classes than a model has."""
    if chosen.classes is None or test.class_names is None:
        return
    x, _ = test.images.batch(torch.arange(1))
    found = Oracle(model).logits(x).shape[1]
    if found != len(test.class_names):
        raise ValueError(f"--classes {chosen.classes} names {len(test.class_names)} classes, the model has {found}")


def choose_sized_attacks(sources: Sequence[str], chosen: Any) -> dict[float | None, dict[str, Attack]]:
    """The attacks for each ε that was asked for; None: for the one that a list of sizes was not asked for."""
    eps = chosen.threat.eps
    if not isinstance(eps, list):
        return {None: choose_attacks(sources, chosen)}
    check_sizes(eps, "--threat.eps")
    found: dict[float | None, dict[str, Attack]] = {}
    for size in eps:
        found[size] = choose_attacks(sources, chosen, size)
    if not found[eps[0]]:
        raise ValueError(f"--attacks must name at least one attack for several --threat.eps, got {chosen.attacks!r}")
    return found


def choose_attacks(sources: Sequence[str], chosen: Any, size: float | None = None) -> dict[str, Attack]:
    """The attacks by name, in the threat model that was asked for or else in that of the sources.

    size: the ε, where several were asked for.

    Raises ValueError where the size of perturbations is not known: an ε belongs to its norm.
    """
    norm, eps = chosen.threat.norm, chosen.threat.eps if size is None else size
    if isinstance(eps, list):
        raise ValueError(
            f"--threat.eps must be one number here, got {eps}: run the command once for each, or innermax evaluate, "
            "which takes several"
        )
    if norm is None or eps is None:
        own = find_setting(sources, "threat", "--threat.norm and --threat.eps") or {}
        norm = norm or own.get("norm", "linf")
        eps = own["eps"] if eps is None and norm == own.get("norm") else eps
    if eps is None:
        raise ValueError(f"the size of {norm} perturbations for {sources[0]} is not known: give --threat.eps")
    attacks = parse_attacks(chosen.attacks, ThreatSettings(norm, eps).build())
    targets = chosen.get("targets")  # which not every command takes
    return dict(attacks if targets is None else aim_attacks(attacks, targets))


def choose_options(chosen: Any) -> dict[str, Any]:
    """The options that `im.evaluate` and `im.transfer` take alike, checked before anything is loaded."""
    read_limit(chosen.limit)
    check_file("--json", chosen.json)
    devices = count_processes() if chosen.devices is None else chosen.devices
    passed_on = {name: getattr(chosen, name) for name in _PASSED_ON}
    return passed_on | {"device": find_device(chosen.device), "devices": devices}


def find_setting(sources: Sequence[str], setting: str, option: str) -> Any:
    """What run folders and models that come with innermax, among the sources, record of a setting; None: none does.

    Raises ValueError where they differ; it tells of the option that decides.
    """
    found: list[tuple[str, Any]] = []
    for source in sources:
        value = _read_settings(source).get(setting)
        if value is not None:
            found.append((source, value))
        if found and found[-1][1] != found[0][1]:
            raise ValueError(f"{found[0][0]} and {source} differ in their {setting}: give {option}")
    return found[0][1] if found else None


def _read_settings(source: str) -> Mapping[str, Any]:
    """The data set and threat model of a source by name, where they are known."""
    if is_run_folder(source):
        return read_settings(Path(source))
    own = find_pretrained(source)
    return {} if own is None else {"data": own.data, "threat": own.threat}


def is_run_folder(source: str) -> bool:
    """Whether a source is the folder of a run."""
    return (Path(source) / "config.yaml").is_file()
