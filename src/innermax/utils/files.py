"""Files: atomic writes, tensors, locks."""

import errno
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from innermax.utils.serialization import parse_json, parse_yaml

IN_MEMORY = 2 * 2**30  # bytes of images; a tensor of more is kept in a file
LOCK = "lock"  # the file in a folder that the process working there holds


class LockHeld(ValueError):
    """Another process holds the lock; the message says which."""


@contextmanager
def lock_file(path: Path, what: str) -> Iterator[None]:
    """Context manager: holds a lock on a file, so that one process at a time works with `what`.

    The system releases the lock of a process that is killed.

    Raises:
        LockHeld: another process holds it; the message says which.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8", opener=refuse_link) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise LockHeld(f"{what} is in use by {lock.read().strip() or 'another process'}") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            told = f"{path} cannot be locked here ({error.strerror}): see that nothing else uses {what}"
            warnings.warn(told, stacklevel=3)
        lock.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        lock.write(f"process {os.getpid()} on {platform.node()} since {since}\n")
        lock.flush()
        yield


def is_vacant(folder: Path) -> bool:
    """Whether a folder is missing, empty, or holds only the remains of a process killed before it wrote config.yaml."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name in ("config.yaml.part", LOCK) for path in folder.iterdir())


def read_config(folder: Path) -> dict[str, Any]:
    """A run's configuration. Raises ValueError where it is not readable."""
    path = folder / "config.yaml"
    try:
        config = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable configuration: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a configuration of innermax")
    return config


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode(errors="surrogateescape"))
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()[:16]


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: afterwards it is complete, or as it was before.

    Raises OSError, which names the file and the reason.
    """
    partial = path.with_name(path.name + ".part")
    try:
        partial.unlink(missing_ok=True)  # a link there would lead elsewhere
        with partial.open("xb") as file:
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


def refuse_link(path: str, flags: int) -> int:
    """An opener for `open` that raises OSError for a symbolic link instead of following it."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8, atomically; bytes of files' names that were no text stay as they are."""
    write_bytes(path, text.encode(errors="surrogateescape"))


def write_json(path: Path, value: object) -> None:
    """Writes a value as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
    """Writes tensors, and JSON-serialisable values beside them, into one safetensors file."""
    own = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    write_bytes(path, save(own, {"innermax": json.dumps(meta or {})}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and values of a file that `save_tensors` wrote. Raises ValueError where it is not readable."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            meta = parse_json((file.metadata() or {}).get("innermax", "{}"))
            if not isinstance(meta, dict):
                raise ValueError("what stands beside the tensors is no object")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {' '.join(str(error).split())}") from error
    return tensors, meta
