"""Images and labels in memory."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from innermax.data.decoding import select
from innermax.utils import randomness
from innermax.utils.validation import check_inputs, check_labels

_SAMPLE = 2**32  # a stream of random numbers, apart from those of a training


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their labels, checked when it is made.

    images: uint8 (N, C, H, W), or float32 (N, *features) in [0, 1]; labels: int64 (N,), ≥ 0; N ≥ 1; numbers: int64 (N,)
    the examples' numbers in the set that they are a sample of; None: 0…N − 1. Images that innermax reads are in a
    temporary file (in TMPDIR) where they take more than 2 GiB.
    Raises TypeError for another type, ValueError for another shape or range.
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor | None = None

    def __post_init__(self) -> None:
        images = self.images
        if images.dtype == torch.uint8:
            if images.ndim != 4 or images.numel() == 0:
                raise ValueError(f"uint8 images must have shape (N, C, H, W) with N ≥ 1, got {tuple(images.shape)}")
        elif images.dtype == torch.float32:
            check_inputs(images, "images")
            low, high = (float(value) for value in images.aminmax())
            if low < 0 or high > 1:
                raise ValueError(
                    f"float images must lie in [0, 1], got values from {low:g} to {high:g}; {_advise(low, high)}"
                )
        else:
            raise TypeError(f"images must be uint8 or float32, got {images.dtype}")
        check_labels(self.labels, len(images), name="labels")
        if self.numbers is not None:
            check_labels(self.numbers, len(images), name="numbers")
        if images.device != self.labels.device:
            raise ValueError(f"images and labels must be on one device, got {images.device} and {self.labels.device}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice) -> "ImageSet":
        """The chosen examples, at least one; unless they are of a sample, they are numbered anew."""
        images = self.images[index] if isinstance(index, slice) else select(self.images, index)
        return ImageSet(images, self.labels[index], None if self.numbers is None else self.numbers[index])

    def sample(self, count: int, seed: int) -> "ImageSet":
        """Some examples drawn from the seed, in their order here and with their numbers; all where count ≥ N."""
        if count >= len(self):
            return self
        chosen = randomness.permutation(seed, len(self), _SAMPLE)[:count].sort().values.to(self.labels.device)
        return replace(self, numbers=self.index)[chosen]

    @property
    def index(self) -> Int[Tensor, " n"]:
        """The examples' numbers."""
        return torch.arange(len(self), device=self.labels.device) if self.numbers is None else self.numbers

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return tuple(self.images.shape[1:])

    @property
    def head(self) -> "ImageSet":
        """The examples that can be read in any order: all of them. A stream has only its first ones."""
        return self

    def batch(self, index: Int[Tensor, " b"]) -> tuple[Float[Tensor, " b *features"], Int[Tensor, " b"]]:
        """The chosen examples as float32 in [0, 1] and labels, on the set's device."""
        x = self.images[index]
        return (x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x), self.labels[index]

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set on another device."""
        numbers = None if self.numbers is None else self.numbers.to(device)
        return ImageSet(self.images.to(device), self.labels.to(device), numbers)


def _advise(low: float, high: float) -> str:
    """What to do with images of these values."""
    if low >= 0 and 2 < high <= 255:
        return "divide them by 255"
    return "where they are normalised, let the model do it: torch.nn.Sequential(im.Normalize(mean, std), model)"


@dataclass(frozen=True, eq=False)
class Data:
    """A data set's splits. Raises ValueError where a label reaches num_classes or the splits' shapes differ."""

    name: str
    train: ImageSet
    validation: ImageSet | None
    test: ImageSet
    num_classes: int
    class_names: tuple[str, ...] | None

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            images: ImageSet | None = getattr(self, split)
            if images is None:
                continue
            check_labels(images.labels, len(images), self.num_classes, name=f"{split} labels of {self.name}")
            if images.shape != self.train.shape:
                raise ValueError(f"{self.name}: {split} images are {images.shape}, train images {self.train.shape}")
