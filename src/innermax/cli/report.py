"""`innermax report`: one HTML page of trained models."""

from itertools import takewhile
from typing import Any

from innermax.cli.arguments import spelled_out


def run(words: list[str]) -> None:
    """Writes the robustness report of trained models."""
    from jsonargparse import ArgumentParser

    import innermax as im
    from innermax.distributed.launch import find_device

    sources = list(takewhile(lambda word: not word.startswith("-"), words))
    parser = ArgumentParser(
        prog="innermax report RUN…",
        description="Write one HTML page: how robust models are, how they were trained, and what fools them. "
        "Each RUN is a run folder or the file of an evaluation's JSON.",
        exit_on_error=False,
    )
    parser.add_argument("-o", "--output", type=str, default="report.html", help="the page")
    parser.add_argument(
        "--pictures", type=int, default=200, help="made again from run folders, at most; 0 computes nothing"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    asks = "--help" in words or "-h" in words
    if not sources and words and not asks:
        raise ValueError("report takes run folders first, such as: innermax report runs/digits -o report.html")
    chosen = parser.parse_args(["--help"] if asks or not words else spelled_out(words[len(sources) :]))
    shown: Any = sources[0] if len(sources) == 1 else sources
    print(im.report(shown, chosen.output, pictures=chosen.pictures, device=find_device(chosen.device)))
