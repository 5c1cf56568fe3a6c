"""Training: Algorithm 1 against a plain loop, the same numbers after any interruption, and folders that can be read."""

import functools
import itertools
import json
import math
import os
import random
import signal
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import innermax as im
from innermax.data.augmentation import augment
from innermax.data.streaming import ORDER
from innermax.objectives import cross_entropy
from innermax.oracle.oracle import Oracle
from innermax.training import loop, run_folder
from innermax.training import train as training
from innermax.training.checkpoints import find_checkpoints
from innermax.training.metrics import warn_of_fosc
from innermax.training.optimizer import learning_rate
from innermax.training.options import TrainingOptions
from innermax.utils import randomness
from innermax.utils.files import load_tensors, read_config

LINF = im.Linf(0.2)
ATTACK = im.PGD(LINF, steps=4)
QUIET = {"batch_size": 8, "precision": "float32", "progress": False}


def examples(count=24, seed=1, classes=3):
    """Noisy bright bars, each class's in its own rows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    images = torch.randint(0, 160, (count, 1, 6, 6), generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * int(label) : 2 * int(label) + 2] += 95
    return images.to(torch.uint8), labels


DATA, VALIDATION = examples(), examples(16, seed=2)


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 3))


def cnn(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 3)
    )


def train(model=None, data=DATA, strategy=None, **options):
    return im.train(mlp() if model is None else model, data, strategy or im.Unsecured(), **QUIET | options)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def distance(one, other):
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def timeless(history):
    """The rows without what a clock says."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in history]


def saved(folder):
    """Tensors and position of the newest state."""
    tensors, meta = load_tensors(find_checkpoints(folder)[0])
    return tensors, meta["position"]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


# Algorithm 1


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
            draws = randomness.derive_seed(seed, loop._ATTACK, epoch)
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
        keys = randomness.hash_keys(0, index, loop._AUGMENT, epoch)
        start = None
        if epoch > 0:
            start = x + augment(kept[index], keys, **moved)
        seed = randomness.derive_seed(0, loop._ATTACK, epoch)
        found = strategy.attack_at(0.0)(model.eval(), x, y, seed=seed, index=index, start=start)
        calls += (found.gradient_calls - (found.steps == 2).long()).tolist()  # the test's last gradient is not paid for
        torch.testing.assert_close(x_adv, found.x_adv, rtol=0, atol=1e-3)
        kept[index] = augment(found.x_adv - x, keys, **moved, back=True).half().float()
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x_adv), y).backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((number + 1) / 9, schedule)
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


# The same numbers


def recipe(kind, network=cnn):
    """Everything that has a state: momentum, averages, dropout, augmentation, measured strategies."""
    options = {"epochs": 3, "lr": 0.1, "seed": 5, "validation_set": VALIDATION, "shift": 1, "flip": True}
    model = functools.partial(network, dropout=0.4)
    strategies = {"dynamic": im.Dynamic(ATTACK, "auto", zero_at=0.9), "curriculum": im.Curriculum(ATTACK, patience=1)}
    strategy = strategies.get(kind, im.Standard(replace(ATTACK, steps=2)))
    if kind in ("float32", "bf16"):
        options |= {"precision": kind, "ema": 0.8, "clip": 0.5, "lr_schedule": "cosine"}
    if kind == "dynamic":
        options |= {"optimizer": "adamw", "lr": 0.01}
    return model, {"strategy": strategy} | options


KINDS = ["float32", "bf16", "dynamic", "curriculum"]


class Interrupting:
    """Cross-entropy; at its call number `at`, before or after the forward pass, `act` happens."""

    def __init__(self, at=None, act=None, after=False):
        self.at, self.act, self.after, self.calls = at, act, after, 0

    def __call__(self, model, x, y, x_adv, epoch):
        self.calls += 1
        if self.calls == self.at and not self.after:
            self.act()
        found = cross_entropy(model, x, y, x_adv, epoch)
        if self.calls == self.at and self.after:
            self.act()
        return found


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def ctrl_c_twice():
    ctrl_c()
    ctrl_c()


def stop():
    raise KeyboardInterrupt


@functools.cache
def straight(kind):
    """An uninterrupted run: its weights, its history."""
    model, options = recipe(kind)
    run = train(model(), objective=Interrupting(), **options)
    return weights(run.model), timeless(run.history)


