"""ImageSet and Data."""

import pytest
import torch

from innermax.data.image_set import Data, ImageSet
from tests.helpers.data import BYTES, LABELS


def test_image_set_is_a_sequence_of_examples():
    images, labels = torch.randint(0, 256, (6, 1, 3, 4), dtype=torch.uint8), torch.arange(6)
    examples = ImageSet(images, labels)
    assert len(examples) == 6
    assert examples.shape == (1, 3, 4)
    assert torch.equal(examples[1:3].images, images[1:3])
    assert torch.equal(examples[torch.tensor([5, 0])].labels, torch.tensor([5, 0]))
    x, y = examples.batch(torch.tensor([4, 4, 1]))
    assert x.dtype == torch.float32
    assert torch.equal(x, images[[4, 4, 1]].float() / 255)
    assert y.tolist() == [4, 4, 1]
    assert torch.equal(examples.images, images)
    assert torch.equal(examples.to("cpu").images, images)


def test_every_byte_becomes_its_255th():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x, _ = ImageSet(images, torch.zeros(1, dtype=torch.int64)).batch(torch.tensor([0]))
    assert torch.equal(x.flatten(), torch.tensor([value / 255 for value in range(256)]))


def test_float_features_of_any_shape():
    features = torch.rand(4, 7)
    examples = ImageSet(features, torch.arange(4))
    assert examples.shape == (7,)
    assert torch.equal(examples.batch(torch.tensor([2]))[0], features[2:3])


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (BYTES, LABELS[:1], ValueError, r"labels must have shape \(2,\), got \(1,\)"),
        (BYTES, LABELS - 1, ValueError, "labels must be ≥ 0, got values from -1"),
        (BYTES, LABELS.int(), TypeError, "labels must be int64, got torch.int32"),
        (BYTES[:0], LABELS[:0], ValueError, "N ≥ 1"),
        (BYTES[0], LABELS[:1], ValueError, r"\(N, C, H, W\)"),
        (BYTES.int(), LABELS, TypeError, "uint8 or float32, got torch.int32"),
        (BYTES.double(), LABELS, TypeError, "uint8 or float32, got torch.float64"),
        (BYTES / 0, LABELS, ValueError, "NaN or infinite"),
        (BYTES + 1.5, LABELS, ValueError, r"lie in \[0, 1\], got values from 1.5 to 1.5"),
        (
            BYTES - 0.5,
            LABELS,
            ValueError,
            r"in \[0, 1\], .* let the model do it: .*im.Normalize\(mean, std\), model\)$",
        ),
        (BYTES + 199.0, LABELS, ValueError, r"lie in \[0, 1\], got values from 199 to 199; divide them by 255$"),
        (
            torch.rand(2, 3).to_sparse(),
            LABELS,
            TypeError,
            "dense tensor that holds values, got torch.sparse_coo on cpu",
        ),
        (
            torch.rand(2, 3, device="meta"),
            LABELS,
            TypeError,
            "dense tensor that holds values, got torch.strided on meta",
        ),
        (torch.rand(0, 3), LABELS[:0], ValueError, "images must have shape"),
    ],
)
def test_image_set_errors(images, labels, error, message):
    with pytest.raises(error, match=message):
        ImageSet(images, labels)


def test_splits_must_agree():
    small, other = ImageSet(BYTES, LABELS), ImageSet(torch.rand(2, 1, 2, 3), LABELS)
    with pytest.raises(ValueError, match=r"test images are \(1, 2, 3\), train images \(1, 2, 2\)"):
        Data("made up", small, None, other, 2, None)
    with pytest.raises(ValueError, match="validation labels of made up must be in 0…1, got values from 2"):
        Data("made up", small, ImageSet(BYTES, LABELS + 2), small, 2, None)


def test_a_sample_knows_its_examples():
    images = ImageSet(torch.rand(40, 3), torch.arange(40))
    sample = images.sample(7, seed=1)
    numbers = sample.index.tolist()
    assert numbers == sorted(set(numbers))
    assert sample.labels.tolist() == numbers
    assert torch.equal(sample.images, images.images[sample.index])
    assert images.sample(7, seed=1).index.tolist() == numbers
    assert images.sample(7, seed=2).index.tolist() != numbers
    again = sample.sample(3, seed=5)
    assert set(again.index.tolist()) < set(numbers)
    assert again.labels.tolist() == again.index.tolist()
    assert sample[2:4].index.tolist() == sample[torch.tensor([2, 3])].to("cpu").index.tolist() == numbers[2:4]
    assert images.sample(40, seed=1) is images
    assert images[5:].index.tolist() == list(range(35))


def test_every_example_is_as_likely_to_be_drawn():
    images = ImageSet(torch.rand(10, 1), torch.arange(10))
    drawn = torch.cat([images.sample(5, seed).index for seed in range(400)]).bincount()
    assert len(drawn) == 10
    assert int((drawn - 200).abs().max()) < 50  # five standard deviations
