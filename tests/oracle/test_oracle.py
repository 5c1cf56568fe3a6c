"""The network as the attacker sees it: the model's own numbers, without a trace on the model."""

import copy
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from innermax.losses import LOSSES, cross_entropy, margin
from innermax.models.wrappers import unwrap
from innermax.oracle.oracle import Oracle
from tests.helpers.oracles import Net, batch, close, data_dependent, learn, plain, small_vgg


@pytest.mark.parametrize("loss", LOSSES.values())
@pytest.mark.parametrize("training", [True, False])
def test_the_oracle_answers_what_autograd_says_of_the_model_in_evaluation_mode(loss, training):
    torch.manual_seed(0)
    x, y = batch()
    model = learn(small_vgg(), x, y).train(training)
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
    oracle = make(learn(small_vgg(), x, y))
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
    model = small_vgg().eval()
    answer = Oracle(model).gradient(x.double(), y, cross_entropy)
    assert answer.gradient.dtype == torch.float64
    torch.testing.assert_close(answer.logits, model(x).detach().double())
    answer = Oracle(copy.deepcopy(model).double()).gradient(x, y, cross_entropy)
    assert (answer.gradient.dtype, answer.logits.dtype, answer.loss.dtype) == (torch.float32, *[torch.float64] * 2)


@pytest.mark.parametrize("make", [Oracle, lambda model: Oracle.fast(model, batch()[0])])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_gradient_mode(make, mode):
    torch.manual_seed(0)
    x, y = batch()
    model = learn(small_vgg(), x, y)
    truth = make(model).gradient(x, y, cross_entropy)
    with mode():
        answer = make(model).gradient(x.clone(), y.clone(), cross_entropy)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(answer.gradient, truth.gradient, rtol=0, atol=0)


def test_answers_can_be_indexed():
    torch.manual_seed(0)
    x, y = batch()
    answer = Oracle(small_vgg()).gradient(x, y, cross_entropy)
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
    model = small_vgg()
    assert unwrap(wrap(model)) is model
    assert torch.equal(Oracle(wrap(model)).logits(batch()[0]), plain(model, batch()[0]))


@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_without_running_statistics_is_refused(affine):
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.BatchNorm1d(4, affine=affine, track_running_stats=False))
    oracle = Oracle(model)
    for ask in (oracle.logits, oracle.logits, lambda x: Oracle.fast(model, x), lambda x: Oracle.fast(model, x[:1])):
        with pytest.raises(ValueError, match=r"layer '2' \(BatchNorm1d\) has no running statistics"):
            ask(batch()[0])


class EachByItself(nn.BatchNorm2d):
    """Standardises every channel of every image by its own mean and variance."""

    def __init__(self):
        super().__init__(1, affine=False, track_running_stats=False)

    def forward(self, x):
        return super().forward(x.reshape(1, -1, *x.shape[2:])).reshape(x.shape)


def test_batchnorm_that_mixes_no_examples_is_taken():
    x, y = batch()
    model = nn.Sequential(nn.Conv2d(2, 3, 3), EachByItself(), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    for oracle in (Oracle(model), Oracle.fast(model, x, "float32")):
        assert close(oracle.logits(x), plain(model, x), 1e-5)
        assert close(oracle.gradient(x[:2], y[:2], margin).gradient, Oracle(model).gradient(x, y, margin).gradient[:2])


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
        (lambda z: (z, z), r"tuple; take innermax.LogitsOnly\(model, output=0\)"),
        (lambda z: {"hidden": z, "logits": z}, r"dict; .*output='logits'"),
        (lambda z: {"loss": None, "output": z}, r"dict; .*output='output'"),
        (lambda z: SimpleNamespace(logits=z), r"SimpleNamespace; .*output='logits'"),
        (lambda z: None, "NoneType$"),
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
        Oracle(small_vgg()).logits(batch(shape=(3, 6, 6))[0])


@pytest.mark.parametrize("loss", [lambda z, y: z.sum(), lambda z, y: z])
def test_a_loss_must_return_one_value_an_example(loss):
    x, y = batch()
    with pytest.raises(ValueError, match=r"loss must return one value an example \(6,\), got"):
        Oracle(small_vgg()).gradient(x, y, loss)


# Nothing happens to the model


def test_a_shadow_shares_parameters_and_nothing_else():
    torch.manual_seed(0)
    x, y = batch()
    model = small_vgg()
    oracle = Oracle(model)
    before = oracle.logits(x)
    learn(model, x, y)
    model.eval()
    stale = copy.deepcopy(small_vgg())
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
    model = learn(small_vgg(), x, y)
    if not traceable:
        model = Net(lambda net, x: next(iter(net.body))(x) if x.sum() < 0 else net.body(x), body=model)
    oracle = Oracle.fast(model, x, precision)
    assert oracle.plan.startswith("3 BatchNorm folded" + (", " if traceable else " module by module"))
    learners = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    tensors = [*oracle._compiled.network.parameters(), *oracle._compiled.network.buffers()]
    assert learners.isdisjoint(t.data_ptr() for t in tensors)
    assert not any(tensor.requires_grad for tensor in tensors)
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
    model = learn(small_vgg(), x, y)
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


# Lower precision


def test_bf16():
    torch.manual_seed(0)
    x, y = batch()
    model = small_vgg()
    oracle = Oracle.fast(model, x, "bf16")
    assert oracle.scheme == "3 BatchNorm folded, channels last, bf16"
    assert re.search(r"bf16 \(mean cosine of the gradients 0\.\d\d\d\)$", oracle.plan)
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
    assert "float32 (RuntimeError: expected m1 and m2 to have the same dtype" in oracle.plan
    learn(model, x, y)
    oracle.refresh()
    assert close(oracle.logits(x), plain(model, x), 1e-6)


def test_unknown_precision(untyped):
    with pytest.raises(ValueError, match=r"unknown precision 'bf-16'; did you mean 'bf16'\?"):
        Oracle.fast(small_vgg(), batch()[0], "bf-16")


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
        self.network, self.room, self.error, self.sizes = small_vgg().eval(), room, error, []

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
