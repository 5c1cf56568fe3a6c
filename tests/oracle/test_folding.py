"""BatchNorm is folded where that changes no answer, and nowhere else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from innermax.losses import cross_entropy
from innermax.models.registry import build_model
from innermax.oracle.folding import fold
from innermax.oracle.oracle import Oracle
from tests.helpers.oracles import Net, batch, close, data_dependent, learn, plain, small_vgg


def pairs(model):
    return set(fold(copy.deepcopy(model).eval()).pairs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_folding_a_plain_network(bias, affine, inplace):
    torch.manual_seed(0)
    x, y = batch()
    model = small_vgg(bias=bias, affine=affine, inplace=inplace)
    assert pairs(model) == {("0", "1"), ("4", "5"), ("9", "10")}
    oracle = Oracle.fast(model, x, "float32")
    assert oracle.plan == "3 BatchNorm folded, channels last, float32"
    assert close(oracle.logits(x), plain(model, x))
    for _ in range(3):
        learn(model, x, y)
        oracle.refresh()
        assert close(oracle.logits(x), plain(model, x))
        answer, truth = (o.gradient(x, y, cross_entropy) for o in (oracle, Oracle(model)))
        torch.testing.assert_close(answer.gradient, truth.gradient, rtol=1e-3, atol=1e-5)
        assert answer.gradient.is_contiguous()


def test_pools_come_before_relus():
    graph = fold(small_vgg().eval()).network.graph
    order = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    assert order == ["0", "3", "2", "4", "7", "6", "8", "9", "11", "12"]


@pytest.mark.parametrize("relu", [torch.relu, F.relu, lambda z: z.relu()])
def test_functional_relus(relu):
    def forward(net, x):
        return net.head(net.pool(relu(net.norm(net.conv(x)))).flatten(1))

    torch.manual_seed(0)
    x, y = batch()
    model = Net(forward, conv=nn.Conv2d(2, 5, 3), norm=nn.BatchNorm2d(5), pool=nn.MaxPool2d(2), head=nn.Linear(20, 4))
    assert pairs(model) == {("conv", "norm")}
    oracle = Oracle.fast(model, x, "float32")
    learn(model, x, y)
    oracle.refresh()
    assert close(oracle.logits(x), plain(model, x))


def shared_layer(net, x):
    return net.head(net.norm(net.conv(net.other(net.conv(x)))).flatten(1))


def layer_used_elsewhere(net, x):
    z = net.conv(x)
    return net.head((net.norm(z) + z).flatten(1))


def norm_first(net, x):
    return net.head(net.conv(net.norm(x).relu()).flatten(1))


def relu_between(net, x):
    return net.head(net.norm(net.conv(x).relu()).flatten(1))


def norm_twice(net, x):
    return net.head((net.norm(net.conv(x)) + net.norm(net.other(x))).flatten(1))


def relu_used_elsewhere(net, x):
    z = net.norm(net.conv(x)).relu()
    return net.head((net.pool(z) + z[..., ::2, ::2]).flatten(1))


def weight_used_elsewhere(net, x):
    return net.head((net.norm(net.conv(x)) + F.conv2d(x, net.conv.weight, padding=1)).flatten(1))


@pytest.mark.parametrize(
    ("forward", "folded"),
    [
        (shared_layer, 0),
        (layer_used_elsewhere, 0),
        (norm_first, 0),
        (relu_between, 0),
        (norm_twice, 2),
        (relu_used_elsewhere, 1),
        (weight_used_elsewhere, None),
    ],
)
@pytest.mark.parametrize("fresh", [True, False])
def test_what_must_not_be_folded(forward, folded, fresh):
    """A new BatchNorm is the identity: a wrong fold shows only once it has learned."""
    torch.manual_seed(0)
    x, y = batch()
    model = Net(
        forward,
        conv=nn.Conv2d(2, 2, 3, padding=1),
        other=nn.Conv2d(2, 2, 3, padding=1),
        norm=nn.BatchNorm2d(2),
        pool=nn.MaxPool2d(2),
        head=nn.Linear(18 if forward is relu_used_elsewhere else 72, 4),
    )
    if folded is not None:
        assert len(pairs(model)) == folded
    if not fresh:
        learn(model, x, y)
    oracle = Oracle.fast(model, x, "float32")
    assert oracle.plan.startswith("unfolded" if folded is None else f"{folded} BatchNorm folded")
    assert close(oracle.logits(x), plain(model, x))
    learn(model, x, y)
    oracle.refresh()
    assert close(oracle.logits(x), plain(model, x))


def tied():
    """Two layers with one weight, of which only one is followed by BatchNorm."""
    model = Net(
        lambda net, x: net.head((net.norm(net.a(x)) + net.b(x)).flatten(1)),
        a=nn.Conv2d(2, 2, 3, padding=1, bias=False),
        b=nn.Conv2d(2, 2, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(2),
        head=nn.Linear(72, 4),
    )
    model.b.weight = model.a.weight
    return model


def parametrized(method, convolution=True):
    layer = method(nn.Conv2d(2, 3, 3, padding=1) if convolution else nn.Linear(72, 3))
    norm = nn.BatchNorm2d(3) if convolution else nn.BatchNorm1d(3)
    head = [nn.Flatten(), nn.Linear(108, 4)] if convolution else [nn.Linear(3, 4)]
    return nn.Sequential(*([] if convolution else [nn.Flatten()]), layer, norm, nn.ReLU(), *head)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm")
@pytest.mark.parametrize(
    "build",
    [
        tied,
        lambda: parametrized(parametrizations.weight_norm),
        lambda: parametrized(parametrizations.spectral_norm),
        lambda: parametrized(parametrizations.weight_norm, convolution=False),
        lambda: parametrized(nn.utils.weight_norm),
        lambda: nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(72, 4))),
    ],
    ids=["tied", "weight_norm", "spectral_norm", "weight_norm linear", "hooked weight_norm", "only weight_norm"],
)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_weights_that_are_computed_or_shared(build, precision):
    torch.manual_seed(0)
    x, y = batch()
    model = build()
    oracle, exact = Oracle.fast(model, x, precision), Oracle(model)
    assert oracle.plan.startswith("unfolded (logits change" if build is tied else "0 BatchNorm folded")
    learn(model, x, y)
    model.eval()
    oracle.refresh()
    exact.refresh()
    truth = model(x).detach()
    assert close(exact.logits(x), truth, 1e-6)
    assert close(oracle.logits(x), truth, 1e-4 if precision == "float32" else 0.05)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_folding_in_every_dimension(dimensions):
    conv, norm = (getattr(nn, f"{kind}{dimensions}d") for kind in ("Conv", "BatchNorm"))
    torch.manual_seed(0)
    model = nn.Sequential(conv(2, 4, 3), norm(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    x, y = batch(shape=(2, *[5] * dimensions))
    learn(model, x, y)
    oracle = Oracle.fast(model, x, "float32")
    assert oracle.plan.startswith("1 BatchNorm folded")
    learn(model, x, y)
    oracle.refresh()
    assert close(oracle.logits(x), plain(model, x))


def test_batchnorm_over_another_dimension_is_not_folded():
    """BatchNorm1d on (B, L, C) normalises L, the linear layer before it makes C."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Flatten(), nn.Linear(25, 4))
    x, y = batch(shape=(5, 5))
    oracle = Oracle.fast(model, x, "float32")
    learn(model, x, y)
    oracle.refresh()
    assert close(oracle.logits(x), plain(model, x))


