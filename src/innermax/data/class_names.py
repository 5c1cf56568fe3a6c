"""The classes of a model by name, and which of them a data set's classes are."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from innermax.utils.optional import import_library
from innermax.utils.serialization import parse_json
from innermax.utils.validation import summarize_error, unknown

IMAGENET = "imagenet"  # its names come with timm
_SYNSET = re.compile(r"(n\d{8})\b[\s,:]*(.*)")
Names = tuple[str, ...]  # of one class, the first to show it by


def read_classes(source: str) -> list[Names]:
    """The names of a model's classes, in the order of its logits.

    Args:
        source: "imagenet"; or a file with a line per class, such as "tench" or "n01440764 tench, Tinca tinca"; or a
            .json file with a list, or a mapping from numbers to names.

    Raises:
        ValueError: it is not readable.
    """
    if source == IMAGENET:
        return _imagenet()
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
        lines = _entries(parse_json(text)) if path.suffix == ".json" else text.rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"classes {source} is not readable: {' '.join(str(error).split())}") from error
    found = [_split(line) for line in lines]
    for number, names in enumerate(found):
        if not names:
            raise ValueError(f"classes {source}: class {number} has no name")
    if len(found) < 2:
        raise ValueError(f"classes {source} must name at least 2 classes, got {len(found)}")
    return found


def match_classes(names: Sequence[str], classes: Sequence[Names]) -> list[int]:
    """The number of each named class among a model's, by one of its names; case, hyphens and underscores do not count.

    Raises:
        ValueError: a name is not among them, or that of several.
    """
    known: dict[str, list[int]] = {}
    for number, aliases in enumerate(classes):
        for alias in dict.fromkeys(map(_plain, aliases)):
            known.setdefault(alias, []).append(number)
    found = []
    for name in names:
        numbers = known.get(_plain(name), [])
        if not numbers:
            raise _unknown(name, known)
        if len(numbers) > 1:
            told = " and ".join(f"{number} ({', '.join(classes[number])})" for number in numbers)
            raise ValueError(f"class {name!r} is the name of several classes of the model: {told}; use another name")
        found.append(numbers[0])
    return found


def _unknown(name: str, known: Mapping[str, object]) -> ValueError:
    """The error for an unknown name; of a thousand known ones it tells the nearest alone."""
    message = str(unknown("class", name, known)).partition(" (known:")[0]
    return ValueError(f"{message}; the model's classes have {len(known)} names")


def _entries(value: object) -> list[str]:
    """The lines that a JSON list or mapping from numbers stands for."""
    if isinstance(value, Mapping):
        numbers = sorted(value, key=int)
        if [int(number) for number in numbers] != list(range(len(numbers))):
            raise ValueError(f"the numbers of its classes must be 0…{len(numbers) - 1}")
        value = [value[number] for number in numbers]
    if not isinstance(value, list):
        raise ValueError(f"it must hold a list or a mapping, got {type(value).__name__}")
    return [", ".join(map(str, entry)) if isinstance(entry, list) else str(entry) for entry in value]


def _split(line: str) -> Names:
    """The names in a line: those between commas and the line as a whole; a WordNet id last."""
    found = _SYNSET.fullmatch(line.strip())
    text = found[2] if found else line.strip()
    parts = [part.strip() for part in text.split(",")]
    names = dict.fromkeys([*parts, text, *([found[1]] if found else [])])
    return tuple(name for name in names if name)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _imagenet() -> list[Names]:
    try:
        info = import_library("timm.data", "ImageNetInfo").ImageNetInfo("imagenet-1k")
    except Exception as error:  # its torchvision, built for another torch, raises what it likes
        reason = summarize_error(error)
        raise ValueError(
            f"classes {IMAGENET} needs timm, pip install 'innermax[timm]', or a file with a line per class: {reason}"
        ) from error
    return [_split(f"{info.index_to_label_name(n)} {info.index_to_description(n)}") for n in range(info.num_classes())]
