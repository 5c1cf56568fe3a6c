"""Scores a model under attack: which examples stay correct, how certain that is, and how far each search got."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from innermax.attacks.base import Attack, looks_like_probabilities
from innermax.attacks.minimal import MinimalAttack, MinimalResult
from innermax.attacks.targeted import Targeted, TargetedResult
from innermax.data.readers import as_image_set
from innermax.evaluation.arguments import check_arguments, check_models, find_ranks, name_errors, place_model
from innermax.evaluation.audit import Audit
from innermax.evaluation.audit_probes import Subject, run_audit
from innermax.evaluation.measure import Measurement, Search, describe_measurement, identify
from innermax.evaluation.model_checks import find_mismatches
from innermax.evaluation.progress import ProgressCallback, show_evaluation
from innermax.evaluation.result import Evaluation
from innermax.evaluation.scoring import (
    PROBABLE,
    AttackedBatch,
    Bench,
    Settings,
    attack_rows,
    measure_distances,
    scoring_logits,
)
from innermax.evaluation.store import (
    ATTACK_KINDS,
    CLEAN,
    CLEAN_KINDS,
    IMAGE,
    MINIMAL_KINDS,
    TARGETED_KINDS,
    CleanRows,
    Column,
    Kinds,
    Part,
    Parts,
    build_rows,
    note_kept_rows,
)
from innermax.models.files import hash_weights
from innermax.oracle.oracle import Oracle, Precision
from innermax.utils.validation import check_flag, summarize_error


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
    progress: bool | ProgressCallback | None = None,
    audit: bool = True,
    surrogates: Mapping[str, nn.Module] | None = None,
    keep_images: bool = False,
) -> Evaluation:
    """Accuracy on clean images, under each attack and under all of them, and how far each attack's search got.

    What an attack returns is projected onto X(x), quantised if `quantize` is given, and scored in float32 by the model
    itself. Random starts follow from seed and position in test_set. So the results do not depend on batch_size, except
    for rounding, unless the model itself draws random numbers.

    Args:
        model: any nn.Module with logits, in any mode; left exactly as found.
        test_set: (images, labels) tensors or whatever `as_image_set` takes: uint8 images, or floats in [0, 1].
        attacks: attacks by name; "clean" and "worst_case" are reserved. Without any, only clean accuracy is measured.
        batch_size: ≥ 1.
        seed: any integer; with the example's position it decides all random starts.
        quantize: 1…16: adversarial images are rounded to this many bits per value; clean images must have no more.
        precision: of the attacks' oracle: "float32", "bf16" or "auto". Scores are always the model's own, in float32.
        device: where to compute; None: where the model is. On another device a copy of the model is evaluated.
        devices: number of processes that share the batches, each with as many threads as this one; on GPUs one per
            GPU, from the first. They are spawned, so a script needs its `if __name__ == "__main__"`, and model and
            attacks must pickle. If torchrun, SLURM or a training has already started that many, and all make the same
            call, these share the batches, and all return the same. The rows are the same, to the bit.
        rows_dir: folder for the rows of each batch, written as soon as they are computed, and at the end for
            rows.parquet, the table of `Evaluation.examples`. The same call resumes from them, to the same table.
        progress: True shows a display on stderr. A function is called as progress(name, examples done, examples in all)
            after each batch, "clean" first; with several devices now and then, from another thread.
        audit: whether to check the result with stronger searches on a sample of the survivors, for at most a tenth of
            what AutoAttack costs.
        surrogates: other models by name, left exactly as found: the audit also tries images made on them. Each costs 20
            of its own gradients per sampled survivor.
        keep_images: keeps the scored images of every attack in `Evaluation.images`, and with the rows where there is a
            rows_dir. They take 4 bytes per value in memory, for each attack as much as the test set in float32: 117 MiB
            for 10,000 images of CIFAR-10. Rows that were kept without images are computed again.

    Raises:
        ValueError, TypeError: an argument is none of the above, labels are not among the model's classes, the model
            returns NaN, an image lies outside an attack's bounds, a surrogate has other classes, or rows_dir belongs to
            another evaluation. With rows_dir, a note on any exception says where finished rows are kept.
    """
    check_arguments(attacks, batch_size, seed, quantize, precision)
    check_flag(keep_images, "keep_images")
    if surrogates is not None:
        check_models("surrogates", surrogates)
        if not (audit and attacks):
            raise ValueError("surrogates are for the audit: they need audit=True and at least one attack")
    images = as_image_set(test_set)
    model, device = place_model(model, images, device)
    ranks = find_ranks(devices, device)
    model, device = place_model(model, images, ranks.device)
    kinds = {CLEAN: CLEAN_KINDS} | {name: _find_kinds(attack) for name, attack in attacks.items()}
    folder = None if rows_dir is None else Path(rows_dir)
    parts = Parts(kinds, len(images), batch_size, folder, images.shape if keep_images else None)
    with show_evaluation(ranks.first and progress, attacks, audit) as tell:
        bench = Bench(images, device, batch_size, seed, quantize, tell)
        build = partial(_Scorer.build, attacks=attacks, precision=precision)
        measurement = Measurement(bench, {"model": model}, build, attacks, parts, ranks, devices)
        with bench.isolate(model), ranks.explain_lost_connection(), ranks.mute_others():
            return _evaluate(measurement, model, precision, audit, surrogates or {})


def _find_kinds(attack: Attack) -> Kinds:
    """The columns of an attack's rows."""
    if isinstance(attack, MinimalAttack):
        return MINIMAL_KINDS
    return TARGETED_KINDS if isinstance(attack, Targeted) else ATTACK_KINDS


