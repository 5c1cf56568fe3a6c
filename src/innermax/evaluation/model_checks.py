"""Signs that a model and the images it is given do not fit, as far as a few hundred answers show."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from innermax.data.image_set import ImageSet
from innermax.models.neighbors import depends_on_neighbors
from innermax.models.wrappers import IMAGENET_STATISTICS, Normalize
from innermax.oracle.oracle import Oracle

_log = logging.getLogger(__name__)
_IMAGES = 256
_MARKED = 0.6  # of the accuracy with a normalisation in front; a model that has hardly learned gains by contrast alone
_SIGMAS = 4.0  # by which the gain must exceed chance: several normalisations are tried
_REMEMBERED = 0.01  # share of the start in a BatchNorm's running statistics below which they describe its images
_UNNORMALISED = "the model is right on"  # how the sentence about a missing normalisation begins
_CHANCE = 1e-6  # probability that one of the model's classes is missing from the images by accident

Statistics = tuple[list[float], list[float]]  # mean and std, one number per channel or one for all
Batches = Iterator[tuple[Tensor, Tensor]]  # images and labels


def find_mismatches(
    model: nn.Module, oracle: Oracle, images: ImageSet, device: torch.device, batch_size: int = _IMAGES
) -> Iterator[str]:
    """A sentence for each sign, which says what to do. Costs about six passes over 256 images, at most.

    oracle: of the model. The images' labels must be among its classes.
    """
    chosen = torch.linspace(0, len(images) - 1, min(_IMAGES, len(images)), device="cpu").round().long()

    def batches() -> Batches:
        for index in torch.split(chosen, batch_size):
            x, y = images.batch(index.to(images.images.device))
            yield x.to(device), y.to(device)

    with oracle.private_randomness(0):  # later draws of the model stay the same
        classes, right = _judge(oracle, batches())
        yield from _check_classes(classes, images)
        yield from _check_neighbors(oracle, next(batches())[0][0])
        if len(images.shape) == 3 and float(right.double().mean()) < _MARKED and not _is_still_starting(model):
            yield from _suggest_normalisation(oracle, batches, right)


def _judge(oracle: Oracle, batches: Batches, before: Statistics | None = None) -> tuple[int, Bool[Tensor, " n"]]:
    """The model's number of classes, and which answers are right; before: a normalisation in front of it."""
    classes, right = 0, []
    for x, y in batches:
        if before is not None:
            with x.device:
                x = Normalize(*before).to(x)(x)
        logits = oracle.logits(x)
        classes = logits.shape[1]
        right.append(logits.argmax(1) == y)
    return classes, torch.cat(right)


@contextmanager
def trust_normalisation() -> Iterator[None]:
    """Context manager: nothing warns of a missing normalisation, as the model learned on such images."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_UNNORMALISED)
        yield


def _check_classes(classes: int, images: ImageSet) -> Iterator[str]:
    known = int(images.labels.max()) + 1
    if (known / classes) ** len(images) < _CHANCE:
        yield (
            f"the model has {classes} classes, the labels of test_set only {known}: an answer among the others counts "
            f"as wrong. Where the labels are other classes than the model's first {known}, number them as the model "
            "does, on the command line with --classes"
        )


def _check_neighbors(oracle: Oracle, x: Tensor) -> Iterator[str]:
    if depends_on_neighbors(oracle.logits, x):
        yield (
            "the model's answer to an image depends on the other images in its batch, so the results depend on "
            "batch_size, and no attack has a gradient of one image alone: normalise each image by itself, or by "
            "statistics that are kept"
        )


def _is_still_starting(model: nn.Module) -> bool:
    """Whether a BatchNorm's running statistics still hold much of their start: then more contrast alone helps."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    batches = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    return any(
        momentum is not None and count is not None and int(count) > 0 and (1 - momentum) ** int(count) > _REMEMBERED
        for momentum, count in batches
    )


def _suggest_normalisation(oracle: Oracle, batches: Callable[[], Batches], right: Tensor) -> Iterator[str]:
    """Whether the model knows the images much better with a normalisation in front."""
    tried = {repr(statistics): statistics for statistics in _candidates(batches())}
    verdicts = {}
    for name, pair in tried.items():
        try:
            verdicts[name] = _judge(oracle, batches(), pair)[1]
        except ValueError as refusal:  # of a model that takes values in [0, 1] alone, so that it needs none
            _log.info("not tried with the normalisation %s: %s", pair, refusal)
    if not verdicts:
        return
    best = max(verdicts, key=lambda name: int(verdicts[name].sum()))
    gained, lost = int((verdicts[best] & ~right).sum()), int((right & ~verdicts[best]).sum())
    # McNemar's statistic for two classifiers on the same examples.
    unremarkable = int(right.sum()) >= _MARKED * int(verdicts[best].sum())
    if unremarkable or gained - lost < _SIGMAS * (gained + lost) ** 0.5:
        return
    mean, std = tried[best]
    yield (
        f"{_UNNORMALISED} {_share(right)} of {len(right)} test images, and on {_share(verdicts[best])} with a "
        "normalisation in front: it seems to have been trained on normalised images; evaluate "
        f"torch.nn.Sequential(im.Normalize({mean}, {std}), model), on the command line --normalize "
        f"{f'[{mean},{std}]'.replace(' ', '')}"
    )


def _candidates(batches: Batches) -> Iterator[Statistics]:
    """Normalisations in common use: by the images' own statistics, and by fixed ones."""
    count, (total, squares) = 0, torch.zeros(2, 1, device="cpu")  # per channel; exact enough in float64
    for x, _ in batches:
        pixels = x.double().transpose(0, 1).flatten(1).cpu()
        count, total = count + pixels.shape[1], total + pixels.sum(1)
        squares = squares + pixels.square().sum(1)
    mean = total / count
    std = ((squares - count * mean.square()).clamp(min=0) / max(count - 1, 1)).sqrt()
    if bool((std > 1e-3).all()):
        yield [round(value, 4) for value in mean.tolist()], [round(value, 4) for value in std.tolist()]
    yield [0.5], [0.5]
    yield [0.0], [round(1 / 255, 6)]  # pixels from 0 to 255
    if len(mean) == 1:
        yield [0.1307], [0.3081]  # MNIST's
    if len(mean) == 3:
        yield IMAGENET_STATISTICS


def _share(right: Tensor) -> str:
    return f"{float(right.double().mean()):.1%}"
