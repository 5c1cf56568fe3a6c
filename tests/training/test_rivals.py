"""The strategies of other papers: twelve updates each against scripts in plain PyTorch, and resumed trainings."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import innermax as im
from innermax.data.augmentation import augment
from innermax.utils import randomness
from tests.helpers.networks import same
from tests.helpers.training import DATA, Interrupting, cnn, ctrl_c, distance, mlp, timeless, train, weights

EPS, SIZE, EPOCHS = 0.2, 8, 4
OPTIMIZER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
PGD10 = im.PGD(im.Linf(EPS), steps=10)
MOVED = {"shift": 1, "flip": True}


def draws(epoch, index, features=36):
    """Uniform numbers in (0, 1), those that innermax draws for the examples in the epoch."""
    seed = randomness.derive_seed(0, 2, epoch)
    return randomness.uniform(randomness.hash_keys(seed, index, 0), features)


def uniform(epoch, index, radius):
    return (radius * (2 * draws(epoch, index) - 1)).reshape(-1, 1, 6, 6)


def gaussian(epoch, index):
    """By Box and Muller's formula."""
    one, two = draws(epoch, index, 72).split(36, dim=1)
    return ((-2 * one.log()).sqrt() * (2 * math.pi * two).cos()).reshape(-1, 1, 6, 6)


def slope(model, x, y):
    """The gradient in evaluation mode, and the logits."""
    model.eval()
    x = x.clone().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
    model.train()
    return gradient, logits.detach()


def in_ball(x_adv, x):
    return torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)


def fgsm_rs(model, x, y, epoch, index):
    start = (x + uniform(epoch, index, EPS)).clamp(0, 1)
    return in_ball(start + 1.25 * EPS * slope(model, start, y)[0].sign(), x)


def n_fgsm(model, x, y, epoch, index):
    start = (x + uniform(epoch, index, 1.5 * EPS)).clamp(0, 1)
    return (start + 0.8 * EPS * slope(model, start, y)[0].sign()).clamp(0, 1)


def fat(model, x, y, epoch, index):
    """Algorithm 1 (PGD-K-τ) an example at a time."""
    points = []
    for row, number in enumerate(index):
        own, label, tau = x[row : row + 1], y[row : row + 1], (0, 0, 1, 2)[epoch]
        point = (own + uniform(epoch, number[None], EPS)).clamp(0, 1)
        for _ in range(10):
            gradient, logits = slope(model, point, label)
            if logits.argmax(1) != label:
                if tau == 0:
                    break
                tau -= 1
            point = in_ball(point + EPS / 4 * gradient.sign(), own)
        points.append(point)
    return torch.cat(points)


class Kept:
    """ATTA with two steps of ε/3, reset at every third epoch, on moved images."""

    def __init__(self):
        self.kept = torch.zeros(len(DATA[1]), 1, 6, 6)

    def __call__(self, model, x, y, epoch, index):
        keys = randomness.hash_keys(0, index, 1, epoch)
        if epoch in (0, 2):
            point = in_ball(x + 0.001 * gaussian(epoch, index), x)
        else:
            point = in_ball(x + augment(self.kept[index], keys, **MOVED), x)
        for _ in range(2):
            point = in_ball(point + EPS / 3 * slope(model, point, y)[0].sign(), x)
        self.kept[index] = augment(point - x, keys, **MOVED, back=True).half().float()
        return point


def replay(model):
    """Free: two epochs of three updates with each batch, whose own input gradients move the perturbations."""
    optimizer = torch.optim.SGD(model.train().parameters(), **OPTIMIZER)
    images, labels = DATA[0].float() / 255, DATA[1]
    delta = torch.zeros(SIZE, 1, 6, 6)
    for epoch in range(2):
        for index in randomness.permutation(0, len(labels), 0, epoch).split(SIZE):
            x, y = images[index], labels[index]
            point = in_ball(x + delta, x)
            for _ in range(3):
                point.requires_grad_()
                optimizer.zero_grad()
                F.cross_entropy(model(point), y).backward()
                optimizer.step()
                point = in_ball(point.detach() + 0.4 * EPS * point.grad.sign(), x)
            delta = point - x


