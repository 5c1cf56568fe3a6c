"""Scores a model under attack: who is still right, with what certainty, and how far each search got."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from innermax.attacks.base import Attack, looks_like_probabilities
from innermax.data.readers import as_image_set
from innermax.evaluation.arguments import check_arguments, check_models, find_ranks, name_errors, on_device
from innermax.evaluation.audit import Audit
from innermax.evaluation.audit_probes import Subject, run_audit
from innermax.evaluation.measure import Measurement, Search, describe_measurement, identify
from innermax.evaluation.model_checks import misgivings
from innermax.evaluation.progress import ProgressCallback, show_evaluation
from innermax.evaluation.result import Evaluation
from innermax.evaluation.scoring import PROBABLE, Attacked, Bench, Settings, attack_rows, scoring_logits
from innermax.evaluation.store import ATTACK_KINDS, CLEAN, CLEAN_KINDS, AttackRows, CleanRows, Column, Parts, kept_rows
from innermax.models.files import hash_weights
from innermax.oracle.oracle import Oracle, Precision


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
        progress: True shows a display on stderr. A function is called as progress(name, examples done, examples in all)
            after each batch, "clean" first; now and then, from another thread, where there are several devices.
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
    ranks = find_ranks(devices, device)
    model, device = on_device(model, images, ranks.device)
    kinds = {CLEAN: CLEAN_KINDS} | dict.fromkeys(attacks, ATTACK_KINDS)
    parts = Parts(kinds, len(images), batch_size, None if rows_dir is None else Path(rows_dir))
    with show_evaluation(ranks.first and progress, attacks, audit) as tell:
        bench = Bench(images, device, batch_size, seed, quantize, tell)
        build = partial(_Scorer.build, attacks=attacks, precision=precision)
        measurement = Measurement(bench, {"model": model}, build, attacks, parts, ranks, devices)
        with bench.isolated(model), ranks.explain_lost_connection(), ranks.mute_others():
            return _evaluate(measurement, model, precision, audit, surrogates or {})


@dataclass(frozen=True, eq=False)
class _Scorer:
    """Keeps the rows of one model: `exact` is its oracle as it is, which decides, `fast` what searches ask."""

    exact: Oracle
    fast: Oracle
    attacks: Mapping[str, Attack]

    @classmethod
    def build(
        cls, bench: Bench, models: Mapping[str, nn.Module], attacks: Mapping[str, Attack], precision: Precision
    ) -> "_Scorer":
        exact = Oracle(models["model"])
        return cls(exact, bench.attack_oracle(models["model"], precision) if attacks else exact, attacks)

    def clean_rows(self, x: Tensor, y: Tensor) -> dict[str, Column]:
        logits = scoring_logits(self.exact, x, y)
        probable = torch.full(y.shape, looks_like_probabilities(logits))
        return vars(CleanRows(logits.argmax(1).cpu().numpy(), probable.numpy()))

    def searches(self) -> list[Search]:
        return [Search(name, name, attack, self.fast, self._attack_rows) for name, attack in self.attacks.items()]

    def _attack_rows(self, batch: Attacked) -> dict[str, Column]:
        logits = scoring_logits(self.exact, batch.image, batch.label)
        return vars(attack_rows(batch.result, logits, batch.label))


def _evaluate(
    measurement: Measurement, model: nn.Module, precision: Precision, audit: bool, surrogates: Mapping[str, nn.Module]
) -> Evaluation:
    """Takes the measurement, and audits what it found."""
    bench, attacks, parts = measurement.bench, measurement.attacks, measurement.parts
    scorer = _Scorer.build(bench, measurement.models, attacks, precision)
    others = _surrogate_oracles(bench, scorer.exact, surrogates)
    settings = measurement.ranks.broadcast(bench.settings(attacks, precision, scorer.fast.plan))
    measurement.open_folder(partial(_configuration, bench, model, attacks, settings))
    with kept_rows(parts.folder), warnings.catch_warnings():
        measurement.score_clean(scorer)
        for sentence in misgivings(model, scorer.exact, bench.images, bench.device, bench.batch_size):
            warnings.warn(sentence, stacklevel=3)
        if parts.whole(CLEAN).columns["probable"].all():
            warnings.warn(f"{PROBABLE}; attacks and gauges need logits (leave the softmax out)", stacklevel=3)
            warnings.filterwarnings("ignore", message=PROBABLE)  # each attack would say so on each batch
        measurement.attack(scorer)
        found = {name: parts.whole(name) for name in attacks}
        evaluation = Evaluation(
            settings=settings,
            label=bench.images.labels.cpu().numpy().copy(),
            clean_prediction=parts.whole(CLEAN).columns["prediction"],
            rows={name: AttackRows(**part.columns) for name, part in found.items()},
            seconds={name: part.seconds for name, part in found.items()},
            weights=hash_weights(model.state_dict()),
        )
        measurement.write_table(evaluation.columns)
        if audit and attacks:
            evaluation = replace(evaluation, audit=_audit(bench, model, scorer, others, attacks, evaluation))
    return evaluation


def _surrogate_oracles(bench: Bench, exact: Oracle, surrogates: Mapping[str, nn.Module]) -> dict[str, Oracle]:
    """The compiled oracles of models that take the same images and have the same classes. ValueError for others."""
    found = {}
    for name, model in surrogates.items():
        with name_errors("surrogate", name):
            own, _ = on_device(model, bench.images, bench.device)
            found[name] = bench.attack_oracle(own, "float32")
            theirs, ours = (oracle.logits(bench.example()).shape[1] for oracle in (found[name], exact))
            if theirs != ours:
                raise ValueError(f"it has {theirs} classes, the model {ours}")
    return found


def _configuration(bench: Bench, model: nn.Module, attacks: Mapping[str, Attack], settings: Settings) -> dict[str, Any]:
    """What identifies an evaluation, as plain YAML: the rows of a folder are one configuration's alone."""
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
        admit=partial(bench.admitted, "audit"),
        seed=bench.seed,
        batch_size=bench.batch_size,
        device=bench.device,
    )
    return run_audit(subject)
