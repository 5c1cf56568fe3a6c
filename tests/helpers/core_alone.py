"""What `pip install innermax` can do without any extra: python core_alone.py FOLDER [--installed]

Nothing that an extra brings can be imported here; --installed: nor is it there, except for what torch brings itself.
"""

import contextlib
import importlib.machinery
import importlib.util
import io
import sys
from pathlib import Path

EXTRAS = {
    *("PIL", "datasets", "huggingface_hub", "jinja2", "jsonargparse", "markupsafe", "matplotlib"),
    *("pandas", "pyarrow", "scipy", "sklearn"),
}
OF_TORCH = {"jinja2", "markupsafe"}


class Without(importlib.machinery.PathFinder):
    """A finder to which what an extra brings is not installed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in EXTRAS else super().find_spec(name, path, target)


def check_what_core_does(folder):
    """Attack, train, evaluate with its audit, save and load."""
    import torch

    import innermax as im

    assert all(hasattr(im, name) for name in im.__all__)
    data, threat = im.load_data("digits"), im.Linf(0.15)
    model = im.build_model("digits-cnn", input_shape=data.train.shape)
    x, y = data.test.batch(torch.arange(8))
    assert (im.PGD(threat, steps=3)(model, x, y).x_adv - x).abs().max() <= 0.15 + 1e-6
    attack, some = im.PGD(threat, steps=2), data.train[:256]
    run = im.train(model, some, im.Dynamic(attack), epochs=1, batch_size=64, progress=False, run_dir=folder / "run")
    own = torch.utils.data.TensorDataset(some.images[:64] / 255, some.labels[:64])
    im.train(model, own, im.WarmStart(attack), epochs=1, batch_size=32, progress=False)
    evaluation = im.evaluate(run.model, data.test[:40], {"pgd": attack, "fab": im.FAB(threat, steps=2)})
    assert evaluation.audit is not None
    assert evaluation.to_json()
    im.save_model(folder / "model", model)
    same = im.load_model(folder / "model")
    assert torch.allclose(same(x), model.eval()(x), atol=1e-5)
    robust = im.load_model("innermax/digits-linf-0.15")
    assert im.evaluate(robust, data.test[:40], {}).accuracy["clean"].correct > 35
    return evaluation, data


def check_what_is_told(folder, evaluation, data):
    """Each missing library by a line that says what to install."""
    import innermax as im
    from innermax.reproduce.run import reproduce

    (folder / "parquet").mkdir()
    (folder / "parquet" / "train-0.parquet").write_bytes(b"PAR1")
    for split in ("train", "test"):
        (folder / "images" / split / "cat").mkdir(parents=True)
        (folder / "images" / split / "cat" / "0.png").write_bytes(b"")
    model, fgsm = im.load_model(folder / "model"), {"fgsm": im.FGSM(im.Linf(0.1))}
    some = data.test[:4]
    asked = {
        "data": [
            lambda: im.load_data(folder / "parquet"),
            lambda: im.load_data(folder / "images"),
            lambda: im.load_data("svhn"),
            lambda: im.load_model("user/name"),
            lambda: im.save_pretrained(model, folder / "hub"),
            lambda: im.push_to_hub(model, "user/name"),
            lambda: im.evaluate(model, some, fgsm, rows_dir=folder / "rows"),
            lambda: evaluation.examples,
        ],
        "report": [
            lambda: im.report(evaluation, folder / "page.html"),
            lambda: im.gallery(model, some, fgsm, im.evaluate(model, some, fgsm)),
            lambda: reproduce(["figure1"], scale="smoke", out=folder / "out", cache=folder / "cache"),
        ],
    }
    for extra, calls in asked.items():
        for number, call in enumerate(calls):
            told = ask(call)
            assert told.endswith(f"pip install 'innermax[{extra}]'"), (extra, number, told)


def ask(call):
    """The message of the error that a call raises."""
    try:
        call()
    except (ImportError, ValueError) as error:
        return str(error)
    raise AssertionError("nothing was missing")


def check_the_commands():
    """The command line without its extra: help and lists work, the others say what is missing."""
    from innermax.cli import main

    for words in ([], ["--version"], ["recipes"], ["models"]):
        with contextlib.redirect_stdout(io.StringIO()) as told:
            assert main(words) == 0, words
        assert told.getvalue()
    for command in ("train digits", "evaluate runs/digits", "sweep digits", "verify x", "export x", "report x"):
        with contextlib.redirect_stderr(io.StringIO()) as told:
            assert main(command.split()) == 2, command
        assert told.getvalue().count("\n") == 1
        assert told.getvalue().endswith("pip install 'innermax[cli]'\n"), told.getvalue()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if "--installed" in sys.argv:
        there = {name for name in EXTRAS if importlib.util.find_spec(name) is not None}
        assert there <= OF_TORCH, there
    sys.meta_path[:] = [Without if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
    made = check_what_core_does(place)
    check_what_is_told(place, *made)
    check_the_commands()
    print("core is whole without any extra")
