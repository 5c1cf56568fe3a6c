"""The networks: their shapes, their sizes, and what the rest of the library asks of them."""

import copy
import json

import pytest
import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from innermax.models.registry import MODELS, build_model
from innermax.models.resnet import Bottleneck, PreActBlock

NATIVE = {
    "mnist-cnn": (1, 28, 28),
    "cifar-cnn": (3, 32, 32),
    "digits-cnn": (1, 8, 8),
    "preact-resnet18": (3, 32, 32),
    "wideresnet": (3, 32, 32),
    "resnet50": (3, 32, 32),
}
SMALL = {"wideresnet": {"depth": 10, "width": 1}}  # the options that keep a test quick


def small(name, shape=None, **options):
    torch.manual_seed(0)
    return build_model(name, input_shape=shape or NATIVE[name], **SMALL.get(name, {}), **options)


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def meta(name, **options):
    with torch.device("meta"):
        return build_model(name, input_shape=(3, 32, 32), **options)


def conv_norm(before, after):
    return 9 * before * after + 2 * after


def test_every_network_is_tested():
    assert set(NATIVE) == set(MODELS)


def test_every_network_is_documented():
    assert [name for name in MODELS if f'"{name}"' not in build_model.__doc__] == []


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("train", [True, False])
def test_logits(name, train):
    model = small(name, num_classes=7).train(train)
    logits = model(torch.rand(2, *NATIVE[name]))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mnist-cnn", (3, 32, 32)),
        ("mnist-cnn", (2, 5, 9)),
        ("cifar-cnn", (1, 28, 28)),
        ("cifar-cnn", (3, 8, 8)),
        ("digits-cnn", (1, 28, 28)),
        ("preact-resnet18", (1, 8, 8)),
        ("wideresnet", (1, 9, 13)),
        ("resnet50", (1, 8, 8)),
    ],
)
def test_other_shapes(name, shape):
    assert small(name, shape).eval()(torch.rand(1, *shape)).shape == (1, 10)


def test_sizes_of_the_plain_networks():
    mnist = conv_norm(1, 32) + conv_norm(32, 64) + (7 * 7 * 64 + 1) * 128 + 129 * 10
    assert size(small("mnist-cnn")) == mnist == 421_738
    pairs = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 196), (196, 196)]
    cifar = sum(conv_norm(*pair) for pair in pairs) + 4 * 4 * 196 * 256 + 2 * 256 + 257 * 10
    assert size(small("cifar-cnn")) == cifar
    digits = conv_norm(1, 16) + conv_norm(16, 32) + conv_norm(32, 64) + (2 * 2 * 64 + 1) * 64 + 65 * 10
    assert size(small("digits-cnn")) == digits


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [  # as published, or counted in widely used implementations
        ("preact-resnet18", {}, 11_172_170),
        ("wideresnet", {"depth": 28, "width": 10}, 36_479_194),
        ("wideresnet", {}, 46_160_474),
        ("resnet50", {}, 23_520_842),
    ],
)
def test_sizes_of_the_residual_networks(name, options, count):
    assert size(meta(name, **options)) == count


@pytest.mark.parametrize(
    ("name", "layers"), [("mnist-cnn", 4), ("cifar-cnn", 8), ("preact-resnet18", 18), ("resnet50", 50)]
)
def test_depth(name, layers):
    """Layers with weights, projections of the shortcuts not counted."""
    weighted = [path for path, module in small(name).named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sum("shortcut" not in path for path in weighted) == layers


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("preact-resnet18", [(64, 32), (128, 16), (256, 8), (512, 4)]),
        ("wideresnet", [(16, 32), (32, 16), (64, 8)]),
        ("resnet50", [(256, 32), (512, 16), (1024, 8), (2048, 4)]),
    ],
)
def test_stages(name, sizes):
    """Channels and image sizes along a residual network, from the block outputs."""
    seen = []
    model = small(name).eval()
    for module in model.modules():
        if type(module).__name__ in ("PreActBlock", "Bottleneck"):
            module.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[1:3])))
    model(torch.rand(1, 3, 32, 32))
    assert list(dict.fromkeys(seen)) == sizes


