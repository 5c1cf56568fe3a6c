"""Scores under attack: known truths, attacks that lie, intervals, and a model left as it was."""

import copy
import io
import json
import math
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import binomtest
from torch import nn

import innermax as im
from innermax.attacks.search import AttackResult
from innermax.evaluation import progress
from innermax.evaluation.result import Evaluation
from innermax.evaluation.scoring import quantized
from innermax.evaluation.store import AttackRows
from innermax.reporting.tables import format_table
from innermax.utils.intervals import paired_difference, wilson

LEVELS = 255
PGD = im.PGD(im.Linf(0.1), steps=5)


def network(seed=0, classes=4):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, classes)
    )


def examples(count=40, seed=1, classes=4):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 6, 6), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, classes, (count,), generator=generator)


@dataclass(frozen=True)
class Scripted:
    """An attack that returns what it is told, and whatever else it likes to claim."""

    threat: object
    point: object
    claims: object = None

    def __call__(self, model, x, y, *, seed=0, index=None, final="gradient"):
        nothing = torch.zeros_like(y)
        result = AttackResult(self.point(x, y, index), None, None, None, None, None, None, nothing, nothing, nothing)
        return result if self.claims is None else replace(result, **self.claims(x, y))


class Watched(nn.Module):
    """Two classes, split by the mean of the pixels; tells `seen` (a function: copies share it) what it is shown."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen(x.clone())
        score = 20 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-score, score], 1)


def linear_problem(count=200):
    """A linear model of two classes with weights of both signs, and inputs no attack of 0.1 takes to their bounds."""
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(12, generator=generator), 0.2 + 0.6 * torch.rand(count, 12, generator=generator)
    y = torch.randint(0, 2, (count,), generator=generator)
    model = nn.Linear(12, 2)
    with torch.no_grad():
        model.weight.copy_(torch.stack([-weight, weight]) / 2)
        model.bias.copy_(torch.tensor([0.5, -0.5]) * (x @ weight).mean())
    margin = (x @ weight - (x @ weight).mean()) * (2 * y - 1)
    return model, x, y, margin, weight


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


@pytest.mark.parametrize("threat", [im.Linf(0.05), im.L2(0.3), im.L1(0.7)])
def test_points_outside_are_brought_back(threat):
    _, x, y, _, _ = linear_problem()
    seen = []
    watched = nn.Sequential(Watched(seen.append))
    attack = Scripted(threat, lambda x, y, index: x + 10 * (0.5 - y[:, None].float()))
    im.evaluate(watched, (x, y), {"far": attack}, batch_size=len(x))
    assert threat.contains(seen[-1], x).all()
    assert torch.allclose(seen[-1], threat.project(x + 10 * (0.5 - y[:, None].float()), x))
    assert not torch.equal(seen[-1], x)


def test_points_inside_are_scored_bit_for_bit():
    _, x, y, _, _ = linear_problem()
    inside, seen = x / 3, []  # x + (x / 3 − x) is not x / 3, in floats
    attack = Scripted(im.Linf(0.7), lambda x, y, index: inside)
    im.evaluate(Watched(seen.append), (x, y), {"a": attack}, batch_size=len(x))
    assert torch.equal(seen[-1], inside)


def test_verdicts_are_never_the_attacks_own():
    model, x, y, margin, _ = linear_problem()
    fallen = Scripted(
        im.Linf(0.1),
        lambda x, y, index: x,
        lambda x, y: {
            "logits": nn.functional.one_hot(1 - y, 2).float(),
            "misclassified": torch.ones_like(y, dtype=torch.bool),
            "loss": torch.full((len(y),), 99.0),
        },
    )
    standing = Scripted(
        im.Linf(0.1),
        lambda x, y, index: PGD(model, x, y).x_adv,
        lambda x, y: {"misclassified": torch.zeros_like(y, dtype=torch.bool)},
    )
    evaluation = im.evaluate(model, (x, y), {"fallen": fallen, "standing": standing, "pgd": im.FGSM(im.Linf(0.1))})
    assert evaluation.accuracy["fallen"] == evaluation.accuracy["clean"]
    assert evaluation.convergence["fallen"].overturned == int((margin > 0).sum())
    assert evaluation.rows["fallen"].loss.max() < 99
    assert evaluation.accuracy["standing"].value < evaluation.accuracy["clean"].value
    assert evaluation.convergence["standing"].overturned == 0


def test_an_attack_that_works_in_place_moves_nothing():
    model, x, y, _, _ = linear_problem()
    before = x.clone()

    def spoil(x, y, index):
        y.fill_(0)
        return x.fill_(0.5)

    evaluation = im.evaluate(model, (x, y), {"spoil": Scripted(im.Linf(1e-6), spoil), "still": PGD})
    assert torch.equal(x, before)
    assert evaluation.accuracy["spoil"] == evaluation.accuracy["clean"]


def test_an_image_that_is_no_image_is_refused():
    model, x, y, _, _ = linear_problem()
    for point, words in [(lambda x, y, i: x * math.nan, "NaN"), (lambda x, y, i: x[:, :3], "shape")]:
        with pytest.raises(ValueError, match=f"attack 'bad' must return finite x_adv .* got {words}"):
            im.evaluate(model, (x, y), {"bad": Scripted(im.Linf(0.1), point)})


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


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("threat", [im.Linf(8 / 255), im.Linf(0.3333), im.L2(0.5), im.L2(3.0), im.L1(1.3), im.L1(12.0)])
def test_quantised_images_are_on_the_grid_and_inside(threat, bits):
    levels = 2**bits - 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, levels + 1, (64, 36), generator=generator) / levels
    feasible = threat.around(x)
    direction = torch.randn(64, 36, generator=generator)
    for point in (threat.sample(x), threat.project(x + direction, x), threat.maximizer(direction, x), x):
        image = quantized(point, feasible, bits)
        assert feasible.contains(image).all()
        assert ((image * levels).round() / levels - image).abs().max() < 1e-6
        assert (image - point).abs().max() < (1 + 1e-4) / levels
    assert torch.allclose(quantized(x, feasible, bits), x)


def test_quantisation_costs_an_attack_no_more_than_it_must():
    x = torch.full((1, 2), 100 / 255)
    full = quantized(x + 8 / 255 * torch.tensor([[1.0, -1.0]]), im.Linf(8 / 255).around(x), 8)
    assert torch.allclose(full * 255, torch.tensor([[108.0, 92.0]]))  # not one level short for a rounding
    cut = quantized(x + torch.tensor([[7.7, 3.6]]) / 255, im.Linf(7.8 / 255).around(x), 8)
    assert torch.allclose(cut * 255, torch.tensor([[107.0, 104.0]]))  # one value without room takes no other's
    # √(3² + 4²) = 5 fits and √(4² + 4²) does not: the value nearer to its next level is the one to go.
    near = quantized(x + torch.tensor([[3.6, 3.5]]) / 255, im.L2(5.1 / 255).around(x), 8)
    assert torch.allclose(near * 255 - 100, torch.tensor([[4.0, 3.0]]), atol=1e-4)


@pytest.mark.parametrize("threat", [im.Linf(0.1), im.L2(0.6), im.L1(2.0)])
def test_what_is_scored_is_quantised(threat):
    images, labels = examples(30, classes=2)
    seen = []
    attack = im.PGD(threat, steps=3, loss="margin")
    evaluation = im.evaluate(Watched(seen.append), (images, labels), {"pgd": attack}, batch_size=30, quantize=8)
    x = images.float() / 255
    assert threat.contains(seen[-1], x).all()
    assert ((seen[-1] * LEVELS).round() / LEVELS - seen[-1]).abs().max() < 1e-6
    assert not torch.equal(seen[-1], x)
    assert evaluation.settings.quantize == 8


def test_clean_images_must_have_the_grid():
    model, x, y, _, _ = linear_problem()
    with pytest.raises(ValueError, match=r"quantize=8 needs images of test_set whose values are multiples of 1/255"):
        im.evaluate(model, (x, y), {"pgd": PGD}, quantize=8)


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


@pytest.mark.parametrize("precision", ["float32", "auto", "bf16"])
def test_scores_are_exact_whatever_the_attack_searched_in(precision):
    x, y = examples()
    model = network().eval()
    evaluation = im.evaluate(
        model, (x, y), {"still": Scripted(im.Linf(0.1), lambda x, y, index: x)}, precision=precision
    )
    with torch.no_grad():
        logits = model(x.float() / 255)
    assert np.array_equal(evaluation.clean_prediction, logits.argmax(1).numpy())
    expected = nn.functional.cross_entropy(logits, y, reduction="none").numpy()
    assert np.allclose(evaluation.rows["still"].loss, expected, rtol=1e-5)
    assert "BatchNorm folded" in evaluation.settings.attack_network
    assert ("float32" in evaluation.settings.attack_network) or precision != "float32"


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


class Noise(nn.Module):
    """Logits with noise, in evaluation too."""

    def forward(self, logits):
        return logits + 0.1 * torch.randn_like(logits)


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


def test_the_table_of_examples():
    evaluation = im.evaluate(network(), examples(), {"pgd": PGD})
    table = evaluation.examples
    assert len(table) == 40
    columns = [field.name for field in fields(AttackRows)]
    told = {"correct", "loss", "fosc", "relative_fosc", "zero_gradient", "steps", "gradient_calls"}
    assert told <= set(columns)
    assert list(table)[4:] == ["seed", *(f"pgd_{column}" for column in ["success", *columns])]
    assert (table.pgd_success != table.pgd_correct).all()
    assert (table.seed == 0).all()
    assert int(table.pgd_correct.sum()) == evaluation.accuracy["pgd"].correct
    assert (table.clean_correct == (table.clean_prediction == table.label)).all()


def test_json_round_trip(tmp_path):
    dumb = Scripted(im.L2(0.1), lambda x, y, index: x)  # without gauges: NaN
    evaluation = im.evaluate(network(), examples(), {"pgd": PGD, "dumb": dumb}, seed=3, quantize=8)
    text = evaluation.to_json(tmp_path / "evaluation.json")
    assert (tmp_path / "evaluation.json").read_text(encoding="utf-8").rstrip() == text
    document = json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))
    assert document["settings"]["seed"] == 3
    assert document["accuracy"]["pgd"]["correct"] == evaluation.accuracy["pgd"].correct
    assert document["convergence"]["dumb"]["fosc_median"] is None
    again = Evaluation.from_json(text)
    assert again.to_json() == text
    assert again.weights == document["weights"] == evaluation.weights != None  # noqa: E711
    assert again.settings == evaluation.settings
    assert again.examples.equals(evaluation.examples)
    assert again.difference(evaluation, "pgd").estimate == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"examples": {"attacks": 3}}', "null"])
def test_other_texts_are_no_evaluation(text):
    with pytest.raises(ValueError, match="text must be an evaluation's JSON"):
        Evaluation.from_json(text)


def test_differences_are_paired():
    one, two = (im.evaluate(network(seed), examples(), {"pgd": PGD}) for seed in (0, 1))
    for name in ("clean", "pgd", "worst_case"):
        mine, theirs = one.correct(name), two.correct(name)
        found = one.difference(two, name)
        assert found.estimate == pytest.approx(mine.mean() - theirs.mean())
        assert found == paired_difference(int((mine & ~theirs).sum()), int((~mine & theirs).sum()), 40)
        back = two.difference(one, name)
        assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    with pytest.raises(ValueError, match="unknown attack 'pdg'; did you mean 'pgd'"):
        one.difference(two, "pdg")
    with pytest.raises(ValueError, match="same examples: its 40 labels differ from these 40"):
        one.difference(im.evaluate(network(), examples(seed=9), {"pgd": PGD}), "pgd")
    with pytest.raises(ValueError, match="same examples: its 39 labels"):
        one.difference(im.evaluate(network(), examples(39), {"pgd": PGD}), "pgd")


@pytest.mark.parametrize("total", [1, 10, 1000])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_wilson_is_scipys(total, confidence):
    for correct in {0, 1, total // 3, total - 1, total}:
        expected = binomtest(correct, total).proportion_ci(confidence, method="wilson")
        assert wilson(correct, total, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson(0, total)[0] == 0
    assert wilson(total, total)[1] == 1


def test_impossible_counts_are_refused():
    for correct, total in [(-1, 3), (4, 3), (0, 0)]:
        with pytest.raises(ValueError, match=f"got {correct} of {total}"):
            wilson(correct, total)
    for counts in [(-1, 0, 3), (2, 2, 3), (0, 0, 0)]:
        with pytest.raises(ValueError, match="counts must be"):
            paired_difference(*counts)
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\)"):
            wilson(1, 2, confidence)


def test_the_paired_interval_by_hand():
    # Cells (20, 12, 2, 16) and 1/2 each: n = 52, difference 10/52, variance (15/52 − (10/52)²)/52.
    found = paired_difference(12, 2, 50)
    half = 1.959963984540054 * math.sqrt((15 / 52 - (10 / 52) ** 2) / 52)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.2, 10 / 52 - half, 10 / 52 + half))
    assert paired_difference(3, 0, 3).high == 1
    assert paired_difference(0, 3, 3).low == -1


@pytest.mark.parametrize(
    ("first", "second", "total"), [(0.05, 0.05, 50), (0.2, 0.1, 50), (0.02, 0.01, 1000), (0.15, 0.1, 1000)]
)
def test_the_paired_interval_covers(first, second, total):
    generator = np.random.default_rng(0)
    draws = generator.multinomial(total, (first, second, 1 - first - second), size=4000)
    intervals = [paired_difference(int(one), int(two), total) for one, two, _ in draws]
    covered = np.mean([interval.low <= first - second <= interval.high for interval in intervals])
    assert 0.94 <= covered <= 0.985


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
        ({"test_set": 3}, TypeError, None),
        ({"model": print}, TypeError, None),
    ],
)
def test_wrong_arguments(changed, error, words):
    arguments = {"model": network(), "test_set": examples(), "attacks": {"pgd": PGD}} | changed
    with pytest.raises(error, match=words):
        im.evaluate(**arguments)


def test_the_terminal_table_fits_80_columns():
    attacks = {"pgd-20": PGD, "cw": im.CW(im.Linf(0.1), 3), "an attack with a rather long name": im.FGSM(im.L2(0.5))}
    attacks["no-gauge"] = Scripted(im.L2(0.1), lambda x, y, index: x)
    evaluation = im.evaluate(network(), examples(), attacks)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(format_table(evaluation))
    text = console.export_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    row = next(line for line in lines if "PGD-20" in line).split()
    found = evaluation.accuracy["pgd-20"]
    assert row[1:3] == [f"{100 * found.value:.2f}", f"{100 * found.low:.2f}–{100 * found.high:.2f}"]
    assert row[3] == f"{evaluation.convergence['pgd-20'].survivors.fosc_median:.2g}"
    assert row[-1] == "6.0"
    assert next(line for line in lines if "no-gauge" in line).split()[3:6] == ["–"] * 3
    assert any("Worst case" in line for line in lines)
