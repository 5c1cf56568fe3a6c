"""Model files: what is saved comes back bit for bit, what is damaged or foreign is refused, pickle is never touched."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import nn

import innermax as im
from innermax.models.files import save_model
from innermax.models.load import load_model
from innermax.utils.files import load_tensors, save_tensors, write_bytes, write_json

NORMALIZE = [[0.2, 0.4, 0.6], [0.3, 0.5, 0.7]]
SHAPE = (3, 8, 8)


def network(**options):
    """A network whose every tensor differs from a fresh one's."""
    model = im.build_model("digits-cnn", num_classes=4, input_shape=SHAPE, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.rand(value.shape, generator=generator) * (50 if value.dtype == torch.int64 else 0.3))
    return model.eval()


def own(seed=0, width=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.BatchNorm1d(width))


def identical(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch):
    """Nothing here ever unpickles: whoever tries, fails."""

    def refuse(*arguments, **options):
        raise AssertionError("pickle")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("options", [{}, {"normalize": NORMALIZE}], ids=["plain", "normalize"])
@pytest.mark.parametrize("name", ["model.safetensors", "best.safetensors"])
def test_a_model_comes_back_bit_for_bit(tmp_path, options, name):
    model, x = network(**options), torch.rand(5, *SHAPE)
    save_model(tmp_path / "deep" / "folder", model, name)
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == sorted([name, "config.json"])
    sources = [tmp_path / "deep" / "folder" / name]
    if name == "model.safetensors":
        sources += [tmp_path / "deep" / "folder", str(tmp_path / "deep" / "folder")]
    for source in sources:
        loaded = load_model(source)
        assert identical(loaded, model)
        assert torch.equal(loaded(x), model(x))
        assert loaded.config == model.config
        assert not any(module.training for module in loaded.modules())
    assert (loaded(x) - network()(x)).abs().max() > 0.01 or not options


def test_options_are_rebuilt(tmp_path):
    model = im.build_model("wideresnet", num_classes=3, input_shape=SHAPE, depth=10, width=1).eval()
    save_model(tmp_path, model)
    assert identical(load_model(tmp_path), model)


def test_a_wrapped_model_is_saved_as_itself(tmp_path):
    model = network()
    save_model(tmp_path, nn.DataParallel(model))
    assert identical(load_model(tmp_path), model)


@pytest.mark.parametrize(
    "config",
    [
        {"model": "their-net", "width": 3},
        {"model": "digits-cnn", "num_classes": 10, "input_shape": [1, 8, 8]},  # innermax's, but of another network
        {"model": ["digits-cnn"]},
        {"architecture": "mlp"},
        "model",
    ],
)
def test_a_config_of_somebody_elses_is_not_taken_for_a_description(config, tmp_path):
    theirs = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    theirs.config = config
    save_model(tmp_path, theirs)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(ValueError, match="pass model="):
        load_model(tmp_path)
    mine = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert torch.equal(load_model(tmp_path, mine)[1].weight, theirs[1].weight)


def test_saving_leaves_the_model_alone(tmp_path):
    model = network().train().to(memory_format=torch.channels_last)
    save_model(tmp_path, model)
    assert model.training
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert identical(load_model(tmp_path), model)


def test_foreign_networks(tmp_path):
    model = own(1).eval()
    save_model(tmp_path, model)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    mine = own(2).train()
    assert load_model(tmp_path, mine) is mine
    assert identical(mine, model)
    assert not mine.training
    with pytest.raises(ValueError, match=r"config.json is not a readable model description: .*pass model="):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors does not fit the model: .*size mismatch for 1.weight"):
        load_model(tmp_path, own(width=4))
    with pytest.raises(ValueError, match=r"model.safetensors does not fit the model: .*Missing key.*1.weight"):
        load_model(tmp_path, nn.Sequential(own()))


def test_shared_and_transposed_weights(tmp_path):
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    model[0].weight = nn.Parameter(torch.rand(4, 4).T)
    save_model(tmp_path, model)
    fresh = nn.Linear(4, 4)
    assert identical(load_model(tmp_path, nn.Sequential(fresh, nn.ReLU(), fresh)), model)