NETWORKS = {
    "digits-cnn": ((1, 8, 8), {}, 3),
    "mnist-cnn": ((1, 12, 12), {}, 2),
    "cifar-cnn": ((3, 8, 8), {}, 7),
    "preact-resnet18": ((3, 8, 8), {}, 8),
    "wideresnet": ((3, 8, 8), {"depth": 10, "width": 1}, 3),
    "resnet50": ((3, 8, 8), {}, 53),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_librarys_networks(name):
    shape, options, folded = NETWORKS[name]
    torch.manual_seed(0)
    x, y = batch(4, shape)
    model = build_model(name, num_classes=4, input_shape=shape, **options)
    oracle = Oracle.fast(model, x, "float32")
    assert oracle.plan == f"{folded} BatchNorm folded, channels last, float32"
    assert close(oracle.logits(x), plain(model, x))
    before = oracle.logits(x)
    learn(model, x, y, steps=1, lr=0.01)
    oracle.refresh()
    assert close(oracle.logits(x), plain(model, x))
    assert not close(before, plain(model, x))


def test_normalisation_inside_the_model():
    torch.manual_seed(0)
    x, _ = batch(4, (1, 8, 8))
    model = build_model("digits-cnn", input_shape=(1, 8, 8), normalize=([0.3], [0.2]))
    oracle = Oracle.fast(model, x, "float32")
    assert oracle.plan.startswith("3 BatchNorm folded")
    assert close(oracle.logits(x), plain(model, x))


def test_a_rewritten_module_keeps_the_attributes_that_its_model_reads():
    torch.manual_seed(0)
    x, y = batch()
    body = small_vgg()
    body.sign = -1
    model = Net(lambda net, x: net.body.sign * net.body(x) if x.mean() > 0 else net.body(x), body=body)
    oracle = Oracle.fast(model, x, "float32")
    assert oracle.plan.startswith("3 BatchNorm folded module by module")
    learn(model, x, y)
    oracle.refresh()
    assert close(oracle.logits(x), plain(model, x))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_untraceable_model_is_folded_module_by_module(precision):
    torch.manual_seed(0)
    x, y = batch()
    model = Net(data_dependent, body=small_vgg())
    oracle = Oracle.fast(model, x, precision)
    reason = "TraceError: symbolically traced variables cannot be used as inputs to control flow"
    assert oracle.plan.startswith(f"3 BatchNorm folded module by module ({reason}), channels last, {precision}")
    learn(model, x, y)
    oracle.refresh()
    assert close(oracle.logits(x), plain(model, x), 1e-4 if precision == "float32" else 0.05)
    torch.testing.assert_close(-oracle.logits(-x), Oracle(model.body).logits(-x), rtol=0.05, atol=0.05)


def nested(net, x):
    z = net.stem(x)
    for block in net.blocks:
        z = block(z) if z.sum() > -1e9 else z
    return net.head(z.mean((2, 3)))


def conv_norm(before, after):
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())


