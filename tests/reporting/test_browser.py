"""The report's page in a browser."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

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


@pytest.fixture(scope="session")
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
