"""Files as an enemy might send them: small ones of the library's own, damaged or rewritten, and what loads them.

For tests/utils/test_hostile_files.py and checks/fuzz.py.
"""

import contextlib
import copy
import io
import json
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import innermax as im
from innermax import cli
from innermax.evaluation.store import ATTACK_KINDS, CLEAN, CLEAN_KINDS, AttackRows, Part, Parts
from innermax.training.checkpoints import _digest, find_checkpoints

ALLOWED = (ValueError, TypeError, OSError)
SHAPE = (1, 8, 8)
THREAT = im.Linf(0.1)
_DEEP = "@deep@"  # stands for lists in lists, deeper than any parser goes
_FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "subprocess.Popen")
TOKENS = (
    b"!!python/object/apply:os.system ['touch fallen']",
    b"&a [*a, *a]",
    b"<<: *a",
    b"\x80\x04\x95\x20\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94",
    b"PK\x03\x04",
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"[" * 3000,
    b"{a: " * 1000,
    b"\xff\xfe\x00",
    "\u202e<script>alert(1)</script>".encode(),
    b"../../../etc/passwd",
)
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    1.5,
    float("nan"),
    float("inf"),
    10**30,
    10**400,
    "",
    "x",
    "0x1F",
    "../../../etc/passwd",
    "os:getcwd",
    "<script>alert(1)</script>",
    "\u202e\x00\ud7ff",
    "a" * 5000,
    [],
    {},
    [[]],
    {"a": 1},
    [None, "a", 1],
    [1] * 1000,
    _DEEP,
)


@dataclass(frozen=True)
class Kind:
    """Files that load, the one that is damaged, how it can be rewritten beside that, and what loads the folder."""

    files: dict[str, bytes]
    target: str
    load: Callable[[Path], object]
    rewrite: Callable[[Callable[[Any], Any], bytes, Callable[..., Any]], bytes] | None = None

    @property
    def content(self) -> bytes:
        return self.files[self.target]


# What an enemy does


@st.composite
def damaged(draw: Any, kind: Kind) -> bytes:
    """The kind's file with one to four changes, of its bytes or, where it can be rewritten, of what they say."""
    content, rewritten = kind.content, kind.rewrite is not None and draw(st.integers(0, 2)) > 0
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3, 4)))):
        if rewritten and kind.rewrite is not None and draw(st.integers(0, 9)):
            with contextlib.suppress(Exception):  # it is too damaged to be rewritten
                content = kind.rewrite(partial(_changed, draw), content, draw)
        else:
            content = _bytes_changed(draw, content)
    return content


def _bytes_changed(draw: Any, content: bytes) -> bytes:
    size = len(content)

    def place() -> int:
        near = st.integers(0, min(size, 64)) | st.integers(max(0, size - 64), size)  # where headers and footers are
        return draw(near | st.integers(0, size))

    start, other = place(), place()
    length = draw(st.sampled_from((1, 2, 4, 8, 16, 64, 512)))
    block = content[start : start + length]
    match draw(st.sampled_from(["flip", "truncate", "insert", "delete", "double", "zero", "swap", "lie", "token"])):
        case "flip":
            return (
                content[:start] + bytes(value ^ draw(st.integers(1, 255)) for value in block[:4]) + content[start + 4 :]
            )
        case "truncate":
            return content[:start]
        case "insert":
            return content[:start] + draw(st.binary(min_size=1, max_size=16)) + content[start:]
        case "delete":
            return content[:start] + content[start + length :]
        case "double":
            return content[:start] + block * draw(st.integers(2, 5)) + content[start + length :]
        case "zero":
            return content[:start] + bytes(len(block)) + content[start + length :]
        case "swap":
            first, second = sorted((start, other))
            return content[:first] + content[second:] + content[first:second]
        case "lie":
            value = draw(st.sampled_from((2**63 - 1, 2**64 - 1, 2**32 - 1, 2**31, 10**12, 2**40, 0, 1)))
            width = draw(st.sampled_from(["<Q", "<I", ">I", "<H"]))
            lie = struct.pack(width, value % 256 ** struct.calcsize(width))
            return content[:start] + lie + content[start + len(lie) :]
        case _:
            return content[:start] + draw(st.sampled_from(TOKENS)) + content[start:]


