"""Model files and run folders: safetensors and JSON, written whole or not at all, never pickle."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from innermax.models import build_model
from innermax.oracle import unwrapped

# A path that ends so is a file's, never a Hub id, which may hold a dot as well.
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".json")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or as it was before. OSError says which file, and why not."""
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error
        raise


def write_json(path: Path, value: object) -> None:
    """Writes a value as JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
    """Writes tensors, and JSON-serialisable values beside them, into one safetensors file."""
    own = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    write_bytes(path, save(own, {"innermax": json.dumps(meta or {})}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and values of a file that `save_tensors` wrote. Raises ValueError where it is not readable."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            meta = json.loads((file.metadata() or {}).get("innermax", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return tensors, meta


def save_model(folder: str | Path, model: nn.Module, name: str = "model.safetensors") -> None:
    """Writes a model's weights and, where innermax built it, the config.json that `load_model` rebuilds it from."""
    model = unwrapped(model)
    write_model(Path(folder), model.state_dict(), getattr(model, "config", None), name)


def write_model(folder: Path, tensors: Mapping[str, Tensor], config: object, name: str = "model.safetensors") -> None:
    """Writes a model's tensors, and its config.json where it is one that innermax builds."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / name, tensors)
    if isinstance(config, Mapping) and "model" in config:
        write_json(folder / "config.json", config)


def load_saved_model(source: str | Path, model: nn.Module | None = None, revision: str | None = None) -> nn.Module:
    """A model from a folder or file that innermax wrote, or from the Hugging Face Hub; in evaluation mode.

    Args:
        source: a run or model folder, a .safetensors file with config.json beside it, or a Hub id such as "user/name".
        model: the network to fill, for one that innermax did not build; changed in place.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: nothing is there, or the files are damaged, foreign or do not fit. Pickle is never loaded.
    """
    path = _located(Path(source), str(source), revision, described=model is None)
    tensors, _ = load_tensors(path)
    if model is None:
        model = _built(path.parent / "config.json")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def _located(path: Path, source: str, revision: str | None, described: bool) -> Path:
    """The weights file; described: with a config.json beside it."""
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.is_file():
            raise ValueError(f"{path.parent} holds no model.safetensors")
    if path.suffix != ".safetensors" and path.exists():
        raise ValueError(f"{path} is no .safetensors file; pickled models are never loaded")
    if path.is_file():
        return path
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or path.suffix in _FILE_SUFFIXES:
        raise ValueError(f"no model at {source}: expected a folder, a .safetensors file or a Hub id such as user/name")
    from huggingface_hub import hf_hub_download

    try:
        if described:
            hf_hub_download(source, "config.json", revision=revision)
        return Path(hf_hub_download(source, "model.safetensors", revision=revision))
    except Exception as error:  # a lost connection comes as the Hub client's own, its HTTP client's or the system's
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"no model {source!r} here or on the Hugging Face Hub: {reason}") from error


def _built(path: Path) -> nn.Module:
    """The network that a config.json describes."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable model description: {error}; pass model= for a network of yours"
        ) from error
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{path} describes no model of innermax; pass model= for a network of yours")
    options = {name: value for name, value in config.items() if name != "model"}
    try:
        return build_model(config["model"], **options)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: torch's, of sizes no machine holds
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
