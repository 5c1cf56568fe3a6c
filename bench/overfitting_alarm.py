"""Records trainings against a single step: what an alarm might look at, and whether they overfit catastrophically.

python bench/overfitting_alarm.py runs.jsonl                 # needs MNIST; a line per training; resumes
python bench/overfitting_alarm.py runs.jsonl --strengthen    # what collapsed again, a step more at each alarm

Trainings of one network on one data set run as a fleet, side by side in one batched network: each has weights, an order
of the images, random numbers, ε, method and learning rate of its own. Signals are means over a quarter of an epoch, the
truth is accuracy under PGD-50 at its end. bench/overfitting_rule.py chooses and tests the alarm.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from overfitting_rule import collapse
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import innermax as im
from innermax.data.image_set import ImageSet
from innermax.training.alarm import Alarm

JUDGED, PROBED = 500, 64  # images held out: for the truth, and for the probe
GAUGED, QUARTERS = 16, 4  # batches of an epoch whose signals are measured; parts of an epoch
STEPS, CONVERGED = 50, 0.01  # of the truth: PGD-50, which an image leaves once its relative FOSC is no larger
METHODS = {"fgsm": (0.0, 1.0), "rs": (1.0, 1.25), "n": (2.0, 1.0)}  # radius of the noise and step, over ε
Ask = Callable[[Tensor], Tensor]  # (N, B, *features) → (N, B, classes)


@dataclass(frozen=True)
class Setting:
    """A training of a fleet: what is its own."""

    eps: float
    method: str  # a name of METHODS, and @ another length of the step over ε
    lr: float
    seed: int

    @property
    def noise_and_step(self) -> tuple[float, float]:
        name, _, step = self.method.partition("@")
        return METHODS[name][0], float(step or METHODS[name][1])


@dataclass(frozen=True)
class Fleet:
    """Trainings side by side: what they share."""

    data: str
    network: str
    images: int
    batch: int
    epochs: int
    settings: tuple[Setting, ...]
    strengthen: bool = False  # whether the alarm of the library, once raised, adds a step


def plain(width: int, shape: tuple[int, ...], norm: bool = True) -> list[nn.Module]:
    """Three convolutions of stride 2, `width` channels and twice as many each time, and two dense layers."""
    layers: list[nn.Module] = []
    channels, side = shape[0], shape[1]
    for stage in range(3):
        wide = width * 2**stage
        layers += [nn.Conv2d(channels, wide, 3, stride=2, padding=1), nn.BatchNorm2d(wide), nn.ReLU()]
        channels, side = wide, -(-side // 2)
    layers += [nn.Flatten(), nn.Linear(channels * side * side, 128), nn.ReLU(), nn.Linear(128, 10)]
    return [layer for layer in layers if norm or not isinstance(layer, nn.BatchNorm2d)]


def pooled(width: int, shape: tuple[int, ...]) -> list[nn.Module]:
    """Two convolutions of stride 1 with max-pools, and two dense layers."""
    layers: list[nn.Module] = []
    channels, side = shape[0], shape[1]
    for stage in range(2):
        wide = width * 2**stage
        layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.MaxPool2d(2), nn.ReLU()]
        channels, side = wide, side // 2
    return [*layers, nn.Flatten(), nn.Linear(channels * side * side, 64), nn.ReLU(), nn.Linear(64, 10)]


def dense(width: int, shape: tuple[int, ...], norm: bool = False) -> list[nn.Module]:
    """Dense layers of `width` and half as many units."""
    layers: list[nn.Module] = [nn.Flatten()]
    before = shape[0] * shape[1] * shape[2]
    for wide in (width, width // 2):
        layers += [nn.Linear(before, wide), *([nn.BatchNorm1d(wide)] if norm else []), nn.ReLU()]
        before = wide
    return [*layers, nn.Linear(before, 10)]


def build(name: str, shape: tuple[int, ...], seed: int) -> nn.Module:
    """A network by kind and width, such as plain-8."""
    torch.manual_seed(seed)
    kind, _, width = name.partition("-")
    kinds: dict[str, Callable[[], list[nn.Module]]] = {
        "plain": lambda: plain(int(width), shape),
        "bare": lambda: plain(int(width), shape, norm=False),
        "pooled": lambda: pooled(int(width), shape),
        "dense": lambda: dense(int(width), shape),
        "normed": lambda: dense(int(width), shape, norm=True),
        "paper": lambda: list(im.build_model("mnist-cnn", input_shape=shape)),
    }
    return nn.Sequential(*kinds[kind]())


@cache
def images(name: str) -> tuple[ImageSet, ImageSet]:
    """What is learned from, and JUDGED + PROBED other images."""
    if name != "digits":
        data = im.load_data(name, validation=JUDGED + PROBED)
        return data.train, data.validation
    data = im.load_data(name)  # too few images for a split of three
    parts = (data.train, data.validation, data.test)
    whole = [torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels")]
    order = torch.randperm(len(whole[0]), generator=torch.Generator().manual_seed(0))
    held, learned = order[: JUDGED + PROBED], order[JUDGED + PROBED :]
    return tuple(ImageSet(whole[0][rows], whole[1][rows]) for rows in (learned, held))  # type: ignore[return-value]


class Stacked:
    """N networks as one, with an Adam for each."""

    def __init__(self, networks: list[nn.Module], rates: list[float]) -> None:
        self.base = copy.deepcopy(networks[0]).to("meta")
        self.weights, self.buffers = stack_module_state(networks)  # type: ignore[arg-type]
        self.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.weights.items()}
        self.rates, self.updates = torch.tensor(rates), 0

    def ask(self, x: Tensor, training: bool, frozen: bool = True) -> Tensor:
        """The logits (N, B, classes) at inputs (N, B, *features)."""
        self.base.train(training)
        weights = {name: w.detach() for name, w in self.weights.items()} if frozen else self.weights
        forward = vmap(lambda w, b, x: functional_call(self.base, (w, b), (x,)))
        answer: Tensor = forward(weights, self.buffers, x)
        return answer

    def learn(self, loss: Tensor) -> None:
        """One step of Adam (Kingma & Ba 2015) for each network; loss: (N,)."""
        self.updates += 1
        slopes = torch.autograd.grad(loss.sum(), list(self.weights.values()))
        with torch.no_grad():
            for (name, weight), slope in zip(self.weights.items(), slopes, strict=True):
                mean, square = self.moments[name]
                mean.lerp_(slope, 0.1)
                square.lerp_(slope.square(), 0.001)
                size = (square / (1 - 0.999**self.updates)).sqrt_().add_(1e-8)
                rate = (self.rates / (1 - 0.9**self.updates)).reshape(-1, *[1] * (weight.ndim - 1))
                weight.sub_(rate * mean / size)


def answer(ask: Ask, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, B) losses, their gradients, and (N, B) whether the predictions are right."""
    point = x.detach().requires_grad_()
    logits = ask(point)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    (slope,) = torch.autograd.grad(loss.sum(), point)
    return loss.detach().reshape(y.shape), slope, logits.detach().argmax(2) == y


