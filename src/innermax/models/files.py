"""Model files and run folders: safetensors and JSON, written whole or not at all, never pickle."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from innermax.models.hub import reach_hub
from innermax.models.pretrained import check_file, find_pretrained
from innermax.models.registry import build_model
from innermax.models.wrappers import unwrap
from innermax.utils.files import hash_tensors, load_tensors, save_tensors, write_json
from innermax.utils.optional import extra
from innermax.utils.serialization import parse_json

# A source with one of these endings is a file, never a Hub id, which may hold a dot, too.
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".json", ".onnx")


def save_model(folder: str | Path, model: nn.Module, name: str = "model.safetensors") -> None:
    """Writes a model's weights and, if innermax built it, the config.json from which `load_model` rebuilds it."""
    model = unwrap(model)
    write_model(Path(folder), model.state_dict(), getattr(model, "config", None), name)


def write_model(folder: Path, tensors: Mapping[str, Tensor], config: object, name: str = "model.safetensors") -> None:
    """Writes a model's tensors, and config.json if `build_model` builds a network with these tensors from config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / name, tensors)
    if isinstance(config, Mapping) and _describes(config, tensors):
        write_json(folder / "config.json", config)


def find_description(model: nn.Module) -> Mapping[str, Any] | None:
    """The config from which `build_model` builds this network; None for one that innermax did not build."""
    model = unwrap(model)
    config = getattr(model, "config", None)
    return config if isinstance(config, Mapping) and _describes(config, model.state_dict()) else None


def _describes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether `build_model` builds a network with these tensors from config, which need not be innermax's."""
    try:
        with torch.device("meta"):
            network = _build_from_config(config)
    except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError):
        return False
    own = network.state_dict()
    return own.keys() == tensors.keys() and all(own[name].shape == value.shape for name, value in tensors.items())


def load_saved_model(source: str | Path, model: nn.Module | None = None, revision: str | None = None) -> nn.Module:
    """A model from a folder or file that innermax wrote, or from the Hugging Face Hub; in evaluation mode.

    Args:
        source: a run or model folder, a .safetensors file with config.json beside it, a model that comes with innermax,
            such as "innermax/digits-linf-0.15", or a Hub id such as "user/name", also "user/name@revision".
        model: the network to load the weights into, if innermax did not build it; changed in place.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: there is no model, or its files are damaged, of another kind or do not fit. Pickle is never loaded.
    """
    path = _find_weights(Path(source), str(source), revision, described=model is None)
    tensors, _ = load_tensors(path)
    if model is None:
        description = path.parent / "config.json"
        with torch.device("meta"):  # takes no memory until a foreign description is seen to fit
            _fill_from_file(_build_from_file(description), tensors, path)
        model = _build_from_file(description)
    return _fill_from_file(model, tensors, path).eval()


def hash_weights(state: Mapping[str, Any]) -> str:
    """The fingerprint of a model's weights, from its state_dict or from the tensors of its file."""
    return hash_tensors(sorted((name, value) for name, value in state.items() if isinstance(value, Tensor)))


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads weights into a network; a network on the meta device takes the tensors themselves.

    Raises ValueError where names or shapes differ, or one number is floating-point and the other is not.
    """
    own = network.state_dict()
    for name, value in own.items():
        if name in tensors and tensors[name].is_floating_point() != value.is_floating_point():
            raise ValueError(f"{name} must be {value.dtype}, got {tensors[name].dtype}")
    try:
        network.load_state_dict(tensors, assign=any(value.is_meta for value in own.values()))
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from error


def _fill_from_file(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The model, with the weights of a file loaded into it."""
    try:
        load_weights(model, tensors)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the model: {error}") from error
    return model


def _find_weights(path: Path, source: str, revision: str | None, described: bool) -> Path:
    """The path of the weights file, downloaded if need be; described: whether config.json is needed, too."""
    own = find_pretrained(source)
    if own is not None:
        if revision is not None:
            raise ValueError(f"{source} comes with innermax, at one revision: leave revision out, got {revision!r}")
        place = own.folder if own.hub is None else Path(f"{own.hub.repo}@{own.hub.revision}")
        found = _find_weights(place, str(place), None, described)
        check_file(found, own)
        return found
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.is_file():
            raise ValueError(f"{path.parent} holds no model.safetensors")
    if path.suffix != ".safetensors" and path.exists():
        raise ValueError(f"{path} is no .safetensors file; {_way_out(path)}")
    if path.is_file():
        return path
    repository, at, told = source.partition("@")
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")) or path.suffix in _FILE_SUFFIXES:
        raise ValueError(f"no model at {source}: expected a folder, a .safetensors file or a Hub id such as user/name")
    if at and (not told or revision not in (None, told)):
        raise ValueError(f"{source} must name one revision after its @, got {told!r} and revision={revision!r}")
    with extra("data"):
        from huggingface_hub import hf_hub_download

    revision = told or revision
    with reach_hub() as fault:
        try:
            if described:
                hf_hub_download(repository, "config.json", revision=revision)
            return Path(hf_hub_download(repository, "model.safetensors", revision=revision))
        except Exception as error:  # a lost connection comes as the Hub client's own, its HTTP client's or the system's
            if fault is not None:
                raise ValueError(
                    f"no model {source!r} here or in the cache of the Hugging Face Hub, which cannot be reached "
                    f"({fault}); name a folder or a .safetensors file"
                ) from error
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"no model {source!r} here or on the Hugging Face Hub: {reason}") from error


def _way_out(path: Path) -> str:
    """What to do with a model's file of another kind."""
    if path.suffix == ".onnx":
        return "ONNX programs have no gradients for an attack: load the weights into the network in PyTorch"
    if _is_torchscript(path):
        return (
            "TorchScript is not supported: build the network in Python, "
            "network.load_state_dict(torch.jit.load(path).state_dict()), and pass it or im.save_model it"
        )
    return (
        "pickled models are never loaded: if you trust the file, build the network in Python, "
        "network.load_state_dict(torch.load(path, weights_only=True)), and pass it or im.save_model it"
    )


def _is_torchscript(path: Path) -> bool:
    """Whether a file is an archive that `torch.jit.save` wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _build_from_file(path: Path) -> nn.Module:
    """The network that a config.json describes."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable model description: {error}; pass model= for a network of yours"
        ) from error
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{path} describes no model of innermax; pass model= for a network of yours")
    try:
        return _build_from_config(config)
    # torch raises its own for sizes that no machine can hold.
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _build_from_config(config: Mapping[str, Any]) -> nn.Module:
    """The network that a config describes: its name under "model", and its options."""
    return build_model(config["model"], **{name: value for name, value in config.items() if name != "model"})
