"""Files that nobody vouches for load or are refused in one line; nothing runs, hangs, or is left half-written."""

import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

import innermax as im
from innermax.cli import main
from innermax.evaluation.result import Evaluation
from innermax.training import run_folder
from innermax.training.checkpoints import _digest, find_checkpoints
from innermax.utils.files import load_tensors, lock_file, refuse_link, save_tensors, write_bytes
from innermax.utils.serialization import parse_json, parse_yaml
from tests.helpers import hostile

pytestmark = pytest.mark.usefixtures("untyped")
EXAMPLES = int(os.environ.get("INNERMAX_FUZZ", "0"))  # of each kind; checks/fuzz.py tries many more
SLOW = ("state", "run", "metrics", "environment", "evaluation", "recipe")  # how the names of slower kinds begin
KINDS = [
    "model",
    "model's config",
    "state",
    "state's header",
    "run's config",
    "run's config, evaluated",
    "metrics",
    "environment",
    "evaluation",
    "evaluation, exported",
    "transfer",
    "recipe",
    "data parquet",
    "image, PNG",
    "image, JPEG",
    "image, WEBP",
    "image, BMP",
    "rows parquet",
]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return hostile.kinds(tmp_path_factory.mktemp("made") / "files")


def test_every_kind_is_tried_and_loads_as_it_is(kinds, tmp_path):
    assert list(kinds) == KINDS
    for kind in kinds.values():
        assert hostile.tried(kind, kind.content, tmp_path / "tried") == "loaded"


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_load_or_are_refused(kinds, tmp_path, name):
    few = 15 if name.startswith(SLOW) else 100

    @settings(
        max_examples=EXAMPLES or few,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.data())
    def attempt(data):
        hostile.tried(kinds[name], data.draw(hostile.damaged(kinds[name])), tmp_path / "tried")

    attempt()


def refused(capsys, *words):
    """The one line that the command line says."""
    assert main(list(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("innermax: ")
    return line


# Sizes


@contextmanager
def memory_of_networks():
    """The numbers that each parameter made inside has memory for."""
    sizes = []
    handle = register_module_parameter_registration_hook(
        lambda _, __, value: sizes.append(value.numel()) if value is not None and not value.is_meta else None
    )
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "lie",
    [
        {"num_classes": 3_000_000},
        {"input_shape": [1, 1024, 1024]},
        {"input_shape": [100_000, 8, 8]},
        {"input_shape": [1, 2**40, 2**40]},
        {"model": "wideresnet", "depth": 10, "width": 60},
        {"model": "wideresnet", "depth": 10, "width": 2**60},
        {"model": "wideresnet", "depth": 6 * 10**9 + 4, "width": 1},
    ],
)
def test_a_network_gets_no_memory_before_the_weights_fit(tmp_path, lie):
    im.save_model(tmp_path, im.build_model("digits-cnn", input_shape=(1, 8, 8)))
    config = json.loads((tmp_path / "config.json").read_text()) | lie
    (tmp_path / "config.json").write_text(json.dumps(config))
    began = time.monotonic()
    with memory_of_networks() as sizes, pytest.raises(ValueError, match=r"does not fit the model|config\.json: "):
        im.load_model(tmp_path)
    assert max(sizes, default=0) <= 20_000  # what the file itself holds
    assert time.monotonic() - began < 20


def test_weights_of_another_kind_of_number(tmp_path):
    model = im.build_model("digits-cnn", input_shape=(1, 8, 8))
    im.save_model(tmp_path, model)
    tensors, _ = load_tensors(tmp_path / "model.safetensors")
    for kind in (torch.complex64, torch.int64, torch.bool):
        save_tensors(tmp_path / "model.safetensors", tensors | {"0.weight": tensors["0.weight"].to(kind)})
        for own in (None, model):
            with pytest.raises(ValueError, match=r"does not fit the model: 0\.weight must be torch\.\w+, got"):
                im.load_model(tmp_path, own)
    save_tensors(tmp_path / "model.safetensors", {name: value.half().float() for name, value in tensors.items()})


def test_a_header_that_promises_more_than_the_file_holds(tmp_path):
    header = json.dumps({"0.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}})
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_tensors(path)
    path.write_bytes((2**62).to_bytes(8, "little") + header.encode())
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_tensors(path)


LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30))


@pytest.mark.parametrize(
    "bomb",
    [
        LAUGHS,
        MERGED,
        "a: &a [*a]",
        "[" * 100_000,
        "[" * 100 + "]" * 100,
        "".join(f"a{n}: &a{n} [*a{n - 1}]\n" if n else "a0: &a0 []\n" for n in range(5000)),
        "a: " + "x" * 5_000_000,
        "- 1\n" * 200_000,
    ],
    ids=["laughs", "merged", "itself", "open", "deep", "chain", "long", "many"],
)
def test_yaml_bombs(tmp_path, capsys, bomb):
    began = time.monotonic()
    with pytest.raises(ValueError, match="not readable as YAML: ") as error:
        parse_yaml(bomb)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    (tmp_path / "bomb.yaml").write_text(bomb)
    assert "not readable as YAML" in refused(capsys, "train", str(tmp_path / "bomb.yaml"))
    (tmp_path / "config.yaml").write_text(bomb)
    assert "config.yaml is not a readable configuration" in refused(capsys, "report", str(tmp_path))
    assert time.monotonic() - began < 60


def test_yaml_of_plain_values():
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}, e: 2}") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": 1, "e": 2},
    }
    assert parse_yaml("") is None
    for odd in ("!!timestamp x", "!!bool x", "!!int ''", "2001-99-99", "? [1]\n: 2", "!!float x", "a: " + "9" * 5000):
        with pytest.raises(ValueError, match="not readable as YAML: "):
            parse_yaml(odd)


