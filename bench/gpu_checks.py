"""A self-check on the device at hand: what only a GPU can show, and no test on a processor. For bench/gpu.py.

Each check is noted with a verdict (right, wrong, not here), and what was measured. An exception is a verdict, too.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from steps import started, whole
from torch import Tensor, nn

import innermax as im
from innermax.losses import cross_entropy
from innermax.oracle.oracle import Oracle
from innermax.training.batch_attack import Attacked
from innermax.utils.validation import summarize_error

EPS = 8 / 255
RIGHT, WRONG, NOT_HERE = "right", "**wrong**", "not here"
Verdict = tuple[str, str]
Network = tuple[str, tuple[int, int, int], dict[str, int]]
_PAPER: dict[str, Network] = {
    "MNIST CNN": ("mnist-cnn", (1, 28, 28), {}),
    "CIFAR CNN": ("cifar-cnn", (3, 32, 32), {}),
    "WideResNet-34-10": ("wideresnet", (3, 32, 32), {"depth": 34, "width": 10}),
    "PreAct ResNet-18": ("preact-resnet18", (3, 32, 32), {}),
}
_SMOKE: dict[str, Network] = {"digits CNN": ("digits-cnn", (1, 8, 8), {})}
_LEAST = {"float32": 0.9999, "bf16": 0.95}  # mean cosine of the compiled network's gradients with the model's
_WAITS = 2  # of a step against a whole attack


def check(note: Callable[[str, Verdict], None], deadline: float, device: str, smoke: bool, folder: Path) -> None:
    """Notes every check that begins before the deadline."""
    networks = _SMOKE if smoke else _PAPER
    checks: dict[str, Callable[[], Verdict]] = {"float32 is float32": partial(_float32, networks, device)}
    for name, network in networks.items():
        for precision in _LEAST:
            checks[f"gradients, {name}, {precision}"] = partial(_gradients, network, precision, device)
    checks |= {
        "gradients, LSTM": partial(_recurrent, device),
        "recordings, 20 batches of 1,000 classes": partial(_recordings, device),
        "waits, Standard": partial(_waits, im.Standard, device),
        "waits, Dynamic": partial(_waits, im.Dynamic, device),
        "a resumed run": partial(_resumed, device, folder),
        "memory": partial(_memory, networks.get("WideResNet-34-10", _SMOKE["digits CNN"]), device, smoke),
    }
    for name, work in checks.items():
        if time.monotonic() > deadline:
            note(name, (NOT_HERE, "no time was left"))
            continue
        try:
            note(name, work())
        except Exception as error:  # noqa: BLE001  the next checks are worth their time
            note(name, (WRONG, summarize_error(error)))


def build(network: Network, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network that has learned a little, so that BatchNorm's statistics are its own; images and labels."""
    name, shape, options = network
    torch.manual_seed(0)
    model = im.build_model(name, input_shape=shape, **options).to(device)
    x, y = torch.rand(64, *shape, device=device), torch.randint(0, 10, (64,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


def _verdict(right: bool, told: str) -> Verdict:
    return RIGHT if right else WRONG, told


def _float32(networks: dict[str, Network], device: str) -> Verdict:
    """By how much float32 logits differ from float64: TensorFloat-32 would leave three digits of them."""
    told, right = [], True
    for name, network in networks.items():
        model, x, _ = build(network, device)
        logits, truth = Oracle(model).logits(x), Oracle(model.double()).logits(x.double())
        off = float((logits.double() - truth).abs().max() / (1 + truth.abs().max()))
        told.append(f"{name} {off:.1e}")
        right &= off < 1e-4
    flags = (
        f"TF32 in convolutions: {torch.backends.cudnn.allow_tf32}, in products: {torch.backends.cuda.matmul.allow_tf32}"
    )
    return _verdict(right, f"logits differ from float64's by {', '.join(told)} of their size; {flags}")


def _gradients(network: Network, precision: Any, device: str) -> Verdict:
    """Compiled gradients against the model's own, batch by batch of other sizes; and the plan."""
    model, x, y = build(network, device)
    oracle, exact = Oracle.fast(model, x[:16], precision), Oracle(model)
    cosines, off = [], 0.0
    for count in (64, 64, 17, 5):
        mine, truth = (one.gradient(x[:count], y[:count], cross_entropy) for one in (oracle, exact))
        found = nn.functional.cosine_similarity(mine.gradient.flatten(1), truth.gradient.flatten(1), eps=1e-30)
        cosines.append(float(found.mean()))
        off = max(off, float((mine.logits - truth.logits).abs().max() / (1 + truth.logits.abs().max())))
    kept = oracle.recheck() is oracle
    right = min(cosines) >= _LEAST[precision] and kept and (device == "cpu" or "CUDA graphs" in oracle.plan)
    told = f"cosine ≥ {min(cosines):.5f}, logits differ by {off:.1e}, kept by a recheck: {kept}; {oracle.plan}"
    return _verdict(right, told)


class _Rows(nn.Module):
    """A recurrent network over the rows of images, with dropout between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(24, 32, 2, batch_first=True, dropout=0.5), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.cells(x.transpose(1, 2).flatten(2))[0][:, -1])
        return head


def _recurrent(device: str) -> Verdict:
    """On cuDNN against the processor."""
    torch.manual_seed(0)
    model, x, y = _Rows(), torch.rand(16, 3, 8, 8), torch.arange(16) % 10
    truth = Oracle(model).gradient(x, y, cross_entropy).gradient
    model.to(device)
    found, told = [], []
    for oracle in (Oracle(model), Oracle.fast(model, x.to(device), "float32")):
        mine = oracle.gradient(x.to(device), y.to(device), cross_entropy).gradient.cpu()
        found.append(float(nn.functional.cosine_similarity(mine.flatten(1), truth.flatten(1)).mean()))
        told.append(oracle.plan)
    return _verdict(min(found) > 0.999, f"cosine ≥ {min(found):.5f}; {told[-1]}")


def _recordings(device: str) -> Verdict:
    """One for all batches of a size, whatever their labels; and at most eight for an attack whose examples leave."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 30 * 30, 1000)).to(device)
    x = torch.rand(64, 3, 32, 32, device=device)
    oracle: Any = Oracle.fast(model, x[:16], "float32")
    if oracle._replayed is None:
        return NOT_HERE if device == "cpu" else WRONG, oracle.plan
    record, recorded = oracle._replayed._record, Counter[str]()

    def counted(compute: Any, *inputs: Tensor) -> Any:
        recorded[now] += 1
        return record(compute, *inputs)

    oracle._replayed._record = counted
    now = "equal"
    for seed in range(20):
        y = torch.randint(1000, (64,), generator=torch.Generator().manual_seed(seed)).to(device)
        im.PGD(im.Linf(EPS), steps=2)(oracle, x, y)
    now = "leaving"
    im.PGD(im.Linf(EPS), steps=20, stop_on_success=True)(oracle, x, model(x).argmax(1))
    told = f"{recorded['equal']} for 20 equal batches, {recorded['leaving']} more where examples leave"
    return _verdict(recorded["equal"] == 1 and recorded["leaving"] <= 8, told)


def _waits(kind: Any, device: str) -> Verdict:
    """How often a training step waits for the device, as torch's sync debug mode counts it, and where."""
    torch.manual_seed(0)
    model = im.build_model("cifar-cnn" if device != "cpu" else "digits-cnn", input_shape=(3, 32, 32))
    attack, images = im.PGD(im.Linf(EPS), steps=10), torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    strategy = im.Dynamic(attack, 1e-3) if kind is im.Dynamic else kind(attack)
    loop = started(model, images, torch.arange(64) % 10, "auto", device, strategy=strategy)
    batch = whole(loop)
    for _ in range(2):
        loop.step(batch, strategy.attack_at(0.0), 0.0)
    with count_waits(device) as places:
        loop.step(batch, strategy.attack_at(0.0), 0.0)
    if device == "cpu":
        return NOT_HERE, "a processor is not waited for"
    most = _WAITS + (attack.steps + 1 if kind is im.Dynamic else 0)
    told = ", ".join(f"{place} ({times})" for place, times in places.items())
    return _verdict(sum(places.values()) <= most, f"{sum(places.values())} in a step: {told}")


@contextmanager
def count_waits(device: str) -> Iterator[Counter[str]]:
    """Context manager: counts the calls that torch warns of as synchronising, by file and line."""
    places = Counter[str]()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if device != "cpu":
                torch.cuda.set_sync_debug_mode("default")
    for one in told:
        if "synchronizing" in str(one.message):
            places[f"{Path(one.filename).name}:{one.lineno}"] += 1


def _resumed(device: str, folder: Path) -> Verdict:
    """Weights of a run that was interrupted after its first epoch, of an uninterrupted one, and of that once more."""
    shape, count = ((3, 32, 32), 1024) if device != "cpu" else ((1, 8, 8), 64)
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8), torch.randint(0, 10, (count,))

    def run(name: str, progress: Any = False) -> nn.Module:
        torch.manual_seed(0)
        model = im.build_model("cifar-cnn" if device != "cpu" else "digits-cnn", input_shape=shape)
        strategy = im.WarmStart(im.PGD(im.Linf(EPS), steps=4))
        return im.train(
            model, (images, labels), strategy, epochs=2, batch_size=count // 8, lr=0.02, ema=0.9, device=device,
            run_dir=folder / name, progress=progress, shift=1, flip=True, overwrite=name != "resumed",
        ).model  # fmt: skip

    def interrupt(_name: str, done: int, total: int) -> None:
        if done == total // 2 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    interrupted: list[bool] = []
    whole_run, again = run("whole"), run("again")
    try:
        run("resumed", interrupt)
    except KeyboardInterrupt:
        resumed = run("resumed")
    same, off = (_distance(whole_run, other) for other in (again, resumed))
    told = f"two uninterrupted runs differ by {same:.1e}, the resumed one by {off:.1e}"
    return _verdict(off <= same, told)


def _distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def _memory(network: Network, device: str, smoke: bool) -> Verdict:
    """What Dynamic holds on the device at most: with a recording for each of eight batch sizes, in one pool."""
    name, shape, options = network
    torch.manual_seed(0)
    model = im.build_model(name, input_shape=shape, **options)
    count = 8 if smoke else 128
    images, labels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8), torch.arange(count) % 10
    loop = started(model, images, labels, "auto", device, strategy=im.Dynamic(im.PGD(im.Linf(EPS), steps=10)))
    x, y = loop.data.batch(torch.arange(count, device=loop.ranks.device))
    attack = im.PGD(im.Linf(EPS), steps=1)
    for size in range(count // 8, count + 1, count // 8):
        attack(loop.state.oracle, x[-size:], y[-size:], final="none")
        loop.descend(x, y, Attacked(x), 0.0, count)
    if device == "cpu":
        return NOT_HERE, "no GPU"
    used, there = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]
    told = f"{name}, batches of {count}: {used / 2**30:.1f} of {there / 2**30:.0f} GiB"
    return _verdict(used < 0.5 * there, told)