def test_one_seed_one_result():
    model, options = recipe("float32")
    final, history = straight("float32")
    torch.manual_seed(99)
    again = train(model(), objective=Interrupting(), **options)
    assert same(weights(again.model), final)
    assert timeless(again.history) == history
    other = train(model(), objective=Interrupting(), **options | {"seed": 6})
    assert not same(weights(other.model), final)


def test_bf16_is_another_arithmetic():
    assert distance(straight("float32")[0], straight("bf16")[0]) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("at", "position"), [(3, (0, 3)), (5, (1, 2)), (7, (2, 1))])
def test_ctrl_c_in_an_epoch_and_the_same_call_again(tmp_path, kind, at, position):
    model, options = recipe(kind)
    final, history = straight(kind)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(model(), objective=Interrupting(at, ctrl_c), run_dir=tmp_path / "run", **options)
    assert signal.getsignal(signal.SIGINT) is before
    _, state = saved(tmp_path / "run")
    assert (state["epoch"], state["batch"]) == position  # the batch ended whole, and no other began
    resumed = train(model(9), objective=Interrupting(), run_dir=tmp_path / "run", **options)
    assert same(weights(resumed.model), final)
    assert timeless(resumed.history) == history
    assert resumed.history[position[0]]["seconds"] >= round(state["seconds"], 3) > 0
    assert [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == list(
        resumed.history
    )


@pytest.mark.parametrize("act", [stop, ctrl_c_twice])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [2, 5])
def test_an_update_that_is_torn_comes_again_whole(tmp_path, act, after, at):
    model, options = recipe("float32")
    final, history = straight("float32")
    learner = model()
    with pytest.raises(KeyboardInterrupt):
        train(learner, objective=Interrupting(at, act, after), run_dir=tmp_path / "run", **options)
    _, state = saved(tmp_path / "run")
    assert (state["epoch"], state["batch"]) == (at // 3, 0)  # nothing torn was saved
    # The same network goes on, as in a notebook: what the torn update left in it must not matter.
    resumed = train(learner, objective=Interrupting(), run_dir=tmp_path / "run", **options)
    assert same(weights(resumed.model), final)
    assert timeless(resumed.history) == history


@dataclass(frozen=True)
class Halting:
    """A strategy that stops the training when it is asked for the second time."""

    attack: im.PGD

    def attack_at(self, progress, history=()):
        if history and not halted:
            halted.append(progress)
            raise KeyboardInterrupt
        return self.attack


halted = []


def test_a_strategy_that_interrupts(tmp_path, untyped):
    model, options = recipe("float32")
    options["strategy"] = Halting(ATTACK)
    halted.append(0.0)
    whole = train(model(), **options)
    halted.clear()
    with pytest.raises(KeyboardInterrupt):
        train(model(), run_dir=tmp_path / "run", **options)
    assert halted == [1 / 3]
    resumed = train(model(), run_dir=tmp_path / "run", **options)
    assert same(weights(resumed.model), weights(whole.model))
    assert timeless(resumed.history) == timeless(whole.history)


def test_what_the_strategies_measured_survives(tmp_path):
    _, dynamic = straight("dynamic")
    assert dynamic[0]["halfway_gauge"] > 0
    assert [row["threshold"] for row in dynamic] == pytest.approx(
        [None, dynamic[0]["halfway_gauge"] * (1 - 1 / 2.7), dynamic[0]["halfway_gauge"] * (1 - 2 / 2.7)]
    )
    assert dynamic[0]["gradients"] == dynamic[0]["attack_steps"] > 1
    assert all("halfway_gauge" not in row for row in dynamic[1:])
    _, curriculum = straight("curriculum")
    levels = [row["attack_steps"] for row in curriculum]
    assert levels[0] == 0


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


def test_a_crash_at_any_write_loses_nothing(tmp_path, monkeypatch):
    options = {"epochs": 2, "validation_set": VALIDATION, "lr": 0.3, "momentum": 0.0}
    whole = train(run_dir=tmp_path / "whole", **options)
    written = []
    sync = os.fsync
    for crash in itertools.count():
        folder, left = tmp_path / str(crash), [crash]

        def fsync(number, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise OSError("disk full")
            sync(number)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                train(run_dir=folder, **options)
                break
            except OSError:
                pass
        run = train(run_dir=folder, **options)
        assert timeless(run.history) == timeless(whole.history)
        for name in ("model.safetensors", "best.safetensors", "config.yaml"):
            assert contents(folder)[name] == contents(tmp_path / "whole")[name], (crash, name)
        assert contents(folder).keys() == contents(tmp_path / "whole").keys()
        written.append(crash)
    assert len(written) >= 8


def test_ctrl_c_after_the_last_batch_is_not_forgotten(tmp_path, monkeypatch):
    validated = training._validate

    def interrupted(*arguments):
        ctrl_c()
        return validated(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(epochs=1, validation_set=VALIDATION, run_dir=tmp_path / "run")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert len(train(epochs=1, validation_set=VALIDATION, run_dir=tmp_path / "run").history) == 1


def test_outside_the_main_thread():
    found = []
    worker = threading.Thread(target=lambda: found.append(train(epochs=1)))
    worker.start()
    worker.join()
    assert same(weights(found[0].model), weights(train(epochs=1).model))


# Run folders


def turning(model, x, y, x_adv, epoch):
    """Learns for two epochs, then unlearns."""
    loss, logits = cross_entropy(model, x, y, x_adv, epoch)
    return (loss if epoch < 2 else -0.5 * loss), logits


BARE = {"lr": 0.3, "momentum": 0.0, "lr_schedule": "constant"}


@pytest.mark.filterwarnings("ignore:FOSC is")  # it turns away from a minimum: the loss has none
def test_a_run_folder(tmp_path):
    options = BARE | {"validation_set": VALIDATION, "validation_attack": ATTACK, "objective": turning}
    torch.manual_seed(0)  # from other weights it may turn away as far as numbers go
    model = im.build_model("digits-cnn", num_classes=3, input_shape=(1, 6, 6))
    start = weights(model)
    run = train(model, strategy=im.Standard(ATTACK), epochs=5, run_dir=str(tmp_path / "run"), **options)
    folder = tmp_path / "run"
    names = ("config.yaml", "environment.json", "metrics.jsonl", "model.safetensors", "best.safetensors", "config.json")
    kept = {f"checkpoints/epoch-00000{epoch}-batch-00000000.safetensors" for epoch in (4, 5)}
    assert set(contents(folder)) == {*names, *kept}
    assert run.run_dir == folder
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(run.history)
    assert [row["epoch"] for row in rows] == list(range(5))
    numbers = {"loss", "accuracy", "lr", "attack_steps", "threshold", "gradients", "fosc", "zero_gradients"}
    numbers |= {"fosc_percentiles", "relative_fosc_percentiles", "ball_fosc_percentiles"}
    numbers |= {"validation_clean", "validation_robust", "validation_fosc"}
    others = {"epoch", "attack_network", "validation_accuracy", "seconds", "images_per_second"}
    assert all(row.keys() == numbers | others for row in rows)
    for row in rows:
        assert row["attack_network"].startswith("3 BatchNorm folded, channels last, ")
        assert row["validation_accuracy"] == row["validation_robust"] <= row["validation_clean"]
        for name in ("fosc_percentiles", "relative_fosc_percentiles", "ball_fosc_percentiles"):
            assert len(row[name]) == 101
            assert row[name] == sorted(row[name])
        assert row["fosc_percentiles"][0] <= row["fosc"] <= row["fosc_percentiles"][-1]
        assert row["relative_fosc_percentiles"][-1] <= 1
        assert all(
            ball >= exact * (1 - 1e-4)
            for ball, exact in zip(row["ball_fosc_percentiles"], row["fosc_percentiles"], strict=True)
        )
    # The last model and the best, the first of equals.
    assert same(weights(im.load_model(folder)), weights(run.model))
    scores = [row["validation_robust"] for row in rows]
    best = scores.index(max(scores))
    assert best < 4
    assert run.best == rows[best]
    assert scores[4] < scores[best]
    other = im.build_model("digits-cnn", num_classes=3, input_shape=(1, 6, 6))
    other.load_state_dict(start)
    short = train(other, strategy=im.Standard(ATTACK), epochs=best + 1, **options)
    assert same(weights(im.load_model(folder / "best.safetensors")), weights(short.model))
    evaluated = im.evaluate(run.model, VALIDATION, {"attack": ATTACK}).accuracy
    assert (rows[4]["validation_clean"], rows[4]["validation_robust"]) == (
        evaluated["clean"].value,
        evaluated["attack"].value,
    )
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["training"]["strategy"]["attack"]["threat"]["eps"] == 0.2
    assert config["training"]["objective"] == "turning"
    assert config["training"]["lr"] == 0.3
    assert config["model"]["model"] == "digits-cnn"
    assert config["examples"] == {"train": 24, "validation": 16}


def test_a_finished_run_returns_at_once(tmp_path):
    run = train(epochs=2, run_dir=tmp_path / "run", ema=0.5)
    before = contents(tmp_path / "run")

    again = train(mlp(9), epochs=2, run_dir=tmp_path / "run", ema=0.5)
    assert same(weights(again.model), weights(run.model))
    assert again.history == run.history
    assert contents(tmp_path / "run") == before
    assert not again.model.training
    assert again.best is None
    assert "best.safetensors" not in before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.02}, r"training\.lr: 0\.01 there, 0\.02 here"),
        ({"epochs": 3}, r"training\.epochs: 2 there, 3 here"),
        ({"seed": 1}, r"training\.seed: 0 there, 1 here"),
        ({"ema": 0.9}, r"training\.ema: None there, 0\.9 here"),
        ({"strategy": im.Standard(ATTACK)}, r"training\.strategy\.name: Unsecured there, Standard here"),
        ({"objective": "loss_weighted"}, r"training\.objective: cross_entropy there, loss_weighted here"),
        ({"validation_set": VALIDATION}, r"examples\.validation: 0 there, 16 here"),
        ({"data": examples(23)}, r"examples\.train: 24 there, 23 here"),
        ({"settings": {"data": "mnist"}}, r"settings\.data: None there, mnist here"),
        ({"model": im.build_model("digits-cnn", num_classes=3, input_shape=(1, 6, 6))}, "model: Sequential there"),
    ],
)
def test_another_configuration_is_refused(tmp_path, change, words):
    folder = run_folder.open_folder(tmp_path / "run", first_configuration(), False)
    (folder / "notes.txt").write_text("dear")
    before = contents(folder)
    with pytest.raises(ValueError, match=rf"run_dir .*run belongs to another configuration \(.*{words}"):
        train(**{"epochs": 2, "run_dir": folder} | change)
    assert contents(folder) == before


