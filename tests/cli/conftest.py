"""What tests of commands share."""

import pytest

from tests.helpers.recipes import SHAPES, write_parquet


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, with made-up data under the names of the real sets."""
    for name, shape in SHAPES.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for split, count in (("train", 16), ("test", 4)):
            write_parquet(tmp_path / "data" / name / f"{split}.parquet", count, shape)
    monkeypatch.setenv("INNERMAX_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path
