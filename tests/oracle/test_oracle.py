"""The network as the attacker sees it: the model's own numbers, without a trace on the model."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from innermax.losses import LOSSES, cross_entropy, margin
from innermax.models.registry import build_model
from innermax.models.wrappers import unwrapped
from innermax.oracle.folding import fold
from innermax.oracle.oracle import Oracle


class Net(nn.Module):
    """Submodules and a forward pass given as a function of them."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._own = forward

    def forward(self, x):
        return self._own(self, x)


def convnet(*, bias=False, affine=True, inplace=False):
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=bias),
        nn.BatchNorm2d(8, affine=affine),
        nn.ReLU(inplace=inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding=1, bias=bias),
        nn.BatchNorm2d(6, affine=affine),
        nn.ReLU(inplace=inplace),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6, 5, bias=bias),
        nn.BatchNorm1d(5, affine=affine),
        nn.ReLU(inplace=inplace),
        nn.Linear(5, 4),
    )


def batch(count=6, shape=(2, 6, 6), dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, *shape, generator=generator, dtype=dtype), torch.arange(count) % 4


def learn(model, x, y, steps=3, lr=0.2):
    """The model after some training; it is left in training mode."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def plain(model, x):
    """The model's logits in evaluation mode, computed on a copy."""
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def close(mine, truth, tolerance=1e-4):
    return float((mine - truth).abs().max()) <= tolerance * (1 + float(truth.abs().max()))


# The exact oracle


@pytest.mark.parametrize("loss", LOSSES.values())
@pytest.mark.parametrize("training", [True, False])
def test_the_oracle_answers_what_autograd_says_of_the_model_in_evaluation_mode(loss, training):
    torch.manual_seed(0)
    x, y = batch()
    model = learn(convnet(), x, y).train(training)
    answer = Oracle(model).gradient(x, y, loss)
    point, reference = x.clone().requires_grad_(), copy.deepcopy(model).eval()
    value = loss(reference(point), y)
    torch.testing.assert_close(answer.logits, reference(x), rtol=0, atol=0)
    torch.testing.assert_close(answer.loss, value, rtol=0, atol=0)
    torch.testing.assert_close(answer.gradient, torch.autograd.grad(value.sum(), point)[0], rtol=0, atol=0)
    torch.testing.assert_close(Oracle(model).logits(x), reference(x), rtol=0, atol=0)
    assert not any(value.requires_grad for value in (answer.gradient, answer.loss, answer.logits))


def test_the_gradient_is_the_slope_of_each_examples_own_loss():
    torch.manual_seed(0)
    x, y = batch(3, dtype=torch.float64)
    oracle = Oracle(nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.Softplus(), nn.Linear(9, 4)).double())
    answer = oracle.gradient(x, y, cross_entropy)
    direction, h = torch.randn_like(x), 1e-5
    ahead, behind = (oracle.gradient(x + shift * direction, y, cross_entropy).loss for shift in (h, -h))
    slope = (answer.gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [Oracle, lambda model: Oracle.fast(model, batch()[0], "float32")])
def test_an_examples_gradient_does_not_depend_on_its_neighbours(make):
    torch.manual_seed(0)
    x, y = batch(7)
    oracle = make(learn(convnet(), x, y))
    together = oracle.gradient(x, y, cross_entropy)
    for row in range(7):
        alone = oracle.gradient(x[row : row + 1], y[row : row + 1], cross_entropy)
        torch.testing.assert_close(together.gradient[row], alone.gradient[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together.logits[row], alone.logits[0], rtol=1e-4, atol=1e-5)
    # Bitwise at the same shape, whoever the neighbours are.
    other = oracle.gradient(torch.cat([x[:3], 1 - x[3:]]), y, cross_entropy)
    assert torch.equal(together.gradient[:3], other.gradient[:3])
    assert not torch.equal(together.gradient[3:], other.gradient[3:])


def test_gradients_that_are_not_finite_come_back_as_zero():
    class Edge(nn.Module):
        def forward(self, x):
            root = x.relu().sqrt()  # infinite slope at 0
            return torch.stack([root[:, 0] * 0 + x[:, 1], root[:, 2]], 1)

    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])
    answer = Oracle(Edge()).gradient(x, torch.zeros(3, dtype=torch.int64), margin)
    assert answer.gradient.tolist() == [[0.0, -1.0, 0.5], [0.0, -1.0, 0.0], [0.0, -1.0, 0.5]]


@pytest.mark.parametrize("cut", [torch.Tensor.detach, lambda z: 0 * z, lambda z: z.sign()])
def test_a_model_without_gradient_answers_zero(cut):
    model = Net(lambda net, x: cut(net.layer(x)), layer=nn.Linear(3, 2))
    answer = Oracle(model).gradient(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64), cross_entropy)
    assert answer.gradient.shape == (4, 3)
    assert answer.gradient.abs().max() == 0