def _changed(draw: Any, document: Any) -> Any:
    """Plain values with one of them removed, replaced, doubled, wrapped or renamed."""
    document = copy.deepcopy(document)
    whole, key = None, None
    part = document
    while isinstance(part, dict | list) and part and (whole is None or draw(st.integers(0, 3))):
        whole, key = part, draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        part = whole[key]
    if whole is None or draw(st.integers(0, 30)) == 0:
        return draw(st.sampled_from(ODD))
    match draw(st.sampled_from(["odd", "odd", "odd", "near", "remove", "extra", "wrap", "rename"])):
        case "odd":
            whole[key] = draw(st.sampled_from(ODD))
        case "near":
            number = isinstance(part, int | float)
            whole[key] = part * draw(st.sampled_from((-1, 2, 0.5, 10**6, 10**12))) if number else str(part)
        case "remove":
            del whole[key]
        case "extra" if isinstance(whole, list):
            whole.append(draw(st.sampled_from(ODD)))
        case "extra":
            whole[draw(st.sampled_from(("extra", "", "folder", "options", "__class__")))] = draw(st.sampled_from(ODD))
        case "wrap":
            whole[key] = draw(st.sampled_from(([part], {"a": part})))
        case "rename" if isinstance(whole, dict):
            whole[draw(st.sampled_from(("extra", "a" * 300, "<b>&", "../x")))] = whole.pop(key)
    return document


def _deepened(text: str) -> bytes:
    return (
        text.replace(f'"{_DEEP}"', "[" * 3000 + "]" * 3000)
        .replace(_DEEP, "[" * 3000 + "]" * 3000)
        .encode("utf-8", "replace")
    )


def _json(change: Callable[[Any], Any], content: bytes, _: Any) -> bytes:
    return _deepened(json.dumps(change(json.loads(content))))


def _json_lines(change: Callable[[Any], Any], content: bytes, _: Any) -> bytes:
    rows = change([json.loads(line) for line in content.splitlines()])
    return _deepened("\n".join(map(json.dumps, rows)))


def _yaml(change: Callable[[Any], Any], content: bytes, _: Any) -> bytes:
    return _deepened(yaml.safe_dump(change(yaml.safe_load(content)), sort_keys=False))


def _header(change: Callable[[Any], Any], content: bytes, _: Any) -> bytes:
    """A safetensors file whose header says something else."""
    length = int.from_bytes(content[:8], "little")
    header = _deepened(json.dumps(change(json.loads(content[8 : 8 + length]))))
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _state(change: Callable[[Any], Any], content: bytes, draw: Any) -> bytes:
    """A state that says something else, of which its hash is true."""
    from safetensors.torch import load, save

    length = int.from_bytes(content[:8], "little")
    told = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["innermax"])
    tensors, position = load(content), told["position"]
    if draw(st.booleans()):
        position = change(position)
    else:
        name = draw(st.sampled_from(sorted(tensors)))
        match draw(st.sampled_from(["shape", "type", "nan", "rename", "remove"])):
            case "shape":
                tensors[name] = draw(st.sampled_from((torch.ones(3), torch.ones(()), torch.ones(0, 4))))
            case "type":
                kinds = (torch.float64, torch.bool, torch.int64, torch.bfloat16, torch.complex64)
                tensors[name] = tensors[name].to(draw(st.sampled_from(kinds)))
            case "nan":
                tensors[name] = (
                    torch.full_like(tensors[name], float("nan")) if tensors[name].is_floating_point() else -1
                )
            case "rename":
                new = draw(
                    st.sampled_from(("optimizer", "optimizer/x/y", "optimizer/0", "optimizer/99/a", "model/x", ""))
                )
                tensors[new] = tensors.pop(name)
            case _:
                del tensors[name]
    try:
        digest = _digest(tensors, position)
    except Exception:  # noqa: BLE001  a position that is none
        digest = "0"
    meta = _deepened(json.dumps({"position": position, "sha256": digest})).decode()
    return save(tensors, {"innermax": meta})


def _table(_: Callable[[Any], Any], content: bytes, draw: Any) -> bytes:
    """A parquet file with another column, type, value or description."""
    table = pq.read_table(pa.BufferReader(content))
    told = dict(table.schema.metadata or {})
    name = draw(st.sampled_from(table.column_names))
    place = table.column_names.index(name)
    count = table.num_rows
    match draw(st.sampled_from(["replace", "drop", "rename", "double", "tell", "rows"])):
        case "replace":
            value = draw(
                st.sampled_from(
                    (
                        None,
                        -1,
                        2**62,
                        1.5,
                        float("nan"),
                        "x",
                        b"\x89PNG",
                        [],
                        [1],
                        {"bytes": b"", "path": "/etc/passwd"},
                        {"bytes": None, "path": None},
                        True,
                    )
                )
            )
            table = table.set_column(place, name, pa.array([value] * count))
        case "drop":
            table = table.remove_column(place)
        case "rename":
            table = table.rename_columns(
                [
                    draw(st.sampled_from(("x", "", "label", "image", "index"))) if n == name else n
                    for n in table.column_names
                ]
            )
        case "double":
            table = table.append_column(name, table.column(place))
        case "tell":
            told = {
                key: draw(
                    st.sampled_from(
                        (
                            b"",
                            b"nan",
                            b"1e999",
                            b"{",
                            b"\xff",
                            b"[" * 3000,
                            b'{"info": {"features": {"image": 1, "label": {"names": 3}}}}',
                        )
                    )
                )
                for key in told or [b"huggingface"]
            }
        case _:
            table = draw(st.sampled_from((table.slice(0, 0), table.slice(1), pa.concat_tables([table] * 3))))
    sink = io.BytesIO()
    with contextlib.suppress(Exception):
        table = table.replace_schema_metadata(told)
    pq.write_table(table, sink)
    return sink.getvalue()