def test_a_failure_is_told_once(capfd):
    """fx prints the errors of traced networks to stderr as well."""
    layers = {"conv": nn.Conv2d(2, 4, 3), "norm": nn.BatchNorm2d(4)}
    network = fold(Net(lambda net, x: net.norm(net.conv(x)).view(2, 64), **layers).eval()).network
    for traced in (network, copy.deepcopy(network), copy.deepcopy(copy.deepcopy(network))):
        with pytest.raises(RuntimeError, match="invalid for input"):
            traced(torch.rand(3, 2, 6, 6))
    assert capfd.readouterr().err == ""


def test_modules_within_modules_are_folded():
    torch.manual_seed(0)
    x, y = batch()
    blocks = nn.ModuleList([conv_norm(5, 5), Net(data_dependent, body=conv_norm(5, 5))])
    model = Net(nested, stem=conv_norm(2, 5), blocks=blocks, head=nn.Linear(5, 4))
    assert pairs(model) == {("stem.0", "stem.1"), ("blocks.0.0", "blocks.0.1"), ("blocks.1.body.0", "blocks.1.body.1")}
    oracle = Oracle.fast(model, x, "float32")
    learn(model, x, y)
    oracle.refresh()
    assert close(oracle.logits(x), plain(model, x))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_what_cannot_be_traced_at_all_works_unfolded(precision):
    def forward(net, x):
        return net.head((net.norm(net.conv(x)) if x.mean() > 0 else x).flatten(1))

    torch.manual_seed(0)
    x, y = batch()
    model = Net(forward, conv=nn.Conv2d(2, 5, 3), norm=nn.BatchNorm2d(5), head=nn.Linear(80, 4))
    oracle = Oracle.fast(model, x, precision)
    assert oracle.plan.startswith("unfolded (TraceError: ")
    assert oracle.scheme == f"unfolded, channels last, {precision}"
    learn(model, x, y)
    oracle.refresh()
    assert close(oracle.logits(x), plain(model, x), 1e-5 if precision == "float32" else 0.05)


def test_a_compiled_network_that_is_right_no_more_is_left():
    """A branch that the first check did not see uses a layer a second time, so it must not be folded."""

    def forward(net, x):
        z = net.block(x)
        return net.head((z + net.block[0](x) if float(net.head.bias.sum()) > 100 else z).flatten(1))

    torch.manual_seed(0)
    x, _ = batch()
    model = Net(forward, block=conv_norm(2, 5), head=nn.Linear(180, 4))
    oracle = Oracle.fast(model, x, "float32")
    assert oracle.recheck() is oracle
    with torch.no_grad():
        model.head.bias.fill_(1000.0)
    fresh = oracle.recheck()
    assert fresh is not oracle
    assert close(fresh.logits(x), plain(model, x))
    exact = Oracle(model)
    assert exact.recheck() is exact
