"""The rows of an evaluation in parts, one per batch and attack, which a folder can keep to resume from."""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from innermax.utils.files import is_vacant, read_config, write_bytes, write_text
from innermax.utils.optional import extra
from innermax.utils.serialization import differences, is_finite_number

Column = npt.NDArray[Any]
CLEAN = "clean"
IMAGE = "image"  # the column of scored images, (N, *features)
_CONFIGURATION = "config.yaml"
_TABLE = "rows.parquet"
_NUMBERS = "biuf"  # NumPy's letters for the types a column may have, unless _KINDS names it
_KINDS = {
    "image": "f",
    "correct": "b",
    "probable": "b",
    "distance": "f",
    "prediction": "iu",
    "label": "iu",
    "target": "iu",
    "index": "iu",
}
_LONGEST = 150  # characters of one setting in a message


@dataclass(frozen=True, eq=False)
class AttackRows:
    """What is known of each example after one attack, (N,) each.

    `correct`, `prediction` and `loss`, the cross-entropy, are those of the scored image. The others are as the attack
    reports them at its last iterate: before quantisation, in the attack's precision. NaN where it does not measure its
    own convergence.
    """

    correct: Column
    prediction: Column
    loss: Column
    fosc: Column
    relative_fosc: Column
    zero_gradient: Column
    steps: Column
    gradient_calls: Column
    forward_calls: Column
    overturned: Column


@dataclass(frozen=True, eq=False)
class MinimalRows(AttackRows):
    """The rows of an attack that looks for the smallest perturbation.

    `distance` is the size of the smallest one it found, as the scores confirm it: 0 where the clean image is
    misclassified, infinite where none was found.
    """

    distance: Column


@dataclass(frozen=True, eq=False)
class CleanRows:
    """What is known of each clean example, (N,) each; `probable`: whether the answer looks like probabilities."""

    prediction: Column
    probable: Column


@dataclass(frozen=True, eq=False)
class TargetedRows(AttackRows):
    """The rows of a targeted attack; `target` is the label that it headed for."""

    target: Column


# The columns of a part by name, each with NumPy's letters for the types it may have.
Kinds = Mapping[str, str]
CLEAN_KINDS: Kinds = {entry.name: _KINDS.get(entry.name, _NUMBERS) for entry in fields(CleanRows)}
ATTACK_KINDS: Kinds = {entry.name: _KINDS.get(entry.name, _NUMBERS) for entry in fields(AttackRows)}
MINIMAL_KINDS: Kinds = {entry.name: _KINDS.get(entry.name, _NUMBERS) for entry in fields(MinimalRows)}

TARGETED_KINDS: Kinds = {entry.name: _KINDS.get(entry.name, _NUMBERS) for entry in fields(TargetedRows)}


def build_rows(columns: Mapping[str, Column]) -> AttackRows:
    """The rows of an attack from their columns by name, of which images are none."""
    kept = {name: column for name, column in columns.items() if name != IMAGE}
    kind = MinimalRows if "distance" in kept else TargetedRows if "target" in kept else AttackRows
    return kind(**kept)


