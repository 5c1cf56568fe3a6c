"""Draws docs/concepts/fosc_explained.png: two pixels, what the adversary may do with them, and what FOSC measures."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

import innermax as im

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#5f6368"  # distinct without colour vision; line styles differ, too
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
THREAT = im.Linf(0.3)
CLEAN, POINT, GRADIENT = (torch.tensor([pair]) for pair in ((0.12, 0.5), (0.16, 0.56), (-1.0, 0.8)))


def value(point: torch.Tensor) -> float:
    """The linear model's gain over the present iterate."""
    return float(((point - POINT) * GRADIENT).sum())


def draw_plane(axis: Axes, best: torch.Tensor, beyond: torch.Tensor) -> None:
    """The set, the iterate, the gradient and the level lines of the linear model."""
    (x0, y0), eps = CLEAN[0].tolist(), THREAT.eps
    axis.add_patch(Rectangle((-0.3, -0.02), 0.3, 1.1, facecolor="#f6f6f6", edgecolor="#d0d0d0", hatch="//", lw=0))
    axis.add_patch(
        Rectangle((x0 - eps, y0 - eps), 2 * eps, 2 * eps, fill=False, edgecolor=ORANGE, linestyle="--", lw=1.6)
    )
    axis.add_patch(Rectangle((0, y0 - eps), x0 + eps, 2 * eps, facecolor=BLUE, edgecolor=BLUE, alpha=0.16))
    for point, colour, style in ((POINT, GREY, "-"), (best, BLUE, "-"), (beyond, ORANGE, "--")):
        axis.axline(point[0].tolist(), slope=-float(GRADIENT[0, 0] / GRADIENT[0, 1]), color=colour, lw=1.2, ls=style)
    axis.plot(*CLEAN[0].tolist(), "o", color="black", ms=6)
    axis.annotate("x", CLEAN[0].tolist(), (-14, -12), textcoords="offset points", fontsize=12)
    axis.plot(*POINT[0].tolist(), "s", color="black", ms=6)
    axis.annotate("iterate $x^k$", POINT[0].tolist(), (8, -12), textcoords="offset points", fontsize=11)
    axis.annotate(
        "", (POINT + 0.16 * GRADIENT)[0].tolist(), POINT[0].tolist(), arrowprops={"arrowstyle": "-|>", "lw": 2}
    )
    axis.annotate("gradient", (POINT + 0.1 * GRADIENT)[0].tolist(), (8, 6), textcoords="offset points", fontsize=11)
    axis.plot(*best[0].tolist(), "D", color=BLUE, ms=8)
    axis.annotate("best point of X(x)", best[0].tolist(), (10, 8), textcoords="offset points", color=BLUE, fontsize=11)
    axis.plot(*beyond[0].tolist(), "X", color=ORANGE, ms=9)
    axis.annotate(
        "best of\nthe ball",
        beyond[0].tolist(),
        (-6, 12),
        textcoords="offset points",
        color=ORANGE,
        fontsize=11,
        ha="center",
        bbox=PAPER,
    )
    axis.text(0.28, 0.24, "X(x)", color=BLUE, fontsize=13)
    axis.text(-0.26, 0.08, "darker\nthan black", color=GREY, fontsize=9, bbox=PAPER)
    axis.set(
        xlim=(-0.3, 0.55),
        ylim=(-0.02, 1.08),
        aspect="equal",
        xlabel="one pixel",
        ylabel="another",
        title="What the adversary may still do",
    )
    axis.set_xticks([0, 0.5])
    axis.set_yticks([0, 0.5, 1])


def draw_line(axis: Axes, best: torch.Tensor, beyond: torch.Tensor, worst: torch.Tensor) -> None:
    """The same along the gradient: the linear model's values over X(x), and the three gauges."""
    low, here, high, far = (value(point) for point in (worst, POINT, best, beyond))
    exact, ball = float(THREAT.gap(GRADIENT, POINT, CLEAN)), float(THREAT.gap(GRADIENT, POINT, CLEAN, bounded=False))
    relative = float(THREAT.gap(GRADIENT, POINT, CLEAN, relative=True))
    axis.plot([low, high], [0, 0], color=BLUE, lw=9, alpha=0.25, solid_capstyle="butt")
    axis.plot([high, far], [0, 0], color=ORANGE, lw=1.6, ls="--")
    for place, marker, colour, name in (
        (low, "|", BLUE, "least\nof X(x)"),
        (here, "s", "black", "$x^k$"),
        (high, "D", BLUE, "best\nof X(x)"),
        (far, "X", ORANGE, "best of\nthe ball"),
    ):
        axis.plot(place, 0, marker, color=colour, ms=9)
        axis.annotate(
            name, (place, 0), (0, -14), textcoords="offset points", ha="center", va="top", color=colour, fontsize=10
        )
    for left, right, height, colour, words in (
        (here, high, 0.5, BLUE, f"exact FOSC = {exact:.2f}"),
        (here, far, 1.1, ORANGE, f"ball FOSC = {ball:.2f}, too large"),
        (low, high, 1.7, GREY, f"width = {high - low:.2f}"),
    ):
        axis.annotate("", (right, height), (left, height), arrowprops={"arrowstyle": "<->", "color": colour, "lw": 1.6})
        axis.text((left + right) / 2, height + 0.08, words, ha="center", color=colour, fontsize=11)
    axis.text(low, 2.45, f"relative FOSC = {exact:.2f} / {high - low:.2f} = {relative:.2f}", fontsize=13)
    axis.set(xlim=(low - 0.08, far + 0.1), ylim=(-1.0, 2.9), title="The same, along the gradient")
    axis.set_xlabel("linear model of the loss, more than at $x^k$")
    axis.set_yticks([])
    axis.spines[["left", "top", "right"]].set_visible(False)


def main() -> None:
    """Draws."""
    best, worst = THREAT.maximizer(GRADIENT, CLEAN), THREAT.maximizer(-GRADIENT, CLEAN)
    beyond = CLEAN + THREAT.eps * GRADIENT.sign()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained", width_ratios=(1, 1.25))
    draw_plane(axes[0], best, beyond)
    draw_line(axes[1], best, beyond, worst)
    figure.savefig(Path(__file__).with_name("fosc_explained.png"), dpi=144)


if __name__ == "__main__":
    main()
