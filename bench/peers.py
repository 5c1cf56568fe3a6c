"""PGD as other libraries compute it, on the same model and batch as ours; and proof that each does the same search.

    pip install --constraint constraints.txt --editable '.[bench]'
    pip install --no-deps torchattacks==3.5.1 secml-torch==1.5
    python bench/peers.py

The second line is apart because both of its packages require torchvision and torchattacks a `requests` of 2021, neither
of which their PGD imports. A peer that is not installed is left out.

Every peer searches the L∞ ball within [0, 1] from a random start, with constant step ε/4 and as many gradients as
steps, in evaluation mode. Where a peer evaluates the last iterate, or the clean images, whether asked to or not, that
is part of its price: `passes` counts.
"""

import copy
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innermax as im
from innermax.oracle.oracle import Oracle

Attack = Callable[[Tensor, Tensor], Tensor]
Builder = Callable[[nn.Module, float, int], Attack]

CLASSES = 10  # of every network that is benchmarked
_BALL_TOLERANCE = 1e-6  # rounding of x ± ε in float32
_LOSS_TOLERANCE = 0.05  # between searches from different random starts


class LoweredModel(nn.Module):
    """A classifier of images that computes in bf16 and channels last, and takes and returns float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        lowered: Any = copy.deepcopy(model).eval()
        self.network = lowered.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.to(dtype=torch.bfloat16, memory_format=torch.channels_last)).float()


def innermax_attack(model: nn.Module | Oracle, eps: float, steps: int) -> Attack:
    """Our own search, with nothing computed at the last iterate."""
    search = im.PGD(im.Linf(eps), steps=steps)
    return lambda x, y: search(model, x, y, final="none").x_adv


def floor(model: nn.Module, eps: float, steps: int) -> Attack:
    """The least an eager search in the model's own precision can cost: its passes, and no update; x comes back."""
    frozen = copy.deepcopy(model).requires_grad_(False).eval()

    def attack(x: Tensor, y: Tensor) -> Tensor:
        for _ in range(steps):
            point = x.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(frozen(point), y, reduction="sum"), point)
        return x

    return attack


def naive(model: nn.Module, eps: float, steps: int) -> Attack:
    """The loop of most training scripts: loss.backward(), which leaves gradients in the parameters."""
    model.eval()

    def attack(x: Tensor, y: Tensor) -> Tensor:
        x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            F.cross_entropy(model(x_adv), y).backward()
            with torch.no_grad():
                x_adv = x_adv + eps / 4 * x_adv.grad.sign()
                x_adv = torch.clamp(torch.minimum(torch.maximum(x_adv, x - eps), x + eps), 0, 1)
        return x_adv

    return attack


def torchattacks(model: nn.Module, eps: float, steps: int) -> Attack:
    """torchattacks.PGD."""
    from torchattacks import PGD

    return PGD(model.eval(), eps=eps, alpha=eps / 4, steps=steps, random_start=True)


def foolbox(model: nn.Module, eps: float, steps: int) -> Attack:
    """foolbox.attacks.LinfPGD; its call classifies what it found, whether that is wanted or not."""
    from foolbox import PyTorchModel
    from foolbox.attacks import LinfPGD

    wrapped = PyTorchModel(model.eval(), bounds=(0, 1), device=_device(model))
    search = LinfPGD(abs_stepsize=eps / 4, steps=steps, random_start=True)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        raw, _, _ = search(wrapped, x, y, epsilons=eps)
        return raw

    return attack


def adversarial_robustness_toolbox(model: nn.Module, eps: float, steps: int) -> Attack:
    """ART's ProjectedGradientDescentPyTorch; NumPy arrays go in and come out, and a success rate nobody reads is taken.

    It classifies the clean images, too: its success is a change of prediction.
    """
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model.eval(),
        loss=nn.CrossEntropyLoss(),
        input_shape=(),  # looked at only where ε is an array
        nb_classes=CLASSES,
        clip_values=(0.0, 1.0),
        device_type="gpu" if _device(model).type == "cuda" else "cpu",
    )
    search = ProjectedGradientDescentPyTorch(
        classifier, norm="inf", eps=eps, eps_step=eps / 4, max_iter=steps, num_random_init=1, verbose=False
    )

    def attack(x: Tensor, y: Tensor) -> Tensor:
        search.batch_size = len(x)
        return torch.from_numpy(search.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)

    return attack


def secml_torch(model: nn.Module, eps: float, steps: int) -> Attack:
    """secml-torch's own PGD; what it returns is the best iterate it had a gradient of, at most steps − 1 steps on.

    Version 1.5 starts from the perturbation x + ε·u cut to ±ε, not from ε·u: that is +ε wherever a pixel is bright.
    """
    from secmlt.adv.backends import Backends
    from secmlt.adv.evasion.perturbation_models import LpPerturbationModels
    from secmlt.adv.evasion.pgd import PGD
    from secmlt.models.pytorch.base_pytorch_nn import BasePyTorchClassifier
    from torch.utils.data import DataLoader, TensorDataset

    wrapped = BasePyTorchClassifier(model.eval())
    search = PGD(
        perturbation_model=LpPerturbationModels.LINF,
        epsilon=eps,
        num_steps=steps,
        step_size=eps / 4,
        random_start=True,
        backend=Backends.NATIVE,
    )

    def attack(x: Tensor, y: Tensor) -> Tensor:
        # Its bookkeeping is on the CPU, so that a batch elsewhere has to come and go.
        batches = DataLoader(TensorDataset(x.cpu(), y.cpu()), batch_size=len(x))
        ((x_adv, _),) = search(wrapped, batches, stream=True)
        return x_adv.detach().to(x.device)

    return attack


