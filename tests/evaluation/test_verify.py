"""Claims and adversarial images that are what they say, and others that are not."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import innermax as im
from innermax.evaluation.verify import HandedImages
from tests.helpers.evaluation import Noise, linear_problem

EPS = 0.1
THREAT = im.Linf(EPS)
PGD = {"pgd": im.PGD(THREAT, steps=10)}


def verify(model, data, **options):
    return im.verify(model, data, THREAT, **{"attacks": PGD} | options)


@pytest.fixture
def problem():
    """A linear model, its data, and the images that the threat model leaves correct, known in closed form."""
    model, x, y, margin, weight = linear_problem()
    return model, x, y, margin > EPS * weight.abs().sum()


def worst(model, x, y):
    return im.FGSM(THREAT)(model, x, y).x_adv


def told(found):
    return {check.name: check for check in found.checks}


def test_a_claim_about_all_images_is_held_against_their_number(problem):
    model, x, y, robust = problem
    share = float(robust.double().mean())
    right = verify(model, (x, y), claim=share)
    assert not right.refuted
    assert right.verdict == "not refuted"
    assert right.accuracy.correct == int(robust.sum())
    assert verify(model, (x, y), claim=share / 2).verdict == "not refuted"
    assert verify(model, (x, y), claim=share + 1 / len(x)).verdict == "refuted"
    assert told(right)["claimed robust accuracy"].passed
    assert told(verify(model, (x, y)))["robust accuracy"].passed is None


def test_a_sample_refutes_only_what_is_beyond_chance(problem):
    model, x, y, robust = problem
    share = float(robust.double().mean())
    data = im.ImageSet(x, y)
    found = verify(model, data, claim=share, limit=len(x) // 2)
    assert found.accuracy.total == len(x) // 2
    assert found.evaluation.index is not None
    assert not verify(model, data, claim=min(found.accuracy.high, 1.0), limit=len(x) // 2).refuted
    assert verify(model, data, claim=min(found.accuracy.high + 0.01, 1.0), limit=len(x) // 2).refuted


def test_handed_images_that_are_adversarial(problem):
    model, x, y, robust = problem
    index = (~robust).nonzero()[:, 0]
    handed = HandedImages(worst(model, x, y)[index], index)
    weak = {"weak": im.PGD(im.Linf(1e-6), steps=1)}
    found = im.verify(model, (x, y), THREAT, images=handed, attacks=weak)
    assert not found.refuted
    assert found.accuracy.correct == int(robust.sum()), "they count, whatever the attacks found"
    assert im.verify(model, (x, y), THREAT, images=handed, attacks=weak, claim=1.0).refuted


def test_handed_images_that_are_not_adversarial(problem):
    model, x, y, robust = problem
    clean = verify(model, (x, y), images=HandedImages(x[:6], torch.arange(6)))
    correct = im.Oracle(model).logits(x[:6]).argmax(1) == y[:6]
    check = told(clean)["handed images misclassified alone and in a batch, twice"]
    assert check.passed is bool((~correct).all())
    assert check.evidence.startswith(f"{int((~correct).sum())} of 6; not misclassified: ")
    far = HandedImages((x[:6] + 3 * EPS).clamp(0, 1), torch.arange(6))
    outside = told(verify(model, (x, y), images=far))["handed images inside the threat model"]
    assert outside.passed is False
    assert "outside: " in outside.evidence
    counted = verify(model, (x, y), images=far).accuracy.correct
    assert counted == int(robust.sum()), "images outside the threat model are no counterexamples"


def test_images_that_fall_back_when_they_are_saved(problem):
    model, x, y, _ = problem
    handed = HandedImages(worst(model, x, y), torch.arange(len(x)))
    evidence = told(verify(model, (x, y), images=handed))["handed images as 8-bit files"].evidence
    rounded = (handed.images * 255).round() / 255
    good = THREAT.around(x).contains(rounded, 1e-6) & (im.Oracle(model).logits(rounded).argmax(1) != y)
    assert evidence.startswith(f"{int(good.sum())} of {len(x)} are inside")


class Neighborly(nn.Module):
    """It subtracts the batch's mean, or standardises with its statistics, whatever mode it is in."""

    def __init__(self, model, standardise):
        super().__init__()
        self.model, self.standardise = model, standardise

    def forward(self, x):
        logits = self.model(x)
        return F.batch_norm(logits, None, None, training=True) if self.standardise else logits - logits.mean(0)


