"""The report's page: its numbers are the evaluation's, and it holds nothing foreign."""

import copy
import html
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import nn

import innermax as im
from innermax.cli import main
from innermax.evaluation.audit import judge
from innermax.models.files import hash_weights
from innermax.reporting import contents
from innermax.reporting.gallery import Gallery
from tests.helpers.audits import evidence
from tests.helpers.reporting import ATTACKS, HOSTILE, THREAT

ROOT = Path(__file__).parents[2]


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


def test_signs_are_minus_signs_and_numbers_stand_in_line(page, trained, tmp_path):
    """In the cards, too, where a gradient of zero leaves no line to draw between the name and the numbers."""
    im.report([trained[2], replace(trained[2], clean_prediction=trained[2].label)], tmp_path / "two.html")
    for file in (page, tmp_path / "two.html"):
        texts = Page(re.sub(r"(?s)<(style|pre).*?</\1>", "", file.read_text())).texts
        assert not [text for text in texts if re.search(r"(?:^|[\s[(])-\d|\de-\d", text)]
    assert any(re.search(r"−\d.* → ", text) for text in Page(page.read_text()).texts), "C&W∞ has negative losses"
    assert "<span></span><span>– → –</span>" in page.read_text()


def test_what_is_foreign_shows_as_text(page):
    told = Page(page.read_text())
    assert HOSTILE in told.texts
    assert "<u>nought</u>" in " ".join(told.texts)
    assert "&amp;" in told.texts, "the class is called that, not &"
    assert not {"u", "i"} & {tag for tag, _ in told.tags}
    assert all(told.get("src", "").startswith("data:image/png;base64,") for tag, told in told.tags if tag == "img")
    assert not [name for _, attributes in told.tags for name in attributes if name.startswith("on")]
    assert len(told.scripts) == 2


def test_advice_names_the_model_that_was_measured(trained, tmp_path):
    """A run folder, its best epoch or a model by its name; RUN where nobody said which."""
    run, _, evaluation = trained
    folder = shutil.copytree(run.run_dir, tmp_path / "my run")
    torch.manual_seed(7)
    im.save_model(folder, im.build_model("digits-cnn", input_shape=(1, 8, 8)), "best.safetensors")
    audited = replace(evaluation, audit=judge(evidence(total_gain=0.1, zero_margin_gradient=1.0)))
    last, best = (
        replace(audited, weights=hash_weights(im.load_model(path).state_dict()))
        for path in (folder, folder / "best.safetensors")
    )
    for evaluated, named, source in (
        (last, folder, f"'{folder}'"),
        (best, folder, f"'{folder}' --best"),
        (replace(best, weights=None), folder, f"'{folder}'"),
        (audited, "innermax/digits-linf-0.15", "innermax/digits-linf-0.15"),
        (audited, None, "RUN"),
    ):
        path = im.report({"one": im.Exhibit(evaluated, named)}, tmp_path / "report.html")
        text = html.unescape(path.read_text(encoding="utf-8"))
        assert f"innermax evaluate {source} --attacks square-5000</p>" in text
    best.to_json(folder / "evaluation.json")
    text = im.report(folder, tmp_path / "report.html", pictures=0).read_text(encoding="utf-8")
    assert f"innermax evaluate '{folder}' --best --attacks square-5000</p>" in html.unescape(text)


def test_only_an_audit_that_found_nothing_is_green(trained, tmp_path):
    _, _, evaluation = trained
    for audit, tone in (
        (judge(evidence()), "good"),
        (judge(evidence(total_gain=0.1, zero_margin_gradient=1.0)), "bad"),
        (None, "none"),
    ):
        path = im.report({"one": replace(evaluation, audit=audit)}, tmp_path / "report.html")
        classes = [told["class"] for _, told in Page(path.read_text(encoding="utf-8")).tags if "class" in told]
        assert f"panel statement {tone}" in classes
        assert {name for name in classes if name.startswith("verdict ")} == {f"verdict {tone}"}


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


def test_parts_of_different_models_are_refused(trained, gallery, tmp_path):
    """In whatever way the run is given; its best epoch, its last and either behind a normalisation are its models."""
    run, data, evaluation = trained
    folder, page = run.run_dir, tmp_path / "page.html"
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    few, attacks = data.test[:20], {"fgsm": im.FGSM(THREAT)}
    foreign = im.evaluate(other, few, attacks)
    for given in (run, folder, str(folder), im.Run(run.model, run.history, None)):
        with pytest.raises(ValueError, match="evaluation of 'a' must be of its run's model, got one that") as refusal:
            im.report({"a": im.Exhibit(foreign, given)}, page)
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="gallery of 'a' must be made with its evaluation"):
        im.report({"a": im.Exhibit(foreign, gallery=gallery)}, page)
    with pytest.raises(ValueError, match="model must be what was evaluated: its weights differ"):
        im.gallery(other, data.test[:160], ATTACKS, evaluation)
    assert not page.exists()
    for model in (im.load_model(folder), im.load_model(folder / "best.safetensors"), run.model):
        for own in (model, nn.Sequential(im.Normalize(0.5, 0.5), model)):
            for given in (run, folder):
                im.report({"a": im.Exhibit(im.evaluate(own, few, {}), given)}, page)
    im.save_model(tmp_path / "half", copy.deepcopy(run.model).bfloat16())
    half = im.evaluate(im.load_model(tmp_path / "half").float(), few, {})
    im.report({"a": im.Exhibit(half, tmp_path / "half")}, page)
    im.report({"a": im.Exhibit(replace(foreign, weights=None), run)}, page)  # it does not say
    im.report({"a": im.Exhibit(foreign, tmp_path)}, page)  # no model lies there


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
