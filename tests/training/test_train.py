"""Training: Algorithm 1 against a plain loop, warm starts, and what training leaves alone."""

import copy
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import innermax as im
from innermax.data.augmentation import augment
from innermax.data.streaming import ORDER
from innermax.objectives import cross_entropy
from innermax.training import batch_attack
from innermax.training.options import TrainingOptions
from innermax.utils import randomness
from tests.helpers.networks import same
from tests.helpers.oracles import batch
from tests.helpers.training import (
    ATTACK,
    DATA,
    LINF,
    VALIDATION,
    Interrupting,
    cnn,
    ctrl_c,
    distance,
    examples,
    mlp,
    recipe,
    stop,
    timeless,
    train,
    weights,
)


def fosc(x, point, gradient, eps, gauge):
    """max ⟨x' − point, gradient⟩, over the ball by the paper's closed form, or over ball and pixel bounds together."""
    x, point, gradient = x.flatten(1), point.flatten(1), gradient.flatten(1)
    if gauge == "ball":
        return eps * gradient.abs().sum(1) - ((point - x) * gradient).sum(1)
    high, low = (x + eps).clamp(max=1), (x - eps).clamp(min=0)
    return torch.where(gradient > 0, gradient * (high - point), gradient * (low - point)).sum(1)


def controlled_pgd(model, x, y, start, threshold, steps, size, eps, gauge):
    """Algorithm 1's inner loop on the whole batch, an element of V becoming 0 once FOSC ≤ c_t; points, calls, FOSC."""

    def gradient(point):
        point = point.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)[0]

    point, active = start, torch.ones(len(y), dtype=torch.bool)
    calls = torch.zeros(len(y))
    for step in range(steps):
        slope = gradient(point)
        calls += active
        if threshold is not None and step > 0:
            active = active & (fosc(x, point, slope, eps, gauge) > threshold)
        moved = point + size * slope.sign()
        moved = torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1)
        point = torch.where(active[:, None, None, None], moved, point)
    return point, calls, fosc(x, point, gradient(point), eps, "exact")


def reference(model, thresholds, *, steps, eps, gauge, batch_size, lr, drops, momentum, decay, seed):
    """Algorithm 1 in plain PyTorch, an epoch for each of the thresholds, with SGD written out."""
    images, labels = DATA[0] / 255, DATA[1]
    parameters = list(model.parameters())
    velocity, rows = [torch.zeros_like(p) for p in parameters], []
    for epoch, threshold in enumerate(thresholds):
        row, measured = {"gradients": 0.0, "loss": 0.0, "accuracy": 0.0, "fosc": 0.0}, []
        order = randomness.permutation(seed, len(labels), ORDER, epoch)
        for index in order.split(batch_size):
            x, y = images[index], labels[index]
            draws = randomness.derive_seed(seed, batch_attack._ATTACK, epoch)
            start = LINF.around(x).sample(randomness.hash_keys(draws, index, 0))  # of the first and only restart
            model.eval()
            x_adv, calls, gauges = controlled_pgd(model, x, y, start, threshold, steps, eps / 4, eps, gauge)
            model.train()
            logits = model(x_adv)
            loss = F.cross_entropy(logits, y)
            slopes = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, slope, v in zip(parameters, slopes, velocity, strict=True):
                    v.mul_(momentum).add_(slope + decay * p)
                    p -= lr * 0.1 ** sum(epoch >= drop for drop in drops) * v
            share = len(y) / len(labels)
            row["gradients"] += float(calls.mean()) * share
            row["fosc"] += float(gauges.mean()) * share
            measured += gauges.tolist()
            row["loss"] += float(loss.detach()) * share
            row["accuracy"] += float((logits.argmax(1) == y).float().mean()) * share
        rows.append(row | {"fosc_percentiles": np.quantile(measured, np.arange(101) / 100).tolist()})
    return rows


@pytest.mark.parametrize("network", [mlp, cnn])
@pytest.mark.parametrize(("gauge", "c_max"), [("exact", 0.1), ("ball", None), ("exact", "standard")])
def test_algorithm_1(network, gauge, c_max):
    epochs = 5
    attack = im.PGD(LINF, steps=6, gauge=gauge)
    start = 0.5 if c_max is None else c_max
    strategy = im.Standard(attack) if c_max == "standard" else im.Dynamic(attack, c_max, zero_at=4 / 5)
    thresholds = [None] * epochs if c_max == "standard" else [max(start - t * start / 4, 0) for t in range(epochs)]
    options = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01, "lr_drops": (0.4, 0.8), "seed": 7}
    run = train(network(), strategy=strategy, epochs=epochs, **options)
    expected = network()
    rows = reference(
        expected,
        thresholds,
        steps=6,
        eps=0.2,
        gauge=gauge,
        batch_size=8,
        lr=0.1,
        drops=(2, 4),
        momentum=0.8,
        decay=0.01,
        seed=7,
    )
    assert distance(weights(run.model), weights(network())) > 0.01
    assert distance(weights(run.model), weights(expected)) < 1e-5
    for row, plain, threshold in zip(run.history, rows, thresholds, strict=True):
        assert row["threshold"] == (None if threshold is None else pytest.approx(threshold))
        for name, value in plain.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    costs = [row["gradients"] for row in run.history]
    assert costs[-1] == 6
    assert (2 <= costs[0] < 6) == (c_max != "standard")