# What is attacked


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))


def examples(count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(count) % 10


def kinds(folder: Path) -> dict[str, Kind]:
    """Every kind of file that innermax reads, made by innermax in an empty folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _models(folder / "model") | _runs(folder / "run") | _data(folder / "data") | _rows(folder / "rows")


def _models(folder: Path) -> dict[str, Kind]:
    model = im.build_model("digits-cnn", input_shape=SHAPE, normalize=([0.5], [0.5]))
    im.save_model(folder, model)
    files = _files(folder)
    return {
        "model": Kind(files, "model.safetensors", _answering, _header),
        "model's config": Kind(files, "config.json", _answering, _json),
    }


def _answering(folder: Path) -> None:
    model = im.load_model(folder)
    shape = model.config["input_shape"]
    if shape == list(SHAPE):
        assert model(torch.rand(2, *shape)).shape == (2, model.config["num_classes"])


def _runs(folder: Path) -> dict[str, Kind]:
    trained(folder)
    run = folder.parent / "report"
    shutil.copytree(folder, run)
    model = im.build_model("digits-cnn", input_shape=SHAPE)
    im.save_model(run, model)
    settings = {"data": "digits", "threat": {"norm": "linf", "eps": 0.1}}
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"settings": settings}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    test_set = im.load_data("digits", validation=0).test[:12]
    attacks = {"fgsm": im.FGSM(THREAT), "pgd-3": im.PGD(THREAT, steps=3)}
    im.evaluate(model, test_set, attacks, precision="float32").to_json(run / "evaluation.json")
    im.transfer(model, {"other": model}, test_set, attacks).to_json(run / "transfer.json")
    recipe = b"data: digits\nmodel: digits-cnn\nthreat:\n  eps: 8/255\nattack:\n  steps: 3\nepochs: 1\nlr: 1e-2\n"
    told = _files(run)
    state = find_checkpoints(folder)[0].relative_to(folder).as_posix()
    return {
        "state": Kind(_files(folder), state, trained, _state),
        "state's header": Kind(_files(folder), state, trained, _header),
        "run's config": Kind(told, "config.yaml", _shown, _yaml),
        "run's config, evaluated": Kind(told, "config.yaml", partial(_command, ["evaluate"]), _yaml),
        "metrics": Kind(told, "metrics.jsonl", _shown, _json_lines),
        "environment": Kind(told, "environment.json", _shown, _json),
        "evaluation": Kind(told, "evaluation.json", _shown, _json),
        "evaluation, exported": Kind(told, "evaluation.json", partial(_command, ["export"]), _json),
        "transfer": Kind({"transfer.json": told["transfer.json"]}, "transfer.json", _transfer, _json),
        "recipe": Kind({"mine.yaml": recipe}, "mine.yaml", partial(_command, ["train"]), _yaml),
    }


def trained(folder: Path) -> None:
    """Begins a training of two epochs, or goes on with it."""
    strategy = im.WarmStart(im.PGD(THREAT, steps=1))
    options = {"batch_size": 8, "ema": 0.9, "lr": 0.1, "checkpoint_every": 1, "keep_checkpoints": 1}
    im.train(network(), examples(), strategy, epochs=1, run_dir=folder, progress=False, precision="float32", **options)


def _shown(folder: Path) -> None:
    im.report(folder, folder / "report.html", pictures=0)
    page = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert "<script>alert" not in page


def _transfer(folder: Path) -> None:
    found = im.Transfer.from_json((folder / "transfer.json").read_text(encoding="utf-8"))
    _ = found.accuracy, found.clean_accuracy, found.to_json()


class Reached(Exception):
    """What was to be computed begins."""


def _command(words: list[str], folder: Path) -> None:
    """The command line on a folder; what costs time is not begun."""
    place = {
        "evaluate": [str(folder), "--attacks", "fgsm"],
        "train": [str(folder / "mine.yaml"), "--run-dir", str(folder / "run")],
        "export": [str(folder), "--to", str(folder / "hub")],
    }
    status, told = 0, io.StringIO()
    before = im.__dict__.get("train"), im.__dict__.get("evaluate")

    def stop(*_: Any, **__: Any) -> None:
        raise Reached

    im.train = im.evaluate = stop  # type: ignore[assignment]
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Reached):
            status = cli.main([*words, *place[words[0]]])
    finally:
        for name, value in zip(("train", "evaluate"), before, strict=True):
            if value is None:
                delattr(im, name)
            else:
                setattr(im, name, value)
    if words == ["export"]:
        shutil.rmtree(folder / "hub", ignore_errors=True)
    lines = told.getvalue().splitlines()
    assert status in (0, 2), status
    if status == 2:
        assert lines, "nothing was said"
        assert len([line for line in lines if line.startswith("innermax: ")]) == len(lines), told.getvalue()
        raise ValueError(lines[-1])


def _data(folder: Path) -> dict[str, Kind]:
    folder.mkdir()
    pictures = [Image.fromarray(image[0].numpy()) for image in examples(12)[0]]

    def encoded(image: Image.Image, form: str) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, form)
        return buffer.getvalue()

    column = pa.array([{"bytes": encoded(image, "PNG"), "path": "x.png"} for image in pictures])
    labels = {
        "info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["a", "b"], "_type": "ClassLabel"}}}
    }
    table = pa.table({"image": column, "label": pa.array([0, 1] * 6)})
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(labels)}), sink)
    parquet = {f"{split}.parquet": sink.getvalue() for split in ("train", "test")}
    found = {"data parquet": Kind(parquet, "train.parquet", _read, _table)}
    for form, ending in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("BMP", "bmp")):
        names = [f"{split}/{name}/{n}.{ending}" for split in ("train", "test") for name in "ab" for n in range(2)]
        files = {name: encoded(image, form) for name, image in zip(names, pictures, strict=False)}
        found[f"image, {form}"] = Kind(files, f"train/a/0.{ending}", _read)
    return found


def _read(folder: Path) -> None:
    data = im.load_data(folder, validation=0)
    assert data.train.shape == data.test.shape
    assert int(data.train.labels.max()) < data.num_classes


def _rows(folder: Path) -> dict[str, Kind]:
    kinds, count = {CLEAN: CLEAN_KINDS, "fgsm": ATTACK_KINDS}, 12
    parts = Parts(kinds, count, 6, folder)
    columns = {name: np.zeros(6) for name in AttackRows.__dataclass_fields__}
    columns |= {"correct": np.ones(6, bool), "prediction": np.arange(6), "overturned": np.zeros(6, bool)}
    for start in (0, 6):
        parts.add(CLEAN, start, Part({"prediction": np.zeros(6, np.int64), "probable": np.zeros(6, bool)}, 1.0))
        parts.add("fgsm", start, Part(columns, 1.0))
    files = _files(folder)
    target = next(name for name in files if "fgsm" in name)

    def read(place: Path) -> None:
        kept = Parts(kinds, count, 6, place)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            kept.read()
        if kept.find_missing("fgsm") == []:
            part = kept.join("fgsm")
            assert set(part.columns) == set(columns)
            assert all(len(column) == count for column in part.columns.values())
            assert all(column.dtype.kind in "biuf" for column in part.columns.values())
            return
        assert len(seen) == 1, [str(one.message) for one in seen]
        raise ValueError(str(seen[0].message))

    return {"rows parquet": Kind(files, target, read, _table)}


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


# What must not happen

_seen: list[str] | None = None


def _hook(event: str, arguments: Any) -> None:
    if _seen is not None and event in _FORBIDDEN and "git" not in str(arguments[:2]):
        _seen.append(f"{event} {arguments}")


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """What is executed inside, unpickled or sent: events of Python's own audit."""
    global _seen
    if not getattr(sys, "_innermax_hook", False):
        sys.addaudithook(_hook)
        sys._innermax_hook = True  # type: ignore[attr-defined]
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


def tried(kind: Kind, content: bytes, folder: Path) -> str:
    """Loads the files with this one among them: "loaded", or the name of the error that refuses it.

    Raises AssertionError where something happens that must not: another error, a message of several lines, code that
    runs, a file more or less.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name, whole in (kind.files | {kind.target: content}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(whole)
    before = _files(folder)
    outcome, lines = "loaded", 1
    with watched() as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            kind.load(folder)
        except ALLOWED as error:
            outcome = type(error).__name__
            lines = len(str(error).strip().splitlines())
        except AssertionError:
            raise
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from error
    assert not seen, seen
    assert lines <= 1, f"{lines} lines"
    if outcome != "loaded":
        left = {name for name, whole in _files(folder).items() if before.get(name) != whole} - {"lock"}
        assert not left, f"left or changed: {left}"
    return outcome
