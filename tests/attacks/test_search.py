"""The inner search: when an example stops, which restart is kept, against an independent search."""

import copy
import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from innermax.attacks.pgd import PGD
from innermax.attacks.search import AttackResult, choose_better, measure, search
from innermax.losses import cross_entropy
from innermax.oracle.oracle import Oracle
from innermax.threat import L1, L2, Linf
from innermax.utils import randomness
from tests.helpers.attacks import NORMS, UNBOUNDED, Linear, gradient_of, logits_of, starts
from tests.helpers.data import images
from tests.helpers.networks import Logged, Wrapped, convnet, mlp


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "options", [{}, {"stop_at": 0.3, "gauge": "relative"}, {"stop_on_success": True, "restarts": 2}]
)
def test_an_examples_result_does_not_depend_on_its_batch(norm, options):
    make, eps = NORMS[norm]
    x, y = images(11, shape=(6,), dtype=torch.float64)
    model = mlp()
    attack = PGD(make(eps), steps=6, **options)
    whole = attack(model, x, y)
    for rows in (torch.arange(10, -1, -1), torch.tensor([8, 2, 5]), torch.tensor([6])):
        part = attack(model, x[rows], y[rows], index=rows)
        for field in fields(AttackResult):
            mine, other = getattr(part, field.name), getattr(whole, field.name)[rows]
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_neighbours_do_not_change_a_bit_at_the_same_shape():
    x, y = images(8)
    model, attack = convnet(), PGD(Linf(0.1), steps=5)
    whole = attack(model, x, y)
    other = attack(model, torch.cat([x[:4], 1 - x[4:]]), torch.cat([y[:4], (y[4:] + 1) % 3]))
    for field in fields(AttackResult):
        assert torch.equal(getattr(whole, field.name)[:4], getattr(other, field.name)[:4])
    assert not torch.equal(whole.x_adv[4:], other.x_adv[4:])


# Stopping, against an independent search


def naive_gauges(norm, eps, bounded, g, v, x):
    """(exact, ball, relative) FOSC of one example, straight from the definitions."""
    delta = v - x
    dual = {"linf": g.abs().sum(), "l2": g.norm()}[norm]
    ball = eps * dual - (delta * g).sum()
    if not bounded:
        return {"exact": ball, "ball": ball, "relative": ball / (2 * eps * dual)}
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    exact = torch.maximum(g * (high - v), g * (low - v)).sum()
    return {"exact": exact, "ball": ball, "relative": exact / (g.abs() * (high - low)).sum()}


def naive_move(norm, eps, bounded, g, v, x, step):
    if norm == "linf":
        moved = (v + step * g.sign()).clamp(x - eps, x + eps)
        return moved.clamp(0, 1) if bounded else moved
    delta = v + step * g / g.norm() - x
    return x + delta * min(1.0, eps / float(delta.norm()))


def naive_search(model, norm, eps, bounded, x, y, start, sizes, gauge, threshold):
    """One example after the other: its path, and the gauges on it."""
    found, model = [], copy.deepcopy(model).eval()
    for i in range(len(x)):
        v, recorded = start[i], []
        for k in range(len(sizes) + 1):
            g = gradient_of(model, v[None], y[i : i + 1])[0]
            recorded.append(float(naive_gauges(norm, eps, bounded, g, v, x[i])[gauge]))
            if k == len(sizes) or (k >= 1 and recorded[-1] <= threshold):
                break
            v = naive_move(norm, eps, bounded, g, v, x[i], sizes[k])
        found.append((v, recorded))
    return found


