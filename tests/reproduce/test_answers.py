"""Answers on disk: files of their own, the pack, and both together."""

import json
import lzma
from concurrent.futures import ThreadPoolExecutor

import pytest

from innermax.reproduce.answers import Answers
from innermax.reproduce.run import ARTIFACTS, reproduce
from innermax.reproduce.scales import SCALES
from innermax.utils.files import lock_file


def record(number):
    return {"question": {"n": number}, "answer": {"value": number / 3}, "environment": {}, "seconds": 0.5}


@pytest.fixture
def answers(tmp_path):
    return Answers(tmp_path / "results" / "answers.json.xz", [tmp_path / "cache", tmp_path / "old"])


def again(answers):
    """The same answers for another process."""
    return Answers(answers.pack, answers.folders)


def test_a_new_answer_is_a_file_of_the_first_folder(answers):
    assert answers.find("one") is None
    answers.add("one", record(1))
    assert answers.find("one") == record(1)
    assert json.loads((answers.folders[0] / "one.json").read_text()) == record(1)
    assert not answers.pack.exists()


def test_the_pack_is_read_first_then_the_folders_in_turn(answers):
    for n, folder in enumerate(answers.folders):
        folder.mkdir()
        (folder / "both.json").write_text(json.dumps(record(n)))
    (answers.folders[1] / "old.json").write_text(json.dumps(record(7)))
    assert (answers.find("both"), answers.find("old")) == (record(0), record(7))
    answers.pack_up(["both"])
    answers.add("both", record(9))
    assert again(answers).find("both") == record(0)
    assert again(answers).find("old") == record(7)


def test_packing_keeps_what_is_there_and_leaves_out_what_was_not_asked_or_measured(answers):
    for n in range(4):
        answers.add(f"n{n}", record(n))
    answers.pack_up(["n1", "n0"])
    again(answers).pack_up(["n1", "n2", "missing"])
    packed = json.loads(lzma.decompress(answers.pack.read_bytes()))
    assert packed == {f"n{n}": record(n) for n in range(3)}
    assert list(packed) == sorted(packed)


def test_equal_answers_make_equal_bytes_and_nothing_new_writes_nothing(answers, tmp_path):
    for n in range(3):
        answers.add(f"n{n}", record(n))
    answers.pack_up(["n2", "n0", "n1"])
    other = Answers(tmp_path / "other.xz", answers.folders)
    other.pack_up(["n0"])
    again(other).pack_up(["n1", "n2"])
    assert other.pack.read_bytes() == answers.pack.read_bytes()
    answers.pack.chmod(0o400)
    before = answers.pack.stat()
    again(answers).pack_up(["n0", "n1", "n2"])
    assert answers.pack.stat().st_mtime_ns == before.st_mtime_ns
    assert answers.pack.stat().st_ino == before.st_ino


def test_what_another_packed_meanwhile_stays(answers, tmp_path):
    mine, theirs = answers, Answers(answers.pack, [tmp_path / "their cache"])
    assert mine.find("theirs") is theirs.find("mine") is None  # both have looked
    mine.add("mine", record(1))
    theirs.add("theirs", record(2))
    mine.pack_up(["mine"])
    theirs.pack_up(["theirs"])
    assert again(answers).find("mine") == record(1)
    assert again(answers).find("theirs") == record(2)


def test_packing_waits_for_its_turn(answers):
    answers.add("one", record(1))
    with ThreadPoolExecutor() as pool:
        with lock_file(answers.pack.with_name("answers.lock"), "the pack"):
            packing = pool.submit(answers.pack_up, ["one"])
            with pytest.raises(TimeoutError):
                packing.result(timeout=0.5)
            assert not answers.pack.exists()
        packing.result(timeout=10)
    assert again(answers).find("one") == record(1)


@pytest.mark.parametrize("content", [b"no xz", lzma.compress(b"[1]"), lzma.compress(b"{"), lzma.compress(b'{"n": 1}')])
def test_a_pack_that_is_not_readable_is_named(answers, content):
    answers.pack.parent.mkdir(parents=True)
    answers.pack.write_bytes(content)
    with pytest.raises(ValueError, match=r"answers\.json\.xz"):
        answers.find("n")
    with pytest.raises(ValueError, match=r"answers\.json\.xz"):
        answers.pack_up(["n"])
    assert answers.pack.read_bytes() == content


def test_a_file_that_lacks_its_answer_is_named(answers):
    answers.folders[0].mkdir()
    (answers.folders[0] / "one.json").write_text('{"experiment": {}}')
    with pytest.raises(ValueError, match=r"one\.json.*must have answer, environment, seconds"):
        answers.find("one")


def test_answers_of_an_older_version_are_read_and_packed(tmp_path):
    """It kept them as files in out/answers."""

    def page(out, cache, **options):
        return reproduce(["theorem1"], scale="smoke", out=out, cache=cache, say=lambda line: None, **options)[0]

    first = page(tmp_path / "first", tmp_path / "cache").read_text()
    (file,) = (tmp_path / "cache" / "answers").iterdir()
    old = tmp_path / "out" / "answers"
    old.mkdir(parents=True)
    file.rename(old / file.name)
    assert page(tmp_path / "out", tmp_path / "empty", minutes=0).read_text() == first
    (old / file.name).unlink()
    assert page(tmp_path / "out", tmp_path / "empty", minutes=0).read_text() == first  # packed
    (name,) = json.loads(lzma.decompress((tmp_path / "out" / "smoke" / "answers.json.xz").read_bytes()))
    assert name == file.stem
    assert len(ARTIFACTS["theorem1"].experiments(SCALES["smoke"])) == 1
