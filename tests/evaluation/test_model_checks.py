"""Signs that a model and its images do not fit: a missing normalisation, other classes."""

import ast
import re
import warnings

import pytest
import torch
from torch import nn

import innermax as im
from innermax.data.readers import as_image_set
from innermax.evaluation.model_checks import _candidates, find_mismatches
from tests.helpers.commands import said as run_command
from tests.helpers.evaluation import Noise, examples, network
from tests.helpers.networks import EachByItself

PGD = im.PGD(im.Linf(0.1), steps=3)
CPU = torch.device("cpu")
EVALUATED = ("evaluate", "any", "--data", "digits", "--threat.eps", "0.1", "--attacks", "fgsm", "--limit", "100")


@pytest.fixture(scope="module")
def digits():
    """Test digits, and a linear model that was trained on them normalised."""
    data = im.load_data("digits")
    x, y = data.train.batch(torch.arange(len(data.train)))
    mean, std = float(x.mean()), float(x.std())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model((x - mean) / std), y).backward()
        optimizer.step()
    return data.test, model.eval()


class Normalised(nn.Module):
    """A model of black and white images that takes them after a normalisation; it guesses where that is missing."""

    def __init__(self, model, mean, std, threshold=0.45):
        super().__init__()
        self.model, self.mean, self.std, self.threshold = model, mean, std, threshold

    def forward(self, x):
        pixel = x * self.std + self.mean
        return self.model((pixel > self.threshold).float() + pixel - pixel.detach())


def bare(digits):
    """The model without a normalisation, for images in [0, 1]."""
    data, model = digits
    x, _ = data.batch(torch.arange(len(data)))
    return nn.Sequential(im.Normalize([float(x.mean())], [float(x.std())]), model)


@pytest.mark.parametrize(
    ("mean", "std", "threshold"),
    [(0.5, 0.5, 0.45), (0.1307, 0.3081, 0.5), (0.0, 1 / 255, 0.5), (0.31, 0.37, 0.7)],
    ids=["half", "mnist", "to 255", "own"],
)
def test_normalisation_outside_is_noticed_and_the_advice_works(digits, mean, std, threshold):
    data, _ = digits
    model = Normalised(bare(digits), mean, std, threshold)
    with pytest.warns(UserWarning, match="seems to have been trained on normalised images") as caught:
        raw = im.evaluate(model, data, {})
    said = re.search(r"evaluate (torch.*), on the command line --normalize (\S+)$", str(caught[0].message))
    wrapped = eval(said[1], {"torch": torch, "im": im, "model": model})
    assert [wrapped[0].mean.tolist(), wrapped[0].std.tolist()] == [
        torch.tensor(part).view(-1, 1, 1).tolist() for part in ast.literal_eval(said[2])
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = im.evaluate(wrapped, data, {}).accuracy["clean"].value
    assert right > 0.7 > 0.3 > raw.accuracy["clean"].value


class Negatives(nn.Module):
    """Class 0 where there are negative values, else class 1."""

    def forward(self, x):
        negative = (x < -0.1).flatten(1).any(1).float()
        return torch.stack([negative, 1 - negative], 1) + 0 * x.mean()


@pytest.mark.parametrize(("count", "noticed"), [(15, False), (16, True)])
def test_a_gain_must_exceed_four_standard_deviations_of_chance(count, noticed):
    """With a normalisation right on all of n images instead of none: n ≥ 4·√n."""
    images = im.ImageSet(torch.rand(count, 1, 4, 4), torch.zeros(count, dtype=torch.int64))
    model = Negatives().eval()
    told = [words for words in find_mismatches(model, im.Oracle(model), images, CPU) if "normalised images" in words]
    assert (len(told) == 1) == noticed


def test_images_without_contrast_suggest_no_normalisation_of_their_own():
    """Their standard deviation would be a division by next to nothing."""
    for contrast, own in ((0.0, 0), (1e-4, 0), (0.01, 1)):
        x = 0.5 + contrast * (-1.0) ** torch.arange(32.0).reshape(8, 1, 2, 2)
        fixed = [([0.5], [0.5]), ([0.0], [round(1 / 255, 6)]), ([0.1307], [0.3081])]
        found = list(_candidates(iter([(x, torch.zeros(8))])))
        assert found[own:] == fixed
        assert len(found) == own + 3


def test_mismatches_are_the_same_in_smaller_batches(digits):
    data, _ = digits
    model = Normalised(bare(digits), 0.31, 0.37, 0.7)
    whole, parts = (list(find_mismatches(model, im.Oracle(model), data, CPU, batch_size)) for batch_size in (256, 7))
    assert len(whole) == 1
    assert parts == whole


def test_a_model_that_needs_no_normalisation_is_left_in_peace(digits):
    data, _ = digits
    weak = nn.Sequential(im.Normalize([0.3], [0.4]), nn.Flatten(), nn.Linear(64, 10))
    for model in (bare(digits), weak, network().eval()):
        x, y = (data.images, data.labels) if model is not weak else (data.images, data.labels.flip(0))
        if isinstance(model[0], nn.Conv2d):
            x, y = examples(300)
        assert list(find_mismatches(model, im.Oracle(model), as_image_set((x, y)), CPU)) == []


@pytest.mark.parametrize(
    ("momentum", "batches", "noticed"), [(0.1, 0, True), (0.1, 21, False), (0.1, 100, True), (None, 21, True)]
)
def test_running_statistics_of_a_few_batches_are_no_lack_of_a_normalisation(digits, momentum, batches, noticed):
    """None counted: weights from elsewhere, which do not say."""
    data, _ = digits
    norm = nn.BatchNorm2d(1, momentum=momentum).eval()
    norm.num_batches_tracked.fill_(batches)
    model = nn.Sequential(norm, Normalised(bare(digits), 0.31, 0.37, 0.7))
    assert bool(list(find_mismatches(model, im.Oracle(model), data, CPU))) == noticed


@pytest.mark.parametrize(("batch", "noticed"), [(True, True), (False, False)])
def test_answers_that_depend_on_the_neighbours_are_noticed(batch, noticed):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), EachByItself(batch), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    told = list(find_mismatches(model, im.Oracle(model), as_image_set(examples()), CPU))
    assert bool(told) == noticed
    assert all("depends on the other images in its batch" in sentence for sentence in told)