@dataclass(frozen=True, eq=False)
class Part:
    """Columns of one batch by name, and the seconds they took."""

    columns: Mapping[str, Column]
    seconds: float


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of "clean" and of each search, by their first example's number; in memory, and in a folder if any.

    Attributes:
        kinds: the columns of "clean" and of each search, such as an attack.
        count: examples in all.
        size: examples per part; the last may have fewer.
        folder: where each part is written to a file of its own, whole or not at all.
        image_shape: the shape of one image, where parts of attacks have a column of images; None: they have none.
        held: the seconds of each part that is there.
        columns: the values of all parts, (count,) each. Arrays for each part, kept among the short-lived ones of a
            search, would fragment memory until the next batch does not fit.
    """

    kinds: Mapping[str, Kinds]
    count: int
    size: int
    folder: Path | None
    image_shape: tuple[int, ...] | None = None
    held: dict[str, dict[int, float]] = field(default_factory=dict)
    columns: dict[str, dict[str, Column]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is not None:  # before hours of work whose rows could not be written
            with extra("data"):
                import pyarrow.parquet  # type: ignore[import-untyped]  # noqa: F401
        for name in self.kinds:
            self.held.setdefault(name, {})
            self.columns.setdefault(name, {})

    @property
    def starts(self) -> range:
        """The first example of each part."""
        return range(0, self.count, self.size)

    def find_missing(self, name: str) -> list[int]:
        """The parts that are still to be computed."""
        return [start for start in self.starts if start not in self.held[name]]

    def add(self, name: str, start: int, part: Part) -> None:
        """Adds a part; with a folder, it is on disk when this returns."""
        if self.folder is not None:
            path = self._path(self.folder, name, start)
            path.parent.mkdir(parents=True, exist_ok=True)
            index = np.arange(start, start + self._length(start))
            write_bytes(
                path, _encode_parquet({"index": index, **part.columns}, {"attack": name, "seconds": part.seconds})
            )
        self.keep(name, start, part)

    def read(self) -> None:
        """Reads the parts in the folder; warns of a damaged file, whose part then counts as missing."""
        if self.folder is None:
            return
        for name in self.kinds:
            for start in self.find_missing(name):
                path = self._path(self.folder, name, start)
                if not path.exists():
                    continue
                try:
                    part = self._decode(path.read_bytes(), name, start)
                except ValueError as error:
                    warnings.warn(f"{path} is damaged ({error}): its rows are computed again", stacklevel=4)
                    continue
                if part is not None:
                    self.keep(name, start, part)

    def count_written(self, folder: Path, name: str) -> int:
        """The number of examples whose parts are in a folder."""
        return sum(self._length(start) for start in self.starts if self._path(folder, name, start).exists())

    def join(self, name: str) -> Part:
        """All parts as one, once none is missing."""
        return Part(self.columns[name], sum(self.held[name][start] for start in self.starts))

    def get(self, name: str, start: int) -> Part:
        """A part that is there."""
        stop = start + self._length(start)
        columns = {key: column[start:stop] for key, column in self.columns[name].items()}
        return Part(columns, self.held[name][start])

    def keep(self, name: str, start: int, part: Part) -> None:
        """Copies a part into the columns."""
        whole = self.columns[name]
        for key, column in part.columns.items():
            values = whole[key] if key in whole else np.empty((self.count, *column.shape[1:]), column.dtype)
            # The type differs where an attack leaves out what it reported for other parts.
            whole[key] = values.astype(np.result_type(values, column), copy=False)
            whole[key][start : start + len(column)] = column
        self.held[name][start] = part.seconds

    def _length(self, start: int) -> int:
        return min(self.size, self.count - start)

    def _path(self, folder: Path, name: str, start: int) -> Path:
        """A part's file; the number tells names apart that look the same to a file system."""
        readable = re.sub(r"[^A-Za-z0-9.-]", "_", name)[:60]
        return folder / "parts" / f"{sorted(self.kinds).index(name)}-{readable}" / f"{start:09d}.parquet"

    def _decode(self, content: bytes, name: str, start: int) -> Part | None:
        """A part from its file's bytes; None where they lack only the images.

        Raises ValueError where they are not what `add` wrote.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
            there = [key for key in file.schema_arrow.names if key != IMAGE]
            wanted = [*there, *([IMAGE] if self._has_images(name) and IMAGE in file.schema_arrow.names else [])]
            table = file.read(columns=wanted)
            told = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            columns = {key: table[key].to_numpy() for key in there}
            seconds, attack = float(told["seconds"]), told["attack"]
            index = columns.pop("index", np.empty(0))
            if attack != name or columns.keys() != self.kinds[name].keys():
                raise ValueError(f"it holds {', '.join(columns)} of {attack!r}")
            for key, column in columns.items():
                check_column(column, key, self._length(start), self.kinds[name][key])
            if IMAGE in wanted:
                columns[IMAGE] = self._shape_images(table[IMAGE], start)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise ValueError(" ".join(str(error).split())[:120]) from error
        if not is_finite_number(seconds):
            raise ValueError(f"it took {seconds} seconds")
        if not np.array_equal(index, np.arange(start, start + self._length(start))):
            raise ValueError(f"it does not hold the examples {start}…{start + self._length(start) - 1}")
        return None if self._has_images(name) and IMAGE not in columns else Part(columns, seconds)

    def _has_images(self, name: str) -> bool:
        return self.image_shape is not None and name != CLEAN

    def _shape_images(self, lists: Any, start: int) -> Column:
        """(n, *features) images of a part, of which each is a list of numbers in its file."""
        shape = (self._length(start), *(self.image_shape or ()))
        values: Column = np.asarray(lists.combine_chunks().flatten())
        check_column(values, IMAGE, math.prod(shape))
        return values.reshape(shape)


def check_column(column: Column, name: str, count: int, kinds: str | None = None) -> None:
    """Raises ValueError unless a column has the shape (count,) and the type of number that belongs to its name.

    kinds: NumPy's letters for the types it may have; None: those of the name.
    """
    if column.shape != (count,) or column.dtype.kind not in (kinds or _KINDS.get(name, _NUMBERS)):
        raise ValueError(f"column {name[:60]} must hold {count} numbers of its kind, got {column.dtype} {column.shape}")
    if name in ("prediction", "label", "target") and column.size and int(column.min()) < 0:
        raise ValueError(f"column {name} holds a class below 0")
    if name == "distance" and not bool((column >= 0).all()):
        raise ValueError("column distance holds a value below 0, or NaN")


class OtherRows(ValueError):
    """A folder holds the rows of another configuration; the message says in what they differ."""


def open_rows(folder: Path, configuration: Mapping[str, Any]) -> None:
    """Makes or finds a folder of rows of this configuration.

    Raises:
        OtherRows: the folder holds the rows of another configuration.
        ValueError: it holds files that are no rows.
    """
    if (folder / _CONFIGURATION).exists():
        differing = _compare_configurations(read_config(folder), configuration)
        if differing:
            raise OtherRows(
                f"rows_dir {folder} belongs to another evaluation ({'; '.join(map(_shorten, differing[:4]))}); "
                "choose another folder, or remove it"
            )
        return
    if not is_vacant(folder):
        raise ValueError(f"rows_dir {folder} exists and holds no rows of innermax; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(configuration), sort_keys=False, allow_unicode=True)
    write_text(folder / _CONFIGURATION, text)


def read_plan(folder: Path | None, precision: str) -> str | None:
    """How the attack's network was compiled for the rows in a folder; None: there are none of this precision."""
    if folder is None or not (folder / _CONFIGURATION).exists():
        return None
    try:
        told = read_config(folder)
    except ValueError:  # `open_rows` says so
        return None
    plan = told.get("attack_network")
    return plan if isinstance(plan, str) and told.get("precision") == precision else None


