"""Networks of the kinds that users bring: gradients, speed, training, evaluation, AutoAttack and export of each.

    python checks/networks.py [--only ResNet levit_128s …] [--write results/networks.md]

Small ones of our own (tests/helpers/gallery.py) and, where they are installed, timm's and torchvision's, with random
weights. A step that fails or is wrong is named on the page with its reason. What a page's .json has with nothing that
fails is not measured again.
"""

import argparse
import importlib.util
import json
import logging
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import innermax as im
from innermax.losses import cross_entropy
from innermax.oracle.compiled import floating_dtype
from innermax.utils.environment import environment
from tests.helpers import gallery
from tests.helpers.gallery_steps import (
    Case,
    compare_gradients,
    evaluate,
    evaluation_mode,
    export,
    logits_of,
    run_autoattack,
    train,
)

TORCHVISION = {
    "resnet18": 64, "densenet121": 64, "mobilenet_v3_small": 64, "shufflenet_v2_x0_5": 64, "swin_t": 64,
    "convnext_tiny": 64, "efficientnet_b0": 64, "googlenet": 64,
}  # fmt: skip
TIMM = {
    "resnet18": 64, "mobilenetv3_small_050": 64, "efficientnet_b0": 64, "res2net50_26w_4s": 64, "dla34": 64,
    "levit_128s": 64, "tiny_vit_5m_224": 64, "efficientformerv2_s0": 64, "efficientvit_m0": 64,
    "swin_tiny_patch4_window7_224": 64, "swinv2_cr_tiny_224": 64, "vit_tiny_patch16_224": 64, "convnext_atto": 64,
    "mixer_s32_224": 64, "nf_regnet_b0": 64, "test_nfnet": 64, "sequencer2d_s": 64, "mobilevit_xxs": 64,
}  # fmt: skip
# One network of each of these families of timm goes through the steps at lower cost.
SWEEP = (
    "botnet26t_256", "cait_xxs24_224", "coat_lite_tiny", "convmixer_768_32", "cs3darknet_s", "davit_tiny",
    "edgenext_xx_small", "efficientvit_b0", "eva02_tiny_patch14_224", "fastvit_t8", "focalnet_tiny_srf",
    "gcvit_xxtiny", "gernet_s", "ghostnet_050", "gmlp_ti16_224", "hgnetv2_b0", "hiera_tiny_224", "hrnet_w18_small",
    "inception_next_atto", "lambda_resnet26t", "lcnet_035", "mnasnet_small", "mobilenetv4_conv_small_050",
    "mobileone_s0", "mvitv2_tiny", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnetx_002", "repvgg_a0",
    "repvit_m0_9", "resmlp_12_224", "resnest14d", "rexnet_100", "selecsls42", "semnasnet_050", "seresnet18",
    "shvit_s1", "skresnet18", "starnet_s1", "tinynet_e", "tnt_s_patch16_224", "twins_pcpvt_small", "visformer_tiny",
    "volo_d1_224", "xcit_nano_12_p16_224",
)  # fmt: skip
STEPS: dict[str, Callable[[Case, Path], Any]] = {
    "two updates": lambda case, _: train(case),
    "evaluated": lambda case, _: evaluate(case),
    "AutoAttack": lambda case, _: run_autoattack(case),
    "exported": export,
}
_CLASSES = 10
_FEW = ("two updates", "evaluated")  # steps that the sweep takes


def networks() -> Iterator[tuple[str, Callable[[], Case], bool]]:
    """Names, what makes a network in training mode with images, and whether all steps are taken."""
    for kind in gallery.KINDS:
        yield kind, lambda kind=kind: Case.of(gallery.build(kind), gallery.SHAPE), True
    for library, names in {"torchvision": TORCHVISION, "timm": TIMM}.items():
        if _is_here(library):
            for name, size in names.items():
                yield f"{library} {name}", partial(foreign, library, name, size), True
    if _is_here("timm"):
        for name in SWEEP:
            yield f"timm {name}", partial(foreign, "timm", name, size=64, count=8), False