def test_random_answers_are_not_taken_for_those_of_neighbours():
    model = nn.Sequential(Noise(0.3), network().eval())
    told = list(find_mismatches(model, im.Oracle(model), as_image_set(examples()), CPU))
    assert not any("depends on the other images" in sentence for sentence in told)


def test_a_model_of_more_classes(digits):
    data, _ = digits
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
    nn.init.zeros_(model[1].weight)
    with pytest.warns(UserWarning, match="the model has 12 classes, the labels of test_set only 10"):
        im.evaluate(model, data, {})
    few = data[:20]
    few = im.ImageSet(few.images, few.labels.clamp(max=8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        im.evaluate(model, few, {})


def test_mismatches_change_no_answer(digits, monkeypatch):
    data, _ = digits
    model = nn.Sequential(Normalised(bare(digits), 0.5, 0.5), Noise())
    state = torch.get_rng_state()
    assert list(find_mismatches(model, im.Oracle(model), data, CPU))
    assert torch.equal(state, torch.get_rng_state())
    with pytest.warns(UserWarning, match="normalised"):
        one = im.evaluate(model, data[:100], {"pgd": PGD})
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setattr("innermax.evaluation.evaluate.find_mismatches", lambda *_: ())
    other = im.evaluate(model, data[:100], {"pgd": PGD})
    assert (one.rows["pgd"].loss == other.rows["pgd"].loss).all()


@pytest.mark.filterwarnings("default")
def test_a_normalisation_on_the_command_line(capsys, digits, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shifted = Normalised(bare(digits), 0.5, 0.5)
    monkeypatch.setattr("innermax.load_model", lambda *_, **__: shifted, raising=False)
    told = run_command(capsys, *EVALUATED)
    assert (told.status, told.err.count("\n")) == (0, 1)
    assert told.err.startswith("innermax: the model is right on ")
    option = told.err.split("on the command line ")[1].split()
    after = run_command(capsys, *EVALUATED, *option)
    assert (after.status, after.err) == (0, "")
    assert run_command(capsys, *EVALUATED, "--normalize", "[0.5]").status == 2
    for value, message in (("[[0.5]]", "MEAN"), ("[[0.5],[0]]", "std > 0"), ("[[0.5],[1,2]]", "got 1 and 2")):
        wrong = run_command(capsys, *EVALUATED, "--normalize", value)
        assert (wrong.status, wrong.err.count("\n")) == (2, 1)
        assert message in wrong.err
