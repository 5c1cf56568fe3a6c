"""The probes of an audit: broken defences are found, for the right cause; honest models are left alone."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import innermax as im
from innermax.cli import main
from innermax.evaluation.audit import Quantiles
from innermax.evaluation.result import Evaluation
from innermax.oracle.oracle import Oracle
from innermax.reporting.tables import format_audit
from tests.helpers.threats import WeightedLinf

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import broken

LINF = im.Linf(0.15)
PGD = im.PGD(LINF, steps=10)
KNOWN = Quantiles(0.0, 0.0, 0.0)


BROKEN = {
    "saturated": (lambda m: broken.Changed(m, after=broken.Times(1000)), {"pgd": PGD}, "gradients masked", "saturate"),
    "rounded": (
        lambda m: broken.Changed(m, broken.Quantised(15)),
        {"pgd": PGD},
        "gradients masked",
        "stopped by round",
    ),
    "detached": (lambda m: broken.cut(m, 6), {"pgd": PGD}, "gradients masked", "stopped by detach"),
    "outside": (lambda m: broken.Changed(m, broken.Median()), {"pgd": PGD}, "gradients masked", "no gradient"),
    "one step": (lambda m: m, {"pgd-1": im.PGD(LINF, steps=1)}, "not converged", "few steps"),
    "small": (lambda m: m, {"pgd": im.PGD(LINF, steps=20, step_size=0.0015)}, "not converged", "step size"),
    "wrong way": (lambda m: m, {"pgd": replace(PGD, loss=broken.wrong_way)}, "not converged", "easier"),
    "noisy": (lambda m: broken.Changed(m, after=broken.Noisy(1.0)), {"pgd": PGD}, "randomised", "differ"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_defences_are_found(trained, images, name):
    change, attacks, verdict, cause = BROKEN[name]
    audit = im.evaluate(change(trained).eval(), images, attacks).audit
    assert (audit.verdict, cause in audit.causes[0]) == (verdict, True), audit
    assert audit.advice


@pytest.mark.filterwarnings("ignore:the model seems to return probabilities")
def test_probabilities_are_found(trained, images):
    model = broken.Changed(trained, after=nn.Sequential(broken.Times(30), nn.Softmax(1))).eval()
    audit = im.evaluate(model, images, {"pgd": PGD}).audit
    assert audit.verdict == "gradients masked"
    assert "probabilities" in audit.causes[0]


@pytest.mark.usefixtures("untyped")  # tens of thousands of gradients
def test_an_honest_evaluation_is_left_alone_and_costs_what_is_counted(trained, images):
    strong = {"apgd": im.APGD(LINF, steps=100, loss="margin", targets=9)}
    evaluation = im.evaluate(trained, images, strong)
    audit, found = evaluation.audit, evaluation.audit.evidence
    assert (audit.verdict, audit.causes, audit.advice) == ("no failure found", (), "")
    assert found.survivors == evaluation.worst_case.correct
    assert found.sampled == -(-found.survivors // 2)
    assert found.foretold > 0.9
    assert found.float64_agreement > 0.99
    assert (found.repeat_difference, found.zero_gradient, found.passed, found.large_eps) == (0, 0, (), 0)
    # A tenth of AutoAttack's 4,400 on every survivor, but for the odd one that rounding adds to the sampled half.
    assert found.gradients + found.forwards / 2 <= 0.1 * 4400 * 2 * found.sampled
    assert found.gradients >= 50 * found.sampled
    for name, search in found.searches.items():
        left = evaluation.rows[name].correct
        assert search.relative_fosc.median == pytest.approx(np.median(evaluation.rows[name].relative_fosc[left]))
        assert search.zero_gradient == 0


def test_the_cost_is_counted_call_by_call(trained, images, monkeypatch):
    from innermax.evaluation import audit_probes

    asked = {"gradient": 0, "logits": 0}
    for name in asked:
        whole = getattr(Oracle, name)

        def counted(self, x, *rest, name=name, whole=whole):
            asked[name] += len(x)
            return whole(self, x, *rest)

        monkeypatch.setattr(Oracle, name, counted)
    before, original = {}, audit_probes.run_audit

    def noted(subject):
        before.update(asked)
        return original(subject)

    monkeypatch.setattr("innermax.evaluation.evaluate.run_audit", noted)
    found = im.evaluate(trained, images, {"pgd": PGD}).audit.evidence
    assert found.gradients == asked["gradient"] - before["gradient"]
    assert found.forwards == asked["logits"] - before["logits"]


def test_audits_are_alike_twice_and_leave_the_random_state(trained, images):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, two = (im.evaluate(trained, images[:20], {"pgd": PGD}).audit.to_dict() for _ in range(2))
    assert str(one) == str(two)
    assert torch.equal(torch.get_rng_state(), state)


def test_flat_inputs_two_threats_and_nobody_left():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 2), torch.rand(30, 6)
    with torch.no_grad():
        model.bias -= model(x).median(0).values  # both classes are met
    y = model(x).argmax(1)
    both = {"linf": im.PGD(im.Linf(0.01)), "l2": im.PGD(im.L2(0.02))}
    found = im.evaluate(model, (x, y), both).audit
    assert found.verdict == "no failure found"
    assert "score-based" in found.evidence.fallen
    assert found.evidence.untried == {}
    nobody = im.evaluate(model, (x, 1 - y), both).audit
    assert (nobody.verdict, nobody.evidence.sampled) == ("nothing to audit", 0)
    assert nobody.sentence == "Audit: nothing to audit. None of the 30 images survived the attacks."


def test_what_a_search_on_a_linear_model_is_seen_to_do():
    """Twenty steps of ε/40, each of which gains as much as any other: two of them are a tenth, and reach half of ε."""
    linear = nn.Linear(12, 2, bias=False)
    with torch.no_grad():
        linear.weight[0], linear.weight[1] = 3.0, 2.0
    attack = im.PGD(im.Linf(0.1), steps=20, step_size=0.1 / 40, random_start=False, loss="margin")
    images = 0.4 + 0.2 * torch.rand(40, 12), (torch.arange(40) == 0).long()  # all but the first are right
    found = im.evaluate(linear, images, {"pgd": attack}).audit.evidence.searches["pgd"]
    assert found.steps == 20
    assert found.late_gain == pytest.approx(0.1, rel=1e-3)
    assert (found.reach, found.travelled) == (pytest.approx(0.5), pytest.approx(0.5, rel=1e-3))


def test_a_threat_model_of_ones_own_from_training_to_report(tmp_path):
    data = im.load_data("digits", validation=0)
    threat = WeightedLinf(0.1, weights=(1.0, 1.5))
    torch.manual_seed(0)
    model = im.build_model("digits-cnn", input_shape=data.train.shape)
    strategy = im.Dynamic(im.PGD(threat, steps=3))
    model = im.train(model, data.train[:600], strategy, epochs=2, lr=0.05, progress=False).model
    attacks = {"pgd-1": im.PGD(threat, steps=1), "guided": im.GuidedPGD(threat, budget=2)}
    evaluation = im.evaluate(model, data.test[:60], attacks)
    found = evaluation.audit.evidence
    assert {"more steps", "restarts", "margin", "targeted"} <= found.fallen.keys() or found.strongest == "guided"
    assert {"margin", "targeted"} <= found.fallen.keys()
    assert found.fallen["margin"] > 0
    assert found.untried == {"score-based": "Square does not support WeightedLinf"}
    assert "Not tried: score-based (Square does not support WeightedLinf)." in format_audit(evaluation.audit).plain
    assert Evaluation.from_json(evaluation.to_json()).audit.evidence.untried == found.untried
    shown = im.gallery(model, data.test[:60], attacks, evaluation, pictures=10)
    assert any(picture.loss for picture in shown.pictures if picture.attack == "pgd-1")
    assert shown.sweep.accuracy[0].value >= shown.sweep.accuracy[-1].value
    page = im.report({"mine": im.Exhibit(evaluation, gallery=shown)}, tmp_path / "report.html").read_text()
    assert "Not tried: score-based" in page
    assert "WeightedLinf, ε = 0.1" in page


class Mine:
    """An attack of a user's own, which finds nothing."""

    threat = LINF

    def __call__(self, model, x, y, *, seed=0, index=None, **options):
        return replace(PGD, steps=1, step_size=1e-9)(model, x, y, seed=seed, index=index, **options)


