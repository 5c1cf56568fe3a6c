"""Settings as a recipe or a command line states them, and the values they stand for."""

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from innermax import strategies
from innermax.attacks.pgd import PGD
from innermax.attacks.search import Gauge
from innermax.objectives import OBJECTIVES
from innermax.oracle.oracle import Precision
from innermax.strategies import STRATEGIES, Shape, Strategy
from innermax.threat import Norm, Threat, build_threat
from innermax.utils.serialization import parse_yaml
from innermax.utils.validation import unknown

TABLE = "fgsm,pgd-10,pgd-20,cw-30"  # the attacks of the paper's tables

if TYPE_CHECKING:
    StrategyName = str
    ObjectiveName = str
else:  # what the command line offers
    StrategyName = Literal[*STRATEGIES]
    ObjectiveName = Literal[*OBJECTIVES]


@dataclass(frozen=True)
class ThreatSettings:
    """What the adversary may do.

    Args:
        norm: of the perturbation.
        eps: its largest size, e.g. 8/255.
    """

    norm: Norm = "linf"
    eps: float = 8 / 255

    def build(self) -> Threat:
        """The threat model, on images in [0, 1]."""
        return build_threat(self.norm, self.eps)


@dataclass(frozen=True)
class AttackSettings:
    """What training examples are attacked with.

    Args:
        steps: of PGD, at most.
        step_size: length of a step; empty for ε/4, or "annealed", or one length for every step, or a list.
        random_start: start from a random point.
        gauge: how convergence is measured: exact, ball (the paper's closed form) or relative.
    """

    steps: int = 10
    step_size: float | list[float] | Literal["annealed"] | None = None
    random_start: bool = True
    gauge: Gauge = "exact"

    def build(self, threat: Threat) -> PGD:
        """The attack."""
        step_size = tuple(self.step_size) if isinstance(self.step_size, list) else self.step_size
        return PGD(threat, self.steps, step_size, self.random_start, gauge=self.gauge)


@dataclass(frozen=True)
class RecipeSettings:
    """What is trained, on what, and how it defends itself.

    Args:
        data: digits, mnist, fashion-mnist, cifar10, cifar100, svhn, or a folder.
        validation: held out of the training set, a share or a count; 0 for none, and then the last epoch is the result.
        model: one of the networks that come with innermax, for example mnist-cnn.
        init: a run folder, model file or Hub id to start from instead of random weights.
        strategy: the defence.
        switch: of fgsm-pgd, the share of the training after which PGD takes over.
        objective: what is minimised; loss_weighted is the code released with the paper.
        attacks: what the result is attacked with on the test set, separated by commas.
    """

    data: str
    model: str
    validation: float = 0.1
    init: str | None = None
    strategy: StrategyName = "dynamic"
    switch: float = 1 / 6
    objective: ObjectiveName = "cross_entropy"
    attacks: str = TABLE


@dataclass(frozen=True)
class DynamicSettings:
    """The Dynamic strategy.

    Args:
        c_max: c_t at the start; a number or "auto"; empty for 0.5 on the ball gauge, 0.15 on the exact, else "auto".
        zero_at: share of the training after which c_t is 0.
        shape: how c_t falls.
    """

    c_max: float | Literal["auto"] | None = None
    zero_at: float = 100 / 120
    shape: Shape = "linear"


@dataclass(frozen=True)
class CurriculumSettings:
    """The Curriculum strategy.

    Args:
        full_at: share of the training after which all steps are taken.
        patience: instead, epochs without improvement before one step more.
    """

    full_at: float = 100 / 120
    patience: int | None = None


@dataclass(frozen=True)
class WarmSettings:
    """The WarmStart strategy.

    Args:
        steps: an epoch, at most.
        floor: relative FOSC at or below which an example takes no further step; empty: all are taken.
    """

    steps: int = 2
    floor: float | None = None


