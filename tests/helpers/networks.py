"""Networks that many tests use."""

import torch
import torch.nn.functional as F
from torch import nn


def mlp(dtype=torch.float64, inputs=6, classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes)).to(
        dtype
    )


def convnet(seed=0):
    """With dropout, and BatchNorm whose statistics are not those of a new one."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(36, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    for _ in range(5):
        model(torch.rand(8, 2, 5, 5))
    return model


class Log:
    """What passed through a network; copies of the network write into the same one."""

    def __init__(self):
        self.inputs, self.gradients, self.modules = [], 0, []

    def __deepcopy__(self, memo):
        return self

    @property
    def rows(self):
        return [len(x) for x in self.inputs]


class Logged(nn.Module):
    """A model that writes down each batch that it, or a copy of it, is asked about, and each gradient."""

    def __init__(self, model):
        super().__init__()
        self.model, self.log = model, Log()

    def forward(self, x):
        self.log.inputs.append(x.detach().clone())
        self.log.modules.append(self)
        if x.requires_grad:
            x.register_hook(self._backward)
        return self.model(x)

    def _backward(self, gradient):
        self.log.gradients += len(gradient)


class Wrapped(nn.Module):
    def __init__(self, forward, model):
        super().__init__()
        self.model, self._own = model, forward

    def forward(self, x):
        return self._own(self.model, x)


def half_trained():
    """In training mode but for one frozen BatchNorm, with some gradients and some frozen parameters."""
    model = convnet().train()
    F.cross_entropy(model(torch.rand(8, 2, 5, 5)), torch.arange(8) % 3).backward()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].weight.grad = None
    return model


class Noisy(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x + 0.01 * torch.randn_like(x))


def snapshot(model):
    """Everything about a model that an attack might touch."""
    return {
        "flags": [(name, module.training) for name, module in model.named_modules()],
        "tensors": {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())},
        "identities": [id(value) for value in (*model.parameters(), *model.buffers())],
        "versions": [value._version for value in (*model.parameters(), *model.buffers())],
        "strides": [value.stride() for value in model.parameters()],
        "requires_grad": [value.requires_grad for value in model.parameters()],
        "grads": [None if value.grad is None else value.grad.clone() for value in model.parameters()],
        "grad identities": [id(value.grad) for value in model.parameters()],
        "random": torch.get_rng_state(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class EachByItself(nn.Module):
    """BatchNorm's function over every channel of every image, or over the batch."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def forward(self, x):
        given = x if self.batch else x.reshape(1, -1, *x.shape[2:])
        return nn.functional.batch_norm(given, None, None, training=True).reshape(x.shape)
