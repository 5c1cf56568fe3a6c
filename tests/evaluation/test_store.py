"""Evaluations that are killed, interrupted, shared and damaged: the table is the same to the bit."""

import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import tempfile
import time
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import nn

import innermax as im
from innermax.distributed import spawn
from innermax.distributed.spawn import run_processes
from innermax.evaluation.store import ATTACK_KINDS, CLEAN_KINDS, AttackRows, OtherRows, Part, Parts, open_rows
from innermax.oracle import oracle

THREAT = im.Linf(0.01)
ATTACKS = {"fgsm": im.FGSM(THREAT), "pgd/20": im.PGD(THREAT, 20), "PGD/20": im.PGD(THREAT, 20, restarts=2)}
SIZE, COUNT = 20, 130
CHUNKS = 7


class Noisy(nn.Module):
    """A network of digits that draws random numbers, with a number that is no parameter."""

    def __init__(self, seed=0, scale=1.0):
        super().__init__()
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        self.scale = scale

    def forward(self, x):
        return self.scale * self.network(x + 0.02 * torch.randn_like(x))


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()


def examples(seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (COUNT, 1, 8, 8), dtype=torch.uint8, generator=generator)
    with torch.random.fork_rng(), torch.no_grad():
        labels = Noisy()(images / 255).argmax(1)
    return images, labels