@dataclass(frozen=True)
class EvaluateSettings:
    """What is evaluated, and against what.

    Args:
        data: data set name or folder; empty for the run's own.
        attacks: separated by commas: fgsm, guided, autoattack and autoattack-rand; pgd-K, cw-K, apgd-K and fab-K with
            K steps, square-K with K queries, guided-K with at most K gradients.
        limit: only so many test images, the first ones.
        quantize: score images rounded to so many bits.
        precision: what attacks search in; bf16 and auto are faster and find a little less. Scores are float32 always.
        batch_size: images at a time.
        seed: decides the random starts.
        device: auto, cpu, cuda or cuda:N.
        devices: processes that share the images, on GPUs one a GPU; empty: as many as torchrun or SLURM started, else
            one.
        rows_dir: folder that keeps each example's rows as they come, where the same command goes on if it was stopped;
            empty for one inside the run folder.
        best: evaluate a run's best epoch on its validation split instead of its last.
        normalize: put in front of a model that was trained on normalised images: imagenet, or [MEAN,STD] with a number
            a channel each or one for all, such as [[0.1307],[0.3081]].
        surrogate: another model, a source like the first one's: the audit also shows the model images made on it.
        allow_code: run the code that module:function or a .pt2 program brings.
        json: file to write everything to, per example.
        html: file to write the robustness report to, a page to look at.
    """

    data: str | None = None
    attacks: str = TABLE
    limit: int | None = None
    quantize: int | None = None
    precision: Precision = "float32"
    batch_size: int = 250
    seed: int = 0
    device: str = "auto"
    devices: int | None = None
    rows_dir: str | None = None
    best: bool = False
    normalize: list[list[float]] | Literal["imagenet"] | None = None
    surrogate: str | None = None
    allow_code: bool = False
    json: str | None = None
    html: str | None = None


@dataclass(frozen=True)
class ExportSettings:
    """What a model is written as.

    Args:
        format: hub, a folder as the Hugging Face Hub has it, with a model card; onnx; or pt2, a torch.export program.
        to: file or folder to write; empty for one inside the run folder.
        push: a repository of the Hub, user/name, to upload the folder to instead.
        private: a repository that is new.
        license: the model's, as the Hub spells it, such as apache-2.0.
        best: of a run the best epoch on its validation split, which its evaluation.json tells of, instead of its last.
        input_shape: of one image, [C,H,W], for a model that innermax did not build.
        allow_code: run the code that module:function or a .pt2 program brings.
    """

    format: Literal["hub", "onnx", "pt2"] = "hub"
    to: str | None = None
    push: str | None = None
    private: bool = False
    license: str | None = None
    best: bool = True
    input_shape: list[int] | None = None
    allow_code: bool = False


def build_strategy(
    name: StrategyName,
    attack: PGD,
    dynamic: DynamicSettings,
    curriculum: CurriculumSettings,
    warm: WarmSettings,
    switch: float,
) -> Strategy:
    """The defence of a name."""
    options: dict[str, dict[str, Any]] = {
        "curriculum": vars(curriculum),
        "fgsm-pgd": {"switch": switch},
        "dynamic": vars(dynamic),
        "warm-start": vars(warm),
    }
    return strategies.build_strategy(name, attack, **options.get(name, {}))


def recipe_names() -> list[str]:
    """The recipes that come with innermax."""
    folder = resources.files("innermax") / "recipes"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a recipe by its name, or of a file. Raises ValueError where there is none."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"recipe {name} is not readable: {error}") from error
    if name not in recipe_names():
        raise unknown("recipe", name, recipe_names())
    return (resources.files("innermax") / "recipes" / f"{name}.yaml").read_text()


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 8/255 and 1e-4 as numbers."""


_Loader.add_implicit_resolver("!fraction", re.compile(r"^\d+(\.\d+)?/\d+(\.\d+)?$"), list("0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _fraction(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    above, below = str(loader.construct_scalar(node)).split("/")
    if float(below) == 0:
        raise yaml.YAMLError(f"{node.value} divides by zero")
    return float(above) / float(below)


_Loader.add_constructor("!fraction", _fraction)


def read_yaml(text: str) -> Any:
    """YAML as recipes use it: plain values, and fractions such as 8/255. Raises ValueError for anything else."""
    return parse_yaml(text, _Loader)