def gap(slope: Tensor, point: Tensor, low: Tensor, high: Tensor, relative: bool = False) -> Tensor:
    """FOSC over [low, high], (N, B); relative: over the width of the linear model there."""
    found = torch.maximum(slope * (high - point), slope * (low - point)).flatten(2).sum(2)
    if not relative:
        return found
    return (found / (slope.abs() * (high - low)).flatten(2).sum(2)).nan_to_num(0.0)


def signals(ask: Ask, x: Tensor, y: Tensor, found: dict[str, Tensor], eps: Tensor) -> dict[str, Tensor]:
    """(N,) each: everything an alarm might look at, of a batch in evaluation mode."""
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    point = found["x_adv"].clamp(low, high)
    clean_loss, clean_slope, clean_right = answer(ask, x, y)
    loss, slope, right = answer(ask, point, y)
    moved, vertex = (point - x).flatten(2), (torch.where(slope > 0, high, low) - x).flatten(2)
    fosc, relative = gap(slope, point, low, high), gap(slope, point, low, high, relative=True)
    lengths = moved.norm(dim=2) + vertex.norm(dim=2)
    flat, clean_flat, start_flat = slope.flatten(2), clean_slope.flatten(2), found["slope"].flatten(2)
    told = {
        "loss_clean": clean_loss, "loss_start": found["loss"], "loss": loss, "fell": loss < clean_loss,
        "fell_start": loss < found["loss"], "predicted": (clean_flat * moved).sum(2), "fosc": fosc,
        "relative": relative, "distortion": (moved + vertex).norm(dim=2) / lengths.clamp(min=1e-12),
        "cosine": F.cosine_similarity(clean_flat, flat, 2), "cosine_start": F.cosine_similarity(start_flat, flat, 2),
        "right_clean": clean_right, "right": right, "slope": flat.abs().sum(2),
        "slope_clean": clean_flat.abs().sum(2), "zero": (flat == 0).all(2),
    }  # fmt: skip
    means = {name: value.double().mean(1) for name, value in told.items()}
    tails = {"fosc_50": 0.5, "fosc_90": 0.9, "relative_90": 0.9, "distortion_10": 0.1, "cosine_10": 0.1}
    return means | {name: told[name.partition("_")[0]].double().quantile(q, 1) for name, q in tails.items()}


