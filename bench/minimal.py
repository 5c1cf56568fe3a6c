"""The smallest perturbations that FMN and DDN find, ours beside adv-lib's, with the same number of gradients.

    pip install --no-deps adv-lib==0.2.8 visdom    # where visdom does not build, the script does without
    python bench/minimal.py --write results/minimal.md

On networks in results/paper/models: the same random test images that the model gets right, float32, one thread. Both
sides' images are measured by the same lines: a distance counts where plain PyTorch, on that image alone in its batch,
gives another class.
"""

import argparse
import json
import math
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import machine
from torch import Tensor, nn

import innermax as im

MODELS = {  # title: folder, data
    "MNIST, WarmStart": ("training-a103196736b0", "mnist"),
    "MNIST, Standard": ("training-7829aaae9e7b", "mnist"),
    "MNIST, Unsecured": ("training-34b46cf68083", "mnist"),
    "CIFAR-10, WarmStart": ("training-788e50f4dcb5", "cifar10"),
}
# Norm: threat model, order, ε; the distance does not depend on ε.
NORMS = {"L∞": (im.Linf, float("inf"), 0.3), "L2": (im.L2, 2, 2.0), "L1": (im.L1, 1, 10.0)}
CASES = [("FMN", norm) for norm in NORMS] + [("DDN", "L2")]
_STEPS, _IMAGES, _SEED = 100, 200, 0
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def ours(kind: str, norm: str) -> Attack:
    """The nearest images that our attack finds."""
    threat, _, eps = NORMS[norm]
    attack = {"FMN": im.FMN, "DDN": im.DDN}[kind](threat(eps), steps=_STEPS)
    return lambda model, x, y: attack(model, x, y).nearest  # type: ignore[attr-defined]


def theirs(kind: str, norm: str) -> Attack:
    """The same of adv-lib's; DDN without its rounding to 256 levels, which ours does not have."""
    try:
        import visdom  # noqa: F401  # adv-lib draws with it, where it is asked to
    except ImportError:
        sys.modules["visdom"] = types.ModuleType("visdom")
    from adv_lib.attacks import ddn, fmn

    if kind == "DDN":
        return lambda model, x, y: ddn(model, x, y, steps=_STEPS, levels=None)
    order = NORMS[norm][1]
    return lambda model, x, y: fmn(model, x, y, norm=order, steps=_STEPS)


def distances(model: nn.Module, x: Tensor, y: Tensor, found: Tensor, order: float) -> Tensor:
    """(B,) how far each image is from x; infinite where the model still gets it right or it left the pixels' range."""
    with torch.no_grad():
        fooled = model(found).argmax(1) != y
    inside = ((found >= 0) & (found <= 1)).flatten(1).all(1)
    far = torch.linalg.vector_norm((found.double() - x.double()).flatten(1), order, dim=1)
    return torch.where(fooled & inside, far, math.inf)


def measure(title: str, kind: str, norm: str) -> dict[str, Any]:
    """Distances of both sides on the images that the model gets right, and their seconds."""
    folder, data = MODELS[title]
    model = im.load_model(Path(__file__).parents[1] / "results/paper/models" / folder).eval()
    x, y = im.load_data(data).test.sample(_IMAGES, _SEED).batch(torch.arange(_IMAGES))
    with torch.no_grad():
        right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    result: dict[str, Any] = {"images": len(x)}
    for name, attack in (("ours", ours(kind, norm)), ("theirs", theirs(kind, norm))):
        torch.manual_seed(_SEED)
        began = time.perf_counter()
        found = attack(model, x, y)
        result[f"{name} seconds"] = round(time.perf_counter() - began, 2)
        result[name] = distances(model, x, y, found.detach(), NORMS[norm][1]).tolist()
    return result


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """Medians of both sides and of their ratio image by image; how often ours is nearer and farther by over 1 %."""
    mine, other = (torch.tensor(result[name], dtype=torch.float64) for name in ("ours", "theirs"))
    both = mine.isfinite() & other.isfinite()
    ratio = mine[both] / other[both]
    return {
        "ours": float(mine.median()),
        "theirs": float(other.median()),
        "ratio": float(ratio.quantile(0.5)),
        "mean ratio": float(ratio.log().mean().exp()),
        "nearer": int((mine < 0.99 * other).sum()),
        "farther": int((mine > 1.01 * other).sum()),
        "failed": [int((~side.isfinite()).sum()) for side in (mine, other)],
    }


def page(found: dict[str, Any]) -> str:
    """The page."""
    day, missing = time.strftime("%Y-%m-%d"), len(MODELS) * len(CASES) - len(found)
    lines = [
        "# The smallest perturbation",
        "",
        f"`python bench/minimal.py` on {machine()}, torch {torch.__version__}, {day}: FMN and DDN beside",
        f"those of adv-lib 0.2.8, {_STEPS} gradients an image each, on those of {_IMAGES} random test images that the",
        "model gets right, one seed. *Ratio*: our distance over theirs, image by image, the median and the geometric",
        "mean over the images on which both found something. *Nearer*, *farther*: images on which ours differs by more",
        "than 1 %. *Failed*: images on which nothing was found, ours and theirs. At the end ours asks for 8 forward",
        f"passes more; seconds are beside other programs. {missing} of {len(MODELS) * len(CASES)} cases were not run.",
        "",
        "| model | attack | images | median, ours | theirs | ratio | mean | nearer | farther | failed | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, result in found.items():
        told, (title, kind, norm) = summarize(result), key.split("; ")
        lines.append(
            f"| {title} | {kind}, {norm} | {result['images']} | {told['ours']:.4f} | {told['theirs']:.4f} "
            f"| {told['ratio']:.3f} | {told['mean ratio']:.3f} | {told['nearer']} | {told['farther']} "
            f"| {told['failed'][0]}, {told['failed'][1]} "
            f"| {result['ours seconds']:.0f}, {result['theirs seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints or writes the page, and every image's distances beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    stored = given.write and given.write.with_suffix(".json")
    found: dict[str, Any] = json.loads(stored.read_text()) if stored and stored.exists() else {}
    for title in MODELS:
        for kind, norm in CASES:
            if f"{title}; {kind}; {norm}" in found:
                continue
            found[f"{title}; {kind}; {norm}"] = measure(title, kind, norm)
            told = summarize(found[f"{title}; {kind}; {norm}"])
            print(
                title, kind, norm, {k: v if isinstance(v, list) else round(v, 4) for k, v in told.items()}, flush=True
            )
            if given.write:
                given.write.with_suffix(".json").write_text(json.dumps(found))
                given.write.write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
