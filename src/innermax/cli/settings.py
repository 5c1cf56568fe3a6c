"""Settings as a recipe or the command line gives them, and the values they build."""

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from innermax import strategies
from innermax.attacks.pgd import PGD
from innermax.attacks.search import Gauge
from innermax.attacks.targeted import Rule
from innermax.objectives import OBJECTIVES
from innermax.oracle.oracle import Precision
from innermax.reproduce.comparison import TABLE_ATTACKS
from innermax.strategies import STRATEGIES, Shape, Strategy
from innermax.threat import NORMS, Threat, build_threat
from innermax.utils.serialization import ADDED_FIELD

TABLE = ",".join(TABLE_ATTACKS)

if TYPE_CHECKING:
    NormName = str
    StrategyName = str
    ObjectiveName = str
else:  # what the command line offers
    NormName = Literal[*NORMS]
    StrategyName = Literal[*STRATEGIES]
    ObjectiveName = Literal[*OBJECTIVES]


@dataclass(frozen=True)
class ThreatSettings:
    """The threat model.

    Args:
        norm: Norm of the perturbations.
        eps: Largest size of a perturbation, such as 8/255.
    """

    norm: NormName = "linf"
    eps: float = 8 / 255

    def build(self) -> Threat:
        """The threat model, on images in [0, 1]."""
        return build_threat(self.norm, self.eps)


