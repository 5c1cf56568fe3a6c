"""Files that need no innermax: programs of torch.export and ONNX, at every batch size."""

from typing import ClassVar

import pytest
import torch
from torch import nn

import innermax as im

SHAPES = {"digits-cnn": (1, 8, 8), "cifar-cnn": (3, 32, 32), "preact-resnet18": (3, 32, 32)}


def built(name="digits-cnn", **options):
    torch.manual_seed(1)
    return im.build_model(name, input_shape=SHAPES[name], **options)


@pytest.mark.parametrize("name", SHAPES)
def test_a_program_answers_as_the_model(name, tmp_path):
    model = built(name, normalize=([0.3] * SHAPES[name][0], [0.5] * SHAPES[name][0])).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert im.export_model(model, tmp_path / "model.pt2") == tmp_path / "model.pt2"
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    loaded = im.load_model(tmp_path / "model.pt2", allow_code=True)
    model.eval()
    for size in (1, 3, 16):
        x = torch.rand(size, *SHAPES[name])
        assert torch.allclose(loaded(x), model(x), atol=1e-5)


def test_a_program_can_be_attacked(tmp_path):
    model = built()
    im.export_model(model, tmp_path / "model.pt2")
    x, y, attack = torch.rand(4, 1, 8, 8), torch.arange(4), im.PGD(im.Linf(0.1), steps=3)
    found = [attack(one, x, y).x_adv for one in (model, im.load_model(tmp_path / "model.pt2", allow_code=True))]
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("name", ["digits-cnn", "cifar-cnn"])
def test_onnx_answers_as_the_model(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = built(name, num_classes=7)
    im.export_model(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in (*session.get_inputs(), *session.get_outputs())] == ["images", "logits"]
    model.eval()
    for size in (1, 3, 16):
        x = torch.rand(size, *SHAPES[name])
        (logits,) = session.run(None, {"images": x.numpy()})
        assert torch.allclose(torch.from_numpy(logits), model(x), atol=1e-5)


class Answering(nn.Module):
    """What a function makes of logits."""

    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Linear(4, 3), change

    def forward(self, x):
        return self.change(self.layer(x.flatten(1)))


class Fixed(nn.Module):
    """Knows how many images come."""

    def forward(self, x):
        return x.reshape(2, -1)[:, :3]


class Drawing(nn.Module):
    """Answers another way each time."""

    def forward(self, x):
        return x.flatten(1)[:, :3] + torch.rand(1)


class Branching(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] if x.sum() > 0 else -x.flatten(1)[:, :3]


class Configured(nn.Flatten):
    """Somebody else's, with a config of its own."""

    config: ClassVar = {"model": "theirs", "input_shape": "28x28"}


@pytest.mark.parametrize(
    ("model", "path", "shape", "message"),
    [
        (built(), "model.pt", None, "unknown ending of path '.pt'; did you mean '.pt2'"),
        (nn.Flatten(), "model.pt2", None, "input_shape must be given"),
        (Configured(), "model.pt2", None, "input_shape must be given"),
        (nn.Flatten(), "model.pt2", (0, 3), r"input_shape must be positive integers, got \(0, 3\)"),
        (Fixed(), "model.pt2", (1, 2, 2), "torch.export cannot export the model|does not take 1 images"),
        (Drawing(), "model.pt2", (1, 2, 2), "model.pt2 must have the model's logits, got a difference of"),
        (Branching(), "model.pt2", (1, 2, 2), "torch.export cannot export the model"),
        (Answering(lambda z: {"logits": z}), "model.pt2", (1, 2, 2), r"got dict; .*output='logits'"),
        (Answering(lambda z: (z, z)), "model.onnx", (1, 2, 2), r"got tuple; .*output=0"),
        (Answering(lambda z: z[:, 0]), "model.pt2", (1, 2, 2), r"must return logits of shape .* got \(2,\)"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(model, path, shape, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        im.export_model(model, tmp_path / path, input_shape=shape)
    assert list(tmp_path.iterdir()) == []


def test_a_float64_model_takes_float32_images(tmp_path):
    model = built().double().eval()
    x = torch.rand(3, 1, 8, 8)
    logits = im.load_model(im.export_model(model, tmp_path / "model.pt2"), allow_code=True)(x)
    assert torch.allclose(logits, model(x.double()), atol=1e-12)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"ONNX needs pip install 'innermax\[onnx\]'"):
        im.export_model(built(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
