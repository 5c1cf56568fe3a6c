"""Copies of models that `copy.deepcopy` cannot copy, or would tie to the original."""

import copy
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import innermax as im
from innermax.evaluation.arguments import place_model
from innermax.losses import cross_entropy
from innermax.oracle.oracle import Oracle
from innermax.utils.copying import copy_model


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


class Holder:
    """What users keep beside their layers."""

    def __init__(self, **values):
        vars(self).update(values)


class Slotted:
    __slots__ = ("lock",)

    def __init__(self):
        self.lock = threading.Lock()


class Model(nn.Module):
    """A network with attributes of any kind."""

    def __init__(self, **values):
        super().__init__()
        self.network = network()
        for name, value in values.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.network(x)


class Cached(Model):
    """Keeps what its last pass computed, with its graph."""

    def forward(self, x):
        logits = self.network(x)
        self.last, self.seen = logits, {"by layer": [self.network[0](x), logits]}
        return logits


class Drawing(Model):
    """Draws from a generator of its own."""

    def __init__(self):
        super().__init__(generator=torch.Generator().manual_seed(3))

    def forward(self, x):
        return self.network(x + 0.1 * torch.rand(x.shape, generator=self.generator))


class Guarded(Model):
    """Computes under a lock."""

    def __init__(self):
        super().__init__(lock=threading.Lock())

    def forward(self, x):
        with self.lock:
            return self.network(x)


def hooked():
    model = network()
    model[0].register_forward_hook(lambda module, args, output: output + module.bias.sum())
    model[4].register_forward_pre_hook(partial(lambda scale, module, args: (scale * args[0],), 0.5))
    return model


def cached():
    model = Cached()
    model(torch.rand(2, 1, 6, 6))
    return model


def normalised(method):
    model = network()
    method(model[0])
    return model


def unregistered():
    """Modules in a list, one with a lock: they are no sub-modules."""
    inner = nn.Linear(3, 3)
    inner.lock = threading.Lock()
    return Model(helpers=[inner, nn.Linear(3, 3)])


AWKWARD = {
    "lock": Guarded,
    "lock in an object": lambda: Model(holder=Holder(numbers=[1, 2], lock=threading.RLock())),
    "lock in a slot": lambda: Model(holder={"by name": (Slotted(),)}),
    "method of what holds a lock": lambda: Model(call=Holder(lock=threading.Lock()).__repr__),
    "modules in a list": unregistered,
    "generator": Drawing,
    "kept graph": cached,
    "hooked weight_norm": lambda: normalised(nn.utils.weight_norm),
    "weight_norm": lambda: normalised(parametrizations.weight_norm),
    "spectral_norm": lambda: normalised(parametrizations.spectral_norm),
    "hooks": hooked,
}


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm")
@pytest.mark.parametrize("build", AWKWARD.values(), ids=AWKWARD)
def test_a_copy_computes_the_same_and_learns_apart(build):
    model, x = build(), torch.rand(5, 1, 6, 6)
    twin = copy_model(model)
    model.eval(), twin.eval()
    assert type(twin) is type(model)
    assert torch.equal(twin(x), model(x))
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert own.isdisjoint(tensor.data_ptr() for tensor in (*twin.parameters(), *twin.buffers()))
    before = model(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    if not isinstance(model, Drawing):
        assert torch.equal(model(x), before)
        assert not torch.equal(twin(x), before)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm")
@pytest.mark.parametrize("build", AWKWARD.values(), ids=AWKWARD)
def test_every_user_of_copies_takes_them(build, tmp_path):
    model, (x, y) = build().eval(), (torch.rand(20, 1, 6, 6), torch.arange(20) % 3)
    evaluation = im.evaluate(model, (x, y), {"fgsm": im.FGSM(im.Linf(0.1))})
    assert evaluation.accuracy.keys() == {"clean", "fgsm"}
    Oracle.fast(model, x, "bf16").gradient(x, y, cross_entropy)
    moved, _ = place_model(model, im.ImageSet(x, y), "meta")
    assert next(moved.parameters()).is_meta
    assert not next(model.parameters()).is_meta
    if not isinstance(model, Drawing | Guarded | Cached):  # which torch itself cannot export
        im.export_model(model, tmp_path / "model.pt2", input_shape=(1, 6, 6))


def test_a_model_that_draws_goes_on_as_if_it_had_not_been_copied():
    model, fresh, x = Drawing().eval(), Drawing().eval(), torch.rand(5, 1, 6, 6)
    copy_model(model)(x)
    assert torch.equal(model(x), fresh(x))


def test_what_can_be_copied_is_and_what_cannot_is_shared():
    lock = threading.Lock()
    holder = Holder(numbers=[1, 2], lock=lock)
    model = Model(holder=holder, again=holder, plain=[3])
    twin = copy_model(model)
    assert twin.holder is not holder
    assert twin.again is twin.holder
    assert twin.holder.lock is lock
    twin.holder.numbers.append(3)
    twin.plain.append(4)
    assert (holder.numbers, model.plain) == ([1, 2], [3])


def test_modules_in_a_list_are_copied_too():
    model = unregistered()
    twin = copy_model(model)
    assert twin.helpers[0] is not model.helpers[0]
    assert twin.helpers[0].lock is model.helpers[0].lock


def test_tied_weights_stay_tied_and_modes_stay():
    model = Model(other=nn.Conv2d(1, 4, 3)).train()
    model.other.weight = model.network[0].weight
    model.network[1].eval()
    model.network[4].weight.requires_grad_(False)
    twin = copy_model(model)
    assert twin.other.weight is twin.network[0].weight
    assert [module.training for module in twin.modules()] == [module.training for module in model.modules()]
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]


