"""Ten updates of each objective, against scripts in plain PyTorch that share nothing but the random numbers."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import innermax as im
from innermax.objectives import AWP, MART, TRADES, CrossEntropy, GradAlign, find_objective
from innermax.strategies import STRATEGIES, build_strategy
from innermax.utils import randomness
from tests.helpers.networks import same
from tests.helpers.training import DATA, cnn, distance, mlp, train, weights

EPS, STEPS, SIZE, LR, MOMENTUM, DECAY = 0.2, 4, 8, 0.1, 0.9, 1e-3
ALPHA, GAMMA = 0.1, 0.02


def divergence(clean, logits):
    p = clean.softmax(1)
    return (p * (p / logits.softmax(1)).log()).sum(1)


def trades(model, x, y, x_adv, epoch):
    clean, logits = model(x), model(x_adv)
    return F.cross_entropy(clean, y) + 3 * divergence(clean, logits).mean()


def smooth_trades(model, x, y, x_adv, epoch):
    clean, logits = model(x), model(x_adv)
    return smooth(clean, y) + 3 * divergence(clean, logits).mean()


def mart(model, x, y, x_adv, epoch):
    clean, logits = model(x), model(x_adv)
    rows, p = torch.arange(len(y)), logits.softmax(1)
    others = p.clone()
    others[rows, y] = 0
    loss = -p[rows, y].log() - (1 - others.max(1).values).log()
    return (loss + 2 * divergence(clean, logits) * (1 - clean.softmax(1)[rows, y])).mean()


def smooth(logits, y):
    target = (1 - ALPHA) * F.one_hot(y, 3) + ALPHA / 3
    return -(target * logits.log_softmax(1)).sum(1).mean()


def smooth_cross_entropy(model, x, y, x_adv, epoch):
    return smooth(model(x_adv), y)


def plain_cross_entropy(model, x, y, x_adv, epoch):
    return F.cross_entropy(model(x_adv), y)


def weighted(model, x, y, x_adv, epoch):
    losses = F.cross_entropy(model(x_adv), y, reduction="none")
    return (losses if epoch == 0 else losses * losses.detach()).mean()


def aligned(model, x, y, x_adv, epoch):
    """GradAlign, an example's cosine at a time, of those whose gradients are not 0."""
    keys = torch.randint(2**62, (len(x),))
    noise = (EPS * (2 * randomness.uniform(keys, 36) - 1)).reshape(x.shape)
    points = x.clone().requires_grad_(), (x + noise).clamp(0, 1).requires_grad_()
    (one,) = torch.autograd.grad(F.cross_entropy(model(points[0]), y), points[0])
    value = F.cross_entropy(model(x_adv), y)
    (other,) = torch.autograd.grad(F.cross_entropy(model(points[1]), y), points[1], create_graph=True)
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a.any() and b.any()]
    cosines = [(a * b).sum() / (a.norm() * b.norm()) for a, b in pairs]
    return value + 0.5 * (1 - sum(cosines) / len(cosines))


def attack(model, x, y, start, kl):
    """PGD on the cross-entropy, or on the divergence from the clean answer."""
    model.eval()
    x_adv = start.clone()
    clean = model(x).detach()
    for _ in range(STEPS):
        x_adv.requires_grad_()
        logits = model(x_adv)
        loss = divergence(clean, logits).sum() if kl else F.cross_entropy(logits, y, reduction="sum")
        (slope,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + EPS / 4 * slope.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    model.train()
    return x_adv


def worst_weights(model, objective):
    """A copy of the weights, and the model moved to the worst nearby; a copy finds the direction."""
    proxy = copy.deepcopy(model)
    objective(proxy).backward()
    kept = copy.deepcopy([p.data for p in model.parameters()])
    for own, other in zip(model.parameters(), proxy.parameters(), strict=True):
        if own.ndim > 1:
            own.data += GAMMA * own.data.norm() * other.grad / other.grad.norm()
    return kept


def script(model, objective, kl, awp, updates=10):
    """The training, written down step by step."""
    images, labels = DATA[0].float() / 255, DATA[1]
    optimizer = torch.optim.SGD(model.train().parameters(), LR, MOMENTUM, weight_decay=DECAY)
    done, epoch = 0, 0
    while done < updates:
        seed = randomness.derive_seed(0, 2, epoch)
        for number, index in enumerate(randomness.permutation(0, len(images), 0, epoch).split(SIZE)):
            x, y = images[index], labels[index]
            start = im.Linf(EPS).around(x).sample(randomness.hash_keys(seed, index, 0))
            x_adv = attack(model, x, y, start, kl)

            def loss(network, batch=(x, y, x_adv), epoch=epoch):
                return objective(network, *batch, epoch)

            torch.manual_seed(randomness.derive_seed(0, 3, epoch, number))
            kept = worst_weights(model, loss) if awp else None
            optimizer.zero_grad()
            loss(model).backward()
            for own, value in zip(model.parameters(), kept or (), strict=False):
                own.data = value
            for group in optimizer.param_groups:
                group["lr"] = LR
            optimizer.step()
            done += 1
            if done == updates:
                break
        epoch += 1


OBJECTIVES = {
    "cross_entropy": ("cross_entropy", plain_cross_entropy, False),
    "loss_weighted": ("loss_weighted", weighted, False),
    "label smoothing": (CrossEntropy(label_smoothing=ALPHA), smooth_cross_entropy, False),
    "trades": (TRADES(beta=3), trades, True),
    "trades, label smoothing": (TRADES(beta=3, label_smoothing=ALPHA), smooth_trades, True),
    "mart": (MART(beta=2), mart, False),
    "grad_align": (GradAlign(beta=0.5, threat=im.Linf(EPS)), aligned, False),
}


class Ended(Exception):
    """Ten updates are done."""


class TenUpdates:
    """An objective that ends the training before its eleventh update; `passes` of it make an update."""

    def __init__(self, objective, passes):
        self.objective, self.left = objective, 10 * passes
        self.search_loss = getattr(objective, "search_loss", None)
        self.weight_perturbation = getattr(objective, "weight_perturbation", None)

    def __call__(self, *arguments):
        if self.left == 0:
            raise Ended
        self.left -= 1
        return self.objective(*arguments)


@pytest.mark.parametrize("awp", [False, True], ids=["", "awp"])
@pytest.mark.parametrize("network", [mlp, cnn])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ten_updates_are_those_of_a_script(name, network, awp):
    objective, own, kl = OBJECTIVES[name]
    theirs, mine = network(), network()
    script(theirs, own, kl, awp)
    limited = TenUpdates(AWP(objective, GAMMA) if awp else find_objective(objective), 2 if awp else 1)
    strategy = im.Standard(im.PGD(im.Linf(EPS), steps=STEPS))
    options = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "lr_schedule": "constant", "batch_size": SIZE}
    with pytest.raises(Ended):
        train(mine, DATA, strategy, objective=limited, epochs=5, **options)
    assert distance(weights(mine), weights(theirs)) <= 1e-5
    assert distance(weights(mine), weights(network())) > 0.01