@pytest.mark.parametrize(("standardise", "evidence"), [(False, "depends on the other"), (True, "fails on one image")])
def test_a_model_that_looks_at_the_neighbors_is_refuted(problem, standardise, evidence):
    model, x, y, _ = problem
    found = verify(Neighborly(model, standardise), (x, y), claim=0.0)
    assert found.refuted
    assert told(found)["alone and in a batch"].passed is False
    assert evidence in told(found)["alone and in a batch"].evidence
    assert (found.accuracy, found.evaluation) == (None, None)
    assert json.loads(found.to_json())["accuracy"] is None


@pytest.mark.filterwarnings("ignore")
def test_a_random_model_is_said_to_be_one(problem):
    model, x, y, _ = problem
    found = told(verify(nn.Sequential(Noise(0.1), model), (x, y)))
    assert found["asked twice"].passed is None
    assert "random numbers" in found["asked twice"].evidence
    assert found["alone and in a batch"].evidence.startswith("not tried")


def test_an_answer_that_hangs_on_rounding(problem):
    class Coarse(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x) * (2.0 if x.dtype == torch.float32 else -1.0)

    model, x, y, _ = problem
    check = told(verify(Coarse(model), (x, y)))["in float64"]
    assert check.passed is None
    assert "hangs on rounding" in check.evidence


def test_images_from_a_file(tmp_path, problem):
    _, x, _, _ = problem
    images = (x[:3] * 255).round().byte().numpy()
    np.savez(tmp_path / "a.npz", images=images, index=np.array([4, 5, 6]))
    np.savez(tmp_path / "b.npz", images=x[:3].numpy().astype(">f4"))
    one, other = HandedImages.read(tmp_path / "a.npz"), HandedImages.read(tmp_path / "b.npz")
    assert one.index.tolist() == [4, 5, 6]
    assert torch.allclose(one.images, torch.from_numpy(images).float() / 255)
    assert other.index.tolist() == [0, 1, 2]
    assert torch.equal(other.images, x[:3].float())
    np.savez(tmp_path / "c.npz", pictures=images)
    (tmp_path / "d.npz").write_text("no archive")
    (tmp_path / "e.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-40])
    np.save(tmp_path / "f.npy", images)
    np.savez(tmp_path / "g.npz", images=images.astype(np.uint16))
    np.savez(tmp_path / "h.npz", images=images, index=np.array([0.5, 1.5, 2.5]))
    wrong = dict.fromkeys(("d.npz", "e.npz", "f.npy"), "cannot be read as .npz")
    wrong |= {"c.npz": "must hold images .* got pictures uint8", "g.npz": "got images uint16", "h.npz": "index float64"}
    for name, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            HandedImages.read(tmp_path / name)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (HandedImages(torch.rand(2, 3, 9), torch.arange(2)), "images must have the test images' shape"),
        (HandedImages(torch.full((2, 1), float("nan")), torch.arange(2)), "finite"),
        (HandedImages(torch.rand(2, 1), torch.tensor([0, 10**6])), "index must be in"),
    ],
)
def test_images_that_do_not_fit(problem, images, message):
    model, x, y, _ = problem
    fitting = images.images.reshape(2, -1)[:, :1].expand(2, *x.shape[1:]) if images.images.ndim == 2 else images.images
    with pytest.raises(ValueError, match=message):
        verify(model, (x, y), images=HandedImages(fitting, images.index))


@pytest.mark.parametrize("claim", [54, -0.1, float("nan")])
def test_a_claim_is_a_share(problem, claim):
    model, x, y, _ = problem
    with pytest.raises(ValueError, match=r"claim must be a share in \[0, 1\], such as 0.54, got "):
        verify(model, (x, y), claim=claim)
