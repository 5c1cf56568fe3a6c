"""Draws docs/fosc.png: relative FOSC and loss against the PGD step, for examples of a robust digit classifier."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import innermax as im

STEPS, EXAMPLES, SHOWN = 20, 200, 20


def trace(model: nn.Module, x: Tensor, y: Tensor, threat: im.Linf, sizes: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(steps, examples) relative FOSC and loss of each iterate; the k-th iterate is where a search of k steps ends."""
    found = [im.PGD(threat, steps=k, step_size=tuple(sizes[:k]))(model, x, y, seed=1) for k in range(1, len(sizes) + 1)]
    return torch.stack([result.relative_fosc for result in found]), torch.stack([result.loss for result in found])


def main() -> None:
    """Trains, attacks and draws."""
    torch.manual_seed(0)
    data = im.load_data("digits")
    threat = im.Linf(0.15)
    model = im.build_model("digits-cnn", input_shape=data.train.shape)
    im.train(model, data.train, im.Standard(im.PGD(threat)), epochs=15, batch_size=64, lr=0.05, progress=False)
    x, y = data.test.batch(torch.arange(EXAMPLES))
    shrinking = [threat.eps * 0.5 ** (6 * k / STEPS) for k in range(STEPS)]
    searches = {"constant step ε/4": [threat.eps / 4] * STEPS, "shrinking step": shrinking}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for (name, sizes), colour, dashes in zip(searches.items(), ("#d95f02", "#1b5e9c"), ("-", (0, (4, 1))), strict=True):
        for axis, values in zip(axes, trace(model, x, y, threat, sizes), strict=True):
            steps = range(1, STEPS + 1)
            axis.plot(steps, values[:, :SHOWN], color=colour, alpha=0.25, linewidth=0.8, linestyle=dashes)
            axis.plot(steps, values.nanmedian(1).values, color=colour, linewidth=2.4, linestyle=dashes, label=name)
    axes[0].set(xlabel="PGD step", ylabel="relative FOSC", ylim=(0, 0.6), title="The gauge: how far from stationary")
    axes[1].set(xlabel="PGD step", ylabel="cross-entropy", ylim=(0, 5), title="The loss")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xticks(range(0, STEPS + 1, 5))
    figure.savefig(Path(__file__).with_name("fosc.png"), dpi=144)


if __name__ == "__main__":
    main()
