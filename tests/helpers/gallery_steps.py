"""What users do with a network, step by step, each compared with plain PyTorch: images (B, C, H, W) in [0, 1]."""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innermax as im
from innermax.losses import cross_entropy
from innermax.oracle.compiled import cast, floating_dtype
from innermax.utils.copying import copy_model

THREAT = im.Linf(16 / 255)
LARGEST = 1e-3  # difference of two entries of a gradient, over its largest entry
SAME, ALIKE = 1e-6, 0.999  # the same difference in float64, and the mean cosine, where rounding switches a ReLU


class Wrong(Exception):
    """What is not as with plain PyTorch."""


@dataclass
class Case:
    """A network in training mode, which the steps change, with images and labels."""

    model: nn.Module
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, model: nn.Module, shape: tuple[int, ...], count: int = 32) -> "Case":
        """Random images, and labels among the network's classes."""
        x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
        return cls(model, x, torch.arange(count) % logits_of(model, x[:1]).shape[1])


@dataclass
class GradientError:
    """Of the fast oracle's gradient against plain autograd's: in the model's precision, and where that is large in
    float64, with the mean cosine of the two as they are.
    """

    plain: float
    float64: float | None = None
    cosine: float | None = None

    @property
    def right(self) -> bool:
        """Whether it is close, or differs by rounding alone, which may switch a ReLU or a maximum."""
        rounding = self.float64 is not None and self.float64 <= SAME and self.cosine >= ALIKE
        return self.plain <= LARGEST or rounding


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager: the model in evaluation mode, afterwards in its own modes, without what it kept meanwhile."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train()
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """What the model itself answers in evaluation mode."""
    with evaluation_mode(model):
        return model(x.to(floating_dtype(model)))


def gradient_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """∂ cross-entropy / ∂x in evaluation mode, by plain autograd."""
    with evaluation_mode(model):
        point = x.to(floating_dtype(model)).detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)[0]


def compare_gradients(case: Case) -> tuple[list[GradientError], im.Oracle]:
    """Errors of the fast oracle's gradients before and after an update, and the oracle; Wrong where too large."""
    model, x, y = case.model, case.x[:8], case.y[:8]
    oracle = im.Oracle.fast(model, x, "float32")
    errors = [_gradient_error(oracle, model, x, y)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    F.cross_entropy(model(x.to(floating_dtype(model))), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():  # a step moves some too little to tell
            parameter.mul_(1.1)
    oracle.refresh()
    errors.append(_gradient_error(oracle, model, x, y))
    for moment, error in zip(("", " after an update"), errors, strict=True):
        if not error.right:
            raise Wrong(f"the gradient{moment} is off by {error.plain:.1e} ({error})")
    return errors, oracle


def _gradient_error(oracle: im.Oracle, model: nn.Module, x: Tensor, y: Tensor) -> GradientError:
    found, plain = oracle.gradient(x, y, cross_entropy).gradient, gradient_of(model, x, y)
    error = _relative(found, plain)
    if error > LARGEST:
        with contextlib.suppress(Exception):  # a model may insist on float32
            precise = cast(copy_model(model), torch.float64)
            exact = gradient_of(precise, x.double(), y)
            network = oracle._compiled.to(torch.float64).refresh(precise).network  # folded in float64, too
            directions = [F.normalize(one.double().flatten(1), eps=1e-300) for one in (found, plain)]
            cosine = 1 - (directions[0] - directions[1]).square().sum(1) / 2  # 1 where both are zero
            return GradientError(error, _relative(gradient_of(network, x.double(), y), exact), float(cosine.mean()))
    return GradientError(error)


def _relative(found: Tensor, truth: Tensor) -> float:
    found, truth = (value.to(torch.float64).flatten(1) for value in (found, truth))
    return float(((found - truth).abs().amax(1) / truth.abs().amax(1).clamp_min(1e-30)).max())


def train(case: Case) -> None:
    """Two updates against PGD; Wrong where they change nothing or the loss is no number."""
    before = copy.deepcopy(case.model.state_dict())
    strategy = im.Standard(im.PGD(THREAT, steps=2))
    run = im.train(case.model, (case.x, case.y), strategy, epochs=1, batch_size=len(case.x) // 2, progress=False)
    names = [name for name, parameter in case.model.named_parameters() if parameter.requires_grad]
    still = [name for name in names if torch.equal(case.model.state_dict()[name], before[name])]
    if len(still) > len(names) / 2:
        raise Wrong(f"training leaves {', '.join(still[:3])} as they were")
    if not math.isfinite(run.history[0]["loss"]):
        raise Wrong(f"the loss is {run.history[0]['loss']}")


def evaluate(case: Case) -> None:
    """PGD; Wrong where an accuracy is not the model's own on the same images."""
    x = case.x[:16]
    logits = logits_of(case.model, x)
    y, classes = logits.argmax(1), logits.shape[1]
    y[:4] = (y[:4] + torch.arange(1, 5)) % classes
    attack = im.PGD(THREAT, steps=3)
    scored = im.evaluate(case.model, (x, y), {"pgd": attack}, audit=False, progress=False)
    _check_same("clean accuracy", scored.accuracy["clean"].value, 1 - 4 / len(x))
    attacked = attack(case.model, x, y).x_adv
    _check_same("accuracy under PGD", scored.accuracy["pgd"].value, _accuracy(case.model, attacked, y), 1 / len(x))


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((logits_of(model, x).argmax(1) == y).double().mean())


def _check_same(what: str, found: float, truth: float, tolerance: float = 0.0) -> None:
    if abs(found - truth) > tolerance + 1e-9:
        raise Wrong(f"{what} is {found:.3f}, by plain PyTorch {truth:.3f}")


def run_autoattack(case: Case, eps: float = 0.2, count: int = 2) -> None:
    """AutoAttack on images that the model gets right; Wrong where it cheats or a verdict is not the model's."""
    threat, x = im.Linf(eps), case.x[:count]
    y = logits_of(case.model, x).argmax(1)
    found = im.AutoAttack(threat)(im.Oracle.fast(case.model, x), x, y)
    if not threat.contains(found.x_adv, x).all():
        raise Wrong("an adversarial example lies outside the threat model")
    if not torch.equal(found.misclassified, logits_of(case.model, found.x_adv).argmax(1) != y):
        raise Wrong("a verdict is not the model's")


def export(case: Case, folder: Path) -> None:
    """A file of torch.export; Wrong where it answers something else than the model."""
    path = im.export_model(case.model, folder / "model.pt2", input_shape=case.x.shape[1:])
    found, truth = im.load_model(path, allow_code=True)(case.x[:3]), logits_of(case.model, case.x[:3])
    if _relative(found, truth) > LARGEST:
        raise Wrong(f"the file's logits differ by {_relative(found, truth):.1e} of their size")
