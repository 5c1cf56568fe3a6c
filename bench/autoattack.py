"""Our AutoAttack and PGD beside other people's: who falls, and how long it takes.

    pip install --no-deps pyautoattack==0.2.0      # and the peers of bench/peers.py
    python bench/autoattack.py --write results/autoattack.md

Three questions, on digit and MNIST classifiers that are trained here once (--models):

    agreement   AutoAttack standard and pyautoattack's, its three seeds against one of ours: who survives
    pgd         PGD and foolbox's and torchattacks' with the same step size, from the same starts and from their own
    time        AutoAttack standard and pyautoattack's in turns, in one process, on the same MNIST images

Every record, a chunk of images or one attack of a turn, is kept in the folder --runs when it is done and not repeated:
what was interrupted goes on, and more images or turns add to what is there.
"""

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from timing import machine, ratio, shown
from torch import Tensor, nn

import innermax as im
from innermax.attacks.search import search
from innermax.utils import randomness

SPECIFICATIONS: dict[str, dict[str, Any]] = {
    "digits": {"model": "digits-cnn", "linf": 0.15, "l2": 1.0, "images": None, "epochs": 20, "lr": 0.05},
    "mnist": {"model": "mnist-cnn", "linf": 0.3, "l2": 2.0, "images": 30_000, "epochs": 6, "lr": 0.02},
}
NORMS = {"linf": im.Linf, "l2": im.L2}
PEER_NORMS = {"linf": "Linf", "l2": "L2"}
SEEDS = (0, 1, 2)
CHUNKS = {"digits": 50, "mnist": 250}  # images
STEPS = 20
Attacker = Callable[[nn.Module, im.Linf | im.L2, Tensor, Tensor, int], Tensor]
Start = Tensor | int | None  # the points, a seed for the library's own, or the clean image


def threat_of(name: str) -> im.Linf | im.L2:
    """The threat model of a name such as digits-linf-standard: what it trained with, or of the radius after an @."""
    name, _, eps = name.partition("@")
    data, norm, _ = name.split("-")
    return NORMS[norm](float(eps or SPECIFICATIONS[data][norm]))


def trained(name: str, folder: Path) -> nn.Module:
    """The classifier of a name, from the folder or trained now."""
    name = name.partition("@")[0]
    if not (folder / name / "model.safetensors").exists():
        data, _, strategy = name.split("-")
        told = SPECIFICATIONS[data]
        train_set = im.load_data(data, validation=0).train[: told["images"]]
        threat = threat_of(name)
        attack = im.PGD(threat, steps=7, step_size=threat.eps / 3)
        torch.manual_seed(0)
        im.train(
            im.build_model(told["model"], input_shape=train_set.shape),
            train_set,
            im.Standard(attack) if strategy == "standard" else im.Dynamic(attack, c_max="auto"),
            epochs=told["epochs"],
            lr=told["lr"],
            lr_schedule="cosine",
            run_dir=folder / name,
            progress=False,
        )
    return im.load_model(folder / name)


@cache
def images_of(data: str) -> tuple[Tensor, Tensor]:
    """The test images and labels; after the few digits there are, those of the training set."""
    loaded = im.load_data(data, validation=0)
    parts = (loaded.test, loaded.train) if data == "digits" else (loaded.test,)
    images = [part.batch(torch.arange(min(1_000, len(part)))) for part in parts]
    return torch.cat([x for x, _ in images])[:1_000], torch.cat([y for _, y in images])[:1_000]


# Attackers: who is still right, (B,) bool, scored by the model itself


def innermax_autoattack(precision: str) -> Attacker:
    def attack(model: nn.Module, threat: im.Linf | im.L2, x: Tensor, y: Tensor, seed: int) -> Tensor:
        scored = im.evaluate(model, (x, y), {"aa": im.AutoAttack(threat)}, seed=seed, precision=precision, audit=False)
        return torch.from_numpy(scored.correct("aa"))

    return attack


def pyautoattack(model: nn.Module, threat: im.Linf | im.L2, x: Tensor, y: Tensor, seed: int) -> Tensor:
    import pyautoattack as peer

    norm = PEER_NORMS[type(threat).__name__.lower()]
    attack = peer.AutoAttack(model, norm=norm, eps=threat.eps, seed=seed, version="standard")
    x_adv, _ = attack.run_standard_evaluation(x.clone(), y.clone(), batch_size=250)
    return survivors(model, x_adv, y)