def prior_guided(model):
    """FGSM-MEP, reset in the fourth epoch, on moved images."""
    optimizer = torch.optim.SGD(model.train().parameters(), **OPTIMIZER)
    images, labels = DATA[0].float() / 255, DATA[1]
    kept, momentum = torch.zeros(2, len(labels), 1, 6, 6)
    for epoch in range(EPOCHS):
        for index in randomness.permutation(0, len(labels), 0, epoch).split(SIZE):
            keys, y = randomness.hash_keys(0, index, 1, epoch), labels[index]
            x = augment(images[index], keys, **MOVED)
            if epoch % 3 == 0:
                start = in_ball(x + 0.5 * EPS * uniform(epoch, index, 1).sign(), x)
                before = torch.zeros_like(x)
            else:
                start = in_ball(x + augment(kept[index], keys, **MOVED), x)
                before = augment(momentum[index], keys, **MOVED)
            gradient, _ = slope(model, start, y)
            now = gradient / gradient.abs().sum((1, 2, 3), keepdim=True) + 0.6 * before
            x_adv = in_ball(start + 0.5 * EPS * gradient.sign(), x)
            following = in_ball(start + 0.5 * EPS * now.sign(), x) - x
            kept[index] = augment(following, keys, **MOVED, back=True).half().float()
            momentum[index] = augment(now, keys, **MOVED, back=True).bfloat16().float()
            optimizer.zero_grad()
            told, logits = model(start), model(x_adv)
            (F.cross_entropy(logits, y) + 3 * ((logits - told) ** 2).mean()).backward()
            optimizer.step()


RIVALS = {
    "fgsm-rs": (im.FGSMRS(PGD10), lambda: fgsm_rs, {}),
    "n-fgsm": (im.NFGSM(PGD10, step=0.8, noise=1.5), lambda: n_fgsm, {}),
    "fat": (im.FAT(PGD10, rise_at=(0.5, 0.75)), lambda: fat, {}),
    "atta": (im.ATTA(PGD10, steps=2, step=1 / 3, reset_every=3), Kept, MOVED),
}
# Those that change the update.
UPDATES = {
    "free": (im.Free(PGD10, replays=3, step=0.4), replay, {"epochs": 7}),
    "fgsm-pgi": (im.FGSMPGI(PGD10, step=0.5, momentum=0.6, weight=3.0, reset_every=3), prior_guided, MOVED),
}


def script(model, attack, moved):
    """A training, written down step by step."""
    optimizer = torch.optim.SGD(model.train().parameters(), **OPTIMIZER)
    images, labels = DATA[0].float() / 255, DATA[1]
    seen = []
    for epoch in range(EPOCHS):
        for index in randomness.permutation(0, len(labels), 0, epoch).split(SIZE):
            x = images[index]
            if moved:
                x = augment(x, randomness.hash_keys(0, index, 1, epoch), **moved)
            x_adv = attack(model, x, labels[index], epoch, index)
            seen.append((x, x_adv))
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), labels[index]).backward()
            optimizer.step()
    return seen


@pytest.mark.parametrize("network", [mlp, cnn])
@pytest.mark.parametrize("name", RIVALS)
def test_the_updates_are_those_of_a_script(name, network):
    strategy, attack, moved = RIVALS[name]
    run = train(network(), strategy=strategy, epochs=EPOCHS, lr_schedule="constant", **OPTIMIZER, **moved)
    plain = network()
    seen = script(plain, attack(), moved)
    assert distance(weights(run.model), weights(network())) > 0.01
    assert distance(weights(run.model), weights(plain)) < 1e-5
    beyond = max(float((x_adv - x).abs().max()) for x, x_adv in seen)
    assert beyond == pytest.approx(2.3 * EPS if name == "n-fgsm" else EPS, rel=0.1)


@pytest.mark.parametrize("network", [mlp, cnn])
@pytest.mark.parametrize("name", UPDATES)
def test_changed_updates_are_those_of_a_script(name, network):
    strategy, own, options = UPDATES[name]
    run = train(network(), strategy=strategy, lr_schedule="constant", **{"epochs": EPOCHS} | OPTIMIZER | options)
    plain = network()
    own(plain)
    assert distance(weights(run.model), weights(network())) > 0.01
    assert distance(weights(run.model), weights(plain)) < 1e-5
    assert [row["gradients"] for row in run.history] == ([0] * 2 if name == "free" else [1] * EPOCHS)


