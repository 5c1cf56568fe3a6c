"""Scores a model under attack: who is still right, with what certainty, and how far each search got."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from innermax.attacks.base import Attack
from innermax.data.readers import as_image_set
from innermax.distributed.launch import check_devices
from innermax.distributed.process_group import find_members
from innermax.evaluation.audit import Audit
from innermax.evaluation.audit_probes import Subject, run_audit
from innermax.evaluation.model_checks import misgivings
from innermax.evaluation.parallel import Task, attack_together, exchanged
from innermax.evaluation.result import Evaluation
from innermax.evaluation.scoring import (
    PROBABLE,
    Bench,
    Progress,
    Settings,
    about,
    attack_and_score,
    check_arguments,
    check_models,
    on_device,
    score_clean,
)
from innermax.evaluation.store import CLEAN, AttackRows, Parts, kept_rows, open_rows, write_table
from innermax.losses import cross_entropy
from innermax.models.files import hash_weights
from innermax.oracle.oracle import Oracle, Precision
from innermax.utils.files import hash_tensors
from innermax.utils.serialization import describe
from innermax.utils.validation import check_count
from innermax.utils.version import __version__


def evaluate(
    model: nn.Module,
    test_set: Any,
    attacks: Mapping[str, Attack],
    *,
    batch_size: int = 250,
    seed: int = 0,
    quantize: int | None = None,
    precision: Precision = "float32",
    device: torch.device | str | None = None,
    devices: int = 1,
    rows_dir: str | Path | None = None,
    progress: Progress | None = None,
    audit: bool = True,
    surrogates: Mapping[str, nn.Module] | None = None,
) -> Evaluation:
    """Accuracy on clean images, under each attack and under all of them, and how far each attack's search got.

    What an attack returns is projected onto X(x), quantised where told, and scored in float32 by the model itself. An
    example is known by its position in test_set, so neither its random starts nor, up to rounding, its result depend on
    batch_size, unless the model itself draws random numbers.

    Args:
        model: any nn.Module with logits, in any mode; left exactly as found.
        test_set: (images, labels) tensors or whatever `as_image_set` takes: uint8 images, or floats in [0, 1].
        attacks: attacks by name; "clean" and "worst_case" are taken. Without any, clean accuracy alone is measured.
        batch_size: ≥ 1.
        seed: any integer; with the example's position it decides all random starts.
        quantize: 1…16: only images of this many bits a value count; clean images must have no more.
        precision: what attacks search in, on the compiled model: "float32", "bf16" or "auto". Scores are float32, the
            model's own.
        device: where to compute; where the model is unless told. On another device a copy of the model is evaluated.
        devices: processes that share the batches, each with as many threads as this one; on GPUs one a GPU, the first
            so many. They start anew, so a script needs its `if __name__ == "__main__"`, and model and attacks must
            pickle. Where so many are there already, started by torchrun, SLURM or a training, and all make the same
            call, these share the batches, and all return the same. The rows are the same, to the bit.
        rows_dir: folder that keeps each batch's rows as soon as they are there, and rows.parquet, the table of
            `Evaluation.examples`, in the end. The same call goes on from what the folder holds, to the same table.
        progress: called as progress(name, examples done, examples in all) after each batch, "clean" first; now and
            then, from another thread, where there are several devices.
        audit: whether stronger searches on a sample of the survivors check the result, for at most a tenth of what
            AutoAttack costs.
        surrogates: other models by name, left exactly as found: the audit also shows the model images made on them, for
            20 of their gradients a survivor of the sample each.

    Raises:
        ValueError, TypeError: an argument is outside what is said above; labels are not among the model's classes, the
            model returns NaN, an image lies outside an attack's bounds, a surrogate has other classes, or rows_dir
            belongs to another evaluation. With rows_dir, notes of any exception say where finished rows are kept.
    """
    check_arguments(attacks, batch_size, seed, quantize, precision)
    if surrogates is not None:
        check_models("surrogates", surrogates)
        if not (audit and attacks):
            raise ValueError("surrogates are what the audit tries: they need audit=True and at least one attack")
    images = as_image_set(test_set)
    model, device = on_device(model, images, device)
    check_count(devices, "devices")
    ranks = find_members(devices, device)
    if ranks.count == 1:
        check_devices(devices, device)
    model, device = on_device(model, images, ranks.device)
    bench = Bench(images, device, batch_size, seed, quantize, progress if ranks.first else None)
    exact = Oracle(model)
    folder = None if rows_dir is None else Path(rows_dir)
    parts = Parts((CLEAN, *attacks), len(images), batch_size, folder)
    with bench.in_float32(exact), ranks.explain_lost_connection(), ranks.mute_others():
        oracle = bench.attack_oracle(model, exact, precision) if attacks else exact
        others = _surrogate_oracles(bench, exact, surrogates or {})
        settings = ranks.broadcast(bench.settings(attacks, precision, oracle.plan))
        if folder is not None:
            configuration = _configuration(bench, model, exact, attacks, settings)
            ranks.run_first(lambda: open_rows(folder, configuration))
            parts.read()
            ranks.gather(None)  # nobody writes before all have read
        with kept_rows(folder), warnings.catch_warnings():
            with exchanged(parts, ranks):
                score_clean(bench, exact, attacks, parts, ranks.rank, ranks.count)
            for sentence in misgivings(model, exact, images, device, batch_size):
                warnings.warn(sentence, stacklevel=2)
            if parts.joined(CLEAN).columns["probable"].all():
                message = f"{PROBABLE}; attacks and gauges need logits (leave the softmax out)"
                warnings.warn(message, stacklevel=2)
                warnings.filterwarnings("ignore", message=PROBABLE)  # each attack would say so on each batch
            if devices == ranks.count:
                with exchanged(parts, ranks):
                    attack_and_score(bench, attacks, oracle, exact, parts, ranks.rank, ranks.count)
            else:
                attack_together(Task(bench, model, attacks, precision, parts), devices)
            found = {name: parts.joined(name) for name in attacks}
            evaluation = Evaluation(
                settings=settings,
                label=images.labels.cpu().numpy().copy(),
                clean_prediction=parts.joined(CLEAN).columns["prediction"],
                rows={name: AttackRows(**part.columns) for name, part in found.items()},
                seconds={name: part.seconds for name, part in found.items()},
                weights=hash_weights(model.state_dict()),
            )
            if folder is not None:
                ranks.run_first(lambda: write_table(folder, evaluation.columns()))
            if audit and attacks:
                evaluation = replace(evaluation, audit=_audit(bench, model, exact, oracle, others, attacks, evaluation))
    return evaluation


def _surrogate_oracles(bench: Bench, exact: Oracle, surrogates: Mapping[str, nn.Module]) -> dict[str, Oracle]:
    """The compiled oracles of models that take the same images and have the same classes. ValueError for others."""
    found = {}
    for name, model in surrogates.items():
        with about("surrogate", name):
            own, _ = on_device(model, bench.images, bench.device)
            found[name] = bench.attack_oracle(own, Oracle(own), "float32")
            theirs, ours = (oracle.logits(bench.example()).shape[1] for oracle in (found[name], exact))
            if theirs != ours:
                raise ValueError(f"it has {theirs} classes, the model {ours}")
    return found


def _configuration(
    bench: Bench, model: nn.Module, exact: Oracle, attacks: Mapping[str, Attack], settings: Settings
) -> dict[str, Any]:
    """What identifies an evaluation, as plain YAML: the rows of a folder are one configuration's alone.

    A model's code may change while its weights do not, so its answers to the first examples are told, too.
    """
    _, x, y = next(bench.batches(CLEAN))
    with exact.private_randomness(bench.seed):
        answer = exact.gradient(x[:8], y[:8], cross_entropy)
    tensors = {"images": bench.images.images, "labels": bench.images.labels}
    return {
        "model": type(model).__qualname__,
        "weights": hash_tensors((*model.named_parameters(), *model.named_buffers())),
        "answers": [*answer.loss.tolist(), *answer.gradient.flatten(1).norm(dim=1).tolist()],
        "test_set": hash_tensors(tensors.items()),
        **describe(asdict(settings)),
        "attacks": describe(attacks),
        "device": bench.device.type,
        "innermax": __version__,
    }


def _audit(
    bench: Bench,
    model: nn.Module,
    exact: Oracle,
    oracle: Oracle,
    surrogates: Mapping[str, Oracle],
    attacks: Mapping[str, Attack],
    evaluation: Evaluation,
) -> Audit:
    """Whether an evaluation can be believed."""
    subject = Subject(
        model=model,
        exact=exact,
        oracle=oracle.precise,
        images=bench.images,
        attacks=attacks,
        rows=evaluation.rows,
        survived=evaluation.correct("worst_case"),
        surrogates=surrogates,
        admit=partial(bench.admitted, "audit"),
        seed=bench.seed,
        batch_size=bench.batch_size,
        device=bench.device,
    )
    return run_audit(subject)