@pytest.mark.parametrize("floor", [None, 0.4])
@pytest.mark.parametrize("moved", [{}, {"shift": 1, "flip": True}])
def test_a_warm_start_goes_on_where_the_epoch_before_ended(floor, moved):
    """The same loop, each batch handed the perturbations that the test itself kept from the epoch before."""
    strategy, shown = im.WarmStart(ATTACK, floor=floor), []

    def objective(model, x, y, x_adv, epoch):
        shown.append((x, y, x_adv))
        return cross_entropy(model, x, y, x_adv, epoch)

    run = train(strategy=strategy, objective=objective, epochs=3, lr=0.05, **moved)
    model, kept, calls = mlp(), torch.zeros(len(DATA[1]), 1, 6, 6), []
    schedule = TrainingOptions(strategy, lr=0.05)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4)
    for number, (x, y, x_adv) in enumerate(shown):
        epoch, batch = divmod(number, 3)
        index = randomness.permutation(0, 24, ORDER, epoch).split(8)[batch]
        keys = randomness.hash_keys(0, index, batch_attack._AUGMENT, epoch)
        start = None
        if epoch > 0:
            start = x + augment(kept[index], keys, **moved)
        seed = randomness.derive_seed(0, batch_attack._ATTACK, epoch)
        found = strategy.attack_at(0.0)(model.eval(), x, y, seed=seed, index=index, start=start)
        calls += (found.gradient_calls - (found.steps == 2).long()).tolist()  # the test's last gradient is not paid for
        torch.testing.assert_close(x_adv, found.x_adv, rtol=0, atol=1e-3)
        kept[index] = augment(found.x_adv - x, keys, **moved, back=True).half().float()
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x_adv), y).backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at((number + 1) / 9)
    costs = [row["gradients"] for row in run.history]
    assert costs == pytest.approx([sum(calls[24 * epoch : 24 * epoch + 24]) / 24 for epoch in range(3)], abs=0.05)
    assert (costs == [2, 2, 2]) == (floor is None)


def test_warm_starts_survive_an_interruption(tmp_path):
    options = {"strategy": im.WarmStart(ATTACK), "epochs": 4, "shift": 1, "flip": True}
    straight = train(**options)
    for at in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            train(objective=Interrupting(at, ctrl_c), run_dir=tmp_path / "run", **options)
    again = train(mlp(5), objective=Interrupting(), run_dir=tmp_path / "run", **options)
    assert same(weights(again.model), weights(straight.model))
    assert timeless(again.history) == timeless(straight.history)


def test_the_loss_falls_and_the_network_learns():
    run = train(strategy=im.Standard(im.PGD(im.Linf(0.05), 3)), validation_set=VALIDATION, epochs=20, lr=0.1)
    assert run.history[-1]["loss"] < 0.8 * run.history[0]["loss"]
    assert run.history[-1]["accuracy"] > 0.6
    assert run.history[-1]["validation_clean"] > 0.8
    assert not run.model.training


def test_batches_cover_every_example_once_an_epoch_in_a_new_order():
    seen = []

    def objective(model, x, y, x_adv, epoch):
        seen.append((epoch, x.clone()))
        assert torch.equal(x, x_adv)
        return cross_entropy(model, x, y, x_adv, epoch)

    train(data=examples(22), epochs=2, objective=objective)
    assert [len(x) for _, x in seen] == [8, 7, 7] * 2  # never more than one apart
    assert [epoch for epoch, _ in seen] == [0] * 3 + [1] * 3
    first, second = (torch.cat([x for told, x in seen if told == epoch]) for epoch in (0, 1))
    assert not torch.equal(first, second)
    whole = examples(22)[0].div(255)
    for passed in (first, second):
        assert sorted(map(str, passed.flatten(1).tolist())) == sorted(map(str, whole.flatten(1).tolist()))


@dataclass(frozen=True)
class Own:
    """A user's strategy: only what the documentation asks for."""

    attack: im.PGD

    def attack_at(self, progress, history=()):
        assert [row["epoch"] for row in history] == list(range(round(progress * 3)))
        return self.attack if progress > 0.5 else None


