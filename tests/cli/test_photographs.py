"""`innermax evaluate` on photographs of one's own and somebody's model."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import innermax as im
from innermax.evaluation.result import Evaluation
from tests.helpers.commands import refused, said
from tests.helpers.image_files import encoded, parquet, pixels

NAMES = ("tench", "goldfish", "shark", "ray", "hen", "ostrich")
WORDS = ["--allow-code", "--threat.eps", "1/255", "--attacks", "fgsm"]


class Brightness(nn.Module):
    """Six classes by how bright an image is."""

    def __init__(self):
        super().__init__()
        self.levels = nn.Parameter(torch.linspace(0.05, 0.95, 6))

    def forward(self, x):
        return -100 * (x.flatten(1).mean(1, keepdim=True) - self.levels).square()


def build():
    return Brightness()


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three of the six classes, in the alphabet's order; a nested folder, and no training split."""
    monkeypatch.chdir(tmp_path)
    for name in ("hen", "ray", "tench"):
        level = int(255 * torch.linspace(0.05, 0.95, 6)[NAMES.index(name)])
        for number in range(8):
            path = Path("photos", "test", name, "day1" if number else "", f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (level, level, level)).save(path)
    Path("names.txt").write_text("\n".join(NAMES))
    Path("mine.py").write_text("from tests.cli.test_photographs import build\n")
    yield tmp_path
    sys.modules.pop("mine", None)  # for the next module of that name


def labels():
    return Evaluation.from_json(Path("result.json").read_text()).label.tolist()


@pytest.mark.filterwarnings("default")
def test_classes_by_name(photos, capsys):
    words = ["evaluate", "mine:build", "--data", "photos", *WORDS, "--json", "result.json"]
    status, out, err = said(capsys, *words)
    assert status == 0
    assert "the model has 6 classes, the labels of test_set only 3" in err
    assert "--classes" in err
    status, out, err = said(capsys, *words, "--classes", "names.txt")
    assert (status, err) == (0, "")
    assert "100.00" in out
    kept = Path(out.rpartition("Example by example: ")[2].strip())
    assert kept.is_file()
    assert labels() == [4] * 8 + [3] * 8 + [0] * 8
    Path("names.txt").write_text("\n".join(NAMES[:5]))
    assert "names 5 classes, the model has 6" in refused(capsys, *words, "--classes", "names.txt")
    Path("names.txt").write_text("\n".join(("tinca", *NAMES[1:])))
    assert "unknown class 'tench'" in refused(capsys, *words, "--classes", "names.txt")
    assert "--classes imagenet" not in refused(capsys, *words, "--classes", "nowhere.txt")


def test_a_folder_of_nothing_but_classes(photos, capsys):
    words = ["evaluate", "mine:build", "--data", "photos/test", *WORDS, "--classes", "names.txt"]
    status, out, _ = said(capsys, *words)
    assert status == 0
    assert "24 examples" in out
    Path("photos/test").rename("photos/train")
    assert "holds train/, but neither test*.parquet nor test/ with" in refused(capsys, *words[:3], "photos", *words[4:])


def test_rows_of_other_images_are_not_mixed_up(photos, capsys):
    """Under the same name, in a folder that nobody named."""
    words = ["evaluate", "mine:build", "--data", "photos", *WORDS, "--classes", "names.txt"]
    first = said(capsys, *words).out.rpartition("Example by example: ")[2]
    Image.new("RGB", (8, 8), (1, 2, 3)).save("photos/test/tench/0.png")
    second = said(capsys, *words).out.rpartition("Example by example: ")[2]
    assert first != second
    assert said(capsys, *words).out.rpartition("Example by example: ")[2] == second


def test_a_label_column_of_another_name(tmp_path, monkeypatch, capsys):
    """It is recorded with the run, and found again."""
    monkeypatch.chdir(tmp_path)
    blobs = [encoded(image) for image in pixels(24, 1, 8, 8)]
    for split in ("train", "test"):
        parquet(Path("own", f"{split}.parquet"), blobs, [number % 3 for number in range(24)], label="kind")
    train = ["train", "digits", "--data", "own", "--epochs", "1", "--attacks", "fgsm", "--run-dir", "run"]
    assert "no column label or fine_label" in refused(capsys, *train)
    assert said(capsys, *train, "--label-column", "kind").status == 0
    assert said(capsys, "evaluate", "run", "--attacks", "fgsm", "--json", "result.json").status == 0
    assert labels() == [number % 3 for number in range(24)]


def test_one_number_for_all_channels():
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(im.Normalize(0.5, 0.25)(x), im.Normalize([0.5], [0.25])(x))


@pytest.mark.filterwarnings("default")
def test_a_limit_that_leaves_classes_out(photos, capsys):
    words = ["evaluate", "mine:build", "--data", "photos", *WORDS, "--classes", "names.txt", "--limit", "first:5"]
    status, _, err = said(capsys, *words)
    assert status == 0
    assert "--limit first:5: these 5 test images are of 1 of 3 classes alone" in err


def test_brackets_in_names_are_no_markup(photos, capsys):
    """rich would leave [red] out, and fail at [/a]."""
    words = ["evaluate", "mine:build", "--data", "photos", *WORDS, "--classes", "names.txt"]
    status, out, _ = said(capsys, *words, "--rows-dir", "rows[red]")
    assert status == 0
    assert "Example by example: rows[red]/rows.parquet" in out