def test_tensors_and_values_come_back(tmp_path):
    path = tmp_path / "state.safetensors"
    tensors = {
        "scalar": torch.tensor(3),
        "half": torch.rand(3).bfloat16(),
        "view": torch.rand(4, 6)[:, ::2],
        "none": torch.empty(0),
        "leaf": torch.rand(2, requires_grad=True),
        "double": torch.rand(2, 2, dtype=torch.float64),
    }
    meta = {"epoch": 3, "totals": {"loss": 0.1 + 0.2}, "history": [{"accuracy": 1 / 3, "fosc": None}]}
    save_tensors(path, tensors, meta)
    found, values = load_tensors(path)
    assert values == meta
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("keep", [0, 4, 7, 40, 0.5, -1])
def test_truncated_files(tmp_path, keep):
    save_model(tmp_path, network())
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    one_line(error, str(path), "not a readable safetensors file")


class Bomb:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_pickles_are_refused_whatever_their_name(tmp_path):
    save_model(tmp_path, network())
    for write in (
        lambda path, value: path.write_bytes(pickle.dumps(value)),
        lambda path, value: torch.save(value, path),
    ):
        for name in ("model.pt", "model.bin", "pytorch_model.pkl", "weights", "weights.zip"):
            write(tmp_path / name, Bomb(tmp_path / "fallen"))
            with pytest.raises(ValueError) as error:
                load_model(tmp_path / name)
            one_line(error, str(tmp_path / name), "pickled models are never loaded")
        for name in ("model.safetensors", "best.safetensors"):
            write(tmp_path / name, Bomb(tmp_path / "fallen"))
            with pytest.raises(ValueError) as error:
                load_model(tmp_path / name)
            one_line(error, str(tmp_path / name), "not a readable safetensors file")
    assert not (tmp_path / "fallen").exists()


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02}", b"\0" * 100, b"\xff" * 100, b'{"model": "digits-cnn"}'])
def test_foreign_files(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_model(tmp_path, own())
    one_line(error, str(tmp_path / "model.safetensors"))


def test_weights_of_another_shape(tmp_path):
    save_model(tmp_path, network())
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(description | {"num_classes": 5}))
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    one_line(error, str(tmp_path / "model.safetensors"), "does not fit the model", "size mismatch")
    assert len(str(error.value)) < 500 + len(str(tmp_path))


BASE = {"model": "digits-cnn", "num_classes": 4, "input_shape": [3, 8, 8]}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("", "not a readable model description"),
        ("{", "not a readable model description"),
        (b"\xff\xfe\x00", "not a readable model description"),
        ("[]", "describes no model of innermax"),
        ("{}", "describes no model of innermax"),
        ('{"architectures": ["ResNet"]}', "pass model="),
        (BASE | {"model": "digit-cnn"}, "did you mean 'digits-cnn'"),
        (BASE | {"model": "../../etc/passwd"}, "unknown model"),
        (BASE | {"model": "os.system"}, "unknown model"),
        (BASE | {"model": "__class__"}, "unknown model"),
        (BASE | {"model": ["digits-cnn"]}, "config.json: "),
        (BASE | {"model": None}, "unknown model"),
        (BASE | {"depth": 3}, "unknown option of digits-cnn 'depth'"),
        (BASE | {"name": "mnist-cnn"}, "name"),
        (BASE | {"num_classes": 1}, "num_classes must be an integer ≥ 2"),
        (BASE | {"num_classes": "ten"}, "num_classes"),
        (BASE | {"input_shape": None}, "config.json: "),
        (BASE | {"input_shape": [3, 2, 2]}, "input_shape must be at least"),
        (BASE | {"input_shape": [3, 10**9, 10**9]}, "config.json: "),
        (BASE | {"normalize": [[0.1], [0.1]]}, "normalize must hold 3 means and stds, one per channel"),
        (BASE | {"normalize": 3}, "config.json: "),
        ({"model": "digits-cnn"}, "input_shape"),
    ],
)
def test_bad_descriptions(tmp_path, untyped, config, words):
    save_model(tmp_path, network())
    content = (
        config if isinstance(config, bytes) else (config if isinstance(config, str) else json.dumps(config)).encode()
    )
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    one_line(error, str(tmp_path / "config.json"), words)


