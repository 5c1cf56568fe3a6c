"""`innermax reproduce`: the paper's tables and figures."""

from innermax.cli.arguments import build_parser, split_words
from innermax.reproduce.run import ARTIFACTS, reproduce


def run(words: list[str]) -> None:
    """Reproduces tables and figures of the paper."""
    example = "innermax reproduce table1 --scale smoke"
    names, options = split_words(words, "what to reproduce", example, most=None)
    parser = build_parser(
        "innermax reproduce NAME…", f"Reproduce tables and figures of the paper: {', '.join(ARTIFACTS)}, or all."
    )
    parser.add_function_arguments(reproduce, as_group=False, skip={"names", "say"})
    chosen = vars(parser.parse_args(options))
    for page in reproduce(
        list(ARTIFACTS) if names == ["all"] else names, **chosen, say=lambda line: print(line, flush=True)
    ):
        print(page)