@settings(max_examples=25, phases=[Phase.generate])  # shrinking would take minutes
@given(
    norm=st.sampled_from(["linf", "l2"]),
    gauge=st.sampled_from(["exact", "ball", "relative"]),
    final=st.sampled_from(["gradient", "loss", "none"]),
    seed=st.integers(0, 1000),
    steps=st.integers(1, 8),
    quantile=st.floats(0, 1),
)
def test_an_example_stops_at_its_first_iterate_at_or_below_the_threshold(norm, gauge, final, seed, steps, quantile):
    bounded = norm == "linf"
    eps = 0.3 if bounded else 0.8
    threat = Linf(eps) if bounded else L2(eps, bounds=None)
    x, y = images(7, shape=(6,), dtype=torch.float64, seed=seed)
    model = mlp(seed=seed % 5)
    # A threshold that some of the gauges on the way are below and others above.
    start = starts(PGD(threat, steps), model, x, y, seed=seed)[0]
    sizes = [eps / 4] * steps
    problem = model, norm, eps, bounded, x, y, start, sizes, gauge
    gauges = sorted(value for _, recorded in naive_search(*problem, -1.0) for value in recorded)
    place = quantile * (len(gauges) - 1)
    threshold = gauges[int(place)] / 2 + gauges[math.ceil(place)] / 2 + 1e-7
    expected = naive_search(*problem, threshold)

    logged = Logged(model)
    result = PGD(threat, steps, stop_at=threshold, gauge=gauge)(logged, x, y, seed=seed, final=final)
    taken = torch.tensor([len(recorded) - 1 for _, recorded in expected])
    stopped = torch.tensor([len(g) <= steps or (g[-1] <= threshold and steps < 1) for _, g in expected])
    assert torch.equal(result.steps, taken)
    torch.testing.assert_close(result.x_adv, torch.stack([v for v, _ in expected]), rtol=1e-9, atol=1e-9)
    assert torch.equal(result.gradient_calls, taken + (stopped | torch.tensor(final == "gradient")))
    assert torch.equal(result.forward_calls, (~stopped & torch.tensor(final == "loss")).long())

    # The network saw the active examples, nobody else, and no gradient twice.
    active = [sum(len(recorded) > k for _, recorded in expected) for k in range(steps)]
    active.append(int((~stopped).sum()) if final != "none" else 0)
    assert logged.log.rows == [count for count in active if count > 0]
    assert logged.log.gradients == int(result.gradient_calls.sum())
    assert sum(logged.log.rows) == int((result.gradient_calls + result.forward_calls).sum())

    # What is reported belongs to the returned x_adv.
    if final != "none" or bool(stopped.all()):
        torch.testing.assert_close(result.logits, logits_of(model, result.x_adv), rtol=1e-9, atol=1e-9)
        loss = F.cross_entropy(result.logits, y, reduction="none")
        torch.testing.assert_close(result.loss, loss, rtol=1e-9, atol=1e-9)
        assert torch.equal(result.misclassified, result.logits.argmax(1) != y)
    else:
        assert result.logits is None
        assert result.loss is None
        assert result.misclassified is None
    if final == "gradient" or bool(stopped.all()):
        g = gradient_of(model, result.x_adv, y)
        found = [naive_gauges(norm, eps, bounded, *row) for row in zip(g, result.x_adv, x, strict=True)]
        for name, values in (("exact", result.fosc), ("relative", result.relative_fosc)):
            torch.testing.assert_close(values, torch.stack([row[name] for row in found]), rtol=1e-6, atol=1e-9)
        assert not result.zero_gradient.any()
    else:
        assert result.fosc is None
        assert result.relative_fosc is None
        assert result.zero_gradient is None


@pytest.mark.parametrize("gauge", ["exact", "ball", "relative"])
def test_a_gauge_equal_to_the_threshold_stops(gauge):
    x, y = images(1, shape=(6,), dtype=torch.float64)
    model, threat = mlp(), Linf(0.3)
    point = PGD(threat, steps=1)(model, x, y)
    gradient = Oracle(model).gradient(point.x_adv, y, cross_entropy).gradient
    value = float(threat.gap(gradient, point.x_adv, x, bounded=gauge != "ball", relative=gauge == "relative"))
    assert value > 0
    at = PGD(threat, steps=5, step_size=0.075, stop_at=value, gauge=gauge)(model, x, y)
    below = PGD(threat, steps=5, step_size=0.075, stop_at=math.nextafter(value, 0), gauge=gauge)(model, x, y)
    assert at.steps.tolist() == [1]
    assert at.gradient_calls.tolist() == [2]
    assert torch.equal(at.x_adv, point.x_adv)
    assert below.steps > 1