def innermax_pgd(model: nn.Module, threat: im.Linf | im.L2, x: Tensor, y: Tensor, start: Start) -> Tensor:
    attack = im.PGD(threat, steps=STEPS, step_size=threat.eps / 4, random_start=isinstance(start, int))
    if isinstance(start, Tensor):
        feasible, loss = threat.around(x), attack.objective()
        return search(im.Oracle(model), feasible, start, y, loss, attack.step_sizes(), final="none").x_adv
    return attack(model, x, y, seed=start or 0, final="none").x_adv


def foolbox_pgd(model: nn.Module, threat: im.Linf | im.L2, x: Tensor, y: Tensor, start: Start) -> Tensor:
    import eagerpy
    from foolbox import PyTorchModel, attacks

    kind = attacks.LinfPGD if isinstance(threat, im.Linf) else attacks.L2PGD
    attack = kind(abs_stepsize=threat.eps / 4, steps=STEPS, random_start=start is not None)
    if isinstance(start, Tensor):
        attack.get_random_start = lambda *_: eagerpy.astensor(start)
    torch.manual_seed(start if isinstance(start, int) else 0)
    x_adv, _, _ = attack(PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=threat.eps)
    return x_adv


def torchattacks_pgd(
    model: nn.Module, threat: im.Linf | im.L2, x: Tensor, y: Tensor, start: Start, steps: int = STEPS
) -> Tensor:
    from torchattacks import PGD, PGDL2

    kind = PGD if isinstance(threat, im.Linf) else PGDL2
    torch.manual_seed(start or 0)
    attack = kind(model, eps=threat.eps, alpha=threat.eps / 4, steps=steps, random_start=start is not None)
    return attack(x, y)


def start_of(
    kind: str, library: str, model: nn.Module, threat: im.Linf | im.L2, x: Tensor, y: Tensor, seed: int
) -> Start:
    """Where a library begins: on the "clean" image, at its "own" random start, or at another library's."""
    if kind == "clean":
        return None
    if kind in ("own", library):
        return seed
    if kind == "torchattacks":
        return torchattacks_pgd(model, threat, x, y, seed, steps=0)
    return threat.around(x).sample(randomness.hash_keys(seed, torch.arange(len(x)), 0))


@torch.no_grad()
def survivors(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x).argmax(1) == y


OURS, FAST, THEIRS = "innermax, float32", "innermax, bf16 search", "pyautoattack"
HELD_TOGETHER = (*((THEIRS, seed) for seed in SEEDS), (OURS, 0), (FAST, 0))
AUTOATTACKS: dict[str, Attacker] = {
    THEIRS: pyautoattack,
    OURS: innermax_autoattack("float32"),
    FAST: innermax_autoattack("auto"),
}
PGDS: dict[str, Any] = {"innermax": innermax_pgd, "foolbox": foolbox_pgd, "torchattacks": torchattacks_pgd}
STARTS = {"clean": range(1), "torchattacks": range(10), "innermax": range(10), "own": range(10)}  # seeds of each
STUDENT = 2.262  # 97.5 % quantile of Student's t with as many degrees of freedom as there are seeds, less one


def recorded(path: Path, work: Callable[[], Any]) -> Any:
    """The record of a piece of work, done now where it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        value = work()
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(value))
        partial.replace(path)
        print(path.stem, flush=True)
    return json.loads(path.read_text())


def slug(text: str) -> str:
    return text.replace(", ", "-").replace(" ", "-")


# Agreement


def agreement(name: str, count: int, models: Path, runs: Path) -> dict[str, list[bool]]:
    """Survivors of each attacker and seed, on the first images, chunk by chunk: what is cut short compares, too."""
    x, y = images_of(name.split("-")[0])
    found: dict[str, list[bool]] = {}
    model = trained(name, models)
    chunk = CHUNKS[name.split("-")[0]]
    for start in range(0, count, chunk):
        rows = slice(start, min(start + chunk, count))
        for attacker, seed in HELD_TOGETHER:
            work = lambda attacker=attacker, seed=seed, rows=rows: (  # noqa: E731
                AUTOATTACKS[attacker](model, threat_of(name), x[rows], y[rows], seed).tolist()
            )
            path = runs / f"{name}-{slug(attacker)}-{seed}-{start}-{rows.stop}.json"
            found.setdefault(f"{attacker}, seed {seed}", []).extend(recorded(path, work))
    return found


def compared(found: Mapping[str, list[bool]]) -> dict[str, Any]:
    """Robust accuracies in %, and the agreement of pairs: theirs among themselves, ours with each of theirs."""
    columns = {name: torch.tensor(column) for name, column in found.items()}
    theirs = [name for name in columns if name.startswith(THEIRS)]

    def agree(pairs: Iterable[tuple[str, str]]) -> list[float]:
        return [100 * float((columns[one] == columns[other]).double().mean()) for one, other in pairs]

    accuracies = {name: 100 * float(column.double().mean()) for name, column in columns.items()}
    low, high = (end(accuracies[name] for name in theirs) for end in (min, max))
    return {
        "images": len(columns[theirs[0]]),
        "accuracy": accuracies,
        "within": {name: low - 1e-9 <= accuracies[name] <= high + 1e-9 for name in columns if name not in theirs},
        "among theirs": agree(itertools.combinations(theirs, 2)),
        "with theirs": {
            name: agree((name, other) for other in theirs) for name in columns if name not in theirs
        },
    }  # fmt: skip


# PGD


def pgd(name: str, models: Path, runs: Path) -> dict[str, dict[str, Any]]:
    """Each library's PGD on 1,000 images, by start and library: robust accuracies in %, and how far they are apart."""
    x, y = images_of(name.split("-")[0])
    model, threat = trained(name, models), threat_of(name)

    def survived(kind: str, library: str, seed: int) -> list[bool]:
        start = start_of(kind, library, model, threat, x, y, seed)
        return survivors(model, PGDS[library](model, threat, x, y, start), y).tolist()

    found: dict[str, dict[str, Any]] = {}
    for kind, seeds in STARTS.items():
        rows = {
            library: [
                recorded(
                    runs / f"pgd-{name}-{library}-{kind}-{seed}-rows.json",
                    lambda kind=kind, library=library, seed=seed: survived(kind, library, seed),
                )
                for seed in seeds
            ]
            for library in PGDS
            if (kind, library) != ("innermax", "torchattacks")  # it takes no starts
        }
        found[kind] = {library: beside(verdicts, rows["innermax"]) for library, verdicts in rows.items()}
    return found


