"""Images before and after attacks, with the course of each search; and accuracy by ε."""

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from innermax.attacks.base import Attack
from innermax.attacks.pgd import PGD
from innermax.attacks.search import AttackResult
from innermax.attacks.trace import Trace, search_with_trace, trace_search
from innermax.data.image_set import ImageSet
from innermax.data.readers import as_image_set
from innermax.evaluation.arguments import check_images, place_model
from innermax.evaluation.audit import UNCONVERGED
from innermax.evaluation.evaluate import evaluate
from innermax.evaluation.progress import ProgressCallback, show_evaluation
from innermax.evaluation.result import Evaluation
from innermax.evaluation.scoring import Bench, scoring_logits
from innermax.oracle.oracle import Oracle
from innermax.threat import Threat
from innermax.utils.intervals import Accuracy
from innermax.utils.optional import extra
from innermax.utils.validation import check_count

_BYTES = 2_500_000  # of PNG files, so that the page that holds them as text stays below 5 MB
_SIDE = 96  # pixels; larger images are shown smaller
_CHUNK = 50  # images attacked at a time
_SIZES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # times ε
_STEPS = 10
_SWEPT = 200  # images
# Colours of a negative, no and a positive change, distinct without colour vision (Okabe & Ito 2008).
_LESS, _SAME, _MORE = (0, 114, 178), (245, 245, 245), (213, 94, 0)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """A test image before and after an attack.

    Attributes:
        index: its position in the test set.
        attack: the attack's name.
        label, before, after: the true class, and the predicted ones of the clean and of the attacked image.
        clean, change, attacked: PNG files; the change is scaled so that its largest value has the strongest colour.
        largest: the largest change of a value, in [0, 1].
        relative_fosc: at the end of the search; NaN where the attack does not tell, or the gradient is zero.
        zero_gradient: whether the gradient is zero at the end of the search; None where the attack does not tell.
        loss, fosc: the attack's loss and the relative FOSC by step, the start first; empty unless the attack is a PGD.
    """

    index: int
    attack: str
    label: int
    before: int
    after: int
    clean: bytes
    change: bytes
    attacked: bytes
    largest: float
    relative_fosc: float
    zero_gradient: bool | None
    loss: tuple[float, ...]
    fosc: tuple[float, ...]

    @property
    def outcome(self) -> str:
        """ "fallen", "survived", or "wrong already" without an attack."""
        if self.before != self.label:
            return "wrong already"
        return "survived" if self.after == self.label else "fallen"

    @property
    def unconverged(self) -> bool:
        """Whether it survived a search that ended away from a stationary point, or where the gradient is zero."""
        return self.outcome == "survived" and (bool(self.zero_gradient) or self.relative_fosc > UNCONVERGED)


@dataclass(frozen=True)
class EpsCurve:
    """Accuracy under PGD-10 with a shrinking step on the first test images, by size of the perturbation."""

    eps: tuple[float, ...]
    accuracy: tuple[Accuracy, ...]
    images: int


@dataclass(frozen=True)
class Gallery:
    """What a report shows beside an evaluation's numbers.

    `pictures` is empty where inputs are not images of 1 or 3 channels; `sweep` is None without an attack, or where
    its ε is 0; `weights` is
    the evaluation's.
    """

    pictures: tuple[Picture, ...]
    sweep: EpsCurve | None
    class_names: tuple[str, ...] | None
    weights: str | None = None


