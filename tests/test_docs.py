"""The documentation: its code runs and prints what it says, its commands exist, and its site is built and whole."""

import html
import re
import runpy
import subprocess
import sys
import tomllib

import pytest

import innermax
from innermax.cli import main
from tests.helpers.documented import ROOT, assert_alike, blocks, check_commands, commands, run
from tests.test_layout import FLOORS

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CODED = [page for page in PAGES if any(block.language == "python" for block in blocks(page.read_text()))]
SITE = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]


def name(page):
    return str(page.relative_to(DOCS))


@pytest.mark.usefixtures("untyped")  # pages run as their readers run them, and in half the time
@pytest.mark.filterwarnings("default::FutureWarning")  # PyTorch Lightning's own
@pytest.mark.parametrize("page", CODED, ids=name)
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        run(page)
    except ModuleNotFoundError as error:  # an extra of innermax that is not installed
        if error.name is None or error.name.startswith("innermax"):
            raise
        pytest.skip(f"{name(page)} is not tested: it needs {error.name}")


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page.read_text())], ids=name)
def test_the_commands_of_a_page_are_known(page, capsys):
    check_commands(commands(page.read_text()), capsys)


def test_the_cheap_command_runs(capsys):
    assert main(["recipes"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == set(re.findall(r"^\| `([\w-]+)` \|", (DOCS / "recipes.md").read_text(), re.MULTILINE))


def test_what_is_printed_is_compared():
    assert_alike("robust 61 %, 1,010 of 2\n", "robust 60 %,\n1,000 of 2", "here")
    for printed in ("robust 70 %, 1,010 of 2", "robust 61 %, 1,500 of 2", "other 60 %, 1,000 of 2", "robust 60 %"):
        with pytest.raises(AssertionError):
            assert_alike(printed, "robust 60 %, 1,000 of 2", "here")


def test_every_page_is_in_the_navigation():
    """A page that is missing there is added to `nav` in zensical.toml."""

    def files(entry):
        for value in entry.values():
            yield from [value] if isinstance(value, str) else (file for inner in value for file in files(inner))

    listed = {file for entry in SITE["nav"] for file in files(entry)}
    there = {name(page) for page in PAGES}
    assert there <= listed
    assert all((ROOT / file).is_file() for file in listed - there)


def test_the_architecture_is_that_of_the_code():
    """The page and its picture show the floors that imports keep to, and every file that the page names is there."""
    page, script = (DOCS / "architecture.md").read_text(), runpy.run_path(str(DOCS / "architecture.py"))
    (told,) = re.findall(r"^From the top: (.*?)\.$", page, re.MULTILINE | re.DOTALL)
    assert [re.findall(r"`(\w+)`", floor) for floor in told.split("·")] == [list(floor) for floor in FLOORS]
    drawn = [{box.name.removesuffix("/").removesuffix(".py") for box in floor} for floor in script["FLOORS"]]
    assert drawn == [set(floor) for floor in FLOORS]
    assert (DOCS / "assets" / "architecture.svg").read_text(encoding="utf-8") == script["picture"]()
    source = ROOT / "src" / "innermax"
    for path in re.findall(r"`((?:\w+/)?\w+\.py|\w+/)`", page):
        assert (source / path).exists() or (ROOT / path).exists() or any(source.glob(f"*/{path}")), path


def test_every_public_name_is_in_the_reference():
    told = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    missing = [public for public in innermax.__all__ if f"::: innermax.{public}\n" not in told]
    assert not missing


def test_docstrings_describe_parameters_that_there_are(caplog):
    """As the reference reads them: each parameter by itself."""
    griffe = pytest.importorskip("griffe", reason="docstrings are not read: pip install 'innermax[docs]'")

    def read(part):
        if part.is_alias:
            return
        if part.docstring is not None:
            _ = part.docstring.parsed  # which warns
        for member in part.members.values():
            read(member)

    read(griffe.load("innermax", search_paths=[ROOT / "src"], docstring_parser="google"))
    assert not [record.getMessage() for record in caplog.records]


def test_what_is_promised_is_there():
    """The list of names, parameters and members; `python docs/api.py` writes it, and a promise that is kept stays."""
    page = runpy.run_path(str(DOCS / "api.py"))["write"]()
    assert (DOCS / "reference" / "api.md").read_text(encoding="utf-8") == page
    assert all(re.search(rf"^{public}\b", page, re.MULTILINE) for public in innermax.__all__)


def test_columns_stay_aligned_on_the_site_and_its_pictures_open():
    shown = runpy.run_path(str(DOCS / "assemble.py"))["shown"]
    before = "```python\na = 1    # one\n```\n\nWords    apart.\n\n```text\none sentence\n```\n"
    assert shown(before) == before
    for language in ("", "text"):
        assert shown(f"{before}```{language}\na    b\n```\n") == f"{before}```{{ .text .columns }}\na    b\n```\n"
    assert shown("![a\nb](c.png)") == "[![a\nb](c.png)](c.png)"


@pytest.fixture
def site(tmp_path):
    """The folder of the built site; built apart from the repository, where others may be building it."""
    pytest.importorskip("zensical", reason="the site is not built: pip install 'innermax[docs]'")
    settings = (ROOT / "zensical.toml").read_text().replace('paths = ["src"]', f"paths = ['{ROOT / 'src'}']")
    (tmp_path / "zensical.toml").write_text(settings)
    subprocess.run([sys.executable, "docs/assemble.py", tmp_path / SITE["docs_dir"]], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path / SITE["site_dir"]


def test_the_site_builds_strictly_is_whole_and_asks_no_other_host_for_anything(site):
    pages = {str(page.relative_to(site)): page.read_text() for page in site.rglob("*.html")}
    for page, text in pages.items():
        asked = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", text)
        assert not asked, (page, asked)
        assert not re.search(r"/(?:work|tmp|home|root)/", re.sub(r"<[^>]+>", " ", text)), page
        for picture in re.findall(r"<img\b[^>]*?src=\"([^\"]+)\"", text):
            assert (site / page).parent.joinpath(picture).is_file(), (page, picture)
    sheets = "".join(sheet.read_text() for sheet in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\s)]+", sheets)
    reference = "".join(text for page, text in pages.items() if page.startswith("reference/"))
    words = " ".join(html.unescape(re.sub(r"<[^>]+>", "", reference)).replace("`", "").split())
    for public in innermax.__all__:
        assert f'id="innermax.{public}"' in reference, public
        first = (getattr(innermax, public).__doc__ or "").split("\n\n")[0]
        assert " ".join(first.replace("`", "").split()) in words, public
