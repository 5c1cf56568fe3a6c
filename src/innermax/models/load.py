"""Models from anywhere: files, the Hub, timm, a function somebody wrote, an exported program."""

import difflib
import importlib
import math
import os
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, export, fx, nn
from torch.fx.graph import CodeGen

from innermax.models.files import load_saved_model
from innermax.models.hub import reach_hub
from innermax.models.neighbors import depends_on_neighbors
from innermax.models.wrappers import Normalize
from innermax.utils.optional import import_library
from innermax.utils.randomness import hash_keys, uniform
from innermax.utils.validation import summarize_error

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def load_model(
    source: str | Path, model: nn.Module | None = None, revision: str | None = None, *, allow_code: bool = False
) -> nn.Module:
    """A model from a file, the Hugging Face Hub, timm, or code; in evaluation mode.

    Args:
        source: a run or model folder or a .safetensors file that innermax wrote; a robust model that comes with
            innermax, such as "innermax/digits-linf-0.15" (`innermax models` lists them); a Hub id such as "user/name",
            or "user/name@revision" with a branch, tag or commit;
            "timm:NAME", timm's pretrained network with the normalisation it was trained with in front. With allow_code
            also "module:function", called without arguments, where the current directory is searched first; or a .pt2
            file that `torch.export.save` wrote.
        model: the network to load weights from a file or the Hub into, if innermax did not build it; changed in place.
        revision: branch, tag or commit on the Hub.
        allow_code: whether loading may run code that comes with the source.

    Raises:
        ValueError: there is no model, it would run code that is not allowed, or it is damaged, of another kind or does
            not fit. Pickle is never loaded.
        TypeError: the function does not return an nn.Module.
    """
    name = str(source)
    if model is not None or Path(name).is_dir():
        return load_saved_model(source, model, revision)
    if name.startswith("timm:"):
        return _load_timm(name.removeprefix("timm:"))
    if Path(name).suffix == ".pt2":
        if not Path(name).is_file():
            raise ValueError(f"no torch.export program at {name}")
        _check_allowed(allow_code, f"to load the torch.export program {name}")
        return _load_program(name)
    if _FUNCTION.fullmatch(name):
        module, _, function = name.partition(":")
        _check_allowed(allow_code, f"to call {function}() of the module {module}")
        return _call_function(module, function)
    return load_saved_model(source, model, revision)


class Exported(nn.Module):
    """A `torch.export` program as a module for batches of any size. Exporting fixed whether it trains or evaluates.

    Batches below the exported size are padded with copies of the first input; larger ones are split.

    Raises:
        ValueError: it takes or returns more than one tensor, or was exported in training mode.
    """

    def __init__(self, program: export.ExportedProgram) -> None:
        super().__init__()
        signature = program.graph_signature
        for what, names in {"takes": signature.user_inputs, "returns": signature.user_outputs}.items():
            if len(names) != 1:
                raise ValueError(f"the program {what} {len(names)} values; export one that takes x and returns logits")
        learning = [node for node in program.graph.nodes if _is_training(node)]
        doubtful = [node for node in learning if _keeps_no_statistics(node)]
        _check_evaluating([node for node in learning if node not in doubtful])
        self.smallest, self.largest = _find_batch_sizes(program, signature.user_inputs[0])
        module = program.module(check_guards=False)
        # Plain calls instead of its own, and a plain GraphModule, which can be copied and told to evaluate.
        module.graph.set_codegen(CodeGen())
        self.network = fx.GraphModule(module, module.graph)
        if doubtful and depends_on_neighbors(self, _draw_image(program, signature.user_inputs[0])):
            _check_evaluating(doubtful)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, *features) → logits (B, classes)."""
        return torch.cat([self._answer(part) for part in torch.split(x, self.largest or len(x))])

    def _answer(self, x: Tensor) -> Tensor:
        missing = self.smallest - len(x)
        filled = torch.cat([x, x[:1].detach().expand(missing, *x.shape[1:])]) if missing > 0 else x
        (logits,) = self.network(filled)
        answer: Tensor = logits[: len(x)]
        return answer


def _check_allowed(allowed: bool, what: str) -> None:
    if not allowed:
        raise ValueError(f"{what} is to run code: if you trust it, allow it with --allow-code (allow_code=True)")


def _load_timm(name: str) -> nn.Module:
    """timm's network, with its normalisation in front: for images in [0, 1]."""
    try:
        timm = import_library("timm", "create_model")
    except Exception as error:  # its torchvision, built for another torch, raises what it likes
        raise ValueError(f"timm:{name} needs timm (pip install 'innermax[timm]'): {summarize_error(error)}") from error
    with reach_hub() as fault:
        try:
            network: nn.Module = timm.create_model(name, pretrained=True)
        except Exception as error:  # timm's own, the Hub client's or the system's
            close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=1)
            unknown = "nknown model" in str(error)
            if fault is not None and not unknown:
                raise ValueError(
                    f"timm:{name} has no weights in the cache, and the Hugging Face Hub cannot be reached ({fault}): "
                    f"pass timm.create_model({name!r}, pretrained=False), or load a local file into it with "
                    "load_model(file, model=…)"
                ) from error
            hint = f"; did you mean {close[0]!r}?" if close and unknown else ""
            raise ValueError(f"timm:{name} cannot be had: {summarize_error(error)}{hint}") from error
    told = attrgetter("pretrained_cfg")(network)
    return nn.Sequential(OrderedDict(normalize=Normalize(told["mean"], told["std"]), network=network)).eval()