@dataclass(frozen=True)
class AttackSettings:
    """The attack on training examples, PGD.

    Args:
        steps: Steps, at most.
        step_size: Length of a step: one number, a list of one number per step, or "annealed". By default ε/4.
        random_start: Start from a random point.
        gauge: How convergence is measured: exact, ball (the paper's closed form) or relative.
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
    """What is trained, on what, and how it is defended.

    Args:
        data: digits, mnist, fashion-mnist, cifar10, cifar100, svhn, or a folder.
        label_column: Column of the labels in parquet files, where it has another name than label or several could be
            meant.
        model: A network that comes with innermax, such as mnist-cnn.
        validation: Images held out of the training set, a share or a number. They choose the best epoch; with 0 the
            last epoch is the result.
        init: A run folder, model file or Hub id to start from, instead of random weights.
        strategy: The defence.
        switch: Of fgsm-pgd: share of the training after which PGD takes over.
        objective: What is minimised. loss_weighted is what the code released with the paper minimises.
        beta: Of trades and mart: weight of the divergence between the answers to clean and adversarial images. Of
            grad_align: weight of the angle between input gradients. By default 6 for trades, 5 for mart, 0.2 for
            grad_align.
        label_smoothing: Share of the target, at least 0 and below 1, that is spread over all classes. By default 0.
        awp: Size of an adversarial weight perturbation over that of the weights, such as 0.005. By default weights are
            not perturbed.
        attacks: Attacks on the result with the test images, separated by commas.
    """

    data: str
    model: str
    label_column: str | None = None
    validation: float = 0.1
    init: str | None = None
    strategy: StrategyName = "dynamic"
    switch: float = 1 / 6
    objective: ObjectiveName = "cross_entropy"
    beta: float | None = field(default=None, metadata=ADDED_FIELD)
    label_smoothing: float | None = field(default=None, metadata=ADDED_FIELD)
    awp: float | None = field(default=None, metadata=ADDED_FIELD)
    attacks: str = TABLE


@dataclass(frozen=True)
class DynamicSettings:
    """Options of the strategy dynamic.

    Args:
        c_max: Threshold c_t at the start, a number or "auto". By default 0.5 on the gauge ball, 0.15 on exact and
            "auto" on relative.
        zero_at: Share of the training after which c_t is 0.
        shape: How c_t falls.
    """

    c_max: float | Literal["auto"] | None = None
    zero_at: float = 100 / 120
    shape: Shape = "linear"


@dataclass(frozen=True)
class CurriculumSettings:
    """Options of the strategy curriculum.

    Args:
        full_at: Share of the training after which every step is taken.
        patience: Take one step more after so many epochs without improvement, instead of by full_at.
    """

    full_at: float = 100 / 120
    patience: int | None = None


@dataclass(frozen=True)
class WarmSettings:
    """Options of the strategy warm-start.

    Args:
        steps: Steps per epoch, at most.
        floor: Relative FOSC at or below which an example takes no further step. By default all steps are taken.
    """

    steps: int = 2
    floor: float | None = None


@dataclass(frozen=True)
class FGSMRSSettings:
    """Options of the strategy fgsm-rs.

    Args:
        step: Length of the step over ε.
    """

    step: float = 1.25


@dataclass(frozen=True)
class NFGSMSettings:
    """Options of the strategy n-fgsm.

    Args:
        step: Length of the step over ε.
        noise: Largest noise over ε.
    """

    step: float = 1.0
    noise: float = 2.0


@dataclass(frozen=True)
class ATTASettings:
    """Options of the strategy atta.

    Args:
        steps: Steps per epoch.
        step: Length of a step over ε.
        reset_every: Epochs after which perturbations start afresh; null for never.
    """

    steps: int = 1
    step: float = 0.5
    reset_every: int | None = 10


@dataclass(frozen=True)
class FATSettings:
    """Options of the strategy fat.

    Args:
        rise_at: Shares of the training after each of which the search goes on for one more step after an image fell.
    """

    rise_at: list[float] = field(default_factory=lambda: [50 / 120, 90 / 120])


@dataclass(frozen=True)
class FreeSettings:
    """Options of the strategy free.

    Args:
        replays: Updates with each batch; the epochs are divided by it.
        step: Length of a step over ε.
    """

    replays: int = 8
    step: float = 1.0


@dataclass(frozen=True)
class FGSMPGISettings:
    """Options of the strategy fgsm-pgi.

    Args:
        step: Length of the step over ε.
        momentum: Share of an image's momentum that is left after an epoch.
        weight: Weight of the difference between the answers to an adversarial image and to the start of its search.
        reset_every: Epochs after which perturbations start afresh; null for never.
    """

    step: float = 1.0
    momentum: float = 0.3
    weight: float = 10.0
    reset_every: int | None = 40


@dataclass(frozen=True)
class EvaluateSettings:
    """What is evaluated, and against which attacks.

    Args:
        data: Name of a data set, or a folder, of which the test images are enough. By default the run's own.
        label_column: Column of the labels in parquet files, where it has another name than label or several could be
            meant. By default the run's own.
        classes: How the model numbers its classes, where the data set numbers them otherwise: a file with a name per
            line, such as "n01440764 tench, Tinca tinca", or imagenet. The data set's classes are found by their names.
        attacks: Attacks by name, separated by commas.
        targets: Let every attack head for a label of each image, instead of away from its own: a random one, the next
            one, or the least likely. fgsm, pgd, cw and apgd can.
        limit: Evaluate a random sample of so many test images, which the seed draws, or the first ones: first:500. By
            default all.
        quantize: Round adversarial images to so many bits before they are scored.
        precision: Precision of the attacks; bf16 and auto are faster and find slightly fewer adversarial images. Scores
            are always float32.
        batch_size: Images at a time.
        seed: Seed of the random starts.
        device: auto, cpu, cuda or cuda:N.
        devices: Processes that share the images; on GPUs, one per GPU. By default as many as torchrun or SLURM started,
            else one.
        rows_dir: Folder for the rows of each batch, written as soon as they are computed. The same command resumes from
            it. By default one inside the run folder, or innermax/rows among your caches (XDG_CACHE_HOME, ~/.cache).
        best: Evaluate the best epoch of a run on its validation split instead of the last.
        normalize: Normalise the inputs of a model that expects it: imagenet, or [MEAN,STD] with one number per channel
            each, or one for all, such as [0.1307,0.3081].
        surrogate: Another model, given like the first. The audit also tries adversarial images made on it.
        allow_code: Allow the code of module:function or of a .pt2 program to run.
        json: File to write the whole result to, with every example.
        html: File to write the robustness report to.
        save_images: New folder for the adversarial images: of each attack a .npz, and PNGs of what is misclassified.
            They are also kept with the rows.
    """

    data: str | None = None
    label_column: str | None = None
    classes: str | None = None
    attacks: str = TABLE
    targets: Rule | None = None
    limit: int | str | None = None
    quantize: int | None = None
    precision: Precision = "float32"
    batch_size: int = 250
    seed: int = 0
    device: str = "auto"
    devices: int | None = None
    rows_dir: str | None = None
    best: bool = False
    normalize: list[list[float]] | list[float] | Literal["imagenet"] | None = None
    surrogate: str | None = None
    allow_code: bool = False
    json: str | None = None
    html: str | None = None
    save_images: str | None = None


@dataclass(frozen=True)
class ExportSettings:
    """What a model is written as.

    Args:
        format: hub: a folder as on the Hugging Face Hub, with a model card; onnx; pt2: a torch.export program.
        to: File or folder to write. By default one inside the run folder.
        push: Repository on the Hub, as user/name, to upload the folder to instead.
        private: Make a new repository private.
        license: License of the model, as the Hub spells it, such as apache-2.0.
        best: Of a run, write the best epoch on its validation split, which its evaluation.json is about, instead of the
            last.
        input_shape: Shape [C,H,W] of one image, for a model that innermax did not build.
        allow_code: Allow the code of module:function or of a .pt2 program to run.
    """

    format: Literal["hub", "onnx", "pt2"] = "hub"
    to: str | None = None
    push: str | None = None
    private: bool = False
    license: str | None = None
    best: bool = True
    input_shape: list[int] | None = None
    allow_code: bool = False


# Groups of a recipe's settings by name; those of added strategies have their names.
GROUPS: dict[str, type] = {
    "threat": ThreatSettings,
    "attack": AttackSettings,
    "dynamic": DynamicSettings,
    "curriculum": CurriculumSettings,
    "warm": WarmSettings,
    "fgsm_rs": FGSMRSSettings,
    "n_fgsm": NFGSMSettings,
    "atta": ATTASettings,
    "fat": FATSettings,
    "free": FreeSettings,
    "fgsm_pgi": FGSMPGISettings,
}
# Settings that folders of earlier versions know nothing of, where they are at their defaults.
ADDED: dict[str, Any] = {
    option.name: option.default for option in fields(RecipeSettings) if option.metadata.get("added")
}
_EARLIER = ("threat", "attack", "dynamic", "curriculum", "warm")
ADDED |= {name: asdict(kind()) for name, kind in GROUPS.items() if name not in _EARLIER}


def build_strategy(name: StrategyName, attack: PGD, chosen: Any) -> Strategy:
    """The strategy of a name, with the options that it takes; chosen: the recipe's settings."""
    if name == "fgsm-pgd":
        return strategies.build_strategy(name, attack, switch=chosen["switch"])
    group = {"warm-start": "warm"}.get(name, name.replace("-", "_"))
    options = vars(chosen[group]) if group in GROUPS else {}
    return strategies.build_strategy(name, attack, **options)
