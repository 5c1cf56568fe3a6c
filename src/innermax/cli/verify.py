"""`innermax verify`: tries to refute a claim about a model's robustness, or a set of adversarial images."""

from pathlib import Path
from typing import Any

from innermax.cli.arguments import SOURCES, split_words
from innermax.cli.evaluation import (
    check_classes,
    choose_attacks,
    choose_data,
    choose_options,
    evaluation_parser,
    load_all_images,
    load_source,
    read_limit,
)
from innermax.cli.rows import measure_into, own_rows, print_place
from innermax.distributed.launch import is_first
from innermax.evaluation.verify import HandedImages, Verification, verify
from innermax.reporting.tables import format_verification
from innermax.utils.console import PlainConsole

_OF_EVALUATE_ALONE: set[str | int] = {"html", "save_images", "surrogate"}
_DEFAULTS = {"attacks": "pgd-20,guided", "limit": 1000}


def run(words: list[str]) -> None:
    """Verifies a source; exits with status 1 where the claim is refuted."""
    sources, options = split_words(words, "a run folder or a model", "innermax verify runs/digits --claims 0.9")
    description = (
        "Try to refute a claim about a model's robustness, or check adversarial images. The exit status is 0 where it "
        f"is not refuted, 1 where it is, 2 where the input is bad. SOURCE is {SOURCES}."
    )
    parser = evaluation_parser("innermax verify SOURCE", description, _OF_EVALUATE_ALONE)
    parser.add_argument("--claims", type=float | None, help="Claimed robust accuracy as a share, such as 0.54.")
    images = "File of adversarial images: a .npz with images and, unless they are of the first test images, index."
    parser.add_argument("--images", type=str | None, help=images)
    parser.set_defaults(_DEFAULTS)
    chosen = parser.parse_args(options)
    if _verify(sources[0], chosen).refuted:
        raise SystemExit(1)


def _verify(source: str, chosen: Any) -> Verification:
    """Verifies a source as chosen, writes and prints what comes out."""
    data_name, attacks = choose_data([source], chosen), choose_attacks([source], chosen)
    if not attacks:
        raise ValueError("attacks must hold at least one attack, got none")
    options = choose_options(chosen)
    limit, first = read_limit(chosen.limit)
    if limit is not None and first:
        raise ValueError(f"--limit must be a number, as claims are checked on a random sample, got {chosen.limit}")
    handed = None if chosen.images is None else HandedImages.read(chosen.images)
    model = load_source(source, chosen)
    test = load_all_images(data_name, [source], chosen)
    check_classes(model, test, chosen)
    threat = next(iter(attacks.values())).threat
    own = own_rows(None, [data_name, attacks, options | {"limit": limit}], model.state_dict())
    options |= {"claim": chosen.claims, "images": handed, "limit": limit, "progress": is_first()}

    def measure(rows_dir: Path | None) -> Verification:
        return verify(model, test.images, threat, attacks=attacks, rows_dir=rows_dir, **options)

    rows_dir, found = measure_into(chosen.rows_dir, own, measure)
    if is_first():
        if chosen.json is not None:
            found.to_json(chosen.json)
        PlainConsole().print(format_verification(found), highlight=False)
        print_place(rows_dir if found.evaluation is not None else None)
    return found
