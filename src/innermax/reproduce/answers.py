"""Results on disk, called answers: one JSON file each while they are measured, then packed into one compressed file."""

import json
import lzma
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from innermax.utils.files import LockHeld, lock_file, write_bytes, write_json
from innermax.utils.serialization import parse_json

Record = Mapping[str, Any]  # a stored result, JSON: "question", "answer", "environment", "seconds"


@dataclass(frozen=True)
class Answers:
    """Stored results, by the names of their experiments.

    Args:
        pack: an xz-compressed JSON object, name → record. It is read first, and need not exist.
        folders: of one JSON file per record, searched in this order; new ones are written to the first.
    """

    pack: Path
    folders: Sequence[Path]

    def find(self, name: str) -> Record | None:
        """The record of this name, None where there is none. Raises ValueError where its file is not readable."""
        if name in self._records:
            return self._records[name]
        for folder in self.folders:
            path = folder / f"{name}.json"
            if path.exists():
                record = read_object(path)
                _check_record(path, name, record)
                return record
        return None

    def add(self, name: str, record: Record) -> None:
        """Writes a record to a file of its own."""
        folder = self.folders[0]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.json", record)

    def pack_up(self, names: Iterable[str]) -> None:
        """Adds the records of these names, where there are any, to the pack. What it holds stays as it is."""
        found = {name: record for name in names if name not in self._records and (record := self.find(name))}
        missing = bool(found)
        while missing:
            try:
                with lock_file(self.pack.with_name("answers.lock"), str(self.pack)):
                    _write_pack(self.pack, found | _read_pack(self.pack))
                    missing = False
            except LockHeld:
                time.sleep(0.1)  # another process adds its own

    @cached_property
    def _records(self) -> Mapping[str, Record]:
        """The pack as this process first read it. What another one adds meanwhile, it also has as files."""
        return _read_pack(self.pack)


def _read_pack(path: Path) -> dict[str, Record]:
    """The records of a pack by name, none where there is no pack. Raises ValueError where it is not readable."""
    packed = read_object(path) if path.exists() else {}
    for name, record in packed.items():
        _check_record(path, name, record)
    return packed


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file, which may be compressed. Raises ValueError where it is not readable."""
    content = path.read_bytes()
    try:
        value = parse_json(lzma.decompress(content) if path.suffix == ".xz" else content)
    except (lzma.LZMAError, ValueError) as error:
        raise ValueError(f"{path} is not readable: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _check_record(path: Path, name: str, record: object) -> None:
    needed = {"answer", "environment", "seconds"}
    if not isinstance(record, dict) or not needed <= record.keys():
        raise ValueError(f"{path}: {name} must have {', '.join(sorted(needed))}; remove it to measure it again")


def _write_pack(path: Path, packed: Mapping[str, Record]) -> None:
    """Writes a pack, one line per record, sorted by name, so that equal records make equal bytes."""
    lines = (f"{json.dumps(name)}:{json.dumps(packed[name], separators=(',', ':'))}" for name in sorted(packed))
    write_bytes(path, lzma.compress(("{" + ",\n".join(lines) + "}\n").encode()))