@pytest.mark.parametrize(
    "objective", [*im.objectives.OBJECTIVES, AWP("trades", 0.01), AWP("grad_align", 0.01)], ids=str
)
def test_every_objective_computes_in_bf16(objective):
    found = {}
    for precision in ("float32", "bf16"):
        torch.manual_seed(0)
        run = im.train(
            cnn(), DATA, im.FGSMRS(im.PGD(im.Linf(EPS))), objective=objective, precision=precision, epochs=1,
            batch_size=SIZE, lr=LR, device="cpu", progress=False,
        )  # fmt: skip
        found[precision] = run.history[-1]["loss"]
    assert found["bf16"] == pytest.approx(found["float32"], rel=0.03)
    assert found["bf16"] != found["float32"]


@pytest.mark.parametrize("norm", [im.Linf(0.2), im.L2(1.0), im.L1(4.0)], ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "unsecured"])
def test_every_strategy_and_norm_serves_the_objective_that_says_what_attacks_maximise(strategy, norm):
    options = {"full_at": 0.5} if strategy == "curriculum" else {}  # it attacks from the second epoch on
    chosen = build_strategy(strategy, im.PGD(norm, steps=2), **options)
    row = train(cnn(), DATA, chosen, objective=AWP(TRADES(beta=3), GAMMA), epochs=2).history[-1]
    assert math.isfinite(row["loss"])
    assert (row["gradients"] > 0) == (strategy != "free")  # whose updates are the attack
    assert row["zero_gradients"] == 0
    assert 0 < row["fosc"] < 10


def test_grad_align_has_the_threat_model_of_the_strategys_attack(tmp_path):
    options = {"strategy": im.FGSMRS(im.PGD(im.Linf(EPS))), "epochs": 2, "lr": LR, "run_dir": tmp_path / "run"}
    by_name = train(cnn(), objective=AWP("grad_align"), **options)
    told = train(cnn(), objective=AWP(GradAlign(threat=im.Linf(EPS))), **options | {"run_dir": None})
    other = train(cnn(), objective=AWP(GradAlign(threat=im.Linf(EPS / 2))), **options | {"run_dir": None})
    assert same(weights(by_name.model), weights(told.model))
    assert not same(weights(by_name.model), weights(other.model))
    with pytest.raises(ValueError, match="objective grad_align needs the threat model of the strategy's attack"):
        train(mlp(), objective="grad_align")


def test_grad_align_goes_on_to_the_bit(tmp_path):
    options = {"strategy": im.FGSMRS(im.PGD(im.Linf(EPS))), "epochs": 2, "lr": LR, "checkpoint_every": 1}
    straight = train(cnn(dropout=0.3), objective="grad_align", **options)
    calls = []

    class Stopped(GradAlign):
        def __call__(self, *arguments):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().__call__(*arguments)

    run = {"run_dir": tmp_path / "run", "objective": Stopped(threat=im.Linf(EPS))}
    with pytest.raises(KeyboardInterrupt):
        train(cnn(dropout=0.3), **options, **run)
    again = train(cnn(5, dropout=0.3), **options, **run)
    assert same(weights(again.model), weights(straight.model))