def test_what_an_audit_cannot_try_it_says(trained, images, monkeypatch):
    attack = im.APGD.search
    monkeypatch.setattr(
        im.APGD, "search", lambda self, *a: attack(self, *a) if self.targets is None else refuse("no\ntargets")
    )
    found = im.evaluate(trained, images, {"mine": Mine()}).audit
    own = "mine is not an attack of innermax"
    untried = {"more steps": own, "restarts": own, "targeted": "it failed: no targets"}
    assert found.evidence.untried == untried
    assert found.evidence.fallen["targeted"] == 0
    assert found.sentence.endswith(f" Not tried: more steps, restarts ({own}); targeted (it failed: no targets).")


def refuse(message):
    raise ValueError(message)


class Backwards(torch.autograd.Function):
    """The same image, with a gradient that leads away."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Misleading(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        assert not x.isnan().any()  # cannot be traced: a trace would hold the forward pass alone
        return self.model(Backwards.apply(x))


def test_images_made_on_a_surrogate_are_tried(trained, images):
    attacks = {"pgd": PGD}
    others = {"plain": trained, "random": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))}
    before = [value.clone() for value in trained.state_dict().values()]
    alone = im.evaluate(Misleading(trained), images, attacks).audit
    audit = im.evaluate(Misleading(trained), images, attacks, surrogates=others).audit
    found = audit.evidence
    survivors = im.evaluate(trained, images, attacks)
    assert found.fallen["surrogate plain"] > 0
    assert found.fallen["surrogate random"] == 0
    assert found.total_gain > alone.evidence.total_gain
    assert audit.verdict == "gradients masked"
    assert "surrogate plain" in " ".join(format_audit(audit).plain.split())
    own = {name: count for name, count in found.fallen.items() if not name.startswith("surrogate")}
    assert own == alone.evidence.fallen
    tried = found.sampled - sum(own.values())
    cost = 20 * tried + 20 * (tried - found.fallen["surrogate plain"])
    large = audit.evidence.gradients - alone.evidence.gradients - cost
    assert abs(large) <= 11 * 32, "a search with large ε, on those that stand"
    assert all(torch.equal(one, other) for one, other in zip(before, trained.state_dict().values(), strict=True))
    assert survivors.audit.evidence.fallen.keys().isdisjoint({"surrogate plain"})


def test_a_surrogate_of_a_model_that_draws(trained, images):
    model = broken.Changed(trained, after=broken.Noisy(1.0)).eval()
    audit = im.evaluate(model, images[:20], {"pgd": PGD}, surrogates={"plain": trained}).audit
    assert audit.verdict == "randomised"
    assert {"averaged", "surrogate plain"} == audit.evidence.fallen.keys()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"surrogates": {}}, ValueError, "surrogates must hold at least one model, got none"),
        ({"surrogates": nn.Linear(64, 10)}, TypeError, "surrogates must map names to models, got Linear"),
        ({"surrogates": {"": nn.Linear(64, 10)}}, ValueError, "a model's name must be a text, got ''"),
        ({"surrogates": {"a": print}}, TypeError, "surrogate 'a': model must be a torch.nn.Module"),
        ({"surrogates": {"a": nn.Linear(3, 10)}}, ValueError, "surrogate 'a': the model fails on x of shape"),
        (
            {"surrogates": {"a": nn.Sequential(nn.Flatten(), nn.Linear(64, 3))}},
            ValueError,
            "surrogate 'a': it must have the model's 10 classes, got 3",
        ),
        ({"audit": False}, ValueError, "surrogates are for the audit: they need audit=True"),
        ({"attacks": {}}, ValueError, "surrogates are for the audit: they need audit=True"),
    ],
)
def test_surrogates_are_checked_at_the_door(trained, images, untyped, changed, error, message):
    arguments = {"attacks": {"pgd": PGD}, "surrogates": {"plain": trained}} | changed
    with pytest.raises(error, match=message):
        im.evaluate(trained, images[:4], **arguments)


def test_a_surrogate_on_the_command_line(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        im.save_model(name, trained)
    words = ["evaluate", "mine", "--data", "digits", "--threat.eps", "0.15", "--attacks", "fgsm", "--limit", "9"]
    assert main([*words, "--json", "s.json", "--surrogate", "other"]) == 0
    assert "surrogate other" in json.loads(Path("s.json").read_text())["audit"]["evidence"]["fallen"]
    capsys.readouterr()
    transfer = ["transfer", "mine", "other", "--data", "digits", "--threat.eps", "0.15", "--surrogate", "other"]
    for refused, reason in ([*words, "--surrogate", "nowhere"], "nowhere"), (transfer, "surrogate"):
        assert main(refused) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert reason in err