def withstand(
    ask: Ask, x: Tensor, y: Tensor, eps: Tensor, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Which of (B, *features) images withstand PGD on each network, (N, B), and its gradients, (N,).

    Steps are ε/4 long. An image leaves once it is misclassified, or converged (CONVERGED); what is computed for it
    beside longer searches counts no more.
    """
    count, batch = len(eps), len(x)
    rows = torch.arange(batch).repeat(count, 1)
    stands = torch.ones(count, batch, dtype=torch.bool)
    going, spent = stands.clone(), torch.zeros(count)
    clean, label = x.expand(count, *x.shape), y.repeat(count, 1)
    low, high = (clean - eps).clamp(min=0), (clean + eps).clamp(max=1)
    point = (clean + eps * (2 * torch.rand(clean.shape, generator=generator) - 1)).clamp(0, 1)
    for step in range(steps + 1):
        _, slope, right = answer(ask, point, label)
        spent += going.float().sum(1)
        stands.scatter_(1, rows, stands.gather(1, rows) & (right | ~going))
        going &= right & (gap(slope, point, low, high, relative=True) > CONVERGED)
        if step == steps or not going.any():
            break
        point = (point + eps / 4 * slope.sign()).clamp(low, high)
        most = int(going.sum(1).max())
        if most < 0.8 * going.shape[1]:  # the longest search of a network sets how many are computed for all
            kept = going.int().argsort(dim=1, descending=True, stable=True)[:, :most]
            rows, going, label = (value.gather(1, kept) for value in (rows, going, label))
            at = torch.arange(count)[:, None]
            point, low, high = (value[at, kept] for value in (point, low, high))
    return stands, spent


def judge(ask: Ask, held: ImageSet, eps: Tensor, moment: int) -> dict[str, Any]:
    """Of each network: clean accuracy, accuracy under PGD-50, which images withstand a probe, and its gradients."""
    x, y = held.batch(torch.arange(len(held)))
    fixed, drawn = torch.Generator().manual_seed(1), torch.Generator().manual_seed(moment)
    robust, _ = withstand(ask, x[:JUDGED], y[:JUDGED], eps, STEPS, fixed)
    probed, spent = withstand(ask, x[JUDGED:], y[JUDGED:], eps, 10, drawn)
    clean = (ask(x.expand(len(eps), *x.shape)).argmax(2) == y)[:, :JUDGED]
    return {
        "clean": clean.double().mean(1).tolist(),
        "pgd": robust.double().mean(1).tolist(),
        "probe": ["".join(map(str, row)) for row in probed.int().tolist()],
        "probe_gradients": spent.tolist(),
    }


def search(
    ask: Ask, x: Tensor, y: Tensor, eps: Tensor, noise: Tensor, step: Tensor, steps: Tensor
) -> dict[str, Tensor]:
    """Each training's method, its step cut into so many: loss and gradient at its start, and where it leads.

    N-FGSM, whose noise reaches beyond ε, is projected onto the pixel bounds alone.
    """
    point = start = (x + noise * eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    told: dict[str, Tensor] = {}
    for number in range(int(steps.max())):
        loss, slope, _ = answer(ask, point, y)
        told = told or {"loss": loss, "slope": slope}
        moved = point + step / steps * eps * slope.sign()
        moved = torch.where(noise > 1, moved, moved.clamp(x - eps, x + eps)).clamp(0, 1)
        point = torch.where(number < steps, moved, point)
    return told | {"start": start, "x_adv": point}


def train(fleet: Fleet) -> list[dict[str, Any]]:
    """The fleet's trainings, a row each: setting, seconds, and what was seen in every quarter of an epoch."""
    began, judging = time.process_time(), 0.0
    learned, held = images(fleet.data)
    learned, count, settings = learned[: fleet.images], fleet.images // fleet.batch, fleet.settings
    nets = Stacked([build(fleet.network, learned.shape, each.seed) for each in settings], [s.lr for s in settings])
    eps, noise, step = (
        torch.tensor(values).reshape(-1, 1, 1, 1, 1)
        for values in ([s.eps for s in settings], *zip(*(s.noise_and_step for s in settings), strict=True))
    )

    def evaluated(x: Tensor) -> Tensor:
        return nets.ask(x, training=False)

    torch.manual_seed(sum(each.seed for each in settings))
    quarters: list[list[dict[str, Any]]] = [[] for _ in settings]
    alarms = [Alarm() for _ in settings]
    seen: list[dict[str, Tensor]] = []
    own: list[Tensor] = []
    for epoch, orders in zip(range(fleet.epochs), shuffles(fleet), strict=False):
        for number in range(count):
            chosen = orders[:, number * fleet.batch : (number + 1) * fleet.batch]
            flat, labels = learned.batch(chosen.flatten())
            x, y = flat.reshape(*chosen.shape, *flat.shape[1:]), labels.reshape(chosen.shape)
            raised = [len(alarm.raised) if fleet.strengthen else 0 for alarm in alarms]
            steps = 1 + torch.tensor(raised).reshape(-1, 1, 1, 1, 1)
            found = search(evaluated, x, y, eps, noise, step, steps)
            if number % max(1, count // GAUGED) == 0:
                seen.append(signals(evaluated, x, y, found, eps))
            logits = nets.ask(found["x_adv"], training=True, frozen=False)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").reshape(y.shape).mean(1)
            nets.learn(loss)
            own.append(torch.stack([loss.detach(), (logits.detach().argmax(2) == y).float().mean(1)]))
            if QUARTERS * (number + 1) // count > QUARTERS * number // count:
                at = time.process_time()
                told = {name: torch.stack([each[name] for each in seen]).mean(0).tolist() for name in seen[0]}
                told |= dict(zip(("own_loss", "own_accuracy"), torch.stack(own).mean(0).tolist(), strict=True))
                told |= judge(evaluated, held, eps, epoch * count + number)
                told["steps"] = [float(value) for value in steps.flatten()]
                for index, row in enumerate(quarters):
                    alarms[index] = alarms[index].hear([told["relative"][index]]).end_part(epoch, number)
                    row.append({name: _rounded(values[index]) for name, values in told.items()})
                seen, own = [], []
                judging += time.process_time() - at
    shared = {name: value for name, value in asdict(fleet).items() if name != "settings"}
    seconds = {"seconds": (time.process_time() - began) / len(settings), "judging": judging / len(settings)}
    return [
        {**shared, **asdict(each), **{k: round(v, 2) for k, v in seconds.items()}, "quarters": row}
        for each, row in zip(settings, quarters, strict=True)
    ]


def shuffles(fleet: Fleet) -> Iterator[Tensor]:
    """The order of the images in each epoch, (N, images): each training has its own."""
    epoch = 0
    while True:
        seeds = [each.seed * 1000 + epoch for each in fleet.settings]
        yield torch.stack(
            [torch.randperm(fleet.images, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        epoch += 1


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def plan() -> list[Fleet]:
    """All fleets, in an order of which any beginning can be judged: networks and data sets take turns."""
    digits = [Setting(eps, method, 0.003, 0) for eps in (0.1, 0.15, 0.2) for method in ("fgsm", "rs@2", "n")]
    quick = tuple(Setting(0.2, method, 0.006, 0) for method in ("fgsm", "rs@2", "n"))
    wide = tuple(Setting(0.25, method, 0.003, 0) for method in ("fgsm", "rs@2", "n"))
    found = [Fleet("digits", "plain-8", 1200, 8, 4, (*digits, *wide))]
    found += [Fleet("digits", "bare-16", 1200, 8, 6, (*digits, *quick))]
    collapsing = (Setting(0.2, "fgsm", 0.004, 0), Setting(0.2, "rs@2", 0.004, 0), Setting(0.25, "fgsm", 0.004, 0))
    found += [Fleet("mnist", network, 6000, 32, 3, collapsing) for network in ("bare-8", "plain-8")]
    for seed, network in product(range(1, 4), ("plain-8", "bare-16", "dense-128", "pooled-8")):
        each = product((0.1, 0.15, 0.2, 0.25), ("fgsm", "rs", "rs@2", "n"), (0.004,))
        settings = tuple(Setting(eps, method, rate, seed) for eps, method, rate in each)
        found += [Fleet("mnist", network, 6000, 32, 3, settings), Fleet("digits", network, 1200, 8, 12, settings)]
    return found


def strengthened(kept: list[dict[str, Any]]) -> list[Fleet]:
    """A fleet again for each of which some collapsed, of those alone."""
    shared = [field.name for field in fields(Fleet) if field.name not in ("settings", "strengthen")]
    found: dict[tuple[Any, ...], list[Setting]] = {}
    for run in kept:
        if collapse(run) is not None and not run["strengthen"]:
            own = Setting(run["eps"], run["method"], run["lr"], run["seed"])
            found.setdefault(tuple(run[name] for name in shared), []).append(own)
    return [Fleet(*name, settings=tuple(settings), strengthen=True) for name, settings in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no fleet after so long")
    parser.add_argument("--strengthen", action="store_true", help="what collapsed, with a step more at each alarm")
    told = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    kept = [json.loads(line) for line in told.runs.read_text().splitlines()] if told.runs.exists() else []
    done = {_name(run) for run in kept}
    for fleet in strengthened(kept) if told.strengthen else plan():
        names = {_name(asdict(fleet) | asdict(each)) for each in fleet.settings}
        if names <= done or time.monotonic() - began > 60 * told.minutes:
            continue
        rows = train(fleet)
        with open(told.runs, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        collapsed = sum(collapse(row) is not None for row in rows)
        print(time.strftime("%T"), fleet.data, fleet.network, f"{collapsed} of {len(rows)} collapsed", flush=True)


def _name(run: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a training from all others."""
    names = [field.name for kind in (Fleet, Setting) for field in fields(kind) if field.name != "settings"]
    return tuple(run[name] for name in names)


if __name__ == "__main__":
    main()
