"""Scores under attack: known truths, attacks that lie, intervals, and a model left as it was."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import innermax as im
from innermax.evaluation import progress
from tests.helpers.evaluation import Noise, Scripted, Watched, examples, linear_problem, network

PGD = im.PGD(im.Linf(0.1), steps=5)


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "cw"])
def test_robust_accuracy_of_a_linear_model(attack):
    model, x, y, margin, weight = linear_problem()
    threat = im.Linf(0.1)
    made = {"fgsm": im.FGSM(threat), "pgd": im.PGD(threat, steps=10), "cw": im.CW(threat, 10, confidence=5.0)}[attack]
    evaluation = im.evaluate(model, (x, y), {attack: made})
    robust = margin > 0.1 * weight.abs().sum()
    assert 0 < int(robust.sum()) < int((margin > 0).sum()) < len(x)
    assert evaluation.accuracy["clean"].correct == int((margin > 0).sum())
    assert evaluation.accuracy[attack].correct == int(robust.sum())
    assert np.array_equal(evaluation.rows[attack].correct, robust.numpy())
    assert evaluation.convergence[attack].fosc_p90 < 1e-4
    loss = nn.functional.softplus(0.1 * weight.abs().sum() - margin)
    assert np.allclose(evaluation.rows[attack].loss, loss.numpy(), rtol=1e-4, atol=1e-5)
    assert evaluation.worst_case == evaluation.accuracy[attack]


def test_the_worst_case_is_taken_per_example():
    x = torch.full((6, 1), 0.6)
    y = torch.tensor([1, 1, 1, 1, 1, 0])  # the last one is wrong from the start

    def against(*rows):
        return Scripted(im.Linf(0.2), lambda x, y, index: x - 0.2 * torch.isin(index, torch.tensor(rows))[:, None])

    attacks = {"first": against(0, 1), "second": against(1, 2), "rescue": against(5)}
    evaluation = im.evaluate(Watched(lambda x: None), (x, y), attacks, batch_size=4)
    assert {name: value.correct for name, value in evaluation.accuracy.items()} == {
        "clean": 5,
        "first": 3,
        "second": 3,
        "rescue": 6,
    }
    assert list(evaluation.accuracy) == ["clean", "first", "second", "rescue"]
    assert evaluation.worst_case.correct == 2
    assert evaluation.correct("worst_case").tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize("batch_size", [3, 40, 1000])
def test_the_batch_size_changes_nothing(batch_size):
    attacks = {"pgd": replace(PGD, restarts=2), "stopping": replace(PGD, stop_at=0.05, gauge="relative", steps=20)}
    whole, parts = (im.evaluate(network(), examples(), attacks, batch_size=size) for size in (40, batch_size))
    for name in attacks:
        assert np.array_equal(whole.rows[name].correct, parts.rows[name].correct)
        assert np.array_equal(whole.rows[name].steps, parts.rows[name].steps)
        assert np.allclose(whole.rows[name].loss, parts.rows[name].loss, rtol=1e-4)
        assert np.allclose(whole.rows[name].fosc, parts.rows[name].fosc, rtol=1e-3, atol=1e-6)
    assert whole.examples["index"].tolist() == list(range(40))


def test_the_seed_changes_random_starts():
    losses = [im.evaluate(network(), examples(), {"pgd": PGD}, seed=seed).rows["pgd"].loss for seed in (0, 0, 1)]
    assert np.array_equal(losses[0], losses[1])
    assert not np.allclose(losses[0], losses[2])


def test_gauges_are_the_attacks_own():
    images, labels = examples()
    evaluation = im.evaluate(network(), (images, labels), {"pgd": PGD}, quantize=8)
    result = PGD(network(), images.float() / 255, labels, final="gradient")
    rows, convergence = evaluation.rows["pgd"], evaluation.convergence["pgd"]
    assert np.allclose(rows.fosc, result.fosc.numpy())
    assert np.allclose(rows.relative_fosc, result.relative_fosc.numpy())
    assert convergence.fosc_median == pytest.approx(np.median(result.fosc.numpy()))
    assert convergence.fosc_p90 == pytest.approx(np.quantile(result.fosc.numpy(), 0.9))
    survived = rows.correct
    assert 0 < survived.sum() < 40
    assert convergence.survivors.fosc_median == pytest.approx(np.median(result.fosc.numpy()[survived]))
    assert convergence.survivors.relative_fosc_p90 == pytest.approx(np.quantile(rows.relative_fosc[survived], 0.9))
    assert (convergence.gradients, convergence.forwards) == (6.0, 0.0)
    assert convergence.seconds > 0


def test_zero_gradients_are_not_taken_for_convergence():
    def claims(x, y):
        zero = torch.arange(len(y)) < 3
        return {
            "fosc": torch.where(zero, 0.0, torch.arange(len(y)).float()),
            "relative_fosc": torch.where(zero, math.nan, 0.5),
            "zero_gradient": zero,
            "forward_calls": torch.full_like(y, 2),
        }

    x, y = torch.full((5, 1), 0.6), torch.tensor([1, 1, 0, 0, 0])
    attack = Scripted(im.Linf(0.01), lambda x, y, index: x, claims)
    found = im.evaluate(Watched(lambda x: None), (x, y), {"a": attack}).convergence["a"]
    assert (found.fosc_median, found.relative_fosc_median, found.zero_gradient) == (3.5, 0.5, 0.6)
    assert found.forwards == 2
    assert (found.survivors.zero_gradient, found.gradients) == (1.0, 0.0)
    assert math.isnan(found.survivors.fosc_median)
    assert math.isnan(found.survivors.relative_fosc_p90)


def test_a_callers_autocast_and_inference_mode_change_nothing():
    def followed(x, y, index):
        with torch.enable_grad():
            return x + torch.autograd.grad(x.requires_grad_().square().sum(), x)[0]

    model = network()
    plain = im.evaluate(model, examples(), {"pgd": PGD})
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        under = im.evaluate(model, examples(), {"pgd": PGD})
        im.evaluate(model, examples(), {"an attack with autograd of its own": Scripted(im.Linf(0.1), followed)})
    assert np.array_equal(plain.rows["pgd"].loss, under.rows["pgd"].loss)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_model_and_the_random_state_are_left_as_found(precision):
    model = network()
    model[0].eval()
    model[0].bias.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    torch.manual_seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    noisy = nn.Sequential(model, Noise())
    im.evaluate(noisy, examples(), {"pgd": PGD}, precision=precision)
    with pytest.raises(ValueError, match="finite"):
        im.evaluate(noisy, examples(), {"a": Scripted(im.Linf(0.1), lambda x, y, index: torch.rand(()) * x * math.nan)})
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert torch.equal(model[5].weight.grad, torch.ones_like(model[5].weight))
    assert model[0].weight.grad is None


def test_a_model_that_draws_is_evaluated_alike_twice_whatever_else_is_attacked():
    model = nn.Sequential(network(), Noise())
    one = im.evaluate(model, examples(), {"pgd": PGD})
    two = im.evaluate(model, examples(), {"fgsm": im.FGSM(PGD.threat), "pgd": PGD})
    assert np.array_equal(one.rows["pgd"].loss, two.rows["pgd"].loss)


def test_clean_alone():
    evaluation = im.evaluate(network(), examples(), {})
    assert list(evaluation.accuracy) == ["clean"]
    assert evaluation.worst_case == evaluation.accuracy["clean"]
    assert evaluation.convergence == {}
    assert list(evaluation.examples) == ["index", "label", "clean_prediction", "clean_correct", "seed"]


def test_progress():
    told = []
    im.evaluate(network(), examples(), {"pgd": PGD}, batch_size=25, progress=lambda *step: told.append(step))
    assert told == [("clean", 25, 40), ("clean", 40, 40), ("pgd", 25, 40), ("pgd", 40, 40)]


MEASURES = {
    "evaluate": lambda **options: im.evaluate(network(), examples(), {"pgd": PGD}, **options),
    "transfer": lambda **options: im.transfer(network(), {"b": network(1)}, examples(), {"pgd": PGD}, **options),
    "gallery": lambda **options: im.gallery(
        network(), examples(), {"pgd": PGD}, im.evaluate(network(), examples(), {"pgd": PGD}), **options
    ),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_what_progress_may_be(measure, capsys, monkeypatch, untyped):
    monkeypatch.setattr(progress, "_SPARSE", 0.0)
    measure(progress=True)
    shown = capsys.readouterr()
    assert "40/40" in shown.err
    assert "pgd" in shown.err
    assert shown.out == ""
    for silent in (False, None):
        measure(progress=silent)
    measure()
    assert capsys.readouterr() == ("", "")
    told = []
    measure(progress=lambda *step: told.append(step))
    assert any(name.endswith("pgd") and done == total == 40 for name, done, total in told)
    for wrong in (1, "yes", []):
        with pytest.raises(TypeError, match=r"progress must be True, False or a function \(name, done, in all\), got"):
            measure(progress=wrong)


class Broken(nn.Module):
    """Logits changed by a function."""

    def __init__(self, change):
        super().__init__()
        self.inner, self.change = network(), change

    def forward(self, x):
        return self.change(self.inner(x))


def test_nan_is_refused():
    with pytest.raises(ValueError, match="the model returns NaN logits for 40 of 40 inputs"):
        im.evaluate(Broken(lambda logits: logits * math.nan), examples(), {})


def test_probabilities_are_warned_of_once():
    with pytest.warns(UserWarning, match="the model seems to return probabilities") as caught:
        im.evaluate(Broken(lambda logits: logits.softmax(1)), examples(), {"a": PGD, "b": PGD}, batch_size=8)
    assert len(caught) == 1


def test_labels_and_images_must_fit_before_the_first_attack():
    images, labels = examples()

    def never(x, y, index):
        pytest.fail("attacked")

    idle = {"idle": Scripted(im.Linf(0.1), never)}
    with pytest.raises(ValueError, match=r"the labels of test_set must be in 0…3, got values from 4 to 4"):
        im.evaluate(network(), (images, torch.where(torch.arange(40) < 39, labels, 4)), idle, batch_size=39)
    narrow = idle | {"narrow": im.PGD(im.Linf(0.1, bounds=(0.0, 0.5)))}
    with pytest.raises(ValueError, match=r"attack 'narrow' does not fit the images of test_set .* within the bounds"):
        im.evaluate(network(), (images, labels), narrow)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"attacks": {"clean": PGD}}, ValueError, "a text other than clean, worst_case, got 'clean'"),
        ({"attacks": {"worst_case": PGD}}, ValueError, "got 'worst_case'"),
        ({"attacks": {"": PGD}}, ValueError, "got ''"),
        ({"attacks": {"a": 3}}, TypeError, None),
        ({"attacks": {"a": lambda *_: None}}, TypeError, None),
        ({"attacks": [PGD]}, TypeError, None),
        ({"attacks": {"a": PGD, "a_relative": PGD}}, ValueError, "would share the column a_relative_fosc"),
        ({"devices": 0}, ValueError, "devices must be at least 1, got 0"),
        ({"devices": 2.0}, TypeError, None),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.5}, TypeError, None),
        ({"quantize": 0}, ValueError, "quantize must be in 1…16 or None, got 0"),
        ({"quantize": 17}, ValueError, "quantize must be in 1…16 or None, got 17"),
        ({"seed": 1.5}, TypeError, None),
        ({"precision": "half"}, (ValueError, TypeError), None),
        (
            {"device": "cud"},
            ValueError,
            "device must be None, where the model is, or one that torch has here",
        ),
        ({"device": "cuda:99"}, ValueError, "or one that torch has here, got 'cuda:99'"),
        ({"test_set": 3}, TypeError, None),
        ({"model": print}, TypeError, None),
    ],
)
def test_wrong_arguments(changed, error, words):
    arguments = {"model": network(), "test_set": examples(), "attacks": {"pgd": PGD}} | changed
    with pytest.raises(error, match=words):
        im.evaluate(**arguments)


def test_a_samples_rows_are_those_of_the_whole_set():
    """Random starts belong to an example's number, so a sample is a part of the whole evaluation."""
    x, y = examples(40)
    images, model = im.ImageSet(x, y), network()
    attacks = {"pgd": im.PGD(im.Linf(0.1), steps=3)}
    whole = im.evaluate(model, images, attacks, batch_size=9, audit=False)
    sample = images.sample(11, seed=4)
    part = im.evaluate(model, sample, attacks, batch_size=4, audit=False)
    assert part.examples["index"].tolist() == part.index.tolist() == sample.index.tolist()
    assert np.array_equal(part.label, whole.label[part.index])
    assert np.allclose(part.rows["pgd"].loss, whole.rows["pgd"].loss[part.index], rtol=1e-5)
    assert not np.allclose(part.rows["pgd"].loss, im.evaluate(model, sample[:], attacks, seed=1).rows["pgd"].loss)
    assert np.array_equal(im.Evaluation.from_json(part.to_json()).index, part.index)
    assert im.Evaluation.from_json(whole.to_json()).index is None


def test_samples_of_different_examples_are_not_compared():
    x, y = examples(40)
    images = im.ImageSet(x, torch.zeros_like(y))
    one, other = (im.evaluate(network(), images.sample(9, seed), {}) for seed in (0, 1))
    assert one.difference(one, "clean").estimate == 0
    with pytest.raises(ValueError, match="other must be an evaluation of the same examples"):
        one.difference(other, "clean")
