"""Whether a claim about robustness, or a set of adversarial images, stands up to what can be tried here."""

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from innermax.attacks.base import Attack
from innermax.attacks.guided_pgd import GuidedPGD
from innermax.attacks.pgd import PGD
from innermax.data.image_set import ImageSet
from innermax.data.items import numbers_to_tensor
from innermax.data.readers import as_image_set
from innermax.evaluation.arguments import place_model
from innermax.evaluation.evaluate import evaluate
from innermax.evaluation.progress import ProgressCallback
from innermax.evaluation.result import Evaluation
from innermax.oracle.compiled import cast
from innermax.oracle.frozen import frozen_copy
from innermax.oracle.oracle import Oracle, Precision
from innermax.threat import Threat
from innermax.utils.files import write_text
from innermax.utils.generators import cuda_devices, private_randomness
from innermax.utils.intervals import Accuracy, accuracy
from innermax.utils.validation import check_labels, check_logits, check_number, summarize_error

_IMAGES = 64  # on which it is asked whether the model repeats itself
_TOLERANCE = 1e-6  # by which a handed image may leave the ball: rounding
_LEVELS = 255  # of an 8-bit pixel
_DIFFERENT = 1e-3  # change of a logit, over 1 + the largest, beyond what rounding does
_ROUNDED = 5e-5  # a claim has four decimals
_NAMED = 8  # images that a sentence names


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        passed: False where it speaks against the claim; None where it could not be tried, or says nothing of it.
        evidence: a sentence with the numbers.
    """

    name: str
    passed: bool | None
    evidence: str


@dataclass(frozen=True, eq=False)
class Verification:
    """What became of a claim. It is refuted or not refuted; nothing here proves one.

    Attributes:
        checks: what was looked at, in order.
        claim: the robust accuracy that was claimed, in [0, 1]; None: no number was.
        accuracy: what remains correct after everything that was tried.
        evaluation: of the attacks, with its audit. None, as is the accuracy, where the model has no answer of its own
            to an image, so that there is nothing to attack.
    """

    checks: tuple[Check, ...]
    claim: float | None
    accuracy: Accuracy | None = None
    evaluation: Evaluation | None = None

    @property
    def refuted(self) -> bool:
        """Whether a check speaks against what was claimed."""
        return any(check.passed is False for check in self.checks)

    @property
    def verdict(self) -> str:
        """ "refuted" or "not refuted"."""
        return "refuted" if self.refuted else "not refuted"

    def to_json(self, path: str | Path | None = None) -> str:
        """Verdict, checks and the evaluation's summary as JSON, written to path if one is given."""
        document = {
            "verdict": self.verdict,
            "claim": self.claim,
            "accuracy": None if self.accuracy is None else asdict(self.accuracy),
            "checks": [asdict(check) for check in self.checks],
            "evaluation": None if self.evaluation is None else self.evaluation.summary(),
        }
        text = json.dumps(document, allow_nan=False, ensure_ascii=False)
        if path is not None:
            write_text(Path(path), f"{text}\n")
        return text


@dataclass(frozen=True, eq=False)
class HandedImages:
    """Images that somebody calls adversarial.

    Attributes:
        images: (N, *features) float32, as the model is to see them.
        index: (N,) the test images that they were made from, by number.
        others: how many more images their file holds, which it does not call misclassified.
    """

    images: Float[Tensor, "n ..."]
    index: Int[Tensor, " n"]
    others: int = 0

    @classmethod
    def read(cls, path: str | Path) -> "HandedImages":
        """From a .npz file: images, uint8 or floats in [0, 1], and index; without index they are the first test images.

        Where it also holds labels and predictions, as `Evaluation.save_images` writes them, only those images are meant
        to be adversarial whose prediction is not the label; the others are counted.

        Raises:
            ValueError: it is not readable, or holds something else.
        """
        try:
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, TypeError, AttributeError, BadZipFile, zlib.error) as error:  # .npy: no archive
            raise ValueError(f"{path} cannot be read as .npz: {summarize_error(error)}") from error
        index = arrays.get("index", np.arange(len(arrays.get("images", ()))))
        if "images" not in arrays or not _is_picture(arrays["images"].dtype) or index.dtype.kind not in "iu":
            found = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in arrays.items()) or "nothing"
            raise ValueError(
                f"{path} must hold images (N, C, H, W), uint8 or floats in [0, 1], and integers index, got {found}"
            )
        chosen = _find_misclassified(path, arrays)
        images = numbers_to_tensor(arrays["images"], "images")[chosen]
        images = images.float() / _LEVELS if images.dtype == torch.uint8 else images.float()
        others = len(arrays["images"]) - len(images)
        return cls(images, torch.from_numpy(index.astype(np.int64))[chosen], others)