def test_a_model_that_ignores_its_input_answers_zero():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, x):
            return self.bias.expand(len(x), 2)

    answer = Oracle(Constant()).gradient(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64), cross_entropy)
    assert answer.gradient.abs().max() == 0


def test_a_model_may_change_its_input_in_place():
    """As a normalisation `x -= mean` does."""
    model = nn.Linear(3, 2)
    inplace = Net(lambda net, x: net.layer(x.sub_(0.5)), layer=model)
    x, y = torch.rand(4, 3), torch.zeros(4, dtype=torch.int64)
    before = x.clone()
    answer = Oracle(inplace).gradient(x, y, cross_entropy)
    torch.testing.assert_close(answer.gradient, Oracle(model).gradient(x - 0.5, y, cross_entropy).gradient)
    torch.testing.assert_close(Oracle(inplace).logits(x), model(x - 0.5).detach())
    assert torch.equal(x, before)


def test_inputs_of_another_precision_are_converted():
    torch.manual_seed(0)
    x, y = batch()
    model = convnet().eval()
    answer = Oracle(model).gradient(x.double(), y, cross_entropy)
    assert answer.gradient.dtype == torch.float64
    torch.testing.assert_close(answer.logits, model(x).detach())
    answer = Oracle(copy.deepcopy(model).double()).gradient(x, y, cross_entropy)
    assert answer.gradient.dtype == torch.float32


@pytest.mark.parametrize("make", [Oracle, lambda model: Oracle.fast(model, batch()[0])])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_gradient_mode(make, mode):
    torch.manual_seed(0)
    x, y = batch()
    model = learn(convnet(), x, y)
    truth = make(model).gradient(x, y, cross_entropy)
    with mode():
        answer = make(model).gradient(x.clone(), y.clone(), cross_entropy)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(answer.gradient, truth.gradient, rtol=0, atol=0)


def test_answers_can_be_indexed():
    torch.manual_seed(0)
    x, y = batch()
    answer = Oracle(convnet()).gradient(x, y, cross_entropy)
    rows = torch.tensor([4, 1])
    assert torch.equal(answer[rows].gradient, answer.gradient[rows])
    assert torch.equal(answer[rows].loss, answer.loss[rows])
    assert torch.equal(answer[rows].logits, answer.logits[rows])


# What the model may be


class Compiled(nn.Module):
    """What torch.compile returns."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


class Fabric(nn.Module):
    """What Lightning Fabric's setup returns."""

    def __init__(self, model):
        super().__init__()
        self._forward_module, self.module = Compiled(model), model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        Compiled,
        nn.DataParallel,
        Fabric,
        lambda model: nn.DataParallel(Compiled(model)),
        lambda model: Compiled(nn.DataParallel(Compiled(model))),
    ],
)
def test_wrappers_are_taken_off(wrap):
    model = convnet()
    assert unwrapped(wrap(model)) is model
    assert torch.equal(Oracle(wrap(model)).logits(batch()[0]), plain(model, batch()[0]))


@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_without_running_statistics_is_refused(affine):
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.BatchNorm1d(4, affine, track_running_stats=False))
    for make in (Oracle, lambda model: Oracle.fast(model, batch()[0])):
        with pytest.raises(ValueError, match=r"layer '2' \(BatchNorm1d\) has no running statistics"):
            make(model)


def test_what_is_no_model(untyped):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        Oracle(lambda x: x)


def test_a_model_that_cannot_be_copied():
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("never")

    with pytest.raises(TypeError, match=r"model cannot be copied: RuntimeError: never"):
        Oracle(Stubborn(3, 2))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda z: z[:, 0], r"\(6,\)"),
        (lambda z: z[:3], r"\(3, 4\)"),
        (lambda z: z[:, :1], r"\(6, 1\)"),
        (lambda z: z[..., None], r"\(6, 4, 1\)"),
        (lambda z: (z, z), "tuple"),
    ],
)
def test_an_answer_that_is_not_logits(change, got):
    model = Net(lambda net, x: change(net.layer(x.flatten(1))), layer=nn.Linear(72, 4))
    x, y = batch()
    sentence = rf"model must return logits of shape \(6, classes ≥ 2\), got {got}"
    with pytest.raises(ValueError, match=sentence):
        Oracle(model).logits(x)
    with pytest.raises(ValueError, match=sentence):
        Oracle(model).gradient(x, y, cross_entropy)


def test_inputs_the_model_does_not_take():
    with pytest.raises(ValueError, match=r"the model fails on x of shape \(6, 3, 6, 6\): .*channels"):
        Oracle(convnet()).logits(batch(shape=(3, 6, 6))[0])


