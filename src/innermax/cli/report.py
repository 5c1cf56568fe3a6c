"""`innermax report`: one HTML page of trained models."""

from typing import Any

import innermax as im
from innermax.cli.arguments import build_parser, split_words
from innermax.distributed.launch import find_device


def run(words: list[str]) -> None:
    """Writes the robustness report of trained models."""
    example = "innermax report runs/digits -o report.html"
    sources, options = split_words(words, "run folders", example, most=None)
    parser = build_parser(
        "innermax report RUN…",
        "Write one HTML page: how robust models are, how they were trained, and which images fool them. Each RUN is a "
        "run folder or the JSON file of an evaluation.",
    )
    parser.add_argument("-o", "--output", type=str, default="report.html", help="The page to write.")
    pictures = "Test images to attack again for pictures, at most, in all run folders; 0: no pictures."
    parser.add_argument("--pictures", type=int, default=200, help=pictures)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N.")
    chosen = parser.parse_args(options)
    shown: Any = sources[0] if len(sources) == 1 else sources
    print(im.report(shown, chosen.output, pictures=chosen.pictures, device=find_device(chosen.device)))