def test_a_users_own_strategy_and_objective(untyped):
    def trades(model, x, y, x_adv, epoch):
        clean, attacked = model(x), model(x_adv)
        divergence = F.kl_div(attacked.log_softmax(1), clean.softmax(1), reduction="batchmean")
        return F.cross_entropy(clean, y) + 6 * divergence, attacked

    run = train(strategy=Own(ATTACK), objective=trades, epochs=3)
    assert [row["attack_steps"] for row in run.history] == [0, 0, 4]
    assert [row["gradients"] for row in run.history] == [0, 0, 4]


@pytest.mark.parametrize("gauge", ["exact", "relative", "ball"])
def test_the_automatic_c_max_is_the_median_gauge_halfway(gauge):
    attack, plain = im.PGD(LINF, steps=4, gauge=gauge), {"lr": 0.05, "momentum": 0.0, "weight_decay": 0.0}
    run = train(strategy=im.Dynamic(attack, "auto"), epochs=2, **plain)
    model = train(strategy=im.Standard(attack), epochs=2, objective=first_epoch_only, **plain).model
    x, y = DATA[0] / 255, DATA[1]
    half = im.PGD(LINF, steps=2, step_size=LINF.eps / 4)
    found = half(model, x, y)
    gauges = {"exact": found.fosc, "relative": found.relative_fosc}
    point = found.x_adv.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
    gauges["ball"] = fosc(x, found.x_adv, slope, 0.2, "ball")
    assert run.history[0]["halfway_gauge"] == pytest.approx(float(gauges[gauge].median()), rel=1e-4)


def first_epoch_only(model, x, y, x_adv, epoch):
    """Nothing is learned from the second epoch on."""
    loss, logits = cross_entropy(model, x, y, x_adv, epoch)
    return loss * (epoch == 0), logits


# What is left alone


def test_frozen_batch_norm_stays_frozen():
    model = cnn()
    model.train()
    model[1].eval()
    before = weights(model[1])
    ran = []
    model[1].register_forward_pre_hook(lambda module, _: ran.append(module.training))
    final = weights(train(model, strategy=im.Standard(ATTACK), epochs=2, validation_set=VALIDATION).model[1])
    assert not any(ran)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(final[name], before[name])
    assert not torch.equal(final["weight"], before["weight"])


def test_a_model_in_evaluation_mode_learns_in_training_mode():
    asleep, awake = train(cnn(0, 0.4).eval(), epochs=2), train(cnn(0, 0.4).train(), epochs=2)
    assert same(weights(asleep.model), weights(awake.model))
    assert int(asleep.model[1].num_batches_tracked) == 6
    assert not asleep.model.training


class Auxiliary(nn.Module):
    """Answers in training mode what a function makes of two classifiers' logits."""

    def __init__(self, answer):
        super().__init__()
        self.body, self.answer = cnn(0, 0.4), answer

    def forward(self, x):
        logits = self.body(x)
        return self.answer(logits, 2 * logits) if self.training else logits


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda z, aux: (z, aux), r"must return logits .* got tuple; .*output=0"),
        (lambda z, aux: {"aux": aux, "logits": z}, r"must return logits .* got dict; .*output='logits'"),
    ],
)
def test_auxiliary_answers_in_training_mode_are_refused_at_the_first_update(answer, words):
    model = Auxiliary(answer)
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(ValueError, match=f"^in training mode, the model {words}"):
        train(model, epochs=1)
    assert all(map(torch.equal, before, model.parameters()))


class Cut(nn.Module):
    """A network whose answers no gradient leaves, for one of the reasons that there are."""

    def __init__(self, how):
        super().__init__()
        self.network, self.how = mlp(), how

    def forward(self, x):
        match self.how:
            case "detached":
                return self.network(x).detach()
            case "no_grad":
                with torch.no_grad():
                    return self.network(x)
            case "inference mode":
                with torch.inference_mode():
                    return self.network(x)
            case "NumPy":
                return torch.from_numpy(self.network(x).detach().numpy() + 0)


