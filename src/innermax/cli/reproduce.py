"""`innermax reproduce`: the paper's tables and figures."""

from itertools import takewhile

from innermax.cli.arguments import spelled_out


def run(words: list[str]) -> None:
    """Makes tables and figures of the paper again."""
    from jsonargparse import ArgumentParser

    from innermax.reproduce.run import PIECES, reproduce

    names = list(takewhile(lambda word: not word.startswith("-"), words))
    parser = ArgumentParser(
        prog="innermax reproduce PIECE…",
        description=f"Make tables and figures of the paper again: {', '.join(PIECES)}, or all.",
        exit_on_error=False,
    )
    parser.add_function_arguments(reproduce, as_group=False, skip={"names", "say"})
    asks = "--help" in words or "-h" in words
    if not names and words and not asks:
        raise ValueError("reproduce takes what to make first, such as: innermax reproduce table1 --scale smoke")
    chosen = parser.parse_args(["--help"] if asks or not words else spelled_out(words[len(names) :]))
    pages = reproduce(
        list(PIECES) if names == ["all"] else names, **vars(chosen), say=lambda line: print(line, flush=True)
    )
    for page in pages:
        print(page)