def _find_misclassified(path: str | Path, arrays: Mapping[str, Any]) -> slice | Int[Tensor, " k"]:
    """The rows of a file whose predictions are not their labels; all, where it does not hold both.

    Raises ValueError where they do not fit the images, or no row is left.
    """
    if not {"labels", "predictions"} <= arrays.keys():
        return slice(None)
    labels, predictions = arrays["labels"], arrays["predictions"]
    count = len(arrays["images"]) if arrays["images"].ndim else 0
    if not all(part.shape == (count,) and part.dtype.kind in "iu" for part in (labels, predictions)):
        raise ValueError(
            f"labels and predictions of {path} must be {count} integers each, as it holds so many images, got "
            f"{labels.dtype}{list(labels.shape)} and {predictions.dtype}{list(predictions.shape)}"
        )
    wrong = np.flatnonzero(labels != predictions)
    if len(wrong) == 0:
        raise ValueError(f"{path} holds no image whose prediction is not its label: none is meant to be adversarial")
    return torch.from_numpy(wrong)


def _is_picture(dtype: "np.dtype[Any]") -> bool:
    return dtype == np.uint8 or dtype.kind == "f"


def verify(
    model: nn.Module,
    test_set: Any,
    threat: Threat,
    *,
    claim: float | None = None,
    images: HandedImages | None = None,
    attacks: Mapping[str, Attack] | None = None,
    limit: int | None = 1000,
    batch_size: int = 250,
    seed: int = 0,
    quantize: int | None = None,
    precision: Precision = "float32",
    device: torch.device | str | None = None,
    devices: int = 1,
    rows_dir: str | Path | None = None,
    progress: bool | ProgressCallback | None = None,
) -> Verification:
    """Tries to refute a claim: does the model answer an image by itself, are handed images adversarial, and how many
    test images survive attacks and their audit.

    Args:
        model: any nn.Module with logits, in any mode; left exactly as found.
        test_set: what the claim is about, as for `im.evaluate`.
        threat: the threat model of the claim.
        claim: robust accuracy in [0, 1]. It is refuted where fewer images survive, beyond chance.
        images: adversarial images that came with it.
        attacks: by name; None: PGD-20 and the guided attack.
        limit: a random sample of so many test images; None: all.
        batch_size: as for `im.evaluate`, and so are those below.
        seed: of all that is random.
        quantize: bits per value that adversarial images are rounded to.
        precision: of the attacks.
        device: where to compute.
        devices: processes that share the images.
        rows_dir: folder for the rows.
        progress: whether, or whom, to tell how far it is.

    Raises:
        ValueError, TypeError: an argument is none of these, or the images do not fit the test set.
    """
    if claim is not None:
        check_number(claim, "claim", "a share in [0, 1], such as 0.54", lambda value: 0 <= value <= 1)
    whole = as_image_set(test_set)
    model, device = place_model(model, whole, device)
    if images is not None:
        _check_handed(images, whole)
    chosen = {"pgd-20": PGD(threat, steps=20), "guided": GuidedPGD(threat)} if attacks is None else dict(attacks)
    some = whole if limit is None else whole.sample(limit, seed)
    checks = list(_ask_again(model, some, device))
    if any(check.passed is False for check in checks):
        return Verification(tuple(checks), claim)
    fallen: set[int] = set()
    if images is not None:
        found = list(_judge_handed(model, whole, images, threat, device))
        checks += [check for check, _ in found]
        fallen = set().union(*(numbers for _, numbers in found))
    evaluation = evaluate(
        model,
        some,
        chosen,
        batch_size=batch_size,
        seed=seed,
        quantize=quantize,
        precision=precision,
        device=device,
        devices=devices,
        rows_dir=rows_dir,
        progress=progress,
    )
    survived = evaluation.correct("worst_case") & ~np.isin(some.index.cpu().numpy(), sorted(fallen))
    left = accuracy(int(survived.sum()), len(survived))
    checks += _judge_claim(claim, left, evaluation, everything=len(some) == len(whole))
    return Verification(tuple(checks), claim, left, evaluation)


def _check_handed(handed: HandedImages, whole: ImageSet) -> None:
    if tuple(handed.images.shape[1:]) != whole.shape:
        raise ValueError(f"images must have the test images' shape {whole.shape}, got {tuple(handed.images.shape[1:])}")
    if not bool(torch.isfinite(handed.images).all()):
        raise ValueError("images must hold finite numbers, got NaN or infinite values")
    check_labels(handed.index, len(handed.images), len(whole), name="index")


