"""Losses that depend on the answer to the clean input: it is asked for once, and belongs to its example everywhere."""

from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from innermax.attacks.apgd import APGD
from innermax.attacks.pgd import FGSM, PGD
from innermax.attacks.search import AttackResult
from innermax.attacks.trace import trace_search
from innermax.losses import KLDivergence, cross_entropy, make_reaching
from innermax.oracle.cuda_graphs import Replayed
from innermax.oracle.oracle import Oracle
from innermax.strategies import Standard, halfway_gauge
from innermax.threat import Linf
from innermax.training.metrics import measure_gauges
from tests.helpers.attacks import NORMS, logits_of
from tests.helpers.data import images
from tests.helpers.networks import Logged, convnet, mlp
from tests.oracle.test_cuda_graphs import Tape


@dataclass(frozen=True)
class Away:
    """Leaves the class predicted for the clean input, the more the surer that was: two tensors of other types."""

    weight: float = 1.0

    def prepare(self, clean, label):
        return clean.argmax(1), self.weight * clean.softmax(1).amax(1)

    def __call__(self, logits, label, predicted, weight):
        return weight * cross_entropy(logits, predicted)


LOSSES = [KLDivergence(), Away()]
OPTIONS = [
    {},
    {"stop_at": 0.3, "gauge": "relative"},
    {"stop_on_success": True, "restarts": 2},
]


def prepared(loss, model, x, y):
    with torch.no_grad():
        return loss.prepare(logits_of(model, x), y)


def slope(loss, model, x, y, x_adv):
    point = x_adv.clone().requires_grad_()
    value = loss(logits_of(model, point), y, *prepared(loss, model, x, y))
    return value.detach(), torch.autograd.grad(value.sum(), point)[0]