PEERS: dict[str, Builder] = {
    "floor": floor,
    "torchattacks": torchattacks,
    "foolbox": foolbox,
    "ART": adversarial_robustness_toolbox,
    "secml-torch": secml_torch,
    "naive script": naive,
}
_DISTRIBUTIONS = {
    "torchattacks": "torchattacks",
    "foolbox": "foolbox",
    "ART": "adversarial-robustness-toolbox",
    "secml-torch": "secml-torch",
}


def installed() -> dict[str, Builder]:
    """The peers that can be built here; of each other one a line is printed."""
    found: dict[str, Builder] = {}
    for name, build in PEERS.items():
        try:
            build(nn.Linear(1, CLASSES), 0.1, 1)
        except ImportError as error:
            print(f"left out: {name} ({error})")
        else:
            found[name] = build
    return found


def version(name: str) -> str:
    """The peer's version; "" for what is written here."""
    return importlib.metadata.version(_DISTRIBUTIONS[name]) if name in _DISTRIBUTIONS else ""


@dataclass
class Passes:
    """Forward and backward passes through a network; part of a batch counts as that part of a pass."""

    forward: float = 0
    backward: float = 0

    def __deepcopy__(self, memo: dict[int, object]) -> "Passes":
        """Itself: what a copy of the network computes is counted, too."""
        return self


class _Counting(nn.Module):
    """A network that counts the passes of batches of a known size."""

    def __init__(self, network: nn.Module, batch: int) -> None:
        super().__init__()
        self.network, self.batch, self.passes = network, batch, Passes()

    def forward(self, x: Tensor) -> Tensor:
        self.passes.forward += len(x) / self.batch
        logits = self.network(x)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, gradient: Tensor) -> None:
        self.passes.backward += len(gradient) / self.batch


def passes(build: Builder, model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Passes:
    """What one call of a peer costs in passes; what it spends on being built is not counted."""
    counting = _Counting(copy.deepcopy(model), len(x))
    attack = build(counting, eps, steps)
    counting.passes.forward = counting.passes.backward = 0
    attack(x, y)
    return counting.passes


@dataclass(frozen=True)
class Check:
    """How a peer's answer compares with ours.

    Attributes:
        outside: how far x_adv leaves X(x), 0 where it does not.
        loss: mean cross-entropy of the model at x_adv, in float32.
        relative_loss: the same over ours.
        leaves_gradients: parameters that had no gradient have one after the call.
    """

    outside: float
    loss: float
    relative_loss: float
    leaves_gradients: bool


def check(
    build: Builder, model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, *, lowered: bool = False
) -> Check:
    """Holds a peer's search against ours; lowered: the peer sees the model in bf16, but is scored in float32."""
    scored = copy.deepcopy(model).eval()
    attacked = LoweredModel(scored) if lowered else copy.deepcopy(scored)
    attacked.zero_grad(set_to_none=True)
    x_adv = build(attacked, eps, steps)(x, y)
    loss, ours = _loss(scored, x_adv, y), _loss(scored, innermax_attack(scored, eps, steps)(x, y), y)
    return Check(
        outside=_outside(x_adv, x, eps),
        loss=loss,
        relative_loss=loss / ours,
        leaves_gradients=any(parameter.grad is not None for parameter in attacked.parameters()),
    )


def verify(
    name: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, *, lowered: bool = False
) -> Check:
    """The check of a peer. Raises RuntimeError where it leaves the ball or does not search as well as ours."""
    found = check(PEERS[name], model, x, y, eps, steps, lowered=lowered)
    if found.outside > _BALL_TOLERANCE:
        raise RuntimeError(f"{name} leaves the ball by {found.outside:.1e}")
    if name != "floor" and abs(found.relative_loss - 1) > _LOSS_TOLERANCE:
        raise RuntimeError(
            f"{name} reaches {found.relative_loss:.3f} of our loss: it is not configured for this search"
        )
    return found


def trained_for_a_moment(batch: int, eps: float) -> tuple[nn.Module, Tensor, Tensor]:
    """A digit classifier after three epochs, and test images: on random weights no search can be told from another."""
    data = im.load_data("digits")
    torch.manual_seed(0)
    model = im.build_model("digits-cnn", input_shape=data.train.shape)
    im.train(model, data.train, im.Standard(im.PGD(im.Linf(eps))), epochs=3, batch_size=64, lr=0.05, progress=False)
    x, y = data.test.batch(torch.arange(batch))
    return model.eval(), x, y


def as_markdown(batch: int = 128, eps: float = 0.15, steps: int = 10) -> str:
    """A table of what each peer that is installed computes, and how well it searches."""
    model, x, y = trained_for_a_moment(batch, eps)
    lines = [
        f"| PGD-{steps} | version | forward | backward | gradients left | loss / ours | in bf16 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, build in installed().items():
        spent = passes(build, model, x, y, eps, steps)
        exact, lowered = (verify(name, model, x, y, eps, steps, lowered=lowered) for lowered in (False, True))
        left = "yes" if exact.leaves_gradients else "no"
        losses = "–" if name == "floor" else f"{exact.relative_loss:.3f}"
        lowered_losses = "–" if name == "floor" else f"{lowered.relative_loss:.3f}"
        lines.append(
            f"| {name} | {version(name)} | {spent.forward:g} | {spent.backward:g} | {left} | {losses} | "
            f"{lowered_losses} |"
        )
    return "\n".join(lines) + "\n"


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def _outside(x_adv: Tensor, x: Tensor, eps: float) -> float:
    """How far x_adv is from the nearest point of X(x), in the L∞ norm."""
    inside = torch.clamp(torch.minimum(torch.maximum(x_adv, x - eps), x + eps), 0, 1)
    return float((x_adv - inside).abs().max())


if __name__ == "__main__":
    print(as_markdown())