def test_a_threshold_of_zero_stops_at_a_maximum():
    problem = Linear(5, (6,), None)
    x, y = problem.inputs
    attack = PGD(UNBOUNDED, steps=10, step_size=0.1, random_start=False, stop_at=0.0)
    result = attack(problem.model.double(), x.double() * 0, y)
    assert result.steps.tolist() == [1] * 5
    assert result.gradient_calls.tolist() == [2] * 5
    assert result.fosc.tolist() == [0.0] * 5


def test_every_example_takes_one_step_whatever_the_threshold():
    """Even one that starts at the maximum."""
    x, y = images()
    result = PGD(Linf(0.1), steps=5, stop_at=1e9)(convnet(), x, y)
    assert result.steps.tolist() == [1] * 6
    assert result.gradient_calls.tolist() == [2] * 6
    once = PGD(Linf(0.1), steps=1)(convnet(), x, y)
    assert torch.equal(result.x_adv, once.x_adv)


@pytest.mark.parametrize(("final", "gradients", "forwards"), [("gradient", 5, 0), ("loss", 4, 1), ("none", 4, 0)])
def test_what_the_end_costs(final, gradients, forwards):
    x, y = images()
    model = Logged(convnet())
    result = PGD(Linf(0.1), steps=4)(model, x, y, final=final)
    assert result.gradient_calls.tolist() == [gradients] * 6
    assert result.forward_calls.tolist() == [forwards] * 6
    assert model.log.rows == [6] * (gradients + forwards)
    assert model.log.gradients == 6 * gradients
    same = PGD(Linf(0.1), steps=4)(convnet(), x, y)
    assert torch.equal(result.x_adv, same.x_adv)
    for name in ("loss", "logits", "misclassified"):
        assert (getattr(result, name) is None) == (final == "none")
        if final == "loss":
            torch.testing.assert_close(getattr(result, name), getattr(same, name))
    for name in ("fosc", "relative_fosc", "zero_gradient"):
        assert (getattr(result, name) is None) == (final != "gradient")


# Success and restarts


