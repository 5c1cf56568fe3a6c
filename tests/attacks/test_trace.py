"""Traces against the search written once more, as a plain loop."""

import pytest
import torch

import innermax as im
from innermax.attacks.trace import trace_search
from innermax.losses import find_loss
from innermax.oracle.oracle import Oracle
from innermax.utils import randomness
from tests.helpers.attacks import NORMS, logits_of
from tests.helpers.data import images
from tests.helpers.networks import Logged, Noisy, convnet
from tests.helpers.threats import ScaledL2


def loop(attack, model, x, y, seed, index):
    """Loss, FOSC and relative FOSC at the start and after each step."""
    oracle, around = Oracle(model), attack.threat.around(x)
    point = around.sample(randomness.hash_keys(seed, index, 0)) if attack.random_start else x
    start, met = point, []
    with oracle.private_randomness(seed):
        for size in (*attack.step_sizes(), None):
            answer = oracle.gradient(point, y, find_loss(attack.loss))
            gaps = [around.gap(answer.gradient, point, relative=relative) for relative in (False, True)]
            met.append((answer.loss, *gaps))
            point = point if size is None else around.step(point, answer.gradient, size)
    return start, point, *(torch.stack(values) for values in zip(*met, strict=True))


@pytest.mark.parametrize("threat", [*(make(eps) for make, eps in NORMS.values()), ScaledL2(0.5)])
@pytest.mark.parametrize(
    "options",
    [
        {"step_size": "annealed"},
        {"random_start": False, "loss": "margin"},
        {"stop_at": 10.0, "stop_on_success": True, "restarts": 3},  # which ends the attack at once, not its trace
    ],
)
@pytest.mark.parametrize("wrap", [lambda model: model, Noisy])
def test_a_trace_is_the_search_step_by_step(threat, options, wrap):
    model, (x, y), index = wrap(convnet()), images(6), torch.arange(40, 46)
    attack = im.PGD(threat, steps=5, **options)
    trace = trace_search(attack, model, x, y, seed=7, index=index)
    start, end, loss, fosc, relative = loop(attack, model, x, y, 7, index)
    for name, value in {"start": start, "end": end, "loss": loss, "fosc": fosc, "relative_fosc": relative}.items():
        assert torch.equal(getattr(trace, name).nan_to_num(9.0), value.nan_to_num(9.0)), name
    assert trace.loss.shape == (6, 6)


def test_a_trace_costs_a_gradient_an_iterate_and_leaves_the_attack_alone():
    model, (x, y) = Logged(convnet()), images(6)
    attack = im.PGD(im.Linf(0.1), steps=4, stop_on_success=True)
    trace = trace_search(attack, model, x, y)
    assert model.log.gradients == sum(model.log.rows) == 5 * 6
    result = im.PGD(im.Linf(0.1), steps=4)(model.model, x, y)
    assert torch.equal(trace.end, result.x_adv)
    assert torch.equal(trace.loss[-1], result.loss)
    torch.testing.assert_close(
        trace.loss[0], find_loss("cross_entropy")(logits_of(convnet(), trace.start), y), rtol=1e-5, atol=1e-6
    )


def test_labels_are_checked(untyped):
    x, y = images(6)
    with pytest.raises(ValueError, match="y must be in 0…2, got values from 3 to 3"):
        trace_search(im.PGD(im.Linf(0.1)), convnet(), x, torch.full_like(y, 3))
    with pytest.raises(ValueError, match="y must have shape"):
        trace_search(im.PGD(im.Linf(0.1)), convnet(), x, y[:3])