@pytest.mark.parametrize("name", NATIVE)
def test_traceable(name):
    model = small(name, normalize=([0.4] * NATIVE[name][0], [0.3] * NATIVE[name][0])).eval()
    traced = fx.symbolic_trace(model)
    x = torch.rand(2, *NATIVE[name])
    assert torch.equal(traced(x), model(x))
    calls = {type(traced.get_submodule(node.target)) for node in traced.graph.nodes if node.op == "call_module"}
    assert {nn.Conv2d, nn.BatchNorm2d, nn.ReLU} <= calls  # plain modules, visible to transformations


@pytest.mark.parametrize("name", ["mnist-cnn", "cifar-cnn", "digits-cnn"])
def test_foldable(name):
    """Every convolution of a plain network is directly followed by its BatchNorm; folding it changes nothing."""
    model = small(name).train()
    model(torch.rand(8, *NATIVE[name]))  # running statistics that are not the initial ones
    model.eval()
    folded = copy.deepcopy(model)
    for position, module in enumerate(model):
        if isinstance(module, nn.Conv2d):
            assert isinstance(model[position + 1], nn.BatchNorm2d)
            folded[position] = fuse_conv_bn_eval(module, model[position + 1])
            folded[position + 1] = nn.Identity()
    x = torch.rand(2, *NATIVE[name])
    torch.testing.assert_close(folded(x), model(x))


@pytest.mark.parametrize("name", NATIVE)
def test_config_builds_it_again(name):
    channels = NATIVE[name][0]
    model = small(name, num_classes=5, normalize=((0.25,) * channels, (0.1,) * channels)).eval()
    config = json.loads(json.dumps(model.config))
    assert config == model.config
    again = build_model(config.pop("model"), **config).eval()
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    x = torch.rand(2, *NATIVE[name])
    assert torch.equal(again(x), model(x))


def test_config_values():
    model = build_model("mnist-cnn", input_shape=(1, 28, 28))
    assert model.config == {"model": "mnist-cnn", "num_classes": 10, "input_shape": [1, 28, 28]}
    wide = build_model("wideresnet", input_shape=[3, 8, 8], depth=10, width=2, num_classes=4)
    assert wide.config == {"model": "wideresnet", "num_classes": 4, "input_shape": [3, 8, 8], "depth": 10, "width": 2}
    assert meta("wideresnet").config["depth"] == 34  # defaults are written down
    assert copy.deepcopy(model).config == model.config


def test_normalization_inside_equals_outside():
    mean, std = (0.49, 0.48, 0.44), (0.2, 0.25, 0.3)
    inside = small("cifar-cnn", normalize=(mean, std)).eval()
    outside = small("cifar-cnn").eval()
    x = torch.rand(2, 3, 32, 32)
    shifted = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(inside(x), outside(shifted))
    assert not torch.allclose(inside(x), outside(x))
    assert [key.removeprefix("network.") for key in inside.state_dict()] == list(outside.state_dict())