def foreign(library: str, name: str, size: int, count: int = 16) -> Case:
    """A network of timm or torchvision with random weights, whose BatchNorm has seen images."""
    torch.manual_seed(0)
    if library == "timm":
        import timm

        try:
            model = timm.create_model(name, num_classes=_CLASSES, img_size=size)
        except TypeError:  # no such option
            model = timm.create_model(name, num_classes=_CLASSES)
    else:
        import torchvision

        model = torchvision.models.get_model(name, weights=None, num_classes=_CLASSES)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and len(module.weight) == _CLASSES]
    with torch.no_grad():
        for layer in linear[-1:]:
            if not layer.weight.any():  # as timm's networks begin, where no gradient passes
                nn.init.normal_(layer.weight, std=0.02)
        images = torch.rand(count, 3, size, size)
        if not isinstance(model.train()(images), torch.Tensor):  # auxiliary classifiers answer, too
            model = im.LogitsOnly(model)
        for layer in linear[-1:]:  # else many answer one class, whatever they are given
            layer.bias -= logits_of(model, images).mean(0)
    return Case.of(model, (3, size, size), count)


def speed(case: Case) -> dict[str, Any]:
    """How many times as fast the oracle's gradient is as plain autograd's; both in turns, 9 or as 3 seconds allow."""
    copies = 8 if case.x[0].numel() < 1000 else 1  # as many images as a batch of an evaluation has
    x, y = case.x.repeat(copies, 1, 1, 1), case.y.repeat(copies)
    oracle = im.Oracle.fast(case.model, x[:16])
    point = x.to(floating_dtype(case.model)).requires_grad_()
    seconds: dict[str, list[float]] = {"plain": [], "oracle": []}
    with evaluation_mode(case.model):
        ways = {
            "plain": lambda: torch.autograd.grad(F.cross_entropy(case.model(point), y, reduction="sum"), point),
            "oracle": lambda: oracle.gradient(x, y, cross_entropy),
        }
        for turn in range(102):  # the first two warm up
            for name, way in ways.items():
                began = time.process_time()
                way()
                if turn >= 2:
                    seconds[name].append(time.process_time() - began)
            if turn >= 10 and sum(map(sum, seconds.values())) > 3:
                break
    ratios = [plain / fast for plain, fast in zip(seconds["plain"], seconds["oracle"], strict=True)]
    return {
        "plan": oracle.plan,
        "speed": min(seconds["plain"]) / min(seconds["oracle"]),
        "speed, median": statistics.median(ratios),
        "milliseconds": 1000 * min(seconds["plain"]),
    }