def beside(theirs: list[list[bool]], ours: list[list[bool]]) -> dict[str, Any]:
    """Accuracy by seed and, beside ours: the mean difference, half its 95 % interval, and verdicts shared, all in %."""
    columns, own = (torch.tensor(verdicts).double() for verdicts in (theirs, ours))
    apart = 100 * (columns - own).mean(1)
    few = len(apart) == 1
    return {
        "accuracy": (100 * columns.mean(1)).tolist(),
        "difference": float(apart.mean()),
        "within": 0.0 if few else STUDENT * float(apart.std()) / len(apart) ** 0.5,
        "shared": 100 * float((columns == own).double().mean()),
    }


# Time


def timings(name: str, count: int, turns: int, models: Path, runs: Path) -> dict[str, list[float]]:
    """Seconds of each AutoAttack on the same images, in turns, with as many threads as this process has."""
    x, y = (part[:count] for part in images_of(name.split("-")[0]))
    model = trained(name, models)

    def seconds(attacker: str) -> float:
        began = time.perf_counter()
        AUTOATTACKS[attacker](model, threat_of(name), x, y, 0)
        return time.perf_counter() - began

    threads, found = torch.get_num_threads(), {attacker: [] for attacker in (THEIRS, FAST, OURS)}
    for turn in range(turns):
        for attacker, column in found.items():
            path = runs / f"time-{name}-{slug(attacker)}-{count}-{threads}-{turn}.json"
            column.append(recorded(path, lambda attacker=attacker: seconds(attacker)))
    return found


# The page