def test_layers_of_the_plain_networks():
    block, last = ["Conv2d", "BatchNorm2d", "ReLU"], ["Conv2d", "BatchNorm2d", "MaxPool2d", "ReLU"]
    mnist = last * 2 + ["Flatten", "Linear", "ReLU", "Linear"]
    cifar = [*block, *last] * 3 + ["Flatten", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [type(layer).__name__ for layer in small("mnist-cnn")] == mnist
    assert [type(layer).__name__ for layer in small("cifar-cnn")] == cifar


@pytest.mark.parametrize(("before", "after", "stride"), [(4, 4, 1), (4, 6, 2), (4, 6, 1)])
def test_residual_blocks_against_their_formulas(before, after, stride):
    def norm(x, layer):
        return layer.weight[:, None, None] * x / (1 + layer.eps) ** 0.5 + layer.bias[:, None, None]  # fresh statistics

    def conv(x, layer, stride=1):
        return functional.conv2d(x, layer.weight, stride=stride, padding=layer.kernel_size[0] // 2)

    torch.manual_seed(0)
    x, same = torch.randn(2, before, 6, 6), before == after
    block = PreActBlock(before, after, stride).eval()
    nn.init.normal_(block.norm1.bias)
    first = norm(x, block.norm1).relu()
    y = conv(norm(conv(first, block.conv1, stride), block.norm2).relu(), block.conv2)
    torch.testing.assert_close(block(x), y + (x if same else conv(first, block.shortcut, stride)))

    block = Bottleneck(before, after // 4 if same else 2, stride).eval()
    y = norm(conv(x, block.conv1), block.norm1).relu()
    y = norm(conv(y, block.conv2, stride), block.norm2).relu()
    shortcut = x if same else norm(conv(x, block.shortcut[0], stride), block.shortcut[1])
    torch.testing.assert_close(block(x), (norm(conv(y, block.conv3), block.norm3) + shortcut).relu())


def test_initialisation():
    he = small("preact-resnet18")[1].conv1.weight.detach()  # 64 × 64 × 3 × 3
    assert float(he.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    wide = build_model("wideresnet", input_shape=(3, 8, 8), depth=10, width=2)[1].conv1.weight.detach()  # 16 → 32
    assert float(wide.std()) == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)
    uniform = small("mnist-cnn")[4].weight.detach()  # PyTorch's own: uniform in ±1/√fan-in
    assert float(uniform.abs().max()) == pytest.approx((1 / (9 * 32)) ** 0.5, rel=0.01)


def test_digits_are_learnt_in_seconds():
    from innermax.data.load import load_data

    data = load_data("digits")
    model = small("digits-cnn")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(3):
        for index in torch.randperm(len(data.train)).split(64):
            x, y = data.train.batch(index)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    x, y = data.test.batch(torch.arange(len(data.test)))
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.93


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnist-cn"}, "did you mean 'mnist-cnn'"),
        ({"input_shape": (1, 3, 28)}, "at least 4×4 pixels, got .1, 3, 28"),
        ({"name": "cifar-cnn", "input_shape": (3, 7, 32)}, "at least 8×8 pixels"),
        ({"input_shape": (28, 28)}, r"\(C, H, W\)"),
        ({"input_shape": (1, 0, 28)}, "positive integers"),
        ({"num_classes": 1}, "num_classes must be an integer ≥ 2, got 1"),
        ({"depth": 10}, "unknown option of mnist-cnn 'depth'"),
        ({"name": "wideresnet", "dept": 10}, "did you mean 'depth'"),
        ({"name": "wideresnet", "depth": 30}, r"depth must be 6n \+ 4"),
        ({"name": "wideresnet", "depth": 4}, r"depth must be 6n \+ 4"),
        ({"name": "wideresnet", "width": 0}, "width must be ≥ 1, got 0"),
        ({"normalize": ([0.5], [0.0])}, "std > 0"),
        ({"normalize": ([float("nan")], [1.0])}, "finite"),
        ({"normalize": ([0.5, 0.5], [1.0, 1.0])}, "must hold 1 means and stds, one per channel, got 2 and 2"),
        ({"normalize": ([0.5],)}, r"\(mean, std\), got 1"),
    ],
)
def test_errors(arguments, message):
    arguments = {"name": "mnist-cnn", "input_shape": (1, 28, 28), **arguments}
    with pytest.raises(ValueError, match=message):
        build_model(**arguments)


def test_option_of_a_wrong_type():
    with pytest.raises(TypeError, match="depth must be an integer, got '10'"):
        build_model("wideresnet", input_shape=(3, 8, 8), depth="10")