def evaluated(rows_dir=None, **changed):
    with torch.random.fork_rng():
        arguments = {
            "model": Noisy(),
            "test_set": examples(),
            "attacks": ATTACKS,
            "batch_size": SIZE,
            "seed": 3,
        } | changed
    return im.evaluate(rows_dir=rows_dir, **arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an evaluation that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "rows"
    evaluated(folder)
    return folder


def table(folder):
    return (folder / "rows.parquet").read_bytes()


def files(folder):
    return sorted((folder / "parts").rglob("*.parquet"))


@dataclass(frozen=True)
class Failing:
    """An attack of which nothing is left undone, until a file is there: then it raises, at one of the chunks."""

    threat: object
    sign: str
    kind: str = "ValueError"
    chunk: int = 4

    def __call__(self, model, x, y, *, seed=0, index=None, final="gradient"):
        if int(index[0]) == self.chunk * SIZE and Path(self.sign).exists():
            raise {"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt}[self.kind]("it broke")
        return im.FGSM(self.threat)(model, x, y, seed=seed, index=index, final=final)


def test_the_table_is_the_evaluations(whole):
    evaluation = evaluated()
    found = pq.read_table(whole / "rows.parquet").to_pandas()
    assert found.equals(evaluation.examples)
    per_attack = ["success", *(field.name for field in fields(AttackRows))]
    assert list(found) == [
        *("index", "label", "clean_prediction", "clean_correct", "seed"),
        *(f"{name}_{column}" for name in ATTACKS for column in per_attack),
    ]
    assert (found["seed"] == 3).all()
    assert 0 < found["fgsm_success"].sum() < COUNT
    assert len(files(whole)) == 4 * CHUNKS
    sizes = {len(pq.read_table(path)) for path in files(whole)}
    assert sizes == {SIZE, COUNT % SIZE}


def test_a_finished_evaluation_is_only_read(whole, monkeypatch):
    expected, before = evaluated(), {path: path.stat().st_mtime_ns for path in files(whole)}
    monkeypatch.setattr(im.PGD, "__call__", lambda *_, **__: pytest.fail("attacked"))
    told = []
    again = evaluated(whole, progress=lambda *step: told.append(step))
    assert again.examples.equals(expected.examples)
    assert again.settings == expected.settings
    assert all(convergence.seconds > 0 for convergence in again.convergence.values())
    assert {path: path.stat().st_mtime_ns for path in files(whole)} == before
    assert told[-1] == ("PGD/20", COUNT, COUNT)
    assert told == sorted(told, key=lambda step: ["clean", *ATTACKS].index(step[0]))


def _child(folder):
    torch.set_num_threads(1)
    oracle.times_as_long = lambda *_: 0.5  # as in this process
    evaluated(folder)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_table(whole, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["innermax.evaluation.evaluate", "innermax.evaluation.store", "pyarrow.parquet", "pytest"]
    )
    moments, folder = random.Random(7), tmp_path / "rows"
    kept = 0
    for _ in range(5):
        process = context.Process(target=_child, args=(folder,))
        process.start()
        goal = kept + moments.randrange(0, 6)
        while process.is_alive() and len(files(folder)) < goal:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it ended before it was killed: give it more to do"
        assert not (folder / "rows.parquet").exists()
        assert len(files(folder)) >= kept
        kept = len(files(folder))
    assert 0 < kept < 4 * CHUNKS
    before = {path: path.stat().st_mtime_ns for path in files(folder)}
    evaluated(folder)
    assert table(folder) == table(whole)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in files(folder)}.items(), "no part is made twice"


def test_what_a_kill_leaves_half_written_does_no_harm(whole, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "config.yaml.part").write_text("mod")
    evaluated(folder)
    files(folder)[3].unlink()
    files(folder)[4].with_name("000000020.parquet.part").write_bytes(b"PAR1")
    (folder / "rows.parquet").unlink()
    evaluated(folder)
    assert table(folder) == table(whole)


@pytest.mark.parametrize("kind", ["ValueError", "KeyboardInterrupt"])
def test_a_failing_attack_leaves_what_is_finished_and_says_where(tmp_path, kind):
    sign, folder = tmp_path / "broken", tmp_path / "rows"
    attacks = ATTACKS | {"failing": Failing(THREAT, str(sign), kind)}
    sign.touch()
    with pytest.raises({"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt}[kind]) as caught:
        evaluated(folder, attacks=attacks)
    assert str(caught.value) == "it broke"
    (note,) = caught.value.__notes__
    assert note == f"Rows that are finished are kept in {folder}: the same evaluation resumes from them."
    assert len(files(folder)) == 4 * CHUNKS + 4
    sign.unlink()
    assert evaluated(folder, attacks=attacks).examples.equals(evaluated(attacks=attacks).examples)


def test_of_a_single_batch_only_what_attacks_have_ended_is_kept_and_the_note_says_so(tmp_path):
    sign, folder = tmp_path / "broken", tmp_path / "rows"
    sign.touch()
    attacks = ATTACKS | {"failing": Failing(THREAT, str(sign), "KeyboardInterrupt", chunk=0)}
    with pytest.raises(KeyboardInterrupt) as caught:
        evaluated(folder, attacks=attacks, batch_size=500)
    assert f"All {COUNT} images are one batch" in caught.value.__notes__[0]
    assert "a smaller batch_size finishes some sooner" in caught.value.__notes__[0]
    assert [path.parent.name[2:] for path in files(folder)] == ["PGD_20", "clean", "fgsm", "pgd_20"]


def test_without_a_folder_nothing_is_said_of_one(tmp_path):
    with pytest.raises(ValueError, match="it broke") as caught:
        evaluated(attacks={"failing": Failing(THREAT, str(tmp_path))})
    assert not hasattr(caught.value, "__notes__")


def test_one_process_goes_on_where_two_failed(tmp_path):
    sign, folder, port = tmp_path / "broken", tmp_path / "rows", os.environ.get("MASTER_PORT")
    attacks = ATTACKS | {"failing": Failing(THREAT, str(sign), chunk=5)}
    expected = evaluated(attacks=attacks).examples
    sign.touch()
    with pytest.raises(ValueError, match=r"^it broke") as caught:
        evaluated(folder, attacks=attacks, devices=2)
    assert str(folder) in caught.value.__notes__[0]
    assert not (folder / "rows.parquet").exists()
    kept = files(folder)
    assert any("fgsm" in str(path) for path in kept)
    assert os.environ.get("MASTER_PORT") == port
    assert not multiprocessing.active_children()
    sign.unlink()
    told = []
    assert evaluated(folder, attacks=attacks, progress=lambda *step: told.append(step)).examples.equals(expected)
    assert set(kept) < set(files(folder))
    assert told[-1] == ("failing", COUNT, COUNT)


def _summed(task, rank, processes, device):
    images, labels, answer = task
    mapped = ".npy" in Path("/proc/self/maps").read_text()
    Path(answer).write_text(f"{mapped} {images.sum()} {labels.sum()}")


def test_processes_map_what_is_too_large_for_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(spawn, "IN_MEMORY", 1000)
    images, labels = examples()
    folder, place = tmp_path / "files", tmp_path / "temporary"
    for path in (folder, place):
        path.mkdir()
    pickled = spawn._pickle((images, images[50:], labels), folder, 2)
    assert len(pickled) < images.numel() / 4
    for found, expected in zip(pickle.loads(pickled), (images, images[50:], labels), strict=True):
        assert torch.equal(found, expected)
    assert len(list(folder.iterdir())) == 3
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    run_processes(_summed, (images, labels, str(tmp_path / "answer")), 1, "cpu", lambda: None)
    assert (tmp_path / "answer").read_text() == f"True {images.sum()} {labels.sum()}"
    assert not list(place.glob("innermax-*"))


def test_what_does_not_pickle_is_said(tmp_path):
    model = Noisy()
    model.hidden = lambda x: x
    with pytest.raises(TypeError, match=r"devices=2 needs a model and attacks that pickle, and these do not: .*lambda"):
        evaluated(model=model, devices=2)


def _silent(task, rank, processes, device):
    os._exit(3)


def test_a_process_that_dies_is_an_error():
    with pytest.raises(ChildProcessError, match=r"one of 1 processes ended early: .*exit code 3"):
        run_processes(_silent, None, 1, "cpu", lambda: None)


def other_images():
    images, labels = examples()
    images[-1, 0, 0, 0] ^= 1
    return images, labels


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda: {"model": Noisy(seed=1)}, "weights: .* there, .* here"),
        (lambda: {"model": Noisy(scale=1.01)}, "the model answers the first examples in another way"),
        (lambda: {"model": nn.Sequential(Noisy())}, "model: Noisy there, Sequential here"),
        (lambda: {"test_set": other_images()}, "test_set: .* there"),
        (
            lambda: {"attacks": {**ATTACKS, "fgsm": im.FGSM(im.Linf(0.2))}},
            "attacks.fgsm.threat.eps: 0.01 there, 0.2 here",
        ),
        (lambda: {"attacks": {"fgsm": ATTACKS["fgsm"]}}, "attacks.pgd/20: .* there, None here"),
        (lambda: {"seed": 4}, "seed: 3 there, 4 here"),
        (lambda: {"batch_size": 21}, "batch_size: 20 there, 21 here"),
        (lambda: {"quantize": 8}, "quantize: None there, 8 here"),
        (lambda: {"precision": "auto"}, "precision: float32 there, auto here"),
    ],
)
def test_another_evaluation_is_refused(whole, changed, words):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with torch.random.fork_rng():
        other = changed()
    with pytest.raises(ValueError, match=f"rows_dir {re.escape(str(whole))} belongs to another evaluation .*{words}"):
        evaluated(whole, **other)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_the_last_bits_of_the_models_answers_are_no_other_model(whole):
    path = whole / "config.yaml"
    before = path.read_text()
    config = yaml.safe_load(before)
    config["answers"] = [answer * (1 + 1e-5) for answer in config["answers"]]
    path.write_text(yaml.safe_dump(config))
    evaluated(whole)
    path.write_text(before)