@pytest.mark.parametrize("loss", [lambda z, y: z.sum(), lambda z, y: z])
def test_a_loss_must_return_one_value_an_example(loss):
    x, y = batch()
    with pytest.raises(ValueError, match=r"loss must return one value an example \(6,\), got"):
        Oracle(convnet()).gradient(x, y, loss)


# Nothing happens to the model


def test_a_shadow_shares_parameters_and_nothing_else():
    torch.manual_seed(0)
    x, y = batch()
    model = convnet()
    oracle = Oracle(model)
    before = oracle.logits(x)
    learn(model, x, y)
    model.eval()
    stale = copy.deepcopy(convnet())
    stale.load_state_dict(dict(model.named_parameters()), strict=False)  # its BatchNorm buffers are those of the start
    assert torch.equal(oracle.logits(x), stale.eval()(x).detach())
    assert not torch.equal(oracle.logits(x), before)
    oracle.refresh()
    assert torch.equal(oracle.logits(x), model(x).detach())
    assert not torch.equal(model(x), stale(x))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("traceable", [True, False])
def test_a_fast_oracle_shares_nothing_with_the_learner(precision, traceable):
    torch.manual_seed(0)
    x, y = batch()
    model = learn(convnet(), x, y)
    if not traceable:
        model = Net(lambda net, x: next(iter(net.body))(x) if x.sum() < 0 else net.body(x), body=model)
    oracle = Oracle.fast(model, x, precision)
    assert oracle.plan.startswith("3 BatchNorm folded" + (", " if traceable else " module by module"))
    learners = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert learners.isdisjoint(t.data_ptr() for t in (*oracle._network.parameters(), *oracle._network.buffers()))
    assert not any(parameter.requires_grad for parameter in oracle._network.parameters())
    before = oracle.logits(x)
    learn(model, x, y)
    assert torch.equal(oracle.logits(x), before)
    oracle.refresh()
    assert close(oracle.logits(x), plain(model, x), 1e-4 if precision == "float32" else 0.05)
    assert not close(oracle.logits(x), before, 1e-2)


@pytest.mark.parametrize("make", [Oracle, lambda model: Oracle.fast(model, batch()[0])])
def test_the_model_is_left_as_found(make):
    torch.manual_seed(0)
    x, y = batch()
    model = learn(convnet(), x, y)
    model[1].eval()
    model[4].weight.requires_grad_(False)
    model[4].weight.grad = None
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: seen.append(module))
    flags = [(module.training, type(module)) for module in model.modules()]
    tensors = [(p, p.clone(), p.requires_grad, p._version, p.stride()) for p in (*model.parameters(), *model.buffers())]
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    random = torch.get_rng_state()
    oracle = make(model)
    oracle.gradient(x, y, cross_entropy)
    oracle.logits(x)
    oracle.refresh()
    assert flags == [(module.training, type(module)) for module in model.modules()]
    for now, (tensor, value, requires_grad, version, stride) in zip(
        (*model.parameters(), *model.buffers()), tensors, strict=True
    ):
        assert now is tensor
        assert torch.equal(now, value)
        assert (now.requires_grad, now._version, now.stride()) == (requires_grad, version, stride)
    for parameter, (grad, value) in zip(model.parameters(), grads, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)
    assert torch.equal(torch.get_rng_state(), random)
    assert not set(seen) & set(model.modules())


def test_private_randomness():
    oracle = Oracle(nn.Linear(2, 2))
    state = torch.get_rng_state()
    draws = []
    for seed in (3, 3, 4, -1, 2**70):
        with oracle.private_randomness(seed):
            draws.append(float(torch.rand(())))
        assert torch.equal(torch.get_rng_state(), state)
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(KeyError), oracle.private_randomness(0):
        raise KeyError(float(torch.rand(())))
    assert torch.equal(torch.get_rng_state(), state)


# Folding