def _call_function(module: str, function: str) -> nn.Module:
    with _import_from_current_directory():
        try:
            model = attrgetter(function)(importlib.import_module(module))()
        except Exception as error:  # anything: it is other people's code
            raise ValueError(f"{module}:{function} fails: {summarize_error(error)}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"{module}:{function} must return a torch.nn.Module, got {type(model).__name__}")
    return model.eval()


@contextmanager
def _import_from_current_directory() -> Iterator[None]:
    """Context manager: imports look in the current directory first, as `python -m` does."""
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


def _load_program(path: str) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.11 warns of its own reading
            program = export.load(path)
    except Exception as error:  # zip's, pickle's, torch's
        raise ValueError(f"{path} is not a readable torch.export program: {summarize_error(error)}") from error
    try:
        return Exported(program).eval()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_training(node: fx.Node) -> bool:
    """Whether an operator of an exported program is in training mode."""
    return any(_arguments(node).get(name) is True for name in ("train", "training"))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by name, those that are given and not None."""
    schema = getattr(node.target, "_schema", None)
    named = dict(zip([argument.name for argument in schema.arguments], node.args, strict=False)) if schema else {}
    return {name: value for name, value in (named | node.kwargs).items() if value is not None}


def _keeps_no_statistics(node: fx.Node) -> bool:
    """Whether it normalises what it is given in evaluation mode as in training: weights, an image, or a batch."""
    return "batch_norm" in str(node.target) and "running_mean" not in _arguments(node)


def _check_evaluating(learning: Sequence[fx.Node]) -> None:
    if learning:
        raise ValueError(f"the program was exported in training mode ({learning[0].target}): export model.eval()")


def _input_value(program: export.ExportedProgram, name: str) -> Tensor:
    """Shape and type of what a program takes."""
    value: Tensor = next(node for node in program.graph.nodes if node.name == name).meta["val"]
    return value


def _draw_image(program: export.ExportedProgram, name: str) -> Tensor:
    """An image as the program takes it, values in [0, 1]."""
    value = _input_value(program, name)
    shape = [size if isinstance(size, int) else size.node.hint for size in value.shape[1:]]
    return uniform(hash_keys(0, torch.arange(1, device="cpu")), math.prod(shape)).reshape(shape).to(value.dtype)


def _find_batch_sizes(program: export.ExportedProgram, name: str) -> tuple[int, int | None]:
    """The smallest and the largest batch that a program takes; None: no limit."""
    size = _input_value(program, name).shape[0]
    if isinstance(size, int):
        return size, size
    allowed = program.range_constraints.get(size.node.expr)
    if allowed is None:
        return 1, None
    return int(allowed.lower), int(allowed.upper) if allowed.upper.is_Integer else None
