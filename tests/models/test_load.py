"""Other people's models: where they come from, what is run and what is not."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import innermax as im
from innermax.models.load import Exported
from tests.helpers.commands import said
from tests.helpers.evaluation import network
from tests.helpers.networks import EachByItself

THREAT = im.Linf(0.1)
PGD = im.PGD(THREAT, steps=3)
CPU = torch.device("cpu")


def images(count=20, classes=4):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 6, 6, generator=generator), torch.randint(0, classes, (count,), generator=generator)


def exported(model, batch, **options):
    return torch.export.export(model, (torch.rand(batch, 1, 6, 6),), **options)


def saved(path, program):
    torch.export.save(program, path)
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory, and no module left of what is imported from it."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


# torch.export programs


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_an_exported_program_takes_any_batch(tmp_path, batch):
    model = network().eval()
    loaded = im.load_model(saved(tmp_path / "model.pt2", exported(model, batch)), allow_code=True)
    for count in (1, 3, 4, 8, 9, 20):
        x = images(count)[0].requires_grad_()
        logits = loaded(x)
        torch.testing.assert_close(logits, model(x))
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
        gradients = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (logits, model(x)))
        torch.testing.assert_close(*gradients)


def test_a_program_of_several_batch_sizes(tmp_path):
    shapes = ({0: torch.export.Dim("batch", min=2, max=5)},)
    module = Exported(exported(network().eval(), 3, dynamic_shapes=shapes))
    assert (module.smallest, module.largest) == (2, 5)
    free = Exported(exported(network().eval(), 3, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)))
    assert free.largest is None
    seen = []
    module.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    x = images(11)[0]
    torch.testing.assert_close(module(x), network().eval()(x))
    assert seen == [5, 5, 2]
    torch.testing.assert_close(free(x), network().eval()(x))


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_an_exported_program_is_evaluated_as_the_model_is(precision):
    model, test_set = network().eval(), images()
    module = Exported(exported(model, 8)).train()
    attacks = {"pgd": PGD, "square": im.Square(THREAT, queries=20)}
    mine, its = (im.evaluate(one, test_set, attacks, precision=precision) for one in (model, module))
    assert module.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    for name in ("clean", "pgd", "square"):
        agree = (mine.correct(name) == its.correct(name)).mean()
        assert agree == 1 if precision == "float32" else agree > 0.9


class NormalizedConv(nn.Conv2d):
    """A convolution whose weights BatchNorm's function standardises, as timm's does."""

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return self._conv_forward(x, weight.reshape(self.weight.shape), self.bias)


@pytest.mark.parametrize(
    ("layers", "refused"),
    [
        ((NormalizedConv(1, 3, 3),), False),
        ((nn.Conv2d(1, 3, 3), EachByItself(batch=False), nn.ReLU()), False),
        ((nn.Conv2d(1, 3, 3), EachByItself(batch=True), nn.ReLU()), True),
        ((nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)), True),
        ((NormalizedConv(1, 3, 3), nn.BatchNorm2d(3).train()), True),
        ((nn.Conv2d(1, 3, 3), nn.Dropout().train()), True),
    ],
)
@pytest.mark.parametrize("shapes", [None, ({0: torch.export.Dim("batch")},)])
def test_what_normalises_weights_or_images_is_not_taken_for_training(layers, refused, shapes):
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 4))
    program = exported(model, 3, dynamic_shapes=shapes)
    if refused:
        with pytest.raises(ValueError, match="exported in training mode"):
            Exported(program)
    else:
        x = images(5)[0]
        torch.testing.assert_close(Exported(program)(x), model(x))


def test_a_program_for_one_image_at_a_time_has_no_neighbours():
    model = nn.Sequential(EachByItself(batch=True), nn.Flatten(), nn.Linear(36, 4))
    x = images(3)[0]
    torch.testing.assert_close(Exported(exported(model, 1))(x), torch.cat([model(image[None]) for image in x]))


class Two(nn.Module):
    def forward(self, x):
        return x.flatten(1), x


class Sum(nn.Module):
    def forward(self, x, other):
        return (x + other).flatten(1)


def test_programs_that_cannot_be_evaluated(tmp_path):
    x = torch.rand(2, 1, 6, 6)
    path = tmp_path / "model.pt2"
    for program, message in (
        (torch.export.export(Two(), (x,)), "the program returns 2 values"),
        (torch.export.export(Sum(), (x, x)), "the program takes 2 values"),
        (exported(network().train(), 2), r"exported in training mode \(aten.batch_norm.default\): export model.eval"),
        (
            torch.export.export(nn.Sequential(nn.Dropout(), nn.Flatten()).train(), (x,)),
            r"exported in training mode \(aten.dropout.default\)",
        ),
    ):
        with pytest.raises(ValueError, match=f"model.pt2: .*{message}"):
            im.load_model(saved(path, program), allow_code=True)
    path.write_bytes(b"PK no program")
    with pytest.raises(ValueError, match=r"model\.pt2 is not a readable torch.export program: "):
        im.load_model(path, allow_code=True)
    module = Exported(exported(network().eval(), 2))
    with pytest.raises(ValueError, match=r"the model fails on x of shape \(20, 3, 6, 6\)"):
        im.evaluate(module, (torch.rand(20, 3, 6, 6), images()[1]), {"pgd": PGD})


# Functions

MODULE = """
import torch
from pathlib import Path
Path("ran").touch()
class Factory:
    build = staticmethod(lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).train())