@pytest.mark.parametrize("how", ["detached", "no_grad", "inference mode", "NumPy"])
@pytest.mark.parametrize("strategy", [im.Unsecured(), im.Standard(ATTACK)])
def test_a_model_that_passes_no_gradients_back_is_refused(tmp_path, how, strategy):
    with pytest.raises(ValueError, match="model must pass gradients back to its weights, got logits without a graph"):
        train(Cut(how), strategy=strategy, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_learn_is_refused(tmp_path):
    broken = mlp()
    with torch.no_grad():
        next(broken.parameters())[0] = float("nan")
    exported = torch.export.export(mlp(), (DATA[0][:2] / 255,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    for model, error, words in (
        (mlp().requires_grad_(False), ValueError, "weights that learn, got none that takes a gradient"),
        (broken, ValueError, "the model returns NaN logits for images of train_set"),
        (exported, TypeError, "must change between training and evaluation"),
    ):
        with pytest.raises(error, match=words):
            train(model, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_objective_without_a_gradient_is_refused(untyped):
    def detached(model, x, y, x_adv, epoch):
        loss, logits = cross_entropy(model, x, y, x_adv, epoch)
        return loss.detach(), logits

    with pytest.raises(ValueError, match="objective must return a loss that passes gradients back"):
        train(objective=detached)


def test_auxiliary_answers_are_left_out_by_a_wrapper():
    for answer, output in ((lambda z, aux: (z, aux), 0), (lambda z, aux: {"aux": aux, "logits": z}, "logits")):
        assert len(train(im.LogitsOnly(Auxiliary(answer), output), epochs=1).history) == 1


def test_an_objective_of_ones_own_takes_auxiliary_answers(untyped):
    def both(model, x, y, x_adv, epoch):
        logits, aux = model(x_adv)
        return F.cross_entropy(logits, y) + F.cross_entropy(aux, y), logits

    assert train(Auxiliary(lambda z, aux: (z, aux)), epochs=1, objective=both).history[0]["loss"] > 0


@pytest.mark.parametrize("objective", ["cross_entropy", Interrupting(2, stop)])
def test_global_random_states_are_untouched(untyped, objective):  # beartype draws from Python's
    model, options = recipe("float32")
    learner = model()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    try:
        train(learner, objective=objective, **options)
    except KeyboardInterrupt:
        assert objective != "cross_entropy"
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_frozen_layer_is_unchanged(optimizer):
    model = mlp()
    F.cross_entropy(model(DATA[0] / 255), DATA[1]).backward()  # gradients of its past
    model[1].requires_grad_(False)
    before = weights(model)
    options = {"optimizer": optimizer, "weight_decay": 0.1, "ema": 0.5, "lr": 0.1}
    run = train(model, strategy=im.Standard(ATTACK), epochs=2, **options)
    for final in (weights(model), weights(run.model)):
        assert torch.equal(final["1.weight"], before["1.weight"])
        assert not torch.equal(final["3.weight"], before["3.weight"])
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_old_gradients_do_not_count():
    model = mlp()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    assert same(weights(train(model, epochs=1).model), weights(train(epochs=1).model))


def test_augmentation_belongs_to_the_example_and_the_epoch():
    def shown(**options):
        seen = []

        def objective(model, x, y, x_adv, epoch):
            seen.append(x)
            return cross_entropy(model, x, y, x_adv, epoch)

        train(epochs=2, objective=objective, **options)
        return torch.cat(seen)

    plain, moved = shown(), shown(shift=2, flip=True)
    assert (plain != moved).flatten(1).any(1).float().mean() > 0.7
    assert not torch.equal(shown(shift=2, flip=True, seed=1), moved)
    assert torch.equal(shown(shift=2, flip=True, batch_size=5), moved)
    flipped = shown(flip=True)
    stays = (flipped == plain).flatten(1).all(1)
    assert torch.equal(flipped[~stays], plain[~stays].flip(-1))
    # Half of the examples in every epoch, and not the same ones.
    kept = [{str(x.tolist()) for x in plain[epoch][stays[epoch]]} for epoch in (slice(24), slice(24, 48))]
    assert all(5 < len(images) < 19 for images in kept)
    assert kept[0] != kept[1]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_whose_first_gradient_comes_later_than_others(optimizer):
    """As torch's plain optimisers; its fused SGD fails on them."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.late, self.count = nn.Linear(72, 4), nn.Linear(72, 4), 0

        def forward(self, x):
            self.count += self.training
            x = x.flatten(1)
            return self.head(x) + self.late(x) if self.count > 2 else self.head(x)

    x, y = batch(8)
    torch.manual_seed(0)
    model = Late()
    twin = copy.deepcopy(model)
    options = {"epochs": 5, "batch_size": 8, "lr": 0.1, "lr_schedule": "constant", "weight_decay": 0.0}
    im.train(model, (x, y), im.Unsecured(), optimizer=optimizer, progress=False, precision="float32", **options)
    plain = {
        "sgd": lambda: torch.optim.SGD(twin.parameters(), 0.1, 0.9),
        "adamw": lambda: torch.optim.AdamW(twin.parameters(), 0.1, weight_decay=0.0),
    }[optimizer]()
    for _ in range(5):
        plain.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        plain.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
