"""What seems wrong between a model and the images it is given, as far as a few hundred answers show."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from innermax.data import ImageSet
from innermax.models import IMAGENET_STATISTICS, Normalize
from innermax.oracle import Oracle

_IMAGES = 256
_MARKED = 0.6  # of the accuracy with a normalisation in front; what has hardly learned can gain by contrast alone
_SIGMAS = 4.0  # by which that must exceed chance: several normalisations are tried
_UNNORMALISED = "the model is right on"  # how the sentence about a missing normalisation begins
_CHANCE = 1e-6  # that a class the model has is missing from the images by accident

Statistics = tuple[list[float], list[float]]  # mean and std, one number a channel or one for all


def misgivings(oracle: Oracle, images: ImageSet, device: torch.device) -> Iterator[str]:
    """One sentence for each thing that seems wrong; what to do is in it. Costs at most six passes over 256 images.

    The images' labels must be among the model's classes.
    """
    chosen = torch.linspace(0, len(images) - 1, min(_IMAGES, len(images))).round().long()
    x, y = (part.to(device) for part in images.batch(chosen.to(images.images.device)))
    with oracle.private_randomness(0):  # a model that draws random numbers draws them later as if nothing had been
        logits = oracle.logits(x)
        right = logits.argmax(1) == y
        yield from _other_classes(logits.shape[1], images)
        if x.ndim == 4 and float(right.double().mean()) < _MARKED:
            yield from _normalised_outside(oracle, x, y, right)


@contextmanager
def normalisation_known() -> Iterator[None]:
    """Inside, nobody is warned of images that seem to lack a normalisation: the model learned on such images."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_UNNORMALISED)
        yield


def _other_classes(classes: int, images: ImageSet) -> Iterator[str]:
    known = int(images.labels.max()) + 1
    if (known / classes) ** len(images) < _CHANCE:
        yield (
            f"the model has {classes} classes, the labels of test_set only {known}: an answer among the others counts "
            "as wrong"
        )


def _normalised_outside(oracle: Oracle, x: Tensor, y: Tensor, right: Tensor) -> Iterator[str]:
    """Whether the model knows the images much better with a normalisation in front."""
    tried = {repr(statistics): statistics for statistics in _candidates(x)}
    verdicts = {name: oracle.logits(Normalize(*pair).to(x)(x)).argmax(1) == y for name, pair in tried.items()}
    best = max(verdicts, key=lambda name: int(verdicts[name].sum()))
    gained, lost = int((verdicts[best] & ~right).sum()), int((right & ~verdicts[best]).sum())
    # McNemar's statistic for two classifiers on the same examples.
    unremarkable = int(right.sum()) >= _MARKED * int(verdicts[best].sum())
    if unremarkable or gained - lost < _SIGMAS * (gained + lost) ** 0.5:
        return
    mean, std = tried[best]
    yield (
        f"{_UNNORMALISED} {_share(right)} of {len(y)} test images, and on {_share(verdicts[best])} with a "
        "normalisation in front: it seems to have been trained on normalised images; evaluate "
        f"torch.nn.Sequential(im.Normalize({mean}, {std}), model), on the command line --normalize "
        f"{f'[{mean},{std}]'.replace(' ', '')}"
    )


def _candidates(x: Float[Tensor, "b c h w"]) -> Iterator[Statistics]:
    """Normalisations in common use: the data set's own, and fixed ones."""
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
    if bool((std > 1e-3).all()):
        yield [round(value, 4) for value in mean.tolist()], [round(value, 4) for value in std.tolist()]
    yield [0.5], [0.5]
    yield [0.0], [round(1 / 255, 6)]  # pixels from 0 to 255
    if x.shape[1] == 1:
        yield [0.1307], [0.3081]  # MNIST's
    if x.shape[1] == 3:
        yield IMAGENET_STATISTICS


def _share(right: Tensor) -> str:
    return f"{float(right.double().mean()):.1%}"