@pytest.mark.parametrize(
    "source",
    ["nowhere", "./user/name", "../user/name", "/user/name", "~/name", "a/b/c", "runs/model.pt", "runs/x.safetensors"],
)
def test_nothing_there(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError) as error:
        load_model(source)
    one_line(error, f"no model at {source}", "a folder, a .safetensors file or a Hub id")


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        load_model(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A model that the Hub gives whatever it is asked for, and what it was asked: repository, file, revision."""
    model, asked = network(), []
    save_model(tmp_path / "hub", model)

    def download(repo, file, *, revision=None):
        asked.append((repo, file, revision))
        return str(tmp_path / "hub" / file)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return model, asked


@pytest.mark.parametrize("source", ["user/name", "user/resnet-1.5"])
def test_from_the_hub(hub, source):
    model, asked = hub
    assert identical(load_model(source, revision="v2"), model)
    assert sorted(asked) == [(source, "config.json", "v2"), (source, "model.safetensors", "v2")]
    asked.clear()
    mine = im.build_model("digits-cnn", num_classes=4, input_shape=SHAPE)
    assert identical(load_model(source, mine), model)
    assert asked == [(source, "model.safetensors", None)]


@pytest.mark.parametrize("revision", ["v2", "refs/pr/1", "0123abc"])
def test_a_revision_of_the_hub(hub, tmp_path, revision):
    model, asked = hub
    for load in (im.load_model, im.from_pretrained, load_model):
        asked.clear()
        assert identical(load(f"user/name@{revision}"), model)
        assert set(asked) == {("user/name", name, revision) for name in ("config.json", "model.safetensors")}
    assert identical(load_model(f"user/name@{revision}", revision=revision), model)
    for source, other in ((f"user/name@{revision}", "main"), ("user/name@", None)):
        with pytest.raises(ValueError, match="must name one revision after its @"):
            load_model(source, revision=other)
    (tmp_path / "user").mkdir()
    save_model(tmp_path / "user" / "name@v2", network())  # what is here comes first
    asked.clear()
    load_model("user/name@v2")
    assert not asked


class ClientError(Exception):
    """An HTTP client's own error, in no family with the system's."""


@pytest.mark.parametrize(
    "failure",
    [
        LocalEntryNotFoundError("no connection\n\nand nothing cached"),
        HFValidationError("not an id"),
        ConnectionError("offline"),
        ClientError("404 Client Error.\n\nRepository Not Found"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_an_unreachable_hub(tmp_path, monkeypatch, failure):
    def download(*arguments, **options):
        raise failure

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ValueError) as error:
        load_model("user/name")
    one_line(error, "no model 'user/name' here or on the Hugging Face Hub: ", type(failure).__name__)
    assert error.value.__cause__ is failure


def test_a_hub_that_was_found_unreachable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("innermax.models.hub.find_fault", lambda: "ConnectError: no route")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: [][0])
    with pytest.raises(ValueError) as error:
        load_model("user/name")
    one_line(
        error, "no model 'user/name' here or in the cache", "cannot be reached (ConnectError: no route)", "a folder"
    )


@pytest.mark.filterwarnings("ignore")  # torch calls TorchScript deprecated
def test_files_of_other_kinds_say_what_to_do_with_them(tmp_path):
    own = network()
    torch.save(own.state_dict(), tmp_path / "weights.pth")
    torch.jit.save(torch.jit.trace(own, torch.rand(2, *SHAPE)), tmp_path / "script.pt")
    (tmp_path / "model.onnx").write_bytes(b"?")
    for name, words in {
        "weights.pth": "pickled models are never loaded: .*torch.load.path, weights_only=True",
        "script.pt": "TorchScript is not supported: .*torch.jit.load.path..state_dict",
        "model.onnx": "ONNX programs have no gradients",
    }.items():
        with pytest.raises(ValueError, match=f"{name} is no .safetensors file; {words}"):
            load_model(tmp_path / name)
    with pytest.raises(ValueError, match=r"no model at missing/x.onnx: expected a folder"):
        load_model("missing/x.onnx")


@pytest.mark.parametrize("crash", ["fsync", "replace", "write", "interrupt"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, crash):
    model = network()
    save_model(tmp_path, model)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments, **options):
        raise KeyboardInterrupt if crash == "interrupt" else OSError("disk full")

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, content):
            self.file.write(content[:10])
            fail()

    with monkeypatch.context() as patch:
        if crash == "replace":
            patch.setattr(Path, "replace", fail)
        elif crash == "write":
            opened = Path.open
            patch.setattr(Path, "open", lambda path, mode="r": Full(opened(path, mode)))
        else:
            patch.setattr(os, "fsync", fail)
        other = im.build_model("digits-cnn", num_classes=4, input_shape=SHAPE)
        for write in (lambda: save_model(tmp_path, other), lambda: write_json(tmp_path / "config.json", {"a": 1})):
            with pytest.raises(KeyboardInterrupt if crash == "interrupt" else OSError):
                write()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert identical(load_model(tmp_path), model)


def test_files_are_flushed_before_they_take_their_place(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda number: seen.append((path.read_bytes(), os.fstat(number).st_size)))
    write_bytes(path, b"newer")
    assert seen == [(b"old", 5)]
    assert path.read_bytes() == b"newer"


def test_json_without_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "file.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())