def gallery(
    model: nn.Module,
    test_set: Any,
    attacks: Mapping[str, Attack],
    evaluation: Evaluation,
    *,
    pictures: int = 200,
    class_names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool | ProgressCallback | None = None,
) -> Gallery:
    """Pictures for a report: images of every class that fell and that survived, each under every attack.

    They are attacked again, from the evaluation's own random starts. A sweep over ε with PGD-10 on the first 200 images
    costs 60 gradients for each of them. Images larger than 96 pixels are scaled down, and there are fewer pictures
    where the page would exceed 5 MB.

    Args:
        model: what was evaluated.
        test_set: on what.
        attacks: under which attacks.
        evaluation: its result.
        pictures: ≥ 1, the largest number of pictures: pairs of an image and an attack.
        class_names: one per class.
        device: where to compute. None: where the model is.
        progress: True shows a display on standard error. A function is called as progress(name, images done, images in
            all) after each batch, with the attack's name, or that of a size of ε.

    Raises:
        ValueError, TypeError: pictures is no number ≥ 1; test_set, attacks or model are not the evaluation's.
    """
    check_count(pictures, "pictures")
    images = as_image_set(test_set)
    _check_evaluated(model, images, attacks, evaluation)
    model, device = place_model(model, images, device)
    settings = evaluation.settings
    names = None if class_names is None else tuple(map(str, class_names))
    if not attacks:
        return Gallery((), None, names, evaluation.weights)
    chosen = torch.from_numpy(select_images(evaluation, max(1, pictures // len(attacks))))
    shown: tuple[Picture, ...] = ()
    sizes = _attacks_by_size(images, next(iter(attacks.values())).threat)
    with show_evaluation(progress, {**attacks, **sizes}) as tell:
        bench = Bench(images, device, _CHUNK, settings.seed, settings.quantize, tell)
        with bench.isolate(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the evaluation has given its warnings about this model
            oracle, exact = bench.attack_oracle(model, "float32"), Oracle(model)
            if len(images.shape) == 3 and images.shape[0] in (1, 3):
                shown = tuple(_limit_bytes(_make_pictures(bench, attacks, oracle, exact, chosen), _BYTES))
            swept = _measure_curve(bench, model, sizes) if sizes else None
    return Gallery(shown[:pictures], swept, names, evaluation.weights)


def select_images(evaluation: Evaluation, count: int) -> npt.NDArray[np.int64]:
    """(count,) at most: numbers of test images, in turn of every class and outcome.

    Outcomes are: fell, survived, survived a search that did not converge and, a quarter as often, misclassified clean.
    """
    clean, survived = evaluation.correct("clean"), evaluation.correct("worst_case")
    loose = np.zeros_like(clean)
    for rows in evaluation.rows.values():
        loose |= rows.correct & ((rows.relative_fosc > UNCONVERGED) | (rows.zero_gradient == 1))
    fate = np.where(clean, 1 + survived + (survived & loose), 0)
    group = evaluation.label * 4 + fate
    order = np.argsort(group, kind="stable")
    _, sizes = np.unique(group, return_counts=True)
    turn = np.empty(len(group), dtype=np.int64)
    turn[order] = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    turn = np.where(fate == 0, 4 * turn + 1, turn)
    return np.argsort(turn, kind="stable")[:count].astype(np.int64)


def _check_evaluated(model: nn.Module, images: ImageSet, attacks: Mapping[str, Attack], evaluation: Evaluation) -> None:
    if evaluation.is_of(model) is False:
        raise ValueError("model must be what was evaluated: its weights differ from those that the evaluation measured")
    if not np.array_equal(images.labels.cpu().numpy(), evaluation.label):
        raise ValueError(
            f"test_set must be what was evaluated: its {len(images)} labels differ from the evaluation's "
            f"{len(evaluation.label)}"
        )
    for name, attack in attacks.items():
        if evaluation.settings.attacks.get(name) != repr(attack):
            raise ValueError(f"attacks must be the evaluation's: {name!r} is not, got {attack!r}")


def _make_pictures(
    bench: Bench, attacks: Mapping[str, Attack], oracle: Oracle, exact: Oracle, chosen: Tensor
) -> Iterator[Picture]:
    """The pictures of the chosen images, each under all attacks."""
    for start in range(0, len(chosen), _CHUNK):
        place = chosen[start : start + _CHUNK].to(bench.images.images.device)
        x, y, index = (value.to(bench.device) for value in (*bench.images.batch(place), bench.images.index[place]))
        check_images(x, attacks, bench.quantize)
        before = scoring_logits(exact, x, y).argmax(1)
        columns = [
            _attack_batch(bench, name, attack, oracle, exact, (x, y, index, before)) for name, attack in attacks.items()
        ]
        if bench.progress is not None:
            for name in attacks:
                bench.progress(name, start + len(index), len(chosen))
        for row in zip(*columns, strict=True):
            yield from row


def _attack_batch(
    bench: Bench, name: str, attack: Attack, oracle: Oracle, exact: Oracle, batch: tuple[Tensor, Tensor, Tensor, Tensor]
) -> list[Picture]:
    """One attack's pictures of a batch: (images, labels, numbers, clean predictions)."""
    x, y, index, before = batch
    result, trace = _search(bench, attack, oracle, x, y, index)
    x_adv = bench.admit(name, result, attack.threat.around(x))
    after = scoring_logits(exact, x_adv, y).argmax(1)
    loss: list[list[float]] = [[]] * len(x)
    fosc = loss
    if trace is not None:
        loss, fosc = trace.loss.T.tolist(), trace.relative_fosc.T.tolist()
    relative = [math.nan] * len(x) if result.relative_fosc is None else result.relative_fosc.tolist()
    zero = [None] * len(x) if result.zero_gradient is None else result.zero_gradient.tolist()
    found = []
    for row in range(len(x)):
        change = x_adv[row] - x[row]
        found.append(
            Picture(
                index=int(index[row]),
                attack=name,
                label=int(y[row]),
                before=int(before[row]),
                after=int(after[row]),
                clean=_encode_png(_to_pixels(x[row])),
                change=_encode_png(_colour_change(change)),
                attacked=_encode_png(_to_pixels(x_adv[row])),
                largest=float(change.abs().max()),
                relative_fosc=relative[row],
                zero_gradient=zero[row],
                loss=tuple(loss[row]),
                fosc=tuple(fosc[row]),
            )
        )
    return found


def _search(
    bench: Bench, attack: Attack, oracle: Oracle, x: Tensor, y: Tensor, index: Tensor
) -> tuple[AttackResult, Trace | None]:
    """What an attack finds and, of PGD, the trace of its first search, which is all there is to most."""
    again: dict[str, Any] = {"seed": bench.seed, "index": index}
    if isinstance(attack, PGD) and attack == replace(
        attack, restarts=1, stop_at=None, stop_on_success=False, steps_after_success=0
    ):
        return search_with_trace(attack, oracle, x, y, **again)
    result = attack(oracle, x.clone(), y.clone(), **again, final="gradient")
    return result, trace_search(attack, oracle, x, y, **again) if isinstance(attack, PGD) else None


def _limit_bytes(pictures: Iterator[Picture], limit: int) -> Iterator[Picture]:
    """The first pictures whose files together take up at most `limit` bytes."""
    total = 0
    for picture in pictures:
        total += len(picture.clean) + len(picture.change) + len(picture.attacked)
        if total > limit:
            return
        yield picture


def _attacks_by_size(images: ImageSet, threat: Threat) -> dict[str, PGD]:
    """PGD-10 with a shrinking step for each size of the perturbation that fits between the bounds; none of ε = 0."""
    if threat.eps == 0:
        return {}
    x, _ = images.batch(torch.arange(1, device=images.images.device))
    attacks = {}
    for size in _SIZES:
        try:
            wider = replace(threat, eps=size * threat.eps)
            wider.around(x)
        except ValueError:
            continue  # as large as the bounds
        attacks[f"ε = {wider.eps!r}"] = PGD(wider, _STEPS, "annealed", stop_on_success=True)
    return attacks


def _measure_curve(bench: Bench, model: nn.Module, attacks: Mapping[str, PGD]) -> EpsCurve:
    """Accuracy by size of the perturbation."""
    few, tell = bench.images[:_SWEPT], bench.progress
    found = evaluate(model, few, attacks, seed=bench.seed, device=bench.device, audit=False, progress=tell)
    eps = (0.0, *(attack.threat.eps for attack in attacks.values()))
    return EpsCurve(eps, tuple(found.accuracy.values()), len(few))


def _to_pixels(image: Tensor) -> Pixels:
    """(H, W) or (H, W, 3) of an image in [0, 1]."""
    levels: Pixels = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
    return levels[:, :, 0] if levels.shape[2] == 1 else levels


def _colour_change(change: Tensor) -> Pixels:
    """(H, W, 3) of a change: blue where it darkens, orange where it brightens; of a colour image around mid-grey."""
    share = (change / change.abs().max().clamp(min=1e-12)).detach().float().cpu().permute(1, 2, 0).numpy()
    if share.shape[2] == 3:
        return np.asarray((127.5 + 127.5 * share).round(), np.uint8)
    same, less, more = (np.array(colour, dtype=float) for colour in (_SAME, _LESS, _MORE))
    colour = same + np.abs(share) * (np.where(share < 0, less, more) - same)
    return np.asarray(colour.round(), np.uint8)


def _encode_png(pixels: Pixels) -> bytes:
    """A PNG file, at most 96 pixels per side."""
    with extra("report"):
        from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