def pairs(model):
    return set(fold(copy.deepcopy(model).eval()).pairs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_folding_a_plain_network(bias, affine, inplace):
    torch.manual_seed(0)
    x, y = batch()
    model = convnet(bias=bias, affine=affine, inplace=inplace)
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
    graph = fold(convnet().eval()).network.graph
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
    assert oracle.plan.startswith("unfolded (folding changes logits" if build is tied else "0 BatchNorm folded")
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


def data_dependent(net, x):
    return net.body(x) if x.mean() > 0 else -net.body(x)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_untraceable_model_is_folded_module_by_module(precision):
    torch.manual_seed(0)
    x, y = batch()
    model = Net(data_dependent, body=convnet())
    oracle = Oracle.fast(model, x, precision)
    reason = "TraceError: symbolically traced variables cannot be used as inputs to control flow"
    assert oracle.plan == f"3 BatchNorm folded module by module ({reason}), channels last, {precision}"
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
    assert oracle.plan.endswith(precision)
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


# Lower precision


def test_bf16():
    torch.manual_seed(0)
    x, y = batch()
    model = convnet()
    oracle = Oracle.fast(model, x, "bf16")
    assert oracle.plan == "3 BatchNorm folded, channels last, bf16"
    for _ in range(3):
        learn(model, x, y)
        oracle.refresh()
        answer, truth = (o.gradient(x, y, cross_entropy) for o in (oracle, Oracle(model)))
        assert {answer.gradient.dtype, answer.loss.dtype, answer.logits.dtype} == {torch.float32}
        assert close(answer.logits, truth.logits, 0.05)
        assert not torch.equal(answer.logits, truth.logits)
        similarity = F.cosine_similarity(answer.gradient.flatten(1), truth.gradient.flatten(1))
        assert similarity.min() > 0.95


def test_bf16_is_refused_where_it_changes_the_answers():
    """A difference of large numbers, which bf16 rounds away."""
    model = Net(lambda net, x: net.layer(x.flatten(1)) + 300 - 300, layer=nn.Linear(72, 4))
    x, _ = batch()
    oracle = Oracle.fast(model, x, "bf16")
    assert oracle.plan.startswith("0 BatchNorm folded, float32 (bf16 changes logits by ")
    assert close(oracle.logits(x), plain(model, x), 1e-6)


def test_bf16_is_refused_where_the_network_does_not_compute_in_it():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.fixed = nn.Linear(72, 4), torch.eye(4)

        def forward(self, x):
            return data_dependent(self, x)

        def body(self, x):
            return self.layer(x.flatten(1)) @ self.fixed

    x, y = batch()
    model = Fixed()
    oracle = Oracle.fast(model, x, "bf16")
    assert oracle.plan.startswith("unfolded")
    assert "float32 (the model fails" in oracle.plan
    learn(model, x, y)
    oracle.refresh()
    assert close(oracle.logits(x), plain(model, x), 1e-6)


def test_unknown_precision(untyped):
    with pytest.raises(ValueError, match=r"unknown precision 'bf-16'; did you mean 'bf16'\?"):
        Oracle.fast(convnet(), batch()[0], "bf-16")


def test_the_network_is_asked_once_a_call():
    calls = Counter()

    class Counting(nn.Linear):
        def forward(self, x):
            calls[len(x)] += 1
            return super().forward(x)

    oracle = Oracle(Counting(3, 2))
    oracle.gradient(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64), cross_entropy)
    assert calls == {4: 1}
    oracle.logits(torch.rand(5, 3))
    assert calls == {4: 1, 5: 1}


# Memory


class Cramped(nn.Module):
    """A network whose memory holds so many examples at a time."""

    def __init__(self, room, error):
        super().__init__()
        self.network, self.room, self.error, self.sizes = convnet().eval(), room, error, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise self.error
        return self.network(x)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 bytes")],
)
def test_what_does_not_fit_into_memory_is_asked_in_parts(error, caplog):
    x, y = batch(11)
    model = Cramped(3, error)
    whole, oracle = Oracle(model.network), Oracle(model)
    with caplog.at_level("WARNING", logger="innermax.oracle"):
        torch.testing.assert_close(oracle.logits(x), whole.logits(x))
    assert [record.getMessage() for record in caplog.records] == [
        "11 examples do not fit into memory: the network sees 6 at a time",
        "6 examples do not fit into memory: the network sees 3 at a time",
    ]
    assert oracle.micro_batch == 3
    for mine, theirs in zip(
        vars(oracle.gradient(x, y, cross_entropy)).values(),
        vars(whole.gradient(x, y, cross_entropy)).values(),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    assert len(caplog.records) == 2, "what is known is not tried again"
    with pytest.raises(RuntimeError, match="memory"):
        Oracle(Cramped(0, error)).logits(x)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    model = Cramped(3, RuntimeError("something else"))
    with pytest.raises(ValueError, match="something else"):
        Oracle(model).logits(batch(11)[0])


def test_an_oracle_in_float32_is_its_own_precise_one():
    oracle = Oracle.fast(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(2, 1, 2, 2), "float32")
    assert oracle.precise is oracle


def test_the_precise_oracle_learns_with_the_other():
    torch.manual_seed(0)
    x = torch.rand(4, 1, 2, 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    oracle = Oracle.fast(model, x, "bf16")
    with torch.no_grad():
        model[1].weight.mul_(-2)
    oracle.refresh()
    assert torch.allclose(oracle.precise.logits(x), model(x).detach(), atol=1e-6)