def _ask_again(model: nn.Module, images: ImageSet, device: torch.device) -> Iterator[Check]:
    """Whether the model's answer to an image is the same at another time, beside other images, in another precision.

    Only the second speaks against every claim: then an image alone has no answer. Attacks can average random answers.
    """
    place = torch.arange(min(_IMAGES, len(images)), device=images.labels.device)
    x = images.batch(place)[0].to(device)
    network = frozen_copy(model, share=True)

    def ask(network: nn.Module, images: Tensor, seed: int = 0) -> Tensor:
        with torch.no_grad(), private_randomness(seed, cuda_devices(model)):
            return check_logits(network(images.clone()), len(images))

    first, again = (ask(network, x, seed) for seed in range(2))
    random = "the model draws random numbers"
    yield _compare("asked twice", first, again, None, random)
    if bool((first != again).any()):
        yield Check("alone and in a batch", None, f"not tried: {random}")
        return
    try:
        alone = torch.cat([ask(network, one[None]) for one in x])
    except Exception as failure:  # noqa: BLE001  anything: it may be other people's code
        yield Check("alone and in a batch", False, f"it fails on one image alone: {summarize_error(failure)}")
        return
    yield _compare("alone and in a batch", first, alone, False, "the answer depends on the other images in the batch")
    try:
        finer = ask(cast(frozen_copy(model, share=False), torch.float64), x.double())
    except Exception as failure:  # noqa: BLE001  anything: it may be other people's code
        yield Check("in float64", None, f"not tried: {summarize_error(failure)}")
        return
    yield _compare("in float64", first, finer, None, "the answer hangs on rounding")


def _compare(name: str, one: Tensor, other: Tensor, otherwise: bool | None, cause: str) -> Check:
    """The check that two answers are the same; otherwise: what it says where they are not."""
    largest = float((one.double() - other.double()).abs().max() / (1 + one.double().abs().max()))
    changed = int((one.argmax(1) != other.argmax(1)).sum())
    if largest <= _DIFFERENT:
        return Check(name, True, f"the same answers to {len(one)} images, but for rounding, {largest:.0e}")
    told = f"logits differ by {largest:.2g} of the largest, {changed} of {len(one)} predictions: {cause}"
    return Check(name, otherwise, told)


def _judge_handed(
    model: nn.Module, whole: ImageSet, handed: HandedImages, threat: Threat, device: torch.device
) -> Iterator[tuple[Check, set[int]]]:
    """Checks of the handed images, each with the numbers of the test images that they are a counterexample for."""
    x_adv, index = handed.images.to(device), handed.index
    x, y = (value.to(device) for value in whole.batch(index.to(whole.labels.device)))
    feasible = threat.around(x)
    inside = feasible.contains(x_adv, _TOLERANCE)
    if handed.others:
        told = f"{len(index)} of {len(index) + handed.others}; the others are left out"
        yield Check("handed images whose own prediction is wrong", None, told), set()
    yield _count("handed images inside the threat model", inside, index, "outside"), set()
    fooled = _fools(model, x_adv, y)
    yield (
        _count("handed images misclassified alone and in a batch, twice", fooled, index, "not misclassified"),
        set(index[(inside & fooled).cpu()].tolist()),
    )
    rounded = (x_adv * _LEVELS).round() / _LEVELS
    stays = feasible.contains(rounded, _TOLERANCE) & _fools(model, rounded, y)
    told = f"{int(stays.sum())} of {len(stays)} are inside and misclassified once rounded to 8 bits"
    yield Check("handed images as 8-bit files", None, told), set()


def _count(name: str, good: Bool[Tensor, " n"], index: Tensor, otherwise: str) -> Check:
    bad = index[(~good).cpu()].tolist()
    told = f"{len(good) - len(bad)} of {len(good)}"
    if bad:
        told += f"; {otherwise}: {', '.join(map(str, bad[:_NAMED]))}{', …' * (len(bad) > _NAMED)}"
    return Check(name, not bad, told)


@torch.no_grad()
def _fools(model: nn.Module, x_adv: Tensor, y: Tensor) -> Bool[Tensor, " n"]:
    """Which images are misclassified each time: alone and 64 at a time, with two states of the random generators."""
    oracle, fooled = Oracle(model), torch.ones_like(y, dtype=torch.bool)
    for seed in range(2):
        for size in (1, _IMAGES):
            with private_randomness(seed, cuda_devices(model)):
                logits = torch.cat([oracle.logits(part) for part in torch.split(x_adv, size)])
            fooled &= logits.argmax(1) != y
    return fooled


def _judge_claim(claim: float | None, left: Accuracy, evaluation: Evaluation, *, everything: bool) -> Iterator[Check]:
    """What the attacks and their audit say of the claim."""
    audit = evaluation.audit
    gain = 0.0 if audit is None else audit.evidence.total_gain
    yield Check("audit", None, "it did not run" if audit is None else "; ".join((audit.verdict, *audit.causes)))
    told = f"{left.correct:,} of {left.total:,} survive every attack, {left.value:.2%}"
    if not everything:
        told += f" ({left.low:.2%} to {left.high:.2%})"
    if gain > 0:
        told += f"; the audit takes away {gain:.2%} at least"
    if claim is None:
        yield Check("robust accuracy", None, told)
        return
    most = (left.value if everything else left.high) - gain
    yield Check("claimed robust accuracy", most >= claim - _ROUNDED, f"{told}; claimed: {claim:.2%}")
