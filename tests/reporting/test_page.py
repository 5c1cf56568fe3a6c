"""The report's page: its numbers are the evaluation's, it holds nothing foreign, and a browser shows it as meant."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import innermax as im
from innermax.attacks.trace import trace_search
from innermax.cli import main
from innermax.reporting import charts, contents, svg
from innermax.reporting.gallery import Gallery, select_images
from innermax.reporting.page import format_eps

ROOT = Path(__file__).parents[2]
HOSTILE = '</script><img src=x onerror="alert(1)">'
CLASSES = ["<u>nought</u>", "&amp;", *"23456789"]
THREAT = im.Linf(0.15)
ATTACKS = {"fgsm": im.FGSM(THREAT), 'pgd-4"><i>': im.PGD(THREAT, 4), "cw-4": im.CW(THREAT, 4)}
FLAGS = (
    "headless",
    "no-sandbox",
    "hide-scrollbars",
    "disable-gpu",
    "disable-quic",
    "disable-dev-shm-usage",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "force-prefers-reduced-motion",
    "no-first-run",
)


class Page(HTMLParser):
    """What a page holds: its tags, addresses and texts, and the numbers of the first table of accuracies."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.texts, self.rows, self.scripts = [], [], [], {}, []
        self.row = self.cell = self.script = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        self.tags.append((tag, told))
        self.addresses += [told[name] for name in ("src", "href", "action", "srcset", "data") if name in told]
        if tag == "tr":
            self.row = told.get("data-attack")
        self.cell = told.get("data-number")
        self.script = told if tag == "script" else None

    def handle_endtag(self, tag):
        self.cell = self.script = None

    def handle_data(self, data):
        if self.script is not None:
            self.scripts.append((self.script, data))
        elif data.strip():
            self.texts.append(data.strip())
        if self.cell and self.row:
            self.rows.setdefault(self.row, {}).setdefault(self.cell, data.strip())

    @property
    def numbers(self):
        return json.loads(next(text for told, text in self.scripts if told.get("id") == "numbers"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of two epochs on some digits, and its evaluation."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    data = im.load_data("digits")
    torch.manual_seed(0)
    model = im.build_model("digits-cnn", input_shape=data.train.shape)
    strategy = im.Dynamic(im.PGD(THREAT, 3))
    settings = {"data": "digits", "threat": {"norm": "linf", "eps": 0.15}}
    few = data.train[:600]
    options = {"epochs": 3, "batch_size": 64, "lr": 0.05, "progress": False, "settings": settings}
    run = im.train(model, few, strategy, validation_set=data.validation, run_dir=folder, **options)
    evaluation = im.evaluate(run.model, data.test[:160], ATTACKS)
    return run, data, evaluation


@pytest.fixture(scope="module")
def gallery(trained):
    run, data, evaluation = trained
    return im.gallery(run.model, data.test[:160], ATTACKS, evaluation, pictures=120, class_names=CLASSES)


@pytest.fixture(scope="module")
def page(trained, gallery, tmp_path_factory):
    """The report of two models, one of which is only an evaluation."""
    run, _, evaluation = trained
    path = tmp_path_factory.mktemp("page") / "report.html"
    shown = {HOSTILE: im.Exhibit(evaluation, run, gallery), "numbers alone": evaluation}
    assert im.report(shown, path) == path
    return path


def test_numbers_are_the_evaluations(page, trained):
    document = json.loads(trained[2].to_json())
    told = Page(page.read_text())
    assert list(told.rows) == ["clean", *ATTACKS, "worst_case"]
    for name, row in told.rows.items():
        value = document["worst_case"] if name == "worst_case" else document["accuracy"][name]
        assert row["accuracy"] == f"{100 * value['value']:.2f}"
        assert row["interval"] == f"{100 * value['low']:.2f}–{100 * value['high']:.2f}"
        if name in ATTACKS:
            assert float(row["gradients"]) == pytest.approx(document["convergence"][name]["gradients"], rel=5e-3)
    del document["examples"]
    assert told.numbers == {HOSTILE: document, "numbers alone": document}
    assert document["audit"]["verdict"] in told.texts
    stronger = document["audit"]["evidence"]["fallen"]
    assert all(name in told.texts and str(count) in told.texts for name, count in stronger.items())


def test_what_is_foreign_shows_as_text(page):
    told = Page(page.read_text())
    assert HOSTILE in told.texts
    assert "<u>nought</u>" in " ".join(told.texts)
    assert "&amp;" in told.texts, "the class is called that, not &"
    assert not {"u", "i"} & {tag for tag, _ in told.tags}
    assert all(told.get("src", "").startswith("data:image/png;base64,") for tag, told in told.tags if tag == "img")
    assert not [name for _, attributes in told.tags for name in attributes if name.startswith("on")]
    assert len(told.scripts) == 2


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert all(address.startswith(("data:", "#")) for address in Page(text).addresses)
    assert not re.findall(r"https?://|url\(|@import", text)
    assert "default-src 'none'" in text


def test_one_evaluation_a_folder_and_a_file_are_shown(trained, tmp_path):
    run, _, evaluation = trained
    evaluation.to_json(tmp_path / "scores.json")
    for shown in (evaluation, [evaluation, run], run, run.run_dir, tmp_path / "scores.json"):
        im.report(shown, tmp_path / "page.html", pictures=0)
        told = Page((tmp_path / "page.html").read_text())
        numbers = [value for value in told.numbers.values() if value is not None]
        assert all(value["worst_case"]["value"] == evaluation.worst_case.value for value in numbers)
    assert list(Page((tmp_path / "page.html").read_text()).numbers) == ["scores.json"]


def test_a_run_folder_makes_its_own_pictures(trained, tmp_path, capsys):
    run, data, _ = trained
    folder = shutil.copytree(run.run_dir, tmp_path / "run")
    status = main(["report", str(folder), "-o", str(tmp_path / "page.html")])
    assert (status, capsys.readouterr().err) == (0, "")
    assert "innermax evaluate" in (tmp_path / "page.html").read_text(), "it says what is missing"
    attacks = {"fgsm": im.FGSM(THREAT), "pgd-2": im.PGD(THREAT, 2)}
    im.evaluate(run.model, data.test[:60], attacks, audit=False).to_json(folder / "evaluation.json")
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html"), "--pictures", "20"]) == 0
    cards = [told for _, told in Page((tmp_path / "page.html").read_text()).tags if "data-outcome" in told]
    assert len(cards) == 20
    im.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data.test[:60], attacks, audit=False).to_json(
        folder / "evaluation.json"
    )
    with pytest.warns(UserWarning, match="evaluation.json measured other weights than the run's: innermax evaluate"):
        im.report(folder, tmp_path / "page.html")
    told = Page((tmp_path / "page.html").read_text())
    assert told.numbers == {"run": None}
    assert "measured other weights than" in (tmp_path / "page.html").read_text()


def test_an_evaluation_that_does_not_say_of_which_weights_it_is(trained, tmp_path):
    run, data, _ = trained
    folder, page = shutil.copytree(run.run_dir, tmp_path / "run"), tmp_path / "page.html"
    attacks = {"fgsm": im.FGSM(THREAT)}
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for model, pictures in ((run.model, 60), (other, 0)):
        document = json.loads(im.evaluate(model, data.test[:60], attacks, audit=False).to_json())
        del document["weights"]  # as version 0.1 wrote it
        (folder / "evaluation.json").write_text(json.dumps(document))
        im.report(folder, page)
        told = Page(page.read_text())
        assert told.numbers["run"]["accuracy"] == document["accuracy"]
        assert len([None for _, attributes in told.tags if "data-outcome" in attributes]) == pictures
        assert "does not say which weights it measured" in page.read_text()
        assert ("is not of its model" in page.read_text()) == (model is other)


def test_pictures_are_of_the_weights_that_were_measured(trained, tmp_path, monkeypatch):
    """Here of the last epoch's, which predicts much like the best one's."""
    run, data, _ = trained
    folder = shutil.copytree(run.run_dir, tmp_path / "run")
    torch.manual_seed(7)
    im.save_model(folder, im.build_model("digits-cnn", input_shape=(1, 8, 8)), "best.safetensors")
    attacks = {"fgsm": im.FGSM(THREAT)}
    model = im.load_model(folder)
    im.evaluate(model, data.test[:60], attacks, audit=False).to_json(folder / "evaluation.json")
    asked = []
    monkeypatch.setattr(contents, "gallery", lambda model, *_, **__: asked.append(model) or Gallery((), None, None))
    im.report(folder, tmp_path / "page.html")
    (shown,) = asked
    assert torch.equal(shown.state_dict()["0.weight"], model.state_dict()["0.weight"])


def test_evaluate_writes_a_page(trained, tmp_path, capsys):
    folder, page = shutil.copytree(trained[0].run_dir, tmp_path / "run"), tmp_path / "page.html"
    words = ["evaluate", str(folder), "--limit", "40", "--attacks", "fgsm,pgd-2"]
    assert main([*words, "--json", str(tmp_path / "scores.json"), "--html", str(page)]) == 0
    told, document = Page(page.read_text()), json.loads((tmp_path / "scores.json").read_text())
    assert told.numbers[str(folder)]["accuracy"] == document["accuracy"]
    assert len([None for _, attributes in told.tags if "data-outcome" in attributes]) == 80
    assert "Training loss" in told.texts, "a run folder's training is shown, too"
    assert main([*words, "--html", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "html" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "not readable"),
        (["."], "no run folder"),
        (["-o", "page.html"], "run folders first"),
        (["run", "-o", "nowhere/page.html"], "its folder does not exist"),
        (["run", "--pictures", "-1"], "at least 0"),
        (["run", "run"], "more than once"),
    ],
)
def test_the_command_refuses(trained, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(trained[0].run_dir)
    assert main(["report", *words]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert said in told
    assert not list(tmp_path.glob("*.html"))


def test_what_is_not_known_is_refused(trained, tmp_path):
    run, data, evaluation = trained
    with pytest.raises(TypeError, match="evaluations, runs, exhibits"):
        im.report({"a": 1}, tmp_path / "page.html")
    with pytest.raises(ValueError, match="at least one"):
        im.report([], tmp_path / "page.html")
    with pytest.raises(ValueError, match="what was evaluated"):
        im.gallery(run.model, data.test[1:161], ATTACKS, evaluation)
    with pytest.raises(ValueError, match="evaluation's: 'fgsm' is not"):
        im.gallery(run.model, data.test[:160], {"fgsm": im.PGD(THREAT)}, evaluation)
    (tmp_path / "half.json").write_text("{")
    with pytest.raises(ValueError, match=r"half\.json"):
        im.report(tmp_path / "half.json", tmp_path / "page.html")


# In a browser


@pytest.fixture(scope="module")
def browser():
    """Chromium, which tells what its console says and what it asks for."""
    program, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if program is None or driver is None:
        pytest.skip("nobody looks at the page: chromium and chromedriver are not installed (make browser)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as one:
        yield one


@pytest.fixture
def opened(browser, page):
    """The page in the browser, and a function that runs JavaScript there."""
    look(browser, 1200, "light")
    browser.get(page.as_uri())
    return browser


def look(browser, width, theme, media="screen"):
    """Gives the window a width, and the person a preference."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def visible(browser):
    """What the cards that are shown say of themselves."""
    shown = "[...document.querySelectorAll('.card')].filter(card => card.offsetParent)"
    return browser.execute_script(f"return {shown}.map(card => ({{...card.dataset}}))")


def choose(browser, name, value):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    Select(browser.find_element(By.NAME, name)).select_by_value(value)


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    for key in keys:
        ActionChains(browser).send_keys(key).perform()


def test_it_opens_soon_without_a_complaint_or_a_request(browser, page):
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert page.as_uri() in asked
    assert all(url == page.as_uri() or url.startswith("data:") for url in asked)
    seconds = browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")
    assert 0 < seconds < 5, "a second, on a machine that does nothing else"
    assert browser.execute_script("return [...document.images].every(image => image.naturalWidth > 0)")
    assert browser.execute_script("return document.querySelectorAll('script').length") == 2


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_width_and_theme(opened, tmp_path, width, theme):
    look(opened, width, theme)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width, "nothing hangs out"
    opened.save_screenshot(str(tmp_path / f"{width}-{theme}.png"))
    picture = np.asarray(Image.open(tmp_path / f"{width}-{theme}.png").convert("L"), dtype=float)
    assert picture.shape[1] == width
    assert (np.median(picture) > 128) == (theme == "light")
    assert picture.std() > 10, "something is on it"
    small = "return Math.min(...[...document.querySelectorAll('.chart')].map(one => one.getBoundingClientRect().width))"
    assert opened.execute_script(small) >= 300, "charts are as wide as their text needs"


def test_filters(opened, gallery):
    assert len(visible(opened)) == 24
    for outcome in ("survived", "fallen", "wrong already", "unconverged"):
        choose(opened, "outcome", outcome)
        fits = [p for p in gallery.pictures if outcome == p.outcome or (outcome == "unconverged" and p.unconverged)]
        assert fits
        assert opened.find_element("tag name", "output").text == f"1–{min(24, len(fits))} of {len(fits)}"
        for card, picture in zip(visible(opened), fits, strict=False):
            assert (card["attack"], int(card["class"])) == (picture.attack, picture.label)
    choose(opened, "outcome", "")
    choose(opened, "attack", 'pgd-4"><i>')
    choose(opened, "class", "3")
    fits = [p for p in gallery.pictures if p.attack == 'pgd-4"><i>' and p.label == 3]
    assert [card["attack"] for card in visible(opened)] == [p.attack for p in fits]
    choose(opened, "model", "numbers alone")
    assert visible(opened) == []
    assert opened.find_element("tag name", "output").text == "none"


def test_pages_of_the_gallery_show_each_picture_once(opened, gallery):
    seen = visible(opened)
    while opened.find_element("css selector", "[data-turn='1']").is_enabled():
        opened.find_element("css selector", "[data-turn='1']").click()
        seen += visible(opened)
    assert [(card["attack"], int(card["class"])) for card in seen] == [(p.attack, p.label) for p in gallery.pictures]


def test_the_keyboard_is_enough(opened):
    from selenium.webdriver.common.keys import Keys

    press(opened, Keys.TAB)
    assert opened.switch_to.active_element.get_attribute("class") == "skip"
    assert opened.switch_to.active_element.rect["x"] >= 0, "it shows once it has the focus"
    press(opened, Keys.ENTER)
    assert opened.execute_script("return location.hash") == "#robust"
    reached = set()
    for _ in range(80):
        press(opened, Keys.TAB)
        active = opened.switch_to.active_element
        reached.add(active.tag_name + (active.get_attribute("name") or ""))
        if active.tag_name == "summary" and "evidence" in active.text:
            press(opened, Keys.ENTER)
            assert opened.execute_script("return document.activeElement.parentElement.open")
        if active.get_attribute("name") == "attack":
            press(opened, "F")
            assert {card["attack"] for card in visible(opened)} == {"fgsm"}
        if active.get_attribute("data-turn") == "1":
            before = visible(opened)
            press(opened, Keys.SPACE)
            assert visible(opened) != before
            break
    assert {"summary", "selectmodel", "selectclass", "selectattack", "selectoutcome", "button"} <= reached
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert opened.execute_script(outline) == "solid", "the focus can be seen"


def test_it_prints(opened):
    look(opened, 800, "dark", media="print")
    shown = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert opened.execute_script(shown, "nav", "display") == "none"
    assert opened.execute_script(shown, ".filters", "display") == "none"
    assert opened.execute_script(shown, "body", "backgroundColor") == "rgb(255, 255, 255)"
    pdf = base64.b64decode(opened.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type /Page\b", pdf)) <= 30


# The gallery


def test_pictures_show_what_was_evaluated(trained, gallery):
    _, data, evaluation = trained
    assert len(gallery.pictures) == 120
    for picture in gallery.pictures:
        rows = evaluation.rows[picture.attack]
        assert picture.label == evaluation.label[picture.index]
        assert picture.before == evaluation.clean_prediction[picture.index]
        assert picture.after == rows.prediction[picture.index]
        assert (picture.outcome == "survived") <= bool(rows.correct[picture.index])
        assert picture.relative_fosc == pytest.approx(rows.relative_fosc[picture.index], abs=1e-4, nan_ok=True)
        clean, attacked = (
            np.asarray(Image.open(io.BytesIO(png)), dtype=int) for png in (picture.clean, picture.attacked)
        )
        assert np.array_equal(clean, data.test.images[picture.index, 0].numpy())
        assert np.abs(attacked - clean).max() == pytest.approx(255 * picture.largest, abs=0.51)
        change = np.asarray(Image.open(io.BytesIO(picture.change)), dtype=int)
        darker, brighter = attacked - clean < -1, attacked - clean > 1
        assert (change[darker][:, 2] > change[darker][:, 0]).all(), "blue"
        assert (change[brighter][:, 0] > change[brighter][:, 2]).all(), "orange"


def test_a_trace_ends_where_its_attack_ends(trained):
    run, data, _ = trained
    x, y = data.test.batch(torch.arange(40))
    index = torch.arange(100, 140)
    for attack in (im.PGD(THREAT, 6), im.FGSM(THREAT), im.PGD(im.L2(0.5), 5, "annealed", random_start=False)):
        result = attack(run.model, x, y, seed=3, index=index)
        trace = trace_search(attack, run.model, x, y, seed=3, index=index)
        assert trace.loss.shape == (attack.steps + 1, 40)
        for name in ("loss", "fosc", "relative_fosc"):
            assert torch.allclose(getattr(trace, name)[-1], getattr(result, name), atol=1e-5, equal_nan=True)
    start = im.PGD(im.L2(0.5), 1, random_start=False)
    clean = nn.functional.cross_entropy(run.model(x), y, reduction="none")
    assert torch.allclose(trace_search(start, run.model, x, y).loss[0], clean, atol=1e-5)


def test_the_gallery_holds_every_class_and_fate(trained):
    evaluation = trained[2]
    chosen = select_images(evaluation, 60)
    assert len(set(chosen.tolist())) == 60
    assert set(evaluation.label[chosen]) == set(range(10))
    clean, survived = evaluation.correct("clean")[chosen], evaluation.correct("worst_case")[chosen]
    assert (clean & survived).sum() >= 10
    assert (clean & ~survived).sum() >= 10
    assert (~clean).sum() <= 15
    assert len(select_images(evaluation, 10_000)) == len(evaluation.label)


def test_robustness_against_eps_of_a_linear_model():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(12, generator=generator), 0.3 + 0.4 * torch.rand(120, 12, generator=generator)
    y = torch.randint(0, 2, (120,), generator=generator)
    model = nn.Linear(12, 2)
    with torch.no_grad():
        model.weight.copy_(torch.stack([-weight, weight]) / 2)
        model.bias.copy_(torch.tensor([0.5, -0.5]) * (x @ weight).mean())
    margin = (x @ weight - (x @ weight).mean()) * (2 * y - 1)
    attacks = {"fgsm": im.FGSM(im.Linf(0.02))}
    shown = im.gallery(model, (x, y), attacks, im.evaluate(model, (x, y), attacks))
    assert shown.pictures == (), "these are no images"
    assert shown.sweep.eps == (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04)
    expected = [int((margin > eps * weight.abs().sum()).sum()) for eps in shown.sweep.eps]
    assert [value.correct for value in shown.sweep.accuracy] == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize(("side", "images", "pictures"), [(32, 200, 200), (100, 40, 25)])
def test_pages_stay_below_five_megabytes(tmp_path, side, images, pictures):
    """Noise does not compress: no real images take more room."""
    x = torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(1))
    y = torch.arange(images) % 10
    model = nn.Sequential(nn.AvgPool2d(side // 4), nn.Flatten(), nn.Linear(48, 10))
    attacks = {"fgsm": im.FGSM(im.Linf(8 / 255))}
    evaluation = im.evaluate(model, (x, y), attacks)
    shown = im.gallery(model, (x, y), attacks, evaluation)
    assert pictures <= len(shown.pictures) <= images
    im.report(im.Exhibit(evaluation, gallery=shown), tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 5_000_000


# Figures


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_a_linear_axis_holds_its_values(values):
    axis = svg.linear_axis("x", values)
    rounding = 1e-6 * (axis.high - axis.low)
    assert axis.low <= min(values) + rounding
    assert axis.high >= max(values) - rounding
    assert 2 <= len(axis.ticks) <= 9
    shares = [axis.share(value) for value in sorted(values)]
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)


def test_axes_by_hand():
    assert [tick for tick, _ in svg.linear_axis("x", [], low=0, high=100).ticks] == [0, 25, 50, 75, 100]
    axis = svg.log_axis("x", 2e-4, 0.5, below=True)
    assert (axis.low, axis.high) == (pytest.approx(1e-4), 1.0)
    assert [text for _, text in axis.ticks] == ["≤10⁻⁴", "0.001", "0.01", "0.1", "1"]
    assert axis.share(0.0) == 0
    assert axis.share(0.01) == pytest.approx(0.5)
    assert (format_eps(8 / 255), format_eps(0.3), format_eps(0.5)) == ("8/255", "0.3", "0.5")


def test_the_heat_maps_columns_are_shares_of_examples():
    percentiles = np.linspace(0, 1, 101).tolist()  # uniform
    edges = np.linspace(0, 2, 9)
    assert charts._bin_percentiles([percentiles, None], edges) == pytest.approx([0.25] * 4 + [0] * 4)
    halves = charts._bin_percentiles([[0.5] * 101], edges)
    assert halves[1] + halves[2] == pytest.approx(1)


def test_series_differ_without_colour():
    """Seven of them, each with dashes and a mark of its own."""
    series = [svg.Series(str(n), [0, 1], [n, n], n, kind="marked") for n in range(svg._STYLES)]
    x, y = svg.linear_axis("x", [0, 1]), svg.linear_axis("y", [0, 7])
    drawn = [svg.draw_chart([one], x, y, "") for one in series]
    assert len({re.search(r'stroke-dasharray="([^"]*)"', one)[1] for one in drawn}) == svg._STYLES
    assert len({re.search(r'class="mark s\d" d="M[\d.]+ [\d.]+([^"]*)"', one)[1] for one in drawn}) == svg._STYLES


@pytest.mark.parametrize("theme", [0, 1, 2])
def test_text_and_lines_stand_out(theme):
    """Contrast as WCAG 2 measures it: 4.5 for text, 3 for lines, in light, in dark and printed."""
    style = resources.files("innermax.reporting").joinpath("page.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w]+): #(\w+);", re.findall(r":root \{(.*?)\}", style, re.DOTALL)[theme]))

    def luminance(colour):
        colour = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
        channels = [int(colour[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ground in ("page", "panel"):
        for name in ("ink", "quiet", "good", "bad", *(f"c{number}" for number in range(7))):
            light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= (3 if name[0] == "c" else 4.5), (name, ground)