def agreement_lines(results: Mapping[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| model | images | pyautoattack, seeds 0, 1, 2 | ours | ours, bf16 | agreement among theirs "
        "| ours with theirs | ours, bf16, with theirs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        accuracy = result["accuracy"]
        theirs = ", ".join(f"{value:.1f}" for key, value in accuracy.items() if key.startswith(THEIRS))
        cells = [name, str(result["images"]), theirs]
        ours = [f"{attacker}, seed 0" for attacker in (OURS, FAST)]
        cells += [f"{accuracy[key]:.1f}{'' if result['within'][key] else ' (outside)'}" for key in ours]
        pairs = [result["among theirs"], *(result["with theirs"][key] for key in ours)]
        cells += [f"{statistics.mean(values):.2f} ({min(values):.1f}–{max(values):.1f})" for values in pairs]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def pgd_lines(results: Mapping[str, dict[str, dict[str, Any]]]) -> list[str]:
    peers = [library for library in PGDS if library != "innermax"]
    beside = [f"{peer} less innermax: points, verdicts shared %" for peer in peers]
    lines = [
        f"| model | start | {' | '.join([*PGDS, *beside])} |",
        f"| --- | --- |{' --- |' * (len(PGDS) + len(peers))}",
    ]
    for name, starts in results.items():
        for kind, libraries in starts.items():
            start = kind if kind in ("clean", "own") else f"{kind}'"
            accuracies = [_spread(libraries[library]["accuracy"]) if library in libraries else "–" for library in PGDS]
            differences = [_apart(libraries[peer]) if peer in libraries else "–" for peer in peers]
            lines.append(f"| {' | '.join([name, start, *accuracies, *differences])} |")
    return lines


PGD_WORDS = (
    "Robust accuracy in % on 1,000 images: from the clean image; from the very same random points, torchattacks' or",
    "ours (torchattacks takes none); from each library's own. Of random starts the mean ± standard deviation of ten",
    "seeds, and the mean difference, seed by seed, with its 95 % interval (Student's t): model and images are the same",
    "throughout, so the intervals speak of starts alone.",
    "",
    "In L2 torchattacks draws a start's length uniformly from [0, ε]; foolbox and we draw uniformly from the ball,",
    "most of which lies near its surface. They project onto the ball and then clip, we project onto ball and bounds",
    "together: that is what is left from the same starts in L2.",
)


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def _apart(told: dict[str, Any]) -> str:
    low, high = (told["difference"] + sign * told["within"] for sign in (-1, 1))
    within = f" ({low:+.2f} to {high:+.2f})" if len(told["accuracy"]) > 1 else ""
    return f"{told['difference']:+.2f}{within}, {told['shared']:.2f}".replace("-", "−")


def time_lines(name: str, count: int, seconds: Mapping[str, list[float]]) -> list[str]:
    lines = [
        f"{name}, {count} images, {len(seconds[THEIRS])} turns; the ratio is taken turn by turn: median [quartiles].",
        "",
        "| AutoAttack standard | seconds, each turn | pyautoattack's time over it |",
        "| --- | --- | --- |",
    ]
    for attacker, values in seconds.items():
        over = shown(ratio(seconds[THEIRS], values)) if len(values) > 1 else f"{seconds[THEIRS][0] / values[0]:.2f}"
        lines.append(f"| {attacker} | {', '.join(f'{value:.0f}' for value in values)} | {over} |")
    return lines


def page(
    command: str, agreements: dict[str, Any], pgds: dict[str, Any], timed: tuple[str, int, dict[str, list[float]]]
) -> str:
    return "\n".join(
        [
            "# AutoAttack and PGD beside other people's",
            "",
            f"`{command}` on {machine()}, torch {torch.__version__}.",
            "",
            "## Who survives AutoAttack standard",
            "",
            "Robust accuracy in % and the share of images in % whose verdict two runs share: mean (least–most) over",
            "pairs. Our seed 0; *bf16*: the search on the fast path, every success confirmed in float32. Digits beyond",
            "the 360 test images are training images.",
            "",
            *agreement_lines(agreements),
            "",
            f"## PGD-{STEPS} with step ε/4",
            "",
            *PGD_WORDS,
            "",
            *pgd_lines(pgds),
            "",
            *(["## Time", "", *time_lines(*timed), ""] if timed[2][OURS] else []),
        ]
    )


def _counts(words: list[str]) -> dict[str, int]:
    return {name: int(count) for name, _, count in (word.partition("=") for word in words)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ["digits-linf-standard=1000", "digits-l2-dynamic=1000", "mnist-linf-standard=1000"]
    parser.add_argument("--agreement", nargs="*", default=default, metavar="MODEL[@EPS]=IMAGES")
    parser.add_argument("--pgd", nargs="*", default=[word.partition("=")[0] for word in default], metavar="MODEL[@EPS]")
    parser.add_argument("--time", default="mnist-linf-standard=64", metavar="MODEL=IMAGES")
    parser.add_argument("--turns", type=int, default=3, help="0: no timing")
    parser.add_argument("--models", type=Path, default=Path("runs/models"))
    parser.add_argument("--runs", type=Path, default=Path("runs/autoattack"))
    parser.add_argument("--write", type=Path, help="Markdown file; the numbers go into a .json beside it")
    told = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers'
    agreements = {
        name: compared(agreement(name, count, told.models, told.runs))
        for name, count in _counts(told.agreement).items()
    }
    pgds = {name: pgd(name, told.models, told.runs) for name in told.pgd}
    ((name, count),) = _counts([told.time]).items()
    seconds = timings(name, count, told.turns, told.models, told.runs)
    command = (
        f"python bench/autoattack.py --agreement {' '.join(told.agreement)} --pgd {' '.join(told.pgd)} "
        f"--time {told.time} --turns {told.turns}"
    )
    text = page(command, agreements, pgds, (name, count, seconds))
    print(text)
    if told.write is not None:
        told.write.write_text(text)
        numbers = {"agreement": agreements, "pgd": pgds, "seconds": seconds}
        told.write.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n")