def test_json_bombs():
    for bomb in ("[" * 100_000, "[" * 100 + "]" * 100, '{"a":' * 70 + "1" + "}" * 70, "9" * 5000, b"\xff", "{"):
        with pytest.raises(ValueError, match="not readable as JSON: ") as error:
            parse_json(bomb)
        assert "\n" not in str(error.value)
    assert parse_json("[" * 63 + "]" * 63)


def test_classes_without_end_make_no_table_of_their_pairs(kinds, tmp_path):
    document = json.loads(kinds["evaluation"].content)
    document["examples"]["attacks"]["fgsm"]["prediction"][0] = 10**12
    (tmp_path / "evaluation.json").write_text(json.dumps(document))
    im.report(tmp_path / "evaluation.json", tmp_path / "page.html")
    assert "1000000000000" in (tmp_path / "page.html").read_text()


# Places


def test_nothing_is_written_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "config.json.part").symlink_to(precious)
    (tmp_path / "config.json").symlink_to(precious)
    write_bytes(tmp_path / "config.json", b"theirs")
    assert (tmp_path / "config.json").read_bytes() == b"theirs"
    (tmp_path / "lock").symlink_to(precious)
    with pytest.raises(OSError, match="lock"), lock_file(tmp_path / "lock", "the folder"):
        pass
    with pytest.raises(OSError, match="lock"), open(tmp_path / "lock", "a", opener=refuse_link):
        pass
    assert precious.read_text() == "mine"


def test_an_exported_program_is_not_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "model.part.pt2").symlink_to(tmp_path / "precious")
    im.export_model(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), tmp_path / "model.pt2", input_shape=(1, 2, 2))
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "model.pt2").stat().st_size > 4


def test_an_evaluation_is_not_written_through_a_link(kinds, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "evaluation.json").symlink_to(tmp_path / "precious")
    Evaluation.from_json(kinds["evaluation"].content.decode()).to_json(tmp_path / "evaluation.json")
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("line", ["run_dir: /tmp/elsewhere", "overwrite: true"])
def test_a_recipe_does_not_say_where_to_write(tmp_path, capsys, line):
    (tmp_path / "mine.yaml").write_text(f"data: digits\nmodel: digits-cnn\n{line}\n")
    assert "must not say where to write" in refused(capsys, "train", str(tmp_path / "mine.yaml"))