def number(): return 3
def broken(): raise KeyError("lost\\nfor ever")
def wants(argument): return argument
"""


def test_a_function_of_the_current_directory(here):
    Path("mine.py").write_text(MODULE)
    path = list(sys.path)
    model = im.load_model("mine:Factory.build", allow_code=True)
    assert isinstance(model, nn.Sequential)
    assert not model.training
    assert sys.path == path
    for source, error, message in (
        ("mine:number", TypeError, "mine:number must return a torch.nn.Module, got int"),
        ("mine:broken", ValueError, "mine:broken fails: KeyError: 'lost"),
        ("mine:wants", ValueError, "mine:wants fails: TypeError: .*argument"),
        ("mine:nothing", ValueError, "mine:nothing fails: AttributeError: .*nothing"),
        ("nowhere:build", ValueError, "nowhere:build fails: ModuleNotFoundError: No module named 'nowhere'"),
    ):
        with pytest.raises(error, match=message):
            im.load_model(source, allow_code=True)


def test_no_code_runs_unless_allowed(here):
    Path("mine.py").write_text(MODULE)
    with pytest.raises(
        ValueError, match=r"to call Factory.build\(\) of the module mine is to run code: .*--allow-code"
    ):
        im.load_model("mine:Factory.build")
    saved(here / "model.pt2", exported(network().eval(), 2))
    with pytest.raises(ValueError, match=r"to load the torch.export program model.pt2 is to run code"):
        im.load_model("model.pt2")
    with pytest.raises(ValueError, match=r"no torch.export program at other.pt2"):
        im.load_model("other.pt2", allow_code=True)
    assert not Path("ran").exists()
    assert "mine" not in sys.modules


# timm


@pytest.fixture
def stub(monkeypatch):
    """A package that answers as timm does; the real one needs torchvision."""
    timm = ModuleType("timm")

    def create_model(name, pretrained):
        assert pretrained
        if name != "tiny.a1":
            raise RuntimeError(f"Unknown model ({name})\nand more")
        model = network().train()
        model.pretrained_cfg = {"mean": (0.25,), "std": (0.5,)}
        return model

    timm.create_model, timm.list_models = create_model, lambda: ["tiny", "huge"]
    monkeypatch.setitem(sys.modules, "timm", timm)


def test_a_model_of_timm_takes_images_in_0_1(stub):
    model = im.load_model("timm:tiny.a1")
    assert not any(module.training for module in model.modules())
    x = images()[0]
    assert torch.equal(model(x), network().eval()((x - 0.25) / 0.5))
    with pytest.raises(ValueError) as error:
        im.load_model("timm:tinny.a1")
    assert str(error.value) == (
        "timm:tinny.a1 cannot be had: RuntimeError: Unknown model (tinny.a1); did you mean 'tiny'?"
    )


def test_timm_without_a_network_says_what_else_there_is(stub, monkeypatch):
    monkeypatch.setattr("innermax.models.hub.find_fault", lambda: "ConnectError: no route")
    assert im.load_model("timm:tiny.a1") is not None  # from the cache
    with pytest.raises(ValueError, match=r"timm:tinny.a1 cannot be had: .*did you mean 'tiny'"):
        im.load_model("timm:tinny.a1")
    monkeypatch.setattr("timm.create_model", lambda name, pretrained: [][0])
    with pytest.raises(ValueError) as error:
        im.load_model("timm:tiny")
    assert str(error.value) == (
        "timm:tiny has no weights in the cache, and the Hugging Face Hub cannot be reached (ConnectError: no route): "
        "pass timm.create_model('tiny', pretrained=False), or load a local file into it with load_model(file, model=…)"
    )


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ValueError, match=r"timm:tiny needs timm \(pip install 'innermax\[timm\]'\): ModuleNotFoundError"
    ):
        im.load_model("timm:tiny")


def _has(name):
    return importlib.util.find_spec(name) is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not (_has("timm") and _has("torchvision")), reason="timm or its torchvision is not installed")
def test_timm_itself(monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda name, pretrained: create(name, pretrained=False, num_classes=5))
    model = im.load_model("timm:test_resnet.r160_in1k")
    x = torch.rand(6, 3, 32, 32)
    evaluation = im.evaluate(model, (x, torch.randint(0, 5, (6,))), {"pgd": PGD}, precision="auto")
    assert "BatchNorm folded" in evaluation.settings.attack_network
    with pytest.raises(ValueError, match=r"timm:resnet118 cannot be had: .*; did you mean 'resnet18'"):
        im.load_model("timm:resnet118")


# The command line

EVALUATED = ("--data", "digits", "--threat.eps", "0.1", "--attacks", "fgsm", "--limit", "100")
SOURCE = """
import torch
def build():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    state = torch.load("weights.pt", weights_only=True)
    model.load_state_dict(state)
    return model
"""


@pytest.mark.filterwarnings("default")
def test_evaluate_and_transfer_other_peoples_models(here, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    torch.save(model.state_dict(), "weights.pt")
    Path("mine.py").write_text(SOURCE)
    torch.export.save(torch.export.export(model, (torch.rand(4, 1, 8, 8),)), "mine.pt2")
    for source in ("mine:build", "mine.pt2"):
        refused = said(capsys, "evaluate", source, *EVALUATED)
        assert (refused.status, refused.err.count("\n")) == (2, 1)
        assert source.partition(":")[0] in refused.err
        assert "--allow-code" in refused.err
        told = said(capsys, "evaluate", source, *EVALUATED, "--allow-code", "--json", "raw.json")
        assert (told.status, told.err.count("\n")) == (0, 0)
        assert "FGSM" in told.out
    moved = said(capsys, "transfer", "mine:build", "mine.pt2", *EVALUATED, "--allow-code")
    assert (moved.status, moved.err) == (0, "")
    assert "mine.pt2" in moved.out
    refused = said(capsys, "transfer", "mine:build", "mine.pt2", *EVALUATED)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
