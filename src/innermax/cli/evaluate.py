"""`innermax evaluate`: attacks a trained model with test images."""

import os
from pathlib import Path
from typing import Any

from innermax.cli.arguments import SOURCES, check_count, check_file, spelled_out


def run(words: list[str]) -> None:
    """Attacks a trained model with the test images."""
    parser = evaluation_parser("evaluate SOURCE", f"Attack a trained model: {SOURCES}.", set())
    if not words or words[0].startswith("-"):
        if words and words[0] not in ("-h", "--help"):
            raise ValueError("evaluate takes a run folder or a model first, such as: innermax evaluate runs/digits")
        words = ["", "--help"]
    chosen = parser.parse_args(spelled_out(words[1:]))
    _run_evaluation(words[0], chosen)


def evaluation_parser(command: str, description: str, skip: set[str | int]) -> Any:
    """The parser of a command that attacks trained models."""
    from jsonargparse import ArgumentParser

    from innermax.cli.settings import EvaluateSettings, ThreatSettings

    parser = ArgumentParser(prog=f"innermax {command}", description=description, exit_on_error=False)
    parser.add_class_arguments(EvaluateSettings, as_group=False, skip=skip)
    parser.add_argument(
        "--threat.norm",
        type=ThreatSettings.__annotations__["norm"] | None,
        help="linf, l2 or l1; empty for the run's own",
    )
    parser.add_argument(
        "--threat.eps", type=float | None, help="largest perturbation, e.g. 8/255; empty for the run's own"
    )
    return parser


def build_threat(source: str, own: dict[str, Any], norm: Any, eps: float | None) -> Any:
    """The threat model that was asked for, or else the run's own; an ε belongs to its norm."""
    from innermax.cli.settings import ThreatSettings

    norm = norm or own.get("norm", "linf")
    if eps is None and norm == own.get("norm"):
        eps = own["eps"]
    if eps is None:
        raise ValueError(f"the size of {norm} perturbations for {source} is not known: give --threat.eps")
    return ThreatSettings(norm, eps).build()


def _run_evaluation(source: str, chosen: Any) -> None:
    from rich.console import Console

    import innermax as im
    from innermax.attacks.named import named_attacks
    from innermax.cli.progress import show_evaluation
    from innermax.distributed.launch import count_processes, find_device, is_first
    from innermax.reporting.tables import format_audit, format_table
    from innermax.training.run_folder import read_settings

    path = Path(source)
    told = read_settings(path) if (path / "config.yaml").is_file() else {}
    name = chosen.data or told.get("data")
    if name is None:
        raise ValueError(f"{source} is no run folder, so its data set is not known: give --data")
    attacks = named_attacks(chosen.attacks, build_threat(source, told.get("threat", {}), **vars(chosen.threat)))
    device = find_device(chosen.device)
    check_count("limit", chosen.limit)
    check_file("json", chosen.json)
    check_file("html", chosen.html)
    model = im.load_model(path / "best.safetensors" if chosen.best else source, allow_code=chosen.allow_code)
    model = model if chosen.normalize is None else _normalized(model, chosen.normalize)
    other = chosen.surrogate
    surrogates = None if other is None else {other: im.load_model(other, allow_code=chosen.allow_code)}
    data = im.load_data(name, validation=0)
    test = data.test[: chosen.limit]
    options = {name: getattr(chosen, name) for name in ("batch_size", "seed", "quantize", "precision")}
    options["device"] = device
    rows_dir = chosen.rows_dir
    if rows_dir is None and (path / "config.yaml").is_file() and os.access(path, os.W_OK):
        rows_dir = _own_rows(path, model, name, attacks, {**options, "limit": chosen.limit})
    devices = count_processes() if chosen.devices is None else chosen.devices
    options |= {"devices": devices, "rows_dir": rows_dir, "surrogates": surrogates}
    with show_evaluation(attacks, audit=True, speak=is_first()) as show:
        evaluation = im.evaluate(model, test, attacks, **options, progress=show)
    if not is_first():
        return
    if chosen.json is not None:
        evaluation.to_json(chosen.json)
    if chosen.html is not None:
        names = data.class_names
        shown = im.gallery(model, test, attacks, evaluation, class_names=names, device=device) if attacks else None
        im.report({source: im.Exhibit(evaluation, source, shown)}, chosen.html)
    console = Console()
    console.print(format_table(evaluation))
    if evaluation.audit is not None:
        console.print(format_audit(evaluation.audit))
    if rows_dir is not None:
        console.print(f"Example by example: {Path(rows_dir) / 'rows.parquet'}", highlight=False, soft_wrap=True)


def _own_rows(run: Path, model: Any, data: str, attacks: dict[str, Any], options: dict[str, Any]) -> Path:
    """A folder inside a run folder, another for each evaluation that is asked for."""
    import torch

    from innermax.utils.files import hash_tensors
    from innermax.utils.serialization import describe
    from innermax.utils.version import __version__

    asked = describe([data, attacks, options, __version__, torch.__version__])
    return run / "rows" / hash_tensors([(str(asked), torch.empty(0)), *model.state_dict().items()])


def _normalized(model: Any, normalize: Any) -> Any:
    """The model with a normalisation in front."""
    import torch

    import innermax as im
    from innermax.models.wrappers import IMAGENET_STATISTICS

    pair = IMAGENET_STATISTICS if normalize == "imagenet" else normalize
    if len(pair) != 2:
        raise ValueError(f"normalize must be imagenet or [MEAN,STD], got {normalize}")
    return torch.nn.Sequential(im.Normalize(*pair), model)