@functools.cache
def first_configuration():
    """The configuration of `train(epochs=2)`."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as name:
        train(epochs=2, run_dir=Path(name) / "run")
        return read_config(Path(name) / "run")


def test_a_foreign_folder_is_refused_and_overwrite_keeps_what_is_not_the_runs(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists and holds no run of innermax"):
            train(epochs=1, run_dir=tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {"thesis.tex": b"dear"}
    folder = tmp_path / "run"
    train(epochs=2, run_dir=folder, validation_set=VALIDATION)
    (folder / "thesis.tex").write_text("dear")
    (folder / "evaluation.json").write_text("{}")
    run = train(epochs=1, run_dir=folder, overwrite=True)
    assert len(run.history) == 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert (folder / "thesis.tex").read_text() == "dear"
    assert not any((folder / name).exists() for name in ("best.safetensors", "evaluation.json"))
    assert same(weights(run.model), weights(train(epochs=1).model))


def test_bad_arguments_never_cost_the_old_run(tmp_path):
    train(epochs=1, run_dir=tmp_path / "run")
    before = contents(tmp_path / "run")
    bad = [
        {"data": (DATA[0], DATA[1] + 1)},
        {"validation_set": (DATA[0], DATA[1] + 1)},
        {"validation_set": (DATA[0][..., :5], DATA[1])},
        {"shift": 6},
        {"device": "cuda:99"},
        {"lr": -1.0},
    ]
    for options in bad:
        for folder in (tmp_path / "run", tmp_path / "new"):
            with pytest.raises(ValueError):
                train(**{"epochs": 2, "run_dir": folder, "overwrite": True} | options)
    assert contents(tmp_path / "run") == before
    assert not (tmp_path / "new").exists()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(epochs=2, run_dir=tmp_path / "run", logger="tensorboard", validation_set=VALIDATION)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"loss", "accuracy", "lr", "gradients", "validation_clean"} <= set(events.Tags()["scalars"])
    for name in ("loss", "validation_clean"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(row["epoch"], pytest.approx(row[name])) for row in run.history]
    train(epochs=1, run_dir=tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "tensorboard").exists()
    with pytest.raises(ValueError, match="logger 'tensorboard' writes into the run folder: give run_dir"):
        train(epochs=1, logger="tensorboard")


# What is measured


def counted(monkeypatch):
    """How many gradients the oracles are asked for, an example each."""
    asked, gradient = [0], Oracle.gradient

    def counting(self, x, label, loss):
        asked[0] += len(x)
        return gradient(self, x, label, loss)

    monkeypatch.setattr(Oracle, "gradient", counting)
    return asked


@pytest.mark.parametrize(
    ("strategy", "gradients"),
    [
        (im.Unsecured(), 0),
        (im.Standard(ATTACK), 4),
        (im.Standard(im.FGSM(LINF)), 1),
        (im.Standard(replace(ATTACK, steps=3, restarts=2)), 6),
        (im.Dynamic(ATTACK, 1e6), 2),  # one step, and the gradient that finds it good enough
        (im.Dynamic(replace(ATTACK, gauge="relative"), 0.2), None),
        (im.Standard(replace(ATTACK, stop_on_success=True, restarts=2)), None),
    ],
)
def test_gradients_are_counted_honestly(monkeypatch, strategy, gradients):
    monkeypatch.setattr(loop, "_GAUGED_BATCHES", 1)
    asked = counted(monkeypatch)
    run = train(strategy=strategy, epochs=1)
    row = run.history[0]
    # One of the three batches was gauged besides: a gradient an example more.
    assert row["gradients"] * 24 == asked[0] - 8 * (strategy != im.Unsecured())
    if gradients is None:
        assert 0 < row["gradients"] < 8
        assert row["gradients"] % 1 != 0
    else:
        assert row["gradients"] == gradients
    assert ("fosc" in row) == (strategy != im.Unsecured())


def test_a_gauge_that_cannot_be_measured_is_null(tmp_path):
    # An example that has fallen has no gradient under C&W; here all of them have.
    fallen = (VALIDATION[0], (mlp().eval()(VALIDATION[0] / 255).argmax(1) + 1) % 3)
    options = {"lr": 1e-9, "validation_set": fallen, "validation_attack": im.CW(LINF, steps=2)}
    run = train(epochs=1, run_dir=tmp_path / "run", **options)
    assert run.history[0]["validation_fosc"] is None
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["validation_fosc"] is None


def test_validation_only_watches():
    runs_ = [train(strategy=im.Standard(ATTACK), epochs=2, validation_set=s) for s in (None, VALIDATION, examples(9))]
    finals = [weights(run.model) for run in runs_]
    assert same(finals[0], finals[1])
    assert same(finals[0], finals[2])
    scored = [run.history[-1] for run in runs_]
    assert "validation_accuracy" not in scored[0]
    assert scored[1]["validation_clean"] == pytest.approx(
        float((runs_[1].model(VALIDATION[0] / 255).argmax(1) == VALIDATION[1]).float().mean())
    )


@pytest.mark.parametrize(("strategy", "robust"), [(im.Unsecured(), False), (im.Curriculum(ATTACK), True)])
def test_the_validation_attack_is_the_strategys_own_in_full(strategy, robust):
    run = train(strategy=strategy, epochs=1, validation_set=VALIDATION)
    row = run.history[0]
    assert ("validation_robust" in row) == robust
    accuracy = im.evaluate(run.model, VALIDATION, {"attack": ATTACK}).accuracy["attack" if robust else "clean"].value
    assert row["validation_accuracy"] == accuracy


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


def test_interrupting_leaves_the_learner_in_training_mode():
    model = cnn()
    model.train()
    model[1].eval()
    with pytest.raises(KeyboardInterrupt):
        train(model, epochs=1, objective=Interrupting(2, stop), validation_set=VALIDATION)
    assert model.training
    assert not model[1].training


# The outer step's options


def recorded(model, seen):
    """Cross-entropy that notes the weights before each update."""

    def objective(wrapped, x, y, x_adv, epoch):
        seen.append(weights(model))
        return cross_entropy(wrapped, x, y, x_adv, epoch)

    return objective


def steps_taken(**options):
    """Weights before and after each update."""
    model, seen = cnn(), []
    run = train(model, objective=recorded(model, seen), **options)
    return run, [*seen, weights(model)]


def length(before, after, names):
    return math.sqrt(sum(float((after[name] - before[name]).double().square().sum()) for name in names))


def test_clip():
    names = [name for name, _ in cnn().named_parameters()]
    bare = {"momentum": 0.0, "weight_decay": 0.0, "lr_schedule": "constant", "epochs": 1, "lr": 0.5}
    _, free = steps_taken(**bare)
    _, clipped = steps_taken(**bare, clip=0.01)
    assert length(free[0], free[1], names) > 0.5 * 0.02
    for before, after in itertools.pairwise(clipped):
        assert length(before, after, names) == pytest.approx(0.5 * 0.01, rel=1e-3)
    _, loose = steps_taken(**bare, clip=1e6)
    assert all(same(one, other) for one, other in zip(free, loose, strict=True))
    # The same direction, only shorter.
    ratio = length(free[0], free[1], names) / 0.005
    for name in names:
        torch.testing.assert_close(
            (clipped[1][name] - free[0][name]) * ratio, free[1][name] - free[0][name], rtol=1e-3, atol=1e-5
        )


def test_ema_is_what_is_evaluated_and_saved(tmp_path):
    options = {"epochs": 2, "lr": 0.2, "validation_set": VALIDATION}
    _, seen = steps_taken(**options)
    run, averaged_seen = steps_taken(**options, ema=0.7, run_dir=tmp_path / "run")
    assert not run.model.training
    assert all(same(one, other) for one, other in zip(seen, averaged_seen, strict=True))  # the learner does not notice
    average = {name: value.double() for name, value in seen[1].items()}
    for after in seen[2:]:
        average = {name: 0.7 * average[name] + 0.3 * after[name].double() for name in average}
    found = weights(run.model)
    for name, value in average.items():
        if value.shape:  # but for the count of batches
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)
    assert distance(found, seen[-1]) > 1e-3
    saved = cnn(9)
    im.load_model(tmp_path / "run", saved)
    assert same(weights(saved), found)
    clean = im.evaluate(run.model, VALIDATION, {}).accuracy["clean"].value
    assert run.history[-1]["validation_clean"] == clean
    learner = cnn()
    assert train(learner, epochs=1, ema=0.7).model is not learner
    assert not learner.training


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, lambda t: 1 if t < 0.4 else 0.1 if t < 0.8 else 0.01),
        ({"lr_drops": (0.3, 0.5, 0.6)}, lambda t: 0.1 ** sum(t >= drop for drop in (0.3, 0.5, 0.6))),
        ({"lr_drops": ()}, lambda t: 1),
        ({"lr_schedule": "cosine"}, lambda t: (1 + math.cos(math.pi * t)) / 2),
        ({"lr_schedule": "constant"}, lambda t: 1),
    ],
)
def test_learning_rates_at_every_update(options, share):
    model, seen = mlp(), []

    def objective(wrapped, x, y, x_adv, epoch):
        seen.append(model[3].bias.detach().double().clone())
        return wrapped(x)[:, 0].mean(), torch.zeros(len(x), 3)  # its slope in the first bias is 1

    plain = {"momentum": 0.0, "weight_decay": 0.0, "lr": 0.5, "epochs": 10}
    run = train(model, objective=objective, **plain | options)
    seen.append(model[3].bias.detach().double())
    rates = [float(before[0] - after[0]) for before, after in itertools.pairwise(seen)]
    expected = [0.5 * share((update / 3) / 10 + 1e-12) for update in range(30)]
    assert rates == pytest.approx(expected, abs=2e-6)
    assert [row["lr"] for row in run.history] == pytest.approx(expected[::3])


def test_the_papers_learning_rates():
    options = TrainingOptions(im.Unsecured(), lr_drops=(20 / 50, 40 / 50))
    rates = [learning_rate(epoch / 50, options) for epoch in range(50)]
    assert rates == pytest.approx([0.01] * 20 + [0.001] * 20 + [0.0001] * 10)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizers(name):
    options = {"lr": 0.02, "weight_decay": 0.1, "lr_schedule": "constant", "epochs": 2}
    run = train(optimizer=name, **options)
    model = mlp()
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
        if name == "adamw"
        else torch.optim.SGD(model.parameters(), lr=0.02, weight_decay=0.1, momentum=0.9)
    )
    for epoch in range(2):
        for index in randomness.permutation(0, 24, ORDER, epoch).split(8):
            optimizer.zero_grad()
            F.cross_entropy(model(DATA[0][index] / 255), DATA[1][index]).backward()
            optimizer.step()
    assert distance(weights(run.model), weights(model)) < 1e-6


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


# What goes wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number(tmp_path, value):
    calls = itertools.count(1)

    def objective(model, x, y, x_adv, epoch):
        loss, logits = cross_entropy(model, x, y, x_adv, epoch)
        return loss * (value if next(calls) == 5 else 1), logits

    with pytest.raises(FloatingPointError, match=f"the loss is {value} in epoch 2, batch 2; lower lr"):
        train(epochs=3, objective=objective, run_dir=tmp_path / "run")
    tensors, state = saved(tmp_path / "run")
    assert (state["epoch"], state["batch"]) == (1, 0)
    whole = train(epochs=3, objective=objective, run_dir=tmp_path / "run")
    assert [row["epoch"] for row in whole.history] == [0, 1, 2]
    assert all(torch.isfinite(value).all() for value in tensors.values())


class Broken:
    """Cross-entropy on the attacked batch, spoilt in one of its calls."""

    def __init__(self, at, spoil):
        self.left, self.spoil, self.seen = at, spoil, []

    def __call__(self, model, x, y, x_adv, epoch):
        self.left -= 1
        self.seen.append(x)
        return cross_entropy(model, x, y, self.spoil(x_adv) if self.left == 0 else x_adv, epoch)


def nan_pixels(x):
    return x * math.nan


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_batch_that_is_left_out(tmp_path, clip):
    """The weights and BatchNorm's statistics are those of a training without that batch."""
    options = {"epochs": 2, "clip": clip, "lr": 0.1, "momentum": 0.0, "lr_schedule": "constant", "weight_decay": 0.0}
    broken = Broken(2, nan_pixels)
    run = train(cnn(), objective=broken, on_nan="skip", run_dir=tmp_path / "run", **options)
    assert [row.get("skipped_batches") for row in run.history] == [1, None]
    (told,) = map(json.loads, (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines())
    assert (told["epoch"], told["batch"]) == (0, 1)
    assert told["error"] == "the loss is nan in epoch 1, batch 2; lower lr"
    assert torch.equal(DATA[0][told["examples"]] / 255, broken.seen[1])
    known = weights(run.model)
    assert all(torch.isfinite(value).all() for value in known.values())
    other = cnn()
    learned = Broken(0, None)
    train(other, objective=learned, epochs=1, **{k: v for k, v in options.items() if k != "epochs"})
    batches = int(known["1.num_batches_tracked"])
    assert batches == 5, "six batches, one of them left out"
    assert int(weights(other)["1.num_batches_tracked"]) == 3


def test_a_stopped_run_names_the_examples(tmp_path):
    broken = Broken(2, nan_pixels)
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1, batch 2") as caught:
        train(cnn(), objective=broken, run_dir=tmp_path / "run")
    (told,) = map(json.loads, (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines())
    holds, lists = caught.value.__notes__
    assert holds == f"The batch holds examples {', '.join(map(str, told['examples']))}."
    assert str(tmp_path / "run" / "nonfinite.jsonl") in lists


def test_a_gradient_that_is_no_number_ends_the_run_without_clipping_too():
    def objective(model, x, y, x_adv, epoch):
        logits = model(x_adv)
        return (logits - logits.detach()).abs().sum().sqrt(), logits

    with pytest.raises(FloatingPointError, match="the gradient's norm is nan in epoch 1, batch 1"):
        train(objective=objective, epochs=1)


def test_where_every_batch_is_left_out_the_run_ends():
    def objective(model, x, y, x_adv, epoch):
        loss, logits = cross_entropy(model, x, y, x_adv, epoch)
        return loss * math.nan, logits

    with pytest.raises(FloatingPointError, match="all 3 batches of epoch 1 were skipped"):
        train(objective=objective, epochs=2, on_nan="skip")


def test_an_exploding_fosc_is_warned_of():
    quiet = {"epoch": 0, "loss": 1.0, "fosc": 0.2}
    with pytest.warns(UserWarning, match=r"FOSC is 20.1 on average in epoch 2, more than 10 times the loss"):
        warn_of_fosc({"epoch": 1, "loss": 2.0, "fosc": 20.1}, [quiet])
    for row in (
        {"epoch": 1, "loss": 2.1, "fosc": 20.1},
        {"epoch": 1, "loss": 0.1, "fosc": 1.9},
        {"epoch": 1, "loss": 1},
    ):
        warn_of_fosc(row, [quiet])
    warn_of_fosc({"epoch": 0, "loss": 1.0, "fosc": 100.0}, [])


@pytest.mark.parametrize("strategy", [im.Unsecured(), im.Standard(ATTACK)])
def test_a_learning_rate_that_diverges(strategy):
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) in epoch 1, batch [23]; lower lr"):
        train(strategy=strategy, lr=1e30, epochs=2)


def test_a_gradient_that_is_no_number():
    def objective(model, x, y, x_adv, epoch):
        logits = model(x_adv)
        return (logits - logits.detach()).abs().sum().sqrt(), logits  # 0, with an infinite slope

    with pytest.raises(FloatingPointError, match="the gradient's norm is nan in epoch 1, batch 1"):
        train(objective=objective, epochs=1, clip=1.0)


@pytest.mark.parametrize("name", ["data", "validation_set"])
def test_labels_outside_the_classes(tmp_path, name):
    told = {"data": "train_set", "validation_set": "validation_set"}[name]
    with pytest.raises(ValueError, match=rf"{told} labels must be in 0…2, got values from 1 to 3"):
        train(**{name: (DATA[0], DATA[1] + 1)}, epochs=1, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"optimizer": "sdg"}, ValueError, r"unknown optimizer 'sdg'; did you mean 'sgd'\?"),
        ({"lr_schedule": "drop"}, ValueError, r"unknown lr_schedule 'drop'; did you mean 'drops'\?"),
        ({"precision": "float16"}, ValueError, r"unknown precision 'float16'; did you mean 'float32'\?"),
        ({"logger": "tensorbord"}, ValueError, r"unknown logger 'tensorbord'; did you mean 'tensorboard'\?"),
        (
            {"objective": "cross-entropy"},
            ValueError,
            r"unknown objective 'cross-entropy'; did you mean 'cross_entropy'",
        ),
        ({"device": "cdua"}, ValueError, r"unknown device 'cdua'; did you mean 'cuda'\?"),
        ({"device": "meta"}, ValueError, "unknown device 'meta'"),
        (
            {"device": "cuda:99"},
            ValueError,
            "device must be cpu or one of the . CUDA devices that torch sees, got 'cuda:99'",
        ),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, r"epochs must be an integer, got 1\.5"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, ValueError, r"lr must be a finite number > 0, got 0\.0"),
        ({"lr": math.nan}, ValueError, "lr must be a finite number > 0, got nan"),
        ({"momentum": -0.1}, ValueError, r"momentum must be a finite number ≥ 0, got -0\.1"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay must be a finite number ≥ 0, got inf"),
        ({"clip": 0.0}, ValueError, r"clip must be a number > 0 or None, got 0\.0"),
        ({"clip": math.nan}, ValueError, "clip must be a number > 0 or None, got nan"),
        ({"ema": 1.0}, ValueError, r"ema must be a number in \(0, 1\) or None, got 1\.0"),
        ({"lr_drops": (20, 40)}, ValueError, r"lr_drops must be a sequence of numbers in \(0, 1\), got \(20, 40\)"),
        ({"seed": 1.5}, TypeError, r"seed must be an integer, got 1\.5"),
        ({"shift": 6}, ValueError, "shift must be in 0…5, got 6"),
        ({"strategy": ATTACK}, TypeError, r"strategy must have attack_at\(progress, history\), got PGD"),
        ({"data": [1, 2]}, TypeError, "a data set must be"),
        ({"data": examples(4, classes=2)[0]}, TypeError, "a data set must be"),
        ({"model": "mlp"}, TypeError, r"model must be a torch\.nn\.Module, got str"),
        ({"data": (DATA[0][..., :5], DATA[1])}, ValueError, r"the model fails on x of shape \(2, 1, 6, 5\)"),
    ],
)
def test_bad_arguments(untyped, options, kind, words):
    with pytest.raises(kind, match=words):
        train(**{"epochs": 1} | options)


def test_a_line_an_epoch_where_asked(capsys):
    train(strategy=im.Dynamic(ATTACK, 0.3), epochs=2, validation_set=VALIDATION, progress=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/2  loss ")
    assert "c_t 0.300" in lines[0]
    assert "c_t 0.120" in lines[1]
    assert all(word in lines[1] for word in ("FOSC", "gradients", "clean", "robust", "img/s"))
    train(epochs=1)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