def agree(mine, theirs, rows=slice(None), **tolerance):
    for field in fields(AttackResult):
        one, other = getattr(mine, field.name), getattr(theirs, field.name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other[rows], equal_nan=True, **tolerance)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_examples_result_does_not_depend_on_its_batch(norm, options, loss):
    make, eps = NORMS[norm]
    x, y = images(11, shape=(6,), dtype=torch.float64)
    model, attack = mlp(), PGD(make(eps), steps=6, loss=loss, **options)
    whole = attack(model, x, y)
    assert len(whole.steps.unique()) > 1 or not options.keys() - {"restarts"}
    for rows in (torch.arange(10, -1, -1), torch.tensor([8, 2, 5]), torch.tensor([6])):
        agree(attack(model, x[rows], y[rows], index=rows), whole, rows, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("norm", NORMS)
def test_what_is_reported_belongs_to_the_returned_point(norm, loss):
    make, eps = NORMS[norm]
    x, y = images(9, shape=(6,), dtype=torch.float64)
    threat, model = make(eps), mlp()
    found = PGD(threat, steps=5, loss=loss)(model, x, y)
    value, gradient = slope(loss, model, x, y, found.x_adv)
    torch.testing.assert_close(found.loss, value)
    torch.testing.assert_close(found.fosc, threat.around(x).gap(gradient, found.x_adv))
    start = slope(loss, model, x, y, threat.around(x).sample(torch.arange(9)))[0]
    assert found.loss.mean() > start.mean()


def test_the_gap_is_what_the_linear_model_of_the_divergence_can_gain():
    """Against the best vertex of the box, coordinate by coordinate."""
    x, y = images(7, shape=(6,), dtype=torch.float64)
    model, eps = mlp(), 0.1
    found = PGD(Linf(eps), steps=2, loss=KLDivergence())(model, x, y)
    gradient = slope(KLDivergence(), model, x, y, found.x_adv)[1].numpy()
    low, high = np.maximum(x.numpy() - eps, 0), np.minimum(x.numpy() + eps, 1)
    best = np.where(gradient > 0, high, low)
    np.testing.assert_allclose(found.fosc.numpy(), (gradient * (best - found.x_adv.numpy())).sum(1), atol=1e-12)


@pytest.mark.parametrize("final", ["gradient", "loss", "none"])
@pytest.mark.parametrize("restarts", [1, 3])
def test_the_clean_inputs_are_asked_once(final, restarts):
    x, y = images(6)
    logged = Logged(convnet())
    found = PGD(Linf(0.1), steps=4, restarts=restarts, loss=KLDivergence())(logged, x, y, final=final)
    asked = [torch.equal(inputs, x) for inputs in logged.log.inputs]
    assert asked == [True] + [False] * (len(asked) - 1)
    assert int(found.gradient_calls.sum()) == logged.log.gradients
    assert int((found.forward_calls + found.gradient_calls).sum()) == sum(logged.log.rows)


def test_micro_batches_keep_rows_together():
    x, y = images(10)
    model, attack = convnet(), PGD(Linf(0.1), steps=3, loss=Away())
    whole, oracle = attack(model, x, y), Oracle(model)
    oracle.micro_batch = 3
    agree(attack(oracle, x, y), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"stop_on_success": True, "restarts": 2}], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_threads_keep_rows_together(loss, options):
    x, y = images(20, shape=(6,))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        oracle = Oracle.fast(mlp(torch.float32), x, "float32")
        shared = PGD(Linf(0.3), steps=3, loss=loss, **options)(oracle, x, y)
        assert oracle._workers is not None
    finally:
        torch.set_num_threads(before)
    agree(shared, PGD(Linf(0.3), steps=3, loss=loss, **options)(mlp(torch.float32), x, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_confirmations_keep_rows_together(loss):
    """In bf16 some rows seem to have fallen, and float32 is asked about these alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3))
    model[1].bias.data[:] = torch.tensor([100.0, 100.0, -200.0])
    x = 0.3 + 0.4 * torch.rand(16, 2, 5, 5)
    y = model(x).argmax(1)
    oracle = Oracle.fast(model, x, "bf16")
    found = PGD(Linf(0.12), steps=8, stop_on_success=True, loss=loss)(oracle, x, y)
    assert (found.forward_calls > 1).any()
    fallen = found.misclassified
    assert 0 < int(fallen.sum()) < 16
    truth = slope(loss, model, x, y, found.x_adv)[0]
    torch.testing.assert_close(found.loss.detach(), truth, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_recordings_have_a_place_for_all_that_the_loss_is_given(loss):
    """Examples leave at different steps, so the attack goes through several buckets."""
    tape, (x, y) = Tape(), images(24)
    exact = Oracle.fast(convnet(), x, "float32")
    attack = PGD(Linf(0.2), steps=8, restarts=2, stop_on_success=True, loss=loss)
    truth = attack(exact, x, y)
    exact._replayed = Replayed(partial(Oracle._gradient, exact), tape)
    for _ in range(2):
        agree(attack(exact, x, y), truth)
    assert 1 < len(tape.recorded) == len(set(tape.recorded)) <= 8


def test_recordings_are_known_by_the_loss_and_what_it_is_given():
    exact, tape = Oracle(convnet()), Tape()
    replayed = Replayed(exact.gradient, tape)
    x, y = images(4)
    for loss in (Away(), Away(), Away(2.0), KLDivergence(), KLDivergence()):
        given = prepared(loss, convnet(), x, y)
        torch.testing.assert_close(vars(replayed(x, y, loss, given)), vars(exact.gradient(x, y, loss, given)))
    assert tape.recorded == [4] * 3


def recorded_for(given):
    tape = Tape()
    replayed = Replayed(Oracle(convnet()).gradient, tape)
    x, y = images(4)
    for values in given:
        replayed(x, y, Sum(), values)
    return len(tape.recorded)


@dataclass(frozen=True)
class Sum:
    def __call__(self, logits, label, *given):
        return logits.sum(1) * sum(value.reshape(len(value), -1).sum(1) for value in given)


def test_shapes_and_types_of_what_is_given_tell_recordings_apart():
    one = torch.rand(4, 3)
    assert recorded_for([(one,), (one + 1,)]) == 1
    assert recorded_for([(one,), (one.double(),), (one[:, :2],), (one[:, :, None],), (one, one), ()]) == 6


def test_a_search_of_the_divergence_cannot_start_at_the_clean_input():
    with pytest.raises(ValueError, match=r"random_start must be True with loss KLDivergence\(\), which has no slope"):
        PGD(Linf(0.1), random_start=False, loss=KLDivergence())
    x, y = images(6, dtype=torch.float64)
    model, loss = convnet().double(), KLDivergence()
    assert slope(loss, model, x, y, x)[1].abs().max() < 1e-12
    moved = FGSM(Linf(0.1), loss)(model, x, y)
    assert (moved.loss > 1e-4).all()
    start = Linf(0.1).sample(x, seed=3)
    start[::2] = x[::2]
    found = PGD(Linf(0.1), steps=2, loss=loss)(model, x, y, start=start)
    assert (found.loss > 1e-4).all()
    drawn = PGD(Linf(0.1), steps=2, loss=loss)(model, x, y)
    torch.testing.assert_close(found.x_adv[::2], drawn.x_adv[::2])
    assert not torch.equal(found.x_adv[1::2], drawn.x_adv[1::2])


def test_no_label_is_reached_by_leaving_the_clean_input():
    x, y = images(4)
    with pytest.raises(ValueError, match="leave target out"):
        PGD(Linf(0.1), loss=KLDivergence())(convnet(), x, y, target=(y + 1) % 3)
    with pytest.raises(ValueError, match="reaches no label"):
        make_reaching(KLDivergence())
    with pytest.raises(ValueError, match="loss of APGD must depend on logits and label alone"):
        APGD(Linf(0.1), loss=KLDivergence())


def test_labels_are_checked_before_anything_is_prepared(untyped):
    x, y = images(4)
    with pytest.raises(ValueError, match="y must be in 0…2, got values from 3 to 3"):
        PGD(Linf(0.1), loss=Away())(convnet(), x, torch.full_like(y, 3))


def test_what_is_prepared_must_have_rows(untyped):
    class Scalar(Away):
        def prepare(self, clean, label):
            return clean.argmax(1), clean.sum(1)[:1]

    x, y = images(4)
    with pytest.raises(ValueError, match="must prepare a tuple of tensors with 4 rows"):
        PGD(Linf(0.1), loss=Scalar())(convnet(), x, y)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gauges_and_traces_are_given_the_same(loss):
    x, y = images(8)
    model, threat = convnet(), Linf(0.1)
    attack = PGD(threat, steps=4, loss=loss)
    found = attack(model, x, y, final="none")
    gradient = slope(loss, model, x, y, found.x_adv)[1]
    told = measure_gauges(Oracle(model), attack, x, found.x_adv, y, 0)
    exact = threat.around(x).gap(gradient, found.x_adv)
    torch.testing.assert_close(torch.tensor(told["fosc"]), exact, rtol=1e-4, atol=1e-6)
    half = replace(attack, steps=2)(model, x, y, final="none").x_adv
    exact = threat.around(x).gap(slope(loss, model, x, y, half)[1], half)
    torch.testing.assert_close(halfway_gauge(Standard(attack), Oracle(model), x, y), exact, rtol=1e-4, atol=1e-6)
    trace = trace_search(attack, model, x, y)
    torch.testing.assert_close(trace.loss[-1], attack(model, x, y).loss)
    torch.testing.assert_close(trace.loss[0], slope(loss, model, x, y, trace.start)[0])