@contextmanager
def note_kept_rows(parts: Parts) -> Iterator[None]:
    """Context manager: an exception raised inside gets a note that says where finished parts are kept."""
    try:
        yield
    except BaseException as error:
        if parts.folder is not None:
            told = f"Rows that are finished are kept in {parts.folder}: the same evaluation resumes from them."
            if parts.size >= parts.count > 1:
                told += (
                    f" All {parts.count} images are one batch, whose rows are finished when an attack has ended: a "
                    "smaller batch_size finishes some sooner."
                )
            error.add_note(told)
        raise


def write_table(folder: Path, columns: Mapping[str, Column]) -> None:
    """Writes the table of all examples."""
    write_bytes(folder / _TABLE, _encode_parquet(columns, {}))


def _compare_configurations(before: dict[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How two configurations differ; a model's answers count as equal up to rounding.

    Of how the attack's network is computed only the precision counts: threads and the like change no answer.
    """
    before, now = (told | {"attack_network": _arithmetic(told.get("attack_network"))} for told in (before, dict(now)))
    old, new = before.get("answers"), now["answers"]
    same = isinstance(old, list) and len(old) == len(new) and all(is_finite_number(v) or v != v for v in old)
    if same and np.allclose(np.array(old), np.array(new), 1e-3, 1e-6, equal_nan=True):
        return differences(before | {"answers": new}, now)
    return [*differences(before | {"answers": new}, now), "the model answers the first examples in another way"]


def _arithmetic(plan: object) -> str:
    """What an oracle's plan says of its precision."""
    return "bf16" if re.search(r"(^|[,:] )bf16\b", str(plan)) else "float32"


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"


def _encode_parquet(columns: Mapping[str, Column], metadata: Mapping[str, object]) -> bytes:
    """The bytes of a parquet file of these columns, with a checksum per page."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({key: _encode_column(column) for key, column in columns.items()})
    sink = pa.BufferOutputStream()
    told = {key: repr(value) if isinstance(value, float) else str(value) for key, value in metadata.items()}
    pq.write_table(table.replace_schema_metadata(told), sink, write_page_checksum=True)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _encode_column(column: Column) -> Any:
    """A column for pyarrow; images as lists of their values."""
    import pyarrow as pa

    values = pa.array(column.reshape(-1), from_pandas=False)
    return values if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, column[0].size)
