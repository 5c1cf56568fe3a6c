"""`innermax models`: the robust models that come with innermax."""

from innermax.models.pretrained import Measured, Pretrained, list_pretrained
from innermax.threat import NORMS, format_eps

_HEAD = ("name", "network", "threat model", "clean %", "AutoAttack %", "gradients", "size", "licence")


def run(words: list[str]) -> None:
    """Lists the models."""
    if words and words[0] not in ("-h", "--help"):
        raise ValueError(f"models takes no arguments, got {' '.join(words)}")
    print(format_models(), end="")
    print(
        "\nEach is a SOURCE of innermax evaluate, and loads with im.load_model(NAME). Clean accuracy is on all test "
        "images; AutoAttack's\nis on as many random ones as it says. Gradients are per training image, over the whole "
        "training."
    )


def format_models() -> str:
    """The models as a table of plain text, a line each."""
    rows = [_HEAD, *(_describe(name, model) for name, model in list_pretrained().items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)


def _describe(name: str, model: Pretrained) -> tuple[str, ...]:
    norm = NORMS[model.threat["norm"]].symbol
    autoattack = "not measured" if model.autoattack is None else _share(model.autoattack)
    size = f"{model.bytes / 1e6:.2f} MB" + (" from the Hub" if model.hub is not None else "")
    return (
        name,
        model.network,
        f"{norm} {format_eps(model.threat['eps'])} on {model.data}",
        f"{100 * model.clean.accuracy:.1f}",
        autoattack,
        f"{model.gradients:,.0f}",
        size,
        model.license,
    )


def _share(found: Measured) -> str:
    return f"{100 * found.accuracy:.1f} of {found.images:,}"