def test_fallen_examples_leave():
    x, y = images(12, shape=(6,), dtype=torch.float64)
    model = Logged(mlp())
    y[2:] = logits_of(model.model, x).argmax(1)[2:]
    threat = Linf(0.5, bounds=None)
    attack = PGD(threat, steps=6, stop_on_success=True, step_size=0.1)
    result = attack(model, x, y)
    fallen = result.misclassified
    assert 0 < fallen.sum() < 12
    # Each fell at the first iterate that is misclassified, which may be its start.
    path = starts(PGD(threat, steps=6, step_size=0.1), model.model, x, y)
    wrong = torch.stack([logits_of(model.model, point).argmax(1) != y for point in path])
    first = torch.where(wrong.any(0), wrong.long().argmax(0), 6)
    assert torch.equal(result.steps, first)
    assert torch.equal(fallen, wrong.any(0))
    assert (first == 0).any()
    assert ((first > 0) & (first < 6)).any()
    expected = torch.stack([path[k][row] for row, k in enumerate(first.tolist())])
    torch.testing.assert_close(result.x_adv, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(result.gradient_calls, first + 1)
    assert model.log.rows == [int((first >= k).sum()) for k in range(7)]


@pytest.mark.parametrize("more", [1, 2])
def test_fallen_examples_go_on_for_so_many_steps(more):
    x, y = images(12, shape=(6,), dtype=torch.float64)
    y[2:] = logits_of(mlp(), x).argmax(1)[2:]
    threat = Linf(0.5, bounds=None)
    result = PGD(threat, steps=6, stop_on_success=True, step_size=0.1, steps_after_success=more)(mlp(), x, y)
    path = starts(PGD(threat, steps=6, step_size=0.1), mlp(), x, y)
    wrong = torch.stack([logits_of(mlp(), point).argmax(1) != y for point in path])
    last = torch.where(wrong.cumsum(0).eq(more + 1).any(0), wrong.cumsum(0).eq(more + 1).long().argmax(0), 6)
    assert torch.equal(result.steps, last)
    assert more in last
    assert 6 in last
    expected = torch.stack([path[k][row] for row, k in enumerate(last.tolist())])
    torch.testing.assert_close(result.x_adv, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("deviation", [0.001, 0.5])
def test_a_start_near_x(deviation):
    x, y = images(12, shape=(6,), dtype=torch.float64)
    found = starts(PGD(Linf(0.3), steps=1, random_start=deviation), mlp(), x, y, seed=4)[0]
    noise = deviation * randomness.normal(randomness.hash_keys(4, torch.arange(12), 0), 6)
    torch.testing.assert_close(found, torch.min(torch.max(x + noise, x - 0.3), x + 0.3).clamp(0, 1))


def single_searches(attack, model, x, y, seed, restarts):
    """Each restart's search for itself."""
    oracle, feasible, index = Oracle(model), attack.threat.around(x), torch.arange(len(x))
    found = []
    for restart in range(restarts):
        start = feasible.sample(randomness.hash_keys(seed, index, restart))
        found.append(search(oracle, feasible, start, y, attack.objective(), attack.step_sizes()))
    return found


def last_logit(logits, label):
    """A loss that is higher where the label is predicted, for some: success and loss part ways."""
    return logits[:, -1]


@pytest.mark.parametrize("loss", ["cross_entropy", last_logit])
@pytest.mark.parametrize("norm", NORMS)
def test_the_best_restart_is_kept_for_each_example(norm, loss):
    make, eps = NORMS[norm][0], {"linf": 0.3, "l2": 1.5, "l1": 4.0}[norm]
    x, y = images(24, shape=(6,), dtype=torch.float64)
    model, attack = mlp(seed=5), PGD(make(eps), steps=2, restarts=4, loss=loss)
    result = attack(model, x, y, seed=3)
    searches = single_searches(attack, model, x, y, 3, 4)
    choice, by_loss = [], []
    for row in range(24):
        ranks = [(bool(found.misclassified[row]), float(found.loss[row])) for found in searches]
        choice.append(max(range(4), key=lambda k: ranks[k]))
        by_loss.append(max(range(4), key=lambda k: ranks[k][1]))
    assert choice != by_loss or loss == "cross_entropy"
    assert len(set(choice)) > 1
    for field in fields(AttackResult):
        if field.name not in ("gradient_calls", "forward_calls"):
            expected = torch.stack([getattr(searches[k], field.name)[row] for row, k in enumerate(choice)])
            torch.testing.assert_close(getattr(result, field.name), expected, rtol=1e-12, atol=1e-12)
    assert result.gradient_calls.tolist() == [4 * 3] * 24
    one = PGD(make(eps), steps=2, loss=loss)(model, x, y, seed=3)
    assert (result.misclassified | ~one.misclassified).all()
    assert ((result.loss >= one.loss) | (result.misclassified & ~one.misclassified)).all()


def test_success_comes_before_loss():
    def result(loss, fallen, calls):
        rows = len(loss)
        return AttackResult(
            x_adv=torch.full((rows, 2), float(calls)),
            loss=torch.tensor(loss),
            logits=torch.full((rows, 3), float(calls)),
            fosc=None,
            relative_fosc=None,
            zero_gradient=None,
            misclassified=torch.tensor(fallen),
            steps=torch.full((rows,), calls),
            gradient_calls=torch.full((rows,), calls),
            forward_calls=torch.full((rows,), 1),
        )

    one = result([1.0, 1.0, 1.0, 1.0, 1.0, math.nan, 1.0], [False, True, False, True, True, False, True], 1)
    two = result([2.0, 2.0, 0.5, 0.5, 2.0, 1.0, 1.0], [False, False, True, True, True, True, True], 2)
    best = choose_better(one, two)
    taken = [2, 1, 2, 1, 2, 2, 1]  # of two alike the first
    assert best.steps.tolist() == taken
    assert best.x_adv[:, 0].tolist() == taken
    assert best.logits[:, 2].tolist() == taken
    assert best.loss.tolist() == [2.0, 1.0, 0.5, 1.0, 2.0, 1.0, 1.0]
    assert best.misclassified.tolist() == [False, True, True, True, True, True, True]
    assert best.gradient_calls.tolist() == [3] * 7
    assert best.forward_calls.tolist() == [2] * 7


def test_only_survivors_start_again():
    x, y = images(12, shape=(6,), dtype=torch.float64)
    model = mlp()
    attack = PGD(Linf(0.2), steps=2, restarts=4, stop_on_success=True)
    logged = Logged(model)
    result = attack(logged, x, y, seed=1)
    options = {"stop_on_success": True}
    oracle, feasible, rows = Oracle(model), attack.threat.around(x), torch.arange(12)
    expected_rows, calls = [], torch.zeros(12, dtype=torch.int64)
    fallen = torch.zeros(12, dtype=torch.bool)
    for restart in range(4):
        start = feasible[rows].sample(randomness.hash_keys(1, rows, restart))
        found = search(oracle, feasible[rows], start, y[rows], cross_entropy, attack.step_sizes(), **options)
        expected_rows += [int((found.steps >= k).sum()) for k in range(3)]
        calls[rows] += found.gradient_calls
        fallen[rows] = found.misclassified
        rows = rows[~found.misclassified]
    assert 0 < len(rows) < 12
    assert logged.log.rows == [count for count in expected_rows if count > 0]
    assert torch.equal(result.gradient_calls, calls)
    assert torch.equal(result.misclassified, fallen)
    assert len(set(calls[~fallen].tolist())) == 1


# A given start


@pytest.mark.parametrize("final", ["gradient", "loss", "none"])
def test_who_observes_a_search_sees_what_it_asks(final):
    """The iterates of those that are still searching, and what the network said there; nothing changes by it."""
    model, (x, y) = Logged(mlp()), images(8, shape=(6,), dtype=torch.float64)
    around, seen = Linf(0.3).around(x), []

    def observe(feasible, x_adv, answer):
        assert feasible.x.shape == x_adv.shape == answer.gradient.shape
        seen.append((feasible.x, x_adv, answer))

    options = {"stop_on_success": True, "final": final}
    found = search(Oracle(model), around, x, y, cross_entropy, [0.05] * 6, observe=observe, **options)
    assert len(seen) == 6 + (final == "gradient")
    assert all(torch.equal(point, asked) for (_, point, _), asked in zip(seen, model.log.inputs, strict=False))
    left = [len(point) for _, point, _ in seen]
    assert left == sorted(left, reverse=True)
    assert left[0] == 8 > left[-1] > 0
    for clean, point, answer in seen:
        assert Linf(0.3).contains(point, clean).all()
        torch.testing.assert_close(answer.gradient, gradient_of(model.model, point, y[matching(x, clean)]))
    plain = search(Oracle(model), around, x, y, cross_entropy, [0.05] * 6, **options)
    assert torch.equal(plain.x_adv, found.x_adv)
    assert torch.equal(plain.gradient_calls, found.gradient_calls)


def matching(x, some):
    """Which rows of x they are."""
    return torch.tensor([int((x == row).flatten(1).all(1).nonzero()) for row in some])


def test_a_search_in_two_halves_is_the_search():
    x, y = images(12, shape=(6,), dtype=torch.float64)
    model, threat = mlp(), Linf(0.2)
    whole = PGD(threat, steps=6)(model, x, y, seed=3)
    first = PGD(threat, steps=4)(model, x, y, seed=3, final="none")
    second = PGD(threat, steps=2)(model, x, y, seed=9, start=first.x_adv)
    assert torch.equal(second.x_adv, whole.x_adv)
    assert torch.equal(second.steps, torch.full((12,), 2))
    assert (second.x_adv != PGD(threat, steps=2)(model, x, y, seed=9).x_adv).any()


def test_a_start_is_projected():
    x, y = images(12, shape=(6,))
    attack = PGD(L2(0.3), steps=1, step_size=1e-9)
    outside = x + torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    found = attack(mlp(), x.double(), y, start=outside.double(), final="none").x_adv
    torch.testing.assert_close(found, L2(0.3).project(outside.double(), x.double()), rtol=0, atol=1e-8)
    assert ((found - x).norm(dim=1) > 0.29).any()


@pytest.mark.parametrize("gauge", ["exact", "ball", "relative"])
def test_an_example_that_is_still_converged_takes_no_step(gauge):
    x, y = images(12, shape=(6,), dtype=torch.float64)
    model, threat = mlp(), Linf(0.2)
    start = PGD(threat, steps=3)(model, x, y, final="none").x_adv
    gauges = measure(threat.around(x), gradient_of(model, start, y), start, gauge)
    threshold = float(gauges.sort().values[5:7].mean())
    logged = Logged(model)
    found = PGD(threat, steps=2, gauge=gauge, stop_at=threshold)(logged, x, y, start=start, final="none")
    still = gauges <= threshold
    assert still.sum() == 6
    assert torch.equal(found.steps == 0, still)
    assert torch.equal(found.x_adv[still], start[still])
    assert set(found.gradient_calls[still].tolist()) == {1}
    assert (found.x_adv[~still] != start[~still]).any(1).all()
    assert logged.log.rows[0] == 12
    assert logged.log.rows[1] <= 6


def test_a_start_without_gradient_moves_on():
    """Zero gradients are nothing to follow, not convergence: such an example stays in the search."""
    x, y = images(6, shape=(6,), dtype=torch.float64)
    flat = nn.Sequential(nn.Linear(6, 3), nn.Hardtanh(9.0, 9.5)).double()
    found = PGD(Linf(0.2), steps=2, stop_at=0.1)(flat, x, y, start=x, final="none")
    assert found.steps.tolist() == [2] * 6


def test_threads_share_a_given_start():
    x, y = images(20, shape=(6,))
    start, before = Linf(0.3).sample(x, seed=9), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        oracle = Oracle.fast(mlp(torch.float32), x, "float32")
        shared = PGD(Linf(0.3), steps=1)(oracle, x, y, start=start)
        assert oracle._workers is not None
    finally:
        torch.set_num_threads(before)
    alone = PGD(Linf(0.3), steps=1)(mlp(torch.float32), x, y, start=start)
    torch.testing.assert_close(shared.x_adv, alone.x_adv)


def test_further_restarts_start_at_random():
    x, y = images(12, shape=(6,), dtype=torch.float64)
    model, attack = mlp(), PGD(Linf(0.2), steps=2, restarts=3)
    start = x.clone()
    found = attack(model, x, y, seed=4, start=start)
    single = replace(attack, restarts=1)
    begun = [start, *(attack.threat.around(x).sample(randomness.hash_keys(4, torch.arange(12), r)) for r in (1, 2))]
    losses = torch.stack([single(model, x, y, start=one).loss for one in begun])
    fallen = torch.stack([single(model, x, y, start=one).misclassified for one in begun])
    assert torch.equal(found.misclassified, fallen.any(0))
    never = ~fallen.any(0)
    torch.testing.assert_close(found.loss[never], losses.max(0).values[never], rtol=1e-9, atol=0)


def test_restarts_end_when_nobody_survives():
    x, _ = images()
    model = convnet()
    wrong = (logits_of(model, x).argmax(1) + 1) % 3
    logged = Logged(model)
    result = PGD(Linf(1e-6), steps=3, restarts=5, stop_on_success=True)(logged, x, wrong)
    assert result.misclassified.all()
    assert logged.log.rows == [6]
    assert result.steps.tolist() == [0] * 6


@pytest.mark.parametrize("final", ["loss", "none"])
@pytest.mark.parametrize("stop_on_success", [True, False])
@pytest.mark.parametrize("stop_at", [None, 0.3])
def test_restarts_with_every_final(final, stop_on_success, stop_at):
    """Also where the examples of one restart all stop early, so that it knows more than the next."""
    x, y = images(4, shape=(6,), dtype=torch.float64)
    model = mlp()
    options = {"steps": 3, "restarts": 3, "stop_at": stop_at, "gauge": "relative"}
    attack = PGD(Linf(0.1), stop_on_success=stop_on_success, **options)
    for seed in range(5):
        result = attack(model, x, y, seed=seed, final=final)
        torch.testing.assert_close(result.logits, logits_of(model, result.x_adv), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result.loss, F.cross_entropy(result.logits, y, reduction="none"))
        full = attack(model, x, y, seed=seed)
        torch.testing.assert_close(result.x_adv, full.x_adv, rtol=1e-9, atol=1e-9)
        if result.fosc is not None:
            torch.testing.assert_close(result.fosc, full.fosc, rtol=1e-6, atol=1e-9)


# Gradients that are zero, NaN; answers that are NaN


def saturated(net, x):
    return 1e4 * net(x)


@pytest.mark.parametrize("gauge", ["exact", "ball", "relative"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "forward", [saturated, lambda net, x: net(x).detach(), lambda net, x: net(0 * x), lambda net, x: net(x).round()]
)
def test_a_zero_gradient_is_reported_and_never_convergence(forward, norm, gauge):
    make, eps = NORMS[norm]
    torch.manual_seed(0)
    x, _ = images()
    model = Wrapped(forward, nn.Sequential(nn.Flatten(), nn.Linear(50, 3)))
    y = logits_of(model, x).argmax(1)
    threat = make(eps)
    attack = PGD(threat, steps=4, stop_at=10.0 if gauge != "relative" else 1.0, gauge=gauge)
    logged = Logged(model)
    result = attack(logged, x, y)
    if forward is saturated:
        zero = (gradient_of(model, result.x_adv, y) == 0).flatten(1).all(1)
        assert zero.any()
    else:
        zero = torch.ones(6, dtype=torch.bool)
    assert torch.equal(result.zero_gradient, zero)
    assert result.relative_fosc[zero].isnan().all()
    assert not result.relative_fosc[~zero].isnan().any()
    assert result.steps[zero].tolist() == [4] * int(zero.sum())
    assert (result.fosc[zero] == 0).all()
    assert torch.equal(result.x_adv[zero], logged.log.inputs[0][zero])  # nothing to follow: they stay
    assert threat.contains(result.x_adv, x).all()


def test_an_l1_example_without_gradient_stays():
    x, y = images()
    model = Logged(Wrapped(lambda net, x: net(0 * x), convnet()))
    result = PGD(L1(2.0), steps=4)(model, x, y)
    assert torch.equal(result.x_adv, model.log.inputs[0])


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_that_are_nan(norm):
    """√ of 0: an infinite slope times 0. Only where the gradient is a number is it followed."""
    make, eps = NORMS[norm]
    x, y = images()
    model = Wrapped(lambda net, x: net(x) + (0 * x[:, :1]).sqrt().flatten(1).sum(1, keepdim=True), convnet())
    assert gradient_of(model, x, y)[:, 0].isnan().all()
    threat = make(eps)
    result = PGD(threat, steps=3, random_start=False)(model, x, y)
    assert threat.contains(result.x_adv, x).all()
    assert torch.equal(result.x_adv[:, 0], x[:, 0])
    assert (result.loss > F.cross_entropy(logits_of(model, x), y, reduction="none")).all()
    assert result.fosc.isfinite().all()
    nothing = Wrapped(lambda net, x: net(x) + (0 * x).sqrt().flatten(1).sum(1, keepdim=True), convnet())
    result = PGD(threat, steps=3)(nothing, x, y)
    assert result.zero_gradient.all()
    assert result.relative_fosc.isnan().all()


@pytest.mark.parametrize("final", ["gradient", "loss"])
def test_nan_logits_are_refused(final):
    x, y = images()
    model = Wrapped(lambda net, x: torch.where(x[:, :1, 0, 0] > 0.5, math.nan, net(x)), convnet())
    with pytest.raises(ValueError, match=r"the model returns NaN logits for \d of 6 inputs"):
        PGD(Linf(0.01), steps=2)(model, x, y, final=final)


@pytest.mark.parametrize(("final", "coarse", "precise"), [("none", 8, 0), ("loss", 6, 2), ("gradient", 6, 3)])
def test_where_an_end_is_scored_the_last_quarter_of_the_steps_is_asked_in_float32(final, coarse, precise, monkeypatch):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(2, 1, 3, 4), torch.tensor([0, 1])
    oracle = Oracle.fast(model, x, "bf16")
    asked = []
    for one in (oracle, oracle.precise):
        answer = one.gradient

        def counted(*arguments, one=one, answer=answer):
            asked.append(one)
            return answer(*arguments)

        monkeypatch.setattr(one, "gradient", counted)
    PGD(Linf(0.1), steps=8)(oracle, x, y, final=final)
    assert asked == [oracle] * coarse + [oracle.precise] * precise


def misled():
    """A model whose clean answers seem wrong in bf16: logits so large that it tells two classes of few images apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3))
    model[1].bias.data[:] = torch.tensor([100.0, 100.0, -200.0])
    x = 0.3 + 0.4 * torch.rand(16, 2, 5, 5)
    y = model(x).argmax(1)
    oracle = Oracle.fast(model, x, "bf16")
    assert (oracle.logits(x).argmax(1) != y).sum() >= 3
    return model, oracle, x, y


@pytest.mark.parametrize("options", [{}, {"restarts": 3}])
@pytest.mark.parametrize("final", ["gradient", "loss", "none"])
@pytest.mark.parametrize("eps", [1e-4, 0.02, 0.3])
def test_nobody_leaves_on_the_word_of_bf16(eps, final, options, monkeypatch):
    model, oracle, x, y = misled()
    asked, answer = [], oracle.precise.logits
    monkeypatch.setattr(oracle.precise, "logits", lambda x: asked.append(len(x)) or answer(x))
    attack = PGD(Linf(eps), **{"steps": 8, "stop_on_success": True, **options})
    result = attack(oracle, x, y, final=final)
    fallen = model(result.x_adv).argmax(1) != y
    exact = attack(model, x, y, final="loss").misclassified
    assert (fallen == exact).float().mean() > 0.9
    if eps == 1e-4:
        assert not fallen.any()
        assert (result.forward_calls >= 2).sum() >= 3, "asked at more than one point"
    if eps == 0.3:
        assert fallen.all()
    assert len(asked) > 0
    assert int(result.forward_calls.sum()) == sum(asked)
    if result.misclassified is not None:
        assert torch.equal(result.misclassified, fallen)
    if result.logits is not None:
        truth = model(result.x_adv)
        torch.testing.assert_close(result.logits[fallen], truth[fallen])
        torch.testing.assert_close(result.loss[fallen], F.cross_entropy(truth, y, reduction="none")[fallen])


@pytest.mark.parametrize("final", ["gradient", "loss"])
def test_who_stops_on_its_gauge_has_not_fallen_on_the_word_of_bf16(final):
    """And starts again, as a survivor does."""
    _, oracle, x, y = misled()
    attack = PGD(Linf(1e-4), steps=8, restarts=2, stop_at=1e9, stop_on_success=True)
    result = attack(oracle, x, y, final=final)
    assert not result.misclassified.any()
    assert result.steps.tolist() == [1] * 16
    assert result.gradient_calls.tolist() == [4] * 16


@pytest.mark.parametrize("final", ["gradient", "loss"])
def test_who_stops_on_its_gauge_is_scored_by_float32(final):
    model, oracle, x, y = misled()
    result = PGD(Linf(1e-4), steps=8, stop_at=1e9)(oracle, x, y, final=final)
    truth = model(result.x_adv)
    assert result.steps.tolist() == [1] * 16
    assert result.forward_calls.tolist() == [1] * 16
    assert torch.equal(result.misclassified, truth.argmax(1) != y)
    torch.testing.assert_close(result.logits, truth)
    torch.testing.assert_close(result.loss, F.cross_entropy(truth, y, reduction="none"))


def test_in_float32_nobody_is_asked_twice():
    model, _, x, y = misled()
    logged = Logged(model)
    result = PGD(Linf(0.3), steps=8, stop_on_success=True)(logged, x, y)
    assert result.misclassified.all()
    assert result.forward_calls.tolist() == [0] * 16
    assert sum(logged.log.rows) == int(result.gradient_calls.sum())