def test_pipes_are_not_waited_for(tmp_path):
    image = Image.new("L", (4, 4))
    for split in ("train", "test"):
        (tmp_path / "images" / split / "a").mkdir(parents=True)
        image.save(tmp_path / "images" / split / "a" / "0.png")
    os.mkfifo(tmp_path / "images" / "train" / "a" / "1.png")
    with pytest.raises(ValueError, match="with the name of an image that is no file"):
        im.load_data(tmp_path / "images")
    (tmp_path / "tables").mkdir()
    for split in ("train", "test"):
        os.mkfifo(tmp_path / "tables" / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read as parquet: it is not a file"):
        im.load_data(tmp_path / "tables")
    im.save_model(tmp_path / "model", im.build_model("digits-cnn", input_shape=(1, 8, 8)))
    (tmp_path / "model" / "config.json").unlink()
    os.mkfifo(tmp_path / "model" / "config.json")
    with pytest.raises(ValueError, match="it is not a file"):
        im.load_model(tmp_path / "model")
    (tmp_path / "run" / run_folder.CHECKPOINTS).mkdir(parents=True)
    os.mkfifo(tmp_path / "run" / run_folder.CHECKPOINTS / "epoch-000001-batch-00000000.safetensors")
    assert find_checkpoints(tmp_path / "run") == []


# Code


@pytest.mark.parametrize("setting", ["data", "model", "init", "strategy", "objective", "attacks", "logger", "device"])
def test_a_recipe_imports_nothing(tmp_path, monkeypatch, capsys, setting):
    monkeypatch.chdir(tmp_path)
    Path("stranger.py").write_text("open('ran', 'w')\n")
    told = {"data": "digits", "model": "digits-cnn", "epochs": 1} | {setting: "stranger:build"}
    Path("mine.yaml").write_text(yaml.safe_dump(told))
    assert "stranger" in refused(capsys, "train", "mine.yaml")
    assert not Path("ran").exists()


def test_a_run_folder_imports_nothing(kinds, tmp_path, capsys):
    kind = kinds["run's config, evaluated"]
    config = yaml.safe_load(kind.content)
    config["settings"]["data"] = "os:getcwd"
    assert hostile.tried(kind, kind.content, tmp_path / "run") == "loaded"
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    assert "os:getcwd" in refused(capsys, "evaluate", str(tmp_path / "run"))
    assert "--allow-code" in refused(capsys, "evaluate", "os:getcwd", "--data", "digits", "--threat.eps", "0.1")


# States, whose hash says nothing of who made it


def rehashed(path, tensors=None, **position):
    own, meta = load_tensors(path)
    tensors, told = own if tensors is None else tensors, meta["position"] | position
    save_tensors(path, tensors, {"position": told, "sha256": _digest(tensors, told)})


@pytest.fixture
def state(kinds, tmp_path):
    hostile.tried(kinds["state"], kinds["state"].content, tmp_path / "run")
    return find_checkpoints(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("folder", "/tmp/elsewhere"),
        ("options", {"seed": 1}),
        ("epoch", -1),
        ("epoch", True),
        ("batch", 1.5),
        ("totals", {"loss": "x"}),
        ("totals", {"examples": 1}),
        ("gauged", {"fosc": [1.0]}),
        ("gauged", {"fosc": [], "relative_fosc": [], "ball_fosc": [], "zero_gradient": []}),
        ("history", [{"loss": {}}]),
        ("history", [1]),
        ("micro_batch", 0),
        ("seconds", None),
        ("attack_network", None),
    ],
)
def test_a_state_that_says_what_no_run_writes(state, name, value):
    rehashed(state, **{name: value})
    with pytest.raises(ValueError, match=f"no checkpoint of .* is whole: .*its '{name}' is not what a run writes"):
        hostile.trained(state.parents[1])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("kept", torch.zeros(()), "kept is torch.float32 \\(\\) instead of"),
        ("optimizer/0/momentum_buffer", torch.zeros(3), "momentum_buffer is torch.float32 \\(3,\\) instead of"),
        ("optimizer/99/momentum_buffer", torch.zeros(()), "belongs to no parameter"),
        ("optimizer/x", torch.zeros(()), "belongs to no parameter"),
        ("optimizer/0/exp_avg", torch.zeros(()), "holds exp_avg, momentum_buffer instead of momentum_buffer"),
        ("model/1.weight", torch.zeros(10, 64, dtype=torch.int64), "1.weight must be torch.float32, got torch.int64"),
    ],
)
def test_a_state_of_other_tensors(state, name, value, said):
    tensors, _ = load_tensors(state)
    rehashed(state, tensors | {name: value})
    with pytest.raises(ValueError, match=f"does not fit this run: .*{said}"):
        hostile.trained(state.parents[1])


# What is said of a run


def test_a_configuration_that_says_something_else(kinds, tmp_path, capsys):
    kind = kinds["run's config, evaluated"]
    hostile.tried(kind, kind.content, tmp_path / "run")
    config = yaml.safe_load(kind.content)
    for told, said in (
        (3, "settings must be a mapping"),
        ({"data": ["digits"]}, "settings.data must be a name or a folder"),
        ({"data": "digits", "threat": "linf"}, "settings.threat must hold norm and eps"),
        ({"data": "digits", "threat": {"norm": "linf", "eps": "x" * 1000}}, "settings.threat must hold norm and eps"),
    ):
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config | {"settings": told}))
        for command in ("evaluate", "export"):
            line = refused(capsys, command, str(tmp_path / "run"))
            assert "config.yaml: " in line
            assert said in line
            assert len(line) < 300 + len(str(tmp_path))
    assert not (tmp_path / "run" / "hub").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("settings", "count"), 3),
        (("settings", "attacks"), {"fgsm": 1}),
        (("settings", "folder"), "x"),
        (("examples", "label"), [0.5] * 12),
        (("examples", "label"), [-1] * 12),
        (("examples", "label"), [10**400] * 12),
        (("examples", "clean_prediction"), [0]),
        (("examples", "attacks", "fgsm", "correct"), [1] * 12),
        (("examples", "attacks", "fgsm", "loss"), ["x"] * 12),
        (("examples", "attacks", "worst_case"), {}),
        (("convergence", "fgsm", "seconds"), "x"),
        (("audit",), {"verdict": "fine"}),
    ],
)
def test_an_evaluation_that_says_something_else(kinds, place, value):
    document = json.loads(kinds["evaluation"].content)
    part = document
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    with pytest.raises(ValueError, match="text must be an evaluation's JSON: ") as error:
        Evaluation.from_json(json.dumps(document))
    assert "\n" not in str(error.value)
