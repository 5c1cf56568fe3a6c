"""What an update computes in, and what it leaves as it is: the images."""

import contextlib
import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import innermax as im
from innermax.training.arithmetic import Arithmetic, choose_arithmetic
from tests.helpers.oracles import Net, batch

CPU = torch.device("cpu")


class Scaled(nn.Module):
    """A normalisation whose numbers are parameters that do not learn."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.full((1, 2, 1, 1), 0.4), requires_grad=False)

    def forward(self, x):
        return (x - self.mean) / 0.25


NORMALIZATIONS = {
    "none": nn.Identity,
    "parameters": Scaled,
    "keywords": lambda: Net(lambda net, x: net.inner(x=x), inner=Scaled()),
    "batch": lambda: nn.BatchNorm2d(2, momentum=0.0),
    "group": lambda: nn.GroupNorm(2, 2),
}


class Spied(nn.Module):
    """Shows what its first layer is given, and puts out, in an update."""

    def __init__(self, seen, normalize):
        super().__init__()
        self.normalize, self.first, self.head, self.seen = normalize, nn.Conv2d(2, 4, 3), nn.Linear(64, 4), seen

    def forward(self, x):
        x = self.normalize(x)
        z = self.first(input=x)
        if self.training:
            self.seen.append((x.detach().clone(), z.detach().clone()))
        return self.head(z.flatten(1))


@pytest.mark.parametrize("normalize", NORMALIZATIONS.values(), ids=NORMALIZATIONS)
def test_small_perturbations_arrive_in_an_update(normalize):
    torch.manual_seed(0)
    seen, (x, y) = [], batch(16)
    model = Spied(seen, normalize())
    before = copy.deepcopy(model.first)
    attack = im.PGD(im.Linf(0.2 / 255), steps=2)
    im.train(model, (x, y), im.Standard(attack), epochs=1, batch_size=16, precision="bf16", progress=False)
    x_adv, answer = seen[0]
    assert x_adv.dtype == torch.float32
    assert answer.dtype == torch.bfloat16
    exact = before(x_adv)
    assert (answer.float() - exact).abs().max() < 1.01 * (exact.bfloat16().float() - exact).abs().max()
    assert not model.first._forward_hooks
    assert not model.first._forward_pre_hooks


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_what_bf16_lacks_is_computed_in_float32(precision, caplog):
    def lacking(net, x):
        z = net.first(x)
        if z.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return net.head(z.flatten(1))

    torch.manual_seed(0)
    x, y = batch(16)
    model = Net(lacking, first=nn.Conv2d(2, 4, 3), head=nn.Linear(64, 4))
    found = choose_arithmetic(model, x, precision, CPU)
    assert found == Arithmetic(channels_last=True)
    assert ("updates compute in float32 (RuntimeError: not implemented" in caplog.text) == (precision == "bf16")
    im.train(model, (x, y), im.Unsecured(), epochs=1, precision=precision, progress=False)


def test_what_needs_the_usual_order_gets_it(caplog):
    def ordered(net, x):
        z = net.first(x)
        return net.head(z.view(len(z), -1))

    torch.manual_seed(0)
    x, y = batch(16)
    model = Net(ordered, first=nn.Conv2d(2, 4, 3), head=nn.Linear(64, 4))
    assert choose_arithmetic(model, x, "float32", CPU) == Arithmetic()
    assert "updates compute in channels-first order (RuntimeError: view size" in caplog.text
    im.train(model, (x, y), im.Standard(im.PGD(im.Linf(0.1), steps=2)), epochs=1, progress=False)


def test_what_a_network_collects_in_training_is_of_the_batches_it_learns_from():
    """Also where its copies share what they collect into."""
    seen, (x, y) = [], batch(16)

    def forward(net, x):
        if net.training:
            seen.append(len(x))
        return net.head(x.flatten(1))

    model = Net(forward, head=nn.Linear(72, 4))
    im.train(model, (x, y), im.Standard(im.PGD(im.Linf(0.1), steps=2)), epochs=1, batch_size=8, progress=False)
    assert seen == [8, 8]


@pytest.mark.parametrize("common", [0, 1000])
def test_logits_that_bf16_takes_for_equal_are_computed_in_float32(common, caplog):
    """What they have in common, softmax ignores, and bf16 has no digits left for the rest."""
    torch.manual_seed(0)
    x, _ = batch(16)
    model = Net(lambda net, x: net.body(x) + common, body=nn.Sequential(nn.Flatten(), nn.Linear(72, 4)))
    assert choose_arithmetic(model, x, "bf16", CPU).bf16 == (common == 0)
    assert ("bf16 changes logits, less what they have in common, by" in caplog.text) == (common == 1000)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_complex_parameters(optimizer):
    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 6, 4, dtype=torch.complex64))
            self.head = nn.Linear(48, 4)

        def forward(self, x):
            return self.head((torch.fft.rfft2(x) * self.weight).abs().flatten(1))

    torch.manual_seed(0)
    x, y = batch(16)
    model, attack = Waves(), im.PGD(im.Linf(0.1), steps=2)
    before = model.weight.detach().clone()
    for precision in ("float32", "bf16"):
        im.train(model, (x, y), im.Standard(attack), epochs=2, optimizer=optimizer, precision=precision, progress=False)
    assert not torch.equal(before, model.weight)
    im.evaluate(model, (x, y), {"pgd": attack}, audit=False)


def test_double_precision():
    torch.manual_seed(0)
    x, y = batch(16)
    model, attack = nn.Sequential(nn.Flatten(), nn.Linear(72, 4)).double(), im.PGD(im.Linf(0.1), steps=3)
    run = im.train(model, (x, y), im.Standard(attack), epochs=2, progress=False)
    assert model[1].weight.dtype == torch.float64
    assert run.history[-1]["attack_network"].endswith("float64")
    found = im.evaluate(model, (x, y), {"pgd": attack, "aa": im.AutoAttack(im.Linf(0.1))}, audit=False)
    again = im.evaluate(copy.deepcopy(model).float(), (x, y), {"pgd": attack}, audit=False)
    assert found.accuracy["pgd"].value == again.accuracy["pgd"].value


@pytest.mark.parametrize("attack", [im.PGD, im.FGSM, im.CW, im.APGD, im.FAB, im.Square, im.GuidedPGD, im.AutoAttack])
@pytest.mark.parametrize(("weights", "images"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_attacks_in_double_precision(attack, weights, images):
    torch.manual_seed(0)
    x, y = batch(8)
    options = {"budget": 40} if attack is im.GuidedPGD else {"queries": 20} if attack is im.Square else {}
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4)).to(weights)
    found = attack(im.Linf(0.1), **options)(model, x.to(images), y)
    assert found.x_adv.dtype == torch.float64
    assert found.loss.dtype == torch.float64
    assert (found.x_adv - x).abs().max() <= 0.1 + 1e-6


def test_a_backward_pass_that_bf16_lacks(caplog):
    class Lacking(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            if gradient.dtype == torch.bfloat16:
                raise RuntimeError("backward not implemented for 'BFloat16'")
            return gradient

    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.head(Lacking.apply(net.first(x)).flatten(1)), first=nn.Conv2d(2, 4, 3), head=nn.Linear(64, 4)
    )
    assert not choose_arithmetic(model, batch(4)[0], "bf16", CPU).bf16
    assert "updates compute in float32 (RuntimeError: backward not implemented" in caplog.text


def test_a_layer_that_fails_leaves_autocast_as_it_was():
    model = nn.Sequential(nn.Flatten(), nn.Linear(71, 4))
    arithmetic = Arithmetic(bf16=True, image_layers=("0", "1"))
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError), arithmetic.keep_images(model, "cpu"):
            model(batch(4)[0])
        assert torch.is_autocast_enabled("cpu")
    assert not model[1]._forward_pre_hooks


def test_an_interrupt_within_a_layer_leaves_autocast_as_it_was():
    def interrupted(_net, _x):
        raise KeyboardInterrupt

    model, x = Net(interrupted), torch.rand(2, 6)
    with pytest.raises(KeyboardInterrupt), Arithmetic(bf16=True, image_layers=("",)).keep_images(model, "cpu"):
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Linear(6, 4)(x).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert torch.autocast_increment_nesting() == 1
    torch.autocast_decrement_nesting()


@pytest.mark.parametrize("how", ["itself", "checkpointed", "parametrized", "aligned"])
def test_networks_that_keep_bf16(how, caplog):
    seen, (x, y) = [], batch(16)

    def forward(net, x):
        if how == "itself" and net.training and not net.inside:
            net.inside = True
            net(x)
            net.inside = False
        first = (
            partial(checkpoint, net.first, use_reentrant=False) if how == "checkpointed" and net.training else net.first
        )
        z = net.second(first(x))
        seen.append((net.training, z.dtype))
        return net.head(z.flatten(1))

    torch.manual_seed(0)
    model = Net(forward, first=nn.Conv2d(2, 4, 3), second=nn.Conv2d(4, 4, 1), head=nn.Linear(64, 4))
    model.inside = False
    if how == "parametrized":
        nn.utils.parametrizations.weight_norm(model.first)
    objective = im.GradAlign() if how == "aligned" else "cross_entropy"
    options = {"objective": objective, "epochs": 1, "batch_size": 8, "precision": "bf16", "progress": False}
    im.train(model, (x, y), im.Standard(im.PGD(im.Linf(0.1), steps=2)), **options)
    assert "updates compute" not in caplog.text
    kinds = {dtype for training, dtype in seen if training}
    # The second derivative of a rounded network would be noise.
    assert kinds == ({torch.bfloat16, torch.float32} if how == "aligned" else {torch.bfloat16})


@pytest.mark.parametrize("interrupts", [False, True])
def test_a_network_comes_back_in_the_order_it_had(interrupts, tmp_path):
    """safetensors refuses to save another order."""

    def stop(*_):
        if interrupts:
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 4))
    model[1].to(memory_format=torch.channels_last)
    before, run = [p.stride() for p in model.parameters()], None
    with pytest.raises(KeyboardInterrupt) if interrupts else contextlib.nullcontext():
        run = im.train(model, batch(16), im.Standard(im.FGSM(im.Linf(0.1))), epochs=1, ema=0.9, progress=stop)
    assert [p.stride() for p in model.parameters()] == before
    if run is not None:
        assert run.model is not model
        assert all(p.is_contiguous() for p in run.model.parameters())


def test_tensors_that_share_their_memory_keep_their_order(caplog):
    model = Net(
        lambda net, x: net.head(net.back(net.there(x)).flatten(1)),
        there=nn.Conv2d(2, 4, 3), back=nn.ConvTranspose2d(4, 2, 3), head=nn.Linear(72, 4),
    )  # fmt: skip
    model.back.weight.data = model.there.weight.data
    im.train(model, batch(16), im.Standard(im.FGSM(im.Linf(0.1))), epochs=1, progress=False)
    assert (
        "updates compute in channels-first order (RuntimeError: two of its tensors share their memory)" in caplog.text
    )
    assert model.back.weight.data_ptr() == model.there.weight.data_ptr()


@pytest.mark.parametrize(("channels", "suits"), [(1, False), (3, False), (7, False), (16, True)])
def test_strided_pointwise_convolutions_of_few_channels_get_the_usual_order(channels, suits, caplog):
    """In channels-last order oneDNN writes past a buffer as it computes their weights' gradient, and may crash."""
    network = nn.Sequential(nn.Conv2d(channels, 48, 1, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    x = torch.rand(8, channels, 64, 64)
    network(x)
    found = choose_arithmetic(network, x, "float32", torch.device("cpu"))
    assert found.channels_last == suits
    assert (
        "updates compute in channels-first order (RuntimeError: oneDNN corrupts memory in 0," in caplog.text
    ) != suits
    run = im.train(network, (x, torch.arange(8) % 4), im.Standard(im.FGSM(im.Linf(0.1))), epochs=2, progress=False)
    assert run.history[-1]["loss"] < 10


def test_a_network_in_parts_keeps_its_order():
    x, _ = batch(4)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    assert choose_arithmetic(model, x, "float32", CPU).channels_last
    assert not choose_arithmetic(model, x, "float32", CPU, sharded=True).channels_last