@dataclass(frozen=True, eq=False)
class _Scorer:
    """Scores one model: attacks search with the oracle `fast`, and the verdicts are those of `exact`."""

    bench: Bench
    exact: Oracle
    fast: Oracle
    attacks: Mapping[str, Attack]

    @classmethod
    def build(
        cls, bench: Bench, models: Mapping[str, nn.Module], attacks: Mapping[str, Attack], precision: Precision
    ) -> "_Scorer":
        exact = Oracle(models["model"])
        return cls(bench, exact, bench.attack_oracle(models["model"], precision) if attacks else exact, attacks)

    @property
    def plan(self) -> str:
        """How the network that attacks search with is compiled."""
        return self.fast.scheme

    def recompile(self, plan: str) -> "_Scorer":
        """The same with the network compiled to a plan, whatever the clock says here."""
        return replace(self, fast=self.fast.recompile(plan))

    def clean_rows(self, x: Tensor, y: Tensor) -> dict[str, Column]:
        logits = scoring_logits(self.exact, x, y)
        probable = torch.full(y.shape, bool(looks_like_probabilities(logits)), device="cpu")
        return vars(CleanRows(logits.argmax(1).cpu().numpy(), probable.numpy()))

    def searches(self) -> list[Search]:
        return [Search(name, name, attack, self.fast, self._attack_rows) for name, attack in self.attacks.items()]

    def _attack_rows(self, batch: AttackedBatch) -> dict[str, Column]:
        logits = scoring_logits(self.exact, batch.image, batch.label)
        rows = attack_rows(batch.result, logits, batch.label)
        if isinstance(batch.result, TargetedResult):
            return vars(rows) | {"target": batch.result.target.cpu().numpy()}
        if not isinstance(batch.result, MinimalResult):
            return vars(rows)
        return vars(rows) | {"distance": measure_distances(self.bench, self.exact, batch, rows.correct)}