def test_the_number_of_threads_is_no_other_evaluation(whole, monkeypatch):
    threads = torch.get_num_threads()
    for kind in {type(attack) for attack in ATTACKS.values()}:
        monkeypatch.setattr(kind, "__call__", lambda *_, **__: pytest.fail("attacked again"))
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        evaluated(whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("before", ["bf16", "float32"])
@pytest.mark.parametrize("search", ["evaluate", "transfer"])
def test_the_folders_own_precision_wins_over_the_clock(tmp_path, monkeypatch, before, search):
    monkeypatch.setattr("innermax.oracle.oracle.has_fast_bf16", lambda _: True)
    model, (images, labels) = small_network(), examples()

    def measure(chosen, folder=None):
        monkeypatch.setattr("innermax.oracle.oracle.times_as_long", lambda *_: 2.0 if chosen == "float32" else 0.5)
        options = {"attacks": {"pgd": im.PGD(im.Linf(0.1), steps=2)}, "precision": "auto", "rows_dir": folder}
        if search == "evaluate":
            return im.evaluate(model, (images, labels), **options, batch_size=SIZE)
        return im.transfer({"a; b": model, "c": model}, {"d": model}, (images, labels), **options, batch_size=SIZE)

    after = {"bf16": "float32", "float32": "bf16"}[before]
    assert ("bf16" in measure(after).settings.attack_network) == (after == "bf16")
    expected = measure(before, tmp_path / "rows")
    assert ("bf16" in expected.settings.attack_network) == (before == "bf16")
    for part in sorted((tmp_path / "rows" / "parts").rglob("*.parquet"))[-2:]:
        part.unlink()
    again = measure(after, tmp_path / "rows")
    assert again.settings.attack_network == expected.settings.attack_network
    for name, column in expected.columns().items():
        np.testing.assert_array_equal(again.columns()[name], column)


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("2 BatchNorm folded, channels last, float32", "as the model is, float32, 8 threads", True),
        ("unfolded (bf16 is not traced), float32 (bf16 changes logits by 1e+00)", "0 BatchNorm folded, float32", True),
        ("0 BatchNorm folded, bf16, CUDA graphs", "0 BatchNorm folded, bf16", True),
        ("0 BatchNorm folded, bf16, 2 threads", "0 BatchNorm folded, float32, 2 threads", False),
        ("one: 0 BatchNorm folded, bf16; two: 0 BatchNorm folded, float32", "one: 0 BatchNorm folded, float32", False),
    ],
)
def test_of_an_attacks_network_the_precision_counts(tmp_path, before, now, same):
    told = {"answers": [0.5], "seed": 0}
    open_rows(tmp_path, told | {"attack_network": before})
    if same:
        open_rows(tmp_path, told | {"attack_network": now})
        return
    with pytest.raises(OtherRows, match="attack_network: bf16 there, float32 here"):
        open_rows(tmp_path, told | {"attack_network": now})


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"exists and holds no rows of innermax"):
        evaluated(tmp_path)
    with pytest.raises(ValueError, match=r"exists and holds no rows of innermax"):
        evaluated(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def truncated(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [truncated, lambda _: b"", lambda _: b"PAR1 no more PAR1"])
def test_a_damaged_part_is_named_and_computed_again(whole, damage):
    path = files(whole)[CHUNKS * 2 + 1]
    before = path.read_bytes()
    path.write_bytes(damage(before))
    with pytest.warns(UserWarning, match=f"{re.escape(str(path))} is damaged .*its rows are computed again") as caught:
        again = evaluated(whole)
    assert len(caught) == 1
    assert again.examples.equals(pq.read_table(whole / "rows.parquet").to_pandas())
    assert evaluated(whole).examples.equals(again.examples), "and is whole now"


def test_a_part_of_other_rows_is_not_taken(whole):
    expected = evaluated(whole).examples
    for source, path in [(1, 2), (CHUNKS + 1, 1), (2 * CHUNKS + 1, 3 * CHUNKS + 1)]:
        files(whole)[path].write_bytes(files(whole)[source].read_bytes())
        with pytest.warns(UserWarning, match="is damaged"):
            assert evaluated(whole).examples.equals(expected)
    files(whole)[2].write_bytes(files(whole)[1].read_bytes())
    with pytest.warns(UserWarning, match=r"it does not hold the examples 40…59\)"):
        evaluated(whole)


@pytest.mark.parametrize("order", [(0, 2, 4), (4, 0, 2)])
def test_parts_of_several_types_are_one_column(order):
    """As of an attack that gauges itself on some batches only."""
    parts = Parts({"clean": CLEAN_KINDS, "a": ATTACK_KINDS}, 5, 2, None)
    values = {0: np.array([True, False]), 2: np.array([math.nan, math.nan]), 4: np.array([True])}
    for start in order:
        parts.add("a", start, Part({"zero_gradient": values[start]}, 1.5))
    joined = parts.join("a")
    np.testing.assert_array_equal(joined.columns["zero_gradient"], [1, 0, math.nan, math.nan, 1])
    assert joined.seconds == 4.5
    assert parts.find_missing("a") == []
    assert parts.find_missing("clean") == [0, 2, 4]


def test_a_turned_bit_never_turns_a_row(whole):
    kinds = {"clean": CLEAN_KINDS} | dict.fromkeys(ATTACKS, ATTACK_KINDS)
    path = files(whole)[-1]
    content = path.read_bytes()

    def read():
        parts = Parts(kinds, COUNT, SIZE, whole)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts.read()
        there = 6 * SIZE in parts.held["pgd/20"]
        return {key: column[6 * SIZE :] for key, column in parts.columns["pgd/20"].items()} if there else None

    expected, refused = read(), 0
    assert expected is not None
    assert {len(column) for column in expected.values()} == {COUNT % SIZE}
    for place in range(0, len(content), 61):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        found = read()
        refused += found is None
        assert found is None or all(
            np.array_equal(found[key], column, equal_nan=True) for key, column in expected.items()
        )
    path.write_bytes(content)
    assert refused > 20