class Root(nn.Module):
    """√(1 − x), of which white pixels have no finite slope; it notes what it is given in training mode."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append(x.detach().clone())
        return (1 - x).sqrt()


def test_free_leaves_pixels_without_a_finite_slope_where_they_are():
    images, labels = torch.full((16, 1, 6, 6), 128, dtype=torch.uint8), torch.arange(16) % 4
    images[:, :, 0, 0] = 255
    root = Root()
    torch.manual_seed(0)
    model = nn.Sequential(root, nn.Flatten(), nn.Linear(36, 4))
    strategy = im.Free(PGD10, replays=3)
    train(model, (images, labels), strategy, epochs=3, batch_size=8, lr=0.01)
    seen = torch.cat(root.seen[-2:])  # in the last update with either batch
    assert (seen[:, :, 0, 0] == 1).all()
    assert (seen[:, :, 1:] != images[:, :, 1:] / 255).float().mean() > 0.5


@pytest.mark.parametrize("name", [*RIVALS, *UPDATES])
def test_an_interrupted_training_goes_on_to_the_bit(tmp_path, name):
    strategy, _, own = (RIVALS | UPDATES)[name]
    options = {"strategy": strategy, "epochs": EPOCHS} | OPTIMIZER | own
    straight = train(cnn(), **options)
    for at in (4, 5):
        with pytest.raises(KeyboardInterrupt):
            train(cnn(), objective=Interrupting(at, ctrl_c), run_dir=tmp_path / "run", **options)
    again = train(cnn(5), objective=Interrupting(), run_dir=tmp_path / "run", **options)
    assert same(weights(again.model), weights(straight.model))
    assert timeless(again.history) == timeless(straight.history)


def test_the_gauges_of_n_fgsm_are_those_of_its_projections():
    """Twice: in the log, and in the attack's own result."""
    strategy, seen = im.NFGSM(PGD10), []

    def objective(model, x, y, x_adv, epoch):
        seen.append((x, y, x_adv))
        logits = model(x_adv)
        return 0 * logits.sum(), logits

    run = train(mlp(), strategy=strategy, objective=objective, epochs=1, weight_decay=0.0)
    threat, model, expected = PGD10.threat, mlp(), []
    for number, (x, y, x_adv) in enumerate(seen):
        assert not threat.contains(x_adv, x).any()
        projected = in_ball(x_adv, x)
        fosc = threat.gap(slope(model, projected, y)[0], projected, x)
        expected += fosc.tolist()
        index = randomness.permutation(0, 24, 0, 0).split(8)[number]
        found = strategy.attack_at(0.0)(model.eval(), x, y, seed=randomness.derive_seed(0, 2, 0), index=index)
        torch.testing.assert_close(found.x_adv, x_adv)
        torch.testing.assert_close(found.fosc, fosc)
        assert (found.gradient_calls == 2).all()
    assert run.history[0]["fosc"] == pytest.approx(sum(expected) / 24, rel=1e-4)
    assert run.history[0]["gradients"] == 1


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        (im.ATTA(PGD10), "kept in memory and in checkpoints: perturbations 2.1 MB\n"),
        (im.WarmStart(PGD10), "kept in memory and in checkpoints: perturbations 2.1 MB\n"),
        (im.FGSMPGI(PGD10), "kept in memory and in checkpoints: perturbations 2.1 MB, their momentum 2.1 MB\n"),
        (im.Free(PGD10), "kept in memory and in checkpoints: one batch's perturbations 0.3 MB\n"),
        (im.FGSMRS(PGD10), None),
    ],
)
def test_a_strategy_tells_the_memory_it_takes(capsys, strategy, told):
    images, labels = torch.zeros(1024, 1, 32, 32, dtype=torch.uint8), torch.arange(1024) % 3
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 3))
    train(network, (images, labels), strategy, epochs=2, batch_size=64, progress=True)
    said = "".join(capsys.readouterr())
    assert ("kept in memory" in said) == (told is not None)
    assert told is None or said.count(told) == 1
