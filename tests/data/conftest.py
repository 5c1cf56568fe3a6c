"""What the tests of data share."""

import pytest

from tests.helpers.image_files import encoded, parquet, pixels


@pytest.fixture(autouse=True)
def no_local_data(monkeypatch):
    monkeypatch.delenv("INNERMAX_DATA", raising=False)


@pytest.fixture
def folder(tmp_path):
    """A parquet folder whose train split a test overwrites."""
    for split in ("train", "test"):
        parquet(tmp_path / f"{split}.parquet", [encoded(image) for image in pixels(2)], [0, 1])
    return tmp_path
