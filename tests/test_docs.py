"""The documentation's code runs as written, and prints what it says it prints."""

import pytest

from documented import ROOT, blocks, run

PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.language == "python" for block in blocks(page.read_text()))],
    ids=lambda page: str(page.relative_to(ROOT / "docs")),
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, {})
