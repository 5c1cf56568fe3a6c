"""The classes of a data set by their names among a model's."""

import json
import re

import pytest

from innermax.data.class_names import match_classes, read_classes

LINES = """n01440764 tench, Tinca tinca
n01443537 goldfish, Carassius auratus
n02012849 crane
n03126707 crane
T-shirt/top
great_white shark, white shark, man-eater
"""


@pytest.fixture
def classes(tmp_path):
    (tmp_path / "names.txt").write_text(LINES)
    return read_classes(str(tmp_path / "names.txt"))


def test_names_synsets_and_spellings(classes):
    assert [names[0] for names in classes] == [
        "tench",
        "goldfish",
        "crane",
        "crane",
        "T-shirt/top",
        "great_white shark",
    ]
    names = ["n01443537", "Tench", "tinca_tinca", "Great White-Shark", "t_shirt/top", "n03126707", "tench, Tinca tinca"]
    assert match_classes(names, classes) == [1, 0, 0, 5, 4, 3, 0]


def test_names_that_do_not_tell(classes):
    with pytest.raises(ValueError, match=r"'crane' is the name of several .*: 2 \(crane, n02012849\) and 3 \(crane"):
        match_classes(["crane"], classes)
    with pytest.raises(ValueError, match=r"unknown class 'goldfisch'; did you mean 'goldfish'\?; the model's classes"):
        match_classes(["goldfisch"], classes)


@pytest.mark.parametrize(
    "value", [["cat", "dog"], {"1": "dog", "0": "cat"}, {"0": ["n02123045", "cat"], "1": ["n02084071", "dog"]}]
)
def test_json(tmp_path, value):
    (tmp_path / "names.json").write_text(json.dumps(value))
    assert match_classes(["dog", "cat"], read_classes(str(tmp_path / "names.json"))) == [1, 0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("names.txt", "cat\n\ndog\n", "class 1 has no name"),
        ("names.txt", "cat\n", "must name at least 2 classes, got 1"),
        ("names.json", '{"0": "cat", "2": "dog"}', "numbers of its classes must be 0…1"),
        ("names.json", '{"zero": "cat"}', "is not readable"),
        ("names.json", "7", "must hold a list or a mapping, got int"),
        ("names.json", "{", "is not readable"),
    ],
)
def test_files_that_do_not_fit(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_classes(str(tmp_path / name))
    with pytest.raises(ValueError, match="is not readable"):
        read_classes(str(tmp_path / "nowhere.txt"))


# torchvision's names for classes of which timm's name alone belongs to another one, too.
LONGER = {134: "crane bird", 639: "maillot tank suit"}


def test_imagenets_classes_are_numbered_as_timms_and_torchvisions_models_number_them():
    timm = pytest.importorskip("timm.data", reason="timm is not installed: its list of classes is not compared")
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed: its list is not compared")
    classes = read_classes("imagenet")
    assert [names[-1] for names in classes] == timm.ImageNetInfo("imagenet-1k").label_names()
    told = models.get_model_weights("resnet18").DEFAULT.meta["categories"]
    assert len(told) == len(classes) == 1000
    for number, (name, names) in enumerate(zip(told, classes, strict=True)):
        assert name == LONGER[number] if number in LONGER else number in _numbers(name, classes), (number, name, names)


def _numbers(name, classes):
    """The classes that have a name."""
    try:
        return match_classes([name], classes)
    except ValueError as several:
        return [int(number) for number in re.findall(r"(\d+) \(", str(several))]


def test_a_timm_that_cannot_be_imported_is_said_in_one_line(monkeypatch):
    def fail(*_):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("innermax.data.class_names.import_library", fail)
    with pytest.raises(ValueError, match=r"classes imagenet needs timm.*RuntimeError: operator torchvision::nms does"):
        read_classes("imagenet")