def _evaluate(
    measurement: Measurement, model: nn.Module, precision: Precision, audit: bool, surrogates: Mapping[str, nn.Module]
) -> Evaluation:
    """Takes the measurement and audits the result."""
    bench, attacks, parts = measurement.bench, measurement.attacks, measurement.parts
    scorer = _Scorer.build(bench, measurement.models, attacks, precision)
    measurement, scorer = measurement.agree(scorer, precision)
    others = _build_surrogates(bench, scorer.exact, surrogates)
    settings = measurement.ranks.broadcast(bench.settings(attacks, precision, scorer.plan))
    measurement.open_folder(partial(_identify_evaluation, bench, model, attacks, settings))
    with note_kept_rows(parts), warnings.catch_warnings():
        measurement.score_clean(scorer)
        for sentence in find_mismatches(model, scorer.exact, bench.images, bench.device, bench.batch_size):
            warnings.warn(sentence, stacklevel=3)
        if parts.join(CLEAN).columns["probable"].all():
            warnings.warn(f"{PROBABLE}; attacks and gauges need logits (leave the softmax out)", stacklevel=3)
            warnings.filterwarnings("ignore", message=PROBABLE)  # each attack would say so on each batch
        measurement.attack(scorer)
        found = {name: parts.join(name) for name in attacks}
        evaluation = Evaluation(
            settings=settings,
            label=bench.images.labels.cpu().numpy().copy(),
            index=None if bench.images.numbers is None else bench.images.numbers.cpu().numpy().copy(),
            clean_prediction=parts.join(CLEAN).columns["prediction"],
            rows={name: build_rows(part.columns) for name, part in found.items()},
            seconds={name: part.seconds for name, part in found.items()},
            weights=hash_weights(model.state_dict()),
            images=_collect_images(found) if parts.image_shape is not None else None,
        )
        measurement.write_table(evaluation.columns)
        if audit and attacks:
            try:
                evaluation = replace(evaluation, audit=_audit(bench, model, scorer, others, attacks, evaluation))
            except Exception as failure:  # noqa: BLE001  whatever the model raises where only the audit asks
                told = f"the audit failed ({summarize_error(failure)}): the results are whole, but nothing checked them"
                warnings.warn(told, stacklevel=3)
    return evaluation


def _collect_images(found: Mapping[str, Part]) -> dict[str, Column]:
    """Each attack's scored images."""
    return {name: part.columns[IMAGE] for name, part in found.items()}


def _build_surrogates(bench: Bench, exact: Oracle, surrogates: Mapping[str, nn.Module]) -> dict[str, Oracle]:
    """The surrogates' compiled oracles. Raises ValueError unless they take the images and have the model's classes."""
    found = {}
    for name, model in surrogates.items():
        with name_errors("surrogate", name):
            own, _ = place_model(model, bench.images, bench.device)
            found[name] = bench.attack_oracle(own, "float32")
            theirs, ours = (oracle.logits(bench.example()).shape[1] for oracle in (found[name], exact))
            if theirs != ours:
                raise ValueError(f"it must have the model's {ours} classes, got {theirs}")
    return found


def _identify_evaluation(
    bench: Bench, model: nn.Module, attacks: Mapping[str, Attack], settings: Settings
) -> dict[str, Any]:
    """What identifies an evaluation, as plain YAML: a folder holds the rows of one configuration only."""
    return identify(bench, {"model": model})["model"] | describe_measurement(bench, attacks, settings)


def _audit(
    bench: Bench,
    model: nn.Module,
    scorer: _Scorer,
    surrogates: Mapping[str, Oracle],
    attacks: Mapping[str, Attack],
    evaluation: Evaluation,
) -> Audit:
    """Whether an evaluation can be believed."""
    subject = Subject(
        model=model,
        exact=scorer.exact,
        oracle=scorer.fast.precise,
        images=bench.images,
        attacks=attacks,
        rows=evaluation.rows,
        survived=evaluation.correct("worst_case"),
        surrogates=surrogates,
        admit=partial(bench.admit, "audit"),
        seed=bench.seed,
        batch_size=bench.batch_size,
        device=bench.device,
    )
    return run_audit(subject)