def test_tensors_can_be_given():
    model = network()
    bias = nn.Parameter(torch.zeros(3))
    twin = copy_model(model, {model[4].bias: bias, model[0].weight: model[0].weight})
    assert twin[4].bias is bias
    assert twin[0].weight is model[0].weight
    assert twin[4].weight is not model[4].weight


def test_a_graph_that_is_kept_twice_is_copied_once():
    model = cached()
    twin = copy_model(model)
    assert twin.last is twin.seen["by layer"][1]
    assert torch.equal(twin.last, model.last)
    assert twin.last.grad_fn is None
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)


class Stubborn(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("never")


class Full(nn.Linear):
    def __deepcopy__(self, memo):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Stubborn(3, 2), TypeError, "model cannot be copied: RuntimeError: never"),
        (lambda: Model(inner=Stubborn(3, 2)), TypeError, "model cannot be copied: RuntimeError: never"),
        (lambda: Model(inner=[Stubborn(3, 2)]), TypeError, "model cannot be copied: RuntimeError: never"),
        (lambda: Model(noise=(n for n in range(3))), TypeError, "model cannot be copied: .*'generator' object"),
        (lambda: Model(inner=Full(3, 2)), torch.OutOfMemoryError, "CUDA out of memory"),
    ],
    ids=["model", "module", "module in a list", "iterator", "no memory"],
)
def test_what_cannot_be_copied_is_said(build, error, words):
    with pytest.raises(error, match=words):
        copy_model(build())


def test_a_model_that_was_made_in_inference_mode():
    with torch.inference_mode():
        model = network()
    x, y = torch.rand(5, 1, 6, 6), torch.arange(5) % 3
    same = network()
    answer, truth = (Oracle(one).gradient(x, y, cross_entropy) for one in (model, same))
    assert torch.equal(answer.gradient, truth.gradient)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)),
            "got '1.weight' of a lazy layer: pass it a batch first",
        ),
        (lambda: network().to("meta"), "got '0.weight' on the meta device: load the weights first"),
    ],
)
def test_a_model_without_weights_is_refused(build, words):
    copy_model(build())
    data = torch.rand(20, 1, 6, 6), torch.arange(20) % 3
    for use in (
        lambda: im.evaluate(build(), data, {}),
        lambda: im.evaluate(build(), data, {}, device="cpu"),
        lambda: im.train(build(), data, im.Unsecured()),
        lambda: im.PGD(im.Linf(0.1))(build(), *data),
    ):
        with pytest.raises(ValueError, match=f"model must have its weights, {words}"):
            use()


@pytest.mark.filterwarnings("ignore")  # torch calls TorchScript deprecated
@pytest.mark.parametrize(("wrapped", "what"), [(True, "model layer '1'"), (False, "model")])
def test_torchscript_is_refused_with_the_way_out(wrapped, what):
    script = torch.jit.script(network())
    model = nn.Sequential(nn.Identity(), script) if wrapped else script
    data, strategy = (torch.rand(20, 1, 6, 6), torch.arange(20) % 3), im.Standard(im.PGD(im.Linf(0.1)))
    for use in (
        lambda: im.evaluate(model, data, {}, device="cpu"),
        lambda: im.train(model, data, strategy, device="cpu"),
        lambda: im.PGD(im.Linf(0.1))(model, *data),
    ):
        with pytest.raises(TypeError, match=f"^{what} must be a module in Python, got TorchScript: .*load_state_dict"):
            use()
    plain = network()
    plain.load_state_dict(script.state_dict())
    assert torch.equal(plain(data[0]), script(data[0]))