def row(make: Callable[[], Case], whole: bool = True) -> dict[str, Any]:
    """What was measured of a network; under "failed" the reason for each step that fails.

    whole: whether all steps are taken, or the gradient, updates and the evaluation alone.
    """
    done: dict[str, Any] = {"failed": {}, "whole": whole, "device": environment(0)["device"]}
    began = time.perf_counter()

    def attempt(name: str, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except Exception as error:  # noqa: BLE001  the page says it
            sentence = re.sub(r"\S*/model\.pt2", "model.pt2", " ".join(str(error).split()))
            done["failed"][name] = f"{type(error).__name__}: {sentence[:300]}"
            return None

    case = attempt("built", make)
    if case is None:
        return done
    done["parameters"] = sum(parameter.numel() for parameter in case.model.parameters())
    if (found := attempt("gradient", lambda: compare_gradients(case))) is not None:
        done["gradient"] = [vars(error) for error in found[0]]
        done["plan"] = found[1].plan
    if whole:
        done |= attempt("speed", lambda: speed(case)) or {}
    with tempfile.TemporaryDirectory() as folder:
        for name, step in STEPS.items():
            if whole or name in _FEW:
                attempt(name, partial(step, case, Path(folder)))
    return done | {"seconds": time.perf_counter() - began}


def page(rows: dict[str, dict[str, Any]]) -> str:
    """The tables as Markdown, and what failed."""
    libraries = [f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "timm") if _is_here(name)]
    machines = [*dict.fromkeys(one["device"] for one in rows.values())]
    failures = [(name, step, reason) for name, one in rows.items() for step, reason in one["failed"].items()]
    whole = {name: one for name, one in rows.items() if one["whole"]}
    missing = [name for name, _, _ in networks() if name not in rows]
    lines = [
        "# Networks that users bring",
        "",
        f"`python checks/networks.py` on {', and on '.join(machines)}, one thread, {', '.join(libraries)}; random",
        f"weights.{'' if len(machines) == 1 else ' Which network was measured where stands below.'}",
        f"{len(rows)} networks, {sum(not one['failed'] for one in rows.values())} with nothing that fails.",
        "",
        "- **gradient**: the largest difference of the fast oracle's float32 gradient from plain autograd's, over",
        "  the gradient's largest entry, before and after an update. Above 1e-3 a ReLU or a maximum has switched by",
        "  rounding alone: the same network in float64 is then within 1e-6, which is told, and the mean cosine of the",
        "  float32 gradients at least 0.999.",
        "- **speed**: plain autograd's processor time for a gradient over the oracle's, in turns: the median, and of",
        "  the minima; on a machine that others use, too, either is off by some per cent. The oracle also returns each",
        "  image's loss and logits, and keeps the images from a network that writes into them: 3 to 8 % where a",
        "  gradient takes 15 to 5 milliseconds. A network that would be clearly slower compiled is left as it is.",
        "- **two updates**: `im.train` against PGD-2.",
        "- **evaluated**: `im.evaluate` under PGD-3 finds the accuracies that plain PyTorch finds.",
        "- **AutoAttack**: the verdicts are the model's, the images within ε = 0.2.",
        "- **exported**: `im.export_model` writes a file that has the model's logits.",
        "",
        *_table(whole, ("speed", *STEPS)),
    ]
    if len(rows) > len(whole):
        swept = {name: one for name, one in rows.items() if not one["whole"]}
        lines += ["", "## Families of timm", "", *_table(swept, _FEW)]
    if failures:
        lines += ["", "## What fails", "", *(f"- {name}, {step}: {reason}" for name, step, reason in failures)]
    if missing:
        lines += ["", "## Not measured yet", "", ", ".join(missing) + "."]
    for machine in machines:
        lines += ["", f"## How each is computed on {machine}", ""]
        lines += [
            f"- {name}: {one['plan']}" for name, one in rows.items() if "plan" in one and one["device"] == machine
        ]
    return "\n".join(lines) + "\n"


def _table(rows: dict[str, dict[str, Any]], steps: Sequence[str]) -> list[str]:
    head = ("network", "gradient", "after an update", *steps)
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, one in rows.items():
        cells = [_gradient(error) for error in one.get("gradient", ())] or ["**no**", "**no**"]
        for step in steps:
            failed = step in one["failed"] or "built" in one["failed"]
            fine = f"{one['speed, median']:.2f} ({one['speed']:.2f})" if step == "speed" and not failed else "yes"
            cells.append("**no**" if failed else fine)
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def _gradient(error: dict[str, float | None]) -> str:
    return f"{error['plain']:.0e}" + ("" if error["float64"] is None else f" (float64: {error['float64']:.0e})")


def _is_here(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="names, or parts of names, of networks")
    parser.add_argument("--write", type=Path, help="Markdown file; the numbers go into a .json beside it")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    numbers = arguments.write and arguments.write.with_suffix(".json")
    kept = json.loads(numbers.read_text()) if numbers and numbers.exists() else {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make, whole in networks():
        wanted = arguments.only is None or any(part in name for part in arguments.only)
        if name in kept and not (kept[name]["failed"] and wanted):
            rows[name] = kept[name]
        elif wanted:
            rows[name] = row(make, whole)
            print(name, json.dumps(rows[name]), flush=True)
        if numbers:
            left = {name: kept[name] for name in kept if name not in rows}
            numbers.write_text(json.dumps(rows | left, indent=2) + "\n")
    if numbers:
        arguments.write.write_text(page(rows))
    sys.exit(any(one["failed"] for one in rows.values()))
