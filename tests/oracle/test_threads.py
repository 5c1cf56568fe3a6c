"""An attack that cores share is the attack."""

import threading
import time
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from innermax import APGD, CW, FAB, PGD, Linf, Square
from innermax.oracle.oracle import Oracle
from innermax.oracle.threads import Workers


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)).double()


def batch(count=30):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(count) % 3


@pytest.mark.parametrize(
    "attack",
    [
        PGD(Linf(0.2), steps=4),
        PGD(Linf(0.2), steps=6, restarts=3, stop_on_success=True),
        PGD(Linf(0.2), steps=6, stop_at=0.05),
        CW(Linf(0.2), steps=5),
        APGD(Linf(0.2), steps=10),
        FAB(Linf(0.2), steps=5, targets=2),
        Square(Linf(0.2), queries=20),
    ],
)
@pytest.mark.parametrize("final", ["gradient", "none"])
def test_shared_or_alone(two_threads, network, attack, final):
    x, y = batch()
    index = torch.arange(100, 130)
    oracle = Oracle.fast(network, x, "float32")
    assert oracle.plan.endswith(", 2 threads")
    shared = attack(oracle, x, y, seed=3, index=index, final=final)
    assert oracle._workers is not None
    oracle._threads = 1
    alone = attack(oracle, x, y, seed=3, index=index, final=final)
    torch.testing.assert_close(vars(shared), vars(alone), rtol=1e-9, atol=1e-12, equal_nan=True)


def test_one_thread_shares_nothing(network):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert "threads" not in Oracle.fast(network, batch()[0], "float32").plan
    finally:
        torch.set_num_threads(before)


def test_a_network_that_draws_random_numbers_is_not_shared(two_threads):
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1) + 0.1 * torch.randn_like(x.flatten(1)))

    x, y = batch()
    x = x.float()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    oracle = Oracle.fast(Noisy(36, 3), x, "float32")
    assert "threads" not in oracle.plan
    first, second = (PGD(Linf(0.2), steps=3)(oracle, x, y) for _ in range(2))
    assert torch.equal(first.x_adv, second.x_adv)
    torch.set_rng_state(before)


def test_each_thread_computes_alone_and_the_process_keeps_its_number(two_threads):
    workers, main = Workers(2), threading.get_ident()
    together = threading.Barrier(2)

    def work(part):
        together.wait(timeout=60)  # two threads at once, or never
        return torch.get_num_threads(), threading.get_ident(), torch.is_grad_enabled(), part.tolist()

    seen = workers.map(work, torch.arange(5).tensor_split(2))
    assert [(count, gradients, part) for count, _, gradients, part in seen] == [
        (1, False, [0, 1, 2]),
        (1, False, [3, 4]),
    ]
    assert len({main, *(thread for _, thread, _, _ in seen)}) == 3
    assert torch.get_num_threads() == 2
    fresh = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [2]


def test_work_that_shares_in_its_turn_ends(two_threads):
    workers = Workers(2)

    def outer(part):
        return sum(workers.map(lambda inner: int(inner.sum()), part.tensor_split(2)))

    assert workers.map(outer, torch.arange(8).tensor_split(2)) == [6, 22]


def test_the_first_failure_is_raised_when_all_have_ended(two_threads):
    ended = []

    def work(part):
        if int(part[0]) == 0:
            raise ValueError("the first part")
        ended.append(part)

    with pytest.raises(ValueError, match="the first part"):
        Workers(2).map(work, torch.arange(4).tensor_split(2))
    assert len(ended) == 1


def test_a_loss_that_fails_says_so(two_threads, network):
    x, y = batch()
    oracle = Oracle.fast(network, x, "float32")
    with pytest.raises(ValueError, match="one value an example"):
        PGD(Linf(0.2), loss=lambda logits, label: F.cross_entropy(logits, label))(oracle, x, y)


class Passes(nn.Module):
    """Passes what it computed on through itself, as if nobody else used it meanwhile."""

    def __init__(self):
        super().__init__()
        self.body, self.slow, self.head = nn.Linear(36, 64), nn.Linear(36, 2048), nn.Linear(64, 3)

    def forward(self, x):
        x = x.flatten(1)
        self.features = torch.relu(self.body(x))
        self.penalty = self.slow(x).square().mean()
        return self.head(self.features)


def test_networks_that_keep_values_on_themselves(two_threads):
    torch.manual_seed(0)
    model, (x, y) = Passes(), batch(200)
    oracle = Oracle.fast(model, x[:16].float(), "float32")
    assert "2 threads" in oracle.scheme
    alone, shared = (PGD(Linf(0.2), steps=10)(one, x.float(), y) for one in (model, oracle))
    torch.testing.assert_close(shared.loss, alone.loss, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        model.head.bias.add_(1)
    oracle.refresh()
    alone, shared = (PGD(Linf(0.2), steps=10)(one, x.float(), y) for one in (model, oracle))
    torch.testing.assert_close(shared.loss, alone.loss, rtol=1e-3, atol=1e-4)


class Confused(nn.Module):
    """Keeps the first pixel of the last batch that anybody passed through any copy."""

    last: ClassVar = [None]

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(36, 3)

    def forward(self, x):
        assert len(x) > 0  # plain Python, which no symbolic trace passes
        self.last[0] = x.flatten(1)
        time.sleep(0.01)
        return self.head(self.last[0])


def test_networks_that_threads_disturb_are_not_shared(two_threads):
    torch.manual_seed(0)
    oracle = Oracle.fast(Confused(), batch(16)[0].float(), "float32")
    assert "as a whole (threads that share a batch change logits or gradients by " in oracle.plan
