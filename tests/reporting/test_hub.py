"""Model folders and cards as the Hugging Face Hub has them, and uploads, without the Hub."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import innermax as im
from innermax.cli import main
from innermax.reporting.hub import model_card

THREAT = im.Linf(0.1)
DATA = im.load_data("digits")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = im.build_model("digits-cnn", input_shape=DATA.train.shape)
    im.train(model, DATA.train[:300], im.Unsecured(), epochs=4, batch_size=32, lr=0.05, progress=False)
    return model


@pytest.fixture(scope="module")
def evaluation(model):
    attacks = {"fgsm": im.FGSM(THREAT), "pgd-5": im.PGD(THREAT, steps=5), "a|b": im.CW(THREAT, steps=3)}
    return im.evaluate(model, DATA.test[:60], attacks, audit=False)


def table(card):
    """The rows of a card's table, by attack."""
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in rows[2:]}


def test_a_folder_and_back(model, evaluation, tmp_path):
    im.save_pretrained(model, tmp_path / "hub", evaluation, data="digits")
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    x, _ = DATA.test.batch(torch.arange(4))
    for load in (im.from_pretrained, im.load_model):
        assert torch.allclose(load(tmp_path / "hub")(x), model(x), atol=1e-5)


def test_the_card_holds_the_evaluation(model, evaluation):
    text = model_card(evaluation, repo_id="me/mine", data="mnist", license="mit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        card = ModelCard(text)
    told = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert told == {
        "Accuracy": pytest.approx(evaluation.accuracy["clean"].value, abs=1e-6),
        **{f"Accuracy under {n}": pytest.approx(evaluation.accuracy[n].value, abs=1e-6) for n in evaluation.rows},
        "Accuracy in the worst case": pytest.approx(evaluation.worst_case.value, abs=1e-6),
    }
    assert {result.dataset_type for result in card.data.eval_results} == {"ylecun/mnist"}
    assert (card.data.license, card.data.library_name, card.data.datasets) == ("mit", "innermax", ["ylecun/mnist"])
    assert card.data.model_name == "mine"
    assert 'im.load_model("me/mine")' in text
    assert "`PGD(threat=Linf(eps=0.1, bounds=(0.0, 1.0)), steps=5" in text


def test_the_table_shows_what_was_measured(evaluation):
    rows = table(model_card(evaluation))
    assert list(rows) == ["none", "fgsm", "pgd-5", r"a\|b", "**worst case**"]
    for name in ("fgsm", "pgd-5"):
        value, gauge = evaluation.accuracy[name], evaluation.convergence[name].survivors.relative_fosc_median
        shown = [f"{100 * value.value:.2f}", f"{100 * value.low:.2f}–{100 * value.high:.2f}", f"{gauge:.2g}"]
        assert rows[name][:3] == shown
    assert rows["none"][0] == f"{100 * evaluation.accuracy['clean'].value:.2f}"
    assert rows["**worst case**"][0] == f"{100 * evaluation.worst_case.value:.2f}"


def test_the_audits_words_are_in_it(model):
    from innermax.evaluation.audit import Audit, Evidence

    found = im.evaluate(model, DATA.test[:20], {"fgsm": im.FGSM(THREAT)}, audit=False)
    evidence = Evidence(examples=20, survivors=10, sampled=5, searches={}, strongest="fgsm", averaged=False)
    audit = Audit("not converged", ("too few *steps*",), "Take more: innermax evaluate RUN --attacks cw-100", evidence)
    card = model_card(type(found)(**{**vars_of(found), "audit": audit}), repo_id="me/digits")
    assert r"Cause: too few \*steps\*. Take more: innermax evaluate me/digits --attacks cw-100" in card


def vars_of(evaluation):
    return {n: getattr(evaluation, n) for n in ("settings", "label", "clean_prediction", "rows", "seconds")}


def test_a_card_of_little():
    card = ModelCard(model_card())
    assert card.data.eval_results is None
    assert "## " not in card.text
    assert "your_network" in model_card(described=False)


def test_no_place_of_this_machine_is_told(evaluation):
    training = {"settings": {"data": "/home/me/secret/flowers", "init": "/home/me/start"}, "training": {"epochs": 3}}
    text = model_card(evaluation, training=training)
    assert "/home" not in text
    assert "flowers" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["training"] == {"epochs": 3}


class Hub:
    """What HfApi is asked."""

    def __init__(self, fail=None):
        self.calls, self.files, self.fail = [], {}, fail

    def __call__(self, **options):
        self.calls.append(("api", options["token"]))
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.fail is not None:
            raise self.fail
        self.calls.append(("repo", repo_id, private, exist_ok))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_branch(self, repo_id, *, branch, exist_ok):
        self.calls.append(("branch", repo_id, branch, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append(("upload", repo_id, revision, commit_message))


def test_push_to_hub(model, evaluation, monkeypatch, tmp_path):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    address = im.push_to_hub(model, "me/mine", evaluation, private=True, revision="next", commit_message="x", token="t")
    assert address == "https://huggingface.co/me/mine"
    assert hub.calls == [
        ("api", "t"),
        ("repo", "me/mine", True, True),
        ("branch", "me/mine", "next", True),
        ("upload", "me/mine", "next", "x"),
    ]
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    x, _ = DATA.test.batch(torch.arange(4))
    assert torch.allclose(im.load_model(tmp_path)(x), model(x), atol=1e-5)
    assert b'im.load_model("me/mine")' in hub.files["README.md"]
    # What is uploaded is what a download gives: the same folder, by the Hub's own names.
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda source, name, revision: str(tmp_path / name))
    assert torch.allclose(im.from_pretrained("me/mine")(x), model(x), atol=1e-5)


def test_a_refused_push(model, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(fail=ConnectionError("no way there")))
    with pytest.raises(ValueError, match="me/mine cannot be pushed to the Hugging Face Hub: ConnectionError: no way"):
        im.push_to_hub(model, "me/mine")


def test_an_evaluation_of_other_weights_is_refused(model, evaluation, tmp_path):
    torch.manual_seed(1)
    other = im.build_model("digits-cnn", input_shape=DATA.train.shape)
    with pytest.raises(ValueError, match="evaluation must be of this model, got one that measured other weights"):
        im.save_pretrained(other, tmp_path / "hub", evaluation)
    with pytest.raises(ValueError, match="evaluation must be of this model"):
        im.push_to_hub(other, "me/mine", evaluation)
    assert not (tmp_path / "hub").exists()
    im.save_pretrained(torch.nn.DataParallel(model), tmp_path / "hub", evaluation)


@pytest.mark.parametrize("config", [{"model": "theirs"}, object(), "model", {"model": "digits-cnn"}])
def test_a_network_of_the_users_is_not_taken_for_one_of_innermax(config, tmp_path):
    theirs = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    theirs.config = config
    im.save_pretrained(theirs, tmp_path / "hub")
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"model.safetensors", "README.md"}
    assert "your_network" in (tmp_path / "hub" / "README.md").read_text()


def test_the_card_says_which_weights_were_measured(evaluation):
    assert f"weights: {evaluation.weights}." in model_card(evaluation)
    assert "weights: which weights were measured is not known." in model_card(replace(evaluation, weights=None))


RUN = ["train", "digits", "--run-dir", "run", "--epochs", "2", "--attacks", "fgsm", "--progress", "false"]


@pytest.mark.filterwarnings("default:.*is not of the exported weights")
def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, "--strategy", "unsecured"]) == 0
    capsys.readouterr()
    assert main(["export", "run", "--license", "mit"]) == 0
    assert capsys.readouterr().out == "run/hub\n"
    card = ModelCard(Path("run/hub/README.md").read_text())
    told = json.loads(Path("run/evaluation.json").read_text())["accuracy"]["fgsm"]["value"]
    assert told == pytest.approx(
        {r.metric_name: r.metric_value for r in card.data.eval_results}["Accuracy under fgsm"], abs=1e-6
    )
    assert "strategy: unsecured" in card.text or "name: Unsecured" in card.text
    x, _ = DATA.test.batch(torch.arange(4))
    assert torch.equal(im.load_model("run/hub")(x), im.load_model("run/best.safetensors")(x))
    assert main(["export", "run", "--best", "false", "--to", "last"]) == 0
    assert torch.equal(im.load_model("last")(x), im.load_model("run")(x))
    assert "run/evaluation.json is not of the exported weights" in capsys.readouterr().err
    assert "Robustness" not in Path("last/README.md").read_text()
    assert main(["export", "run", "--format", "pt2"]) == 0
    assert Path("run/model.pt2").exists()
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    assert main(["export", "run", "--push", "me/mine"]) == 0
    assert hub.calls[-1][:2] == ("upload", "me/mine")
    capsys.readouterr()
    for words in (
        ["run", "--format", "onnx", "--push", "me/mine"],
        ["nowhere"],
        ["run/best.safetensors"],
        ["--to", "x"],
    ):
        assert main(["export", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.filterwarnings("default:.*weights")
def test_a_run_that_was_trained_anew_does_not_take_over_the_old_evaluation(tmp_path, monkeypatch, capsys):
    """However it came back: a robust run's numbers must not stand on the card of an unsecured one."""
    monkeypatch.chdir(tmp_path)
    words = ["--threat.eps", "0.15", "--attacks", "pgd-5"]
    assert main([*RUN, *words, "--strategy", "standard"]) == 0
    robust, kept = Path("run/evaluation.json").read_text(), Path("run/best.safetensors").read_bytes()
    assert main([*RUN, *words, "--strategy", "unsecured", "--overwrite", "true"]) == 0
    unsecured = Path("run/evaluation.json").read_text()
    before, after = (json.loads(text)["accuracy"]["pgd-5"]["value"] for text in (robust, unsecured))
    assert before > after + 0.1
    Path("run/evaluation.json").write_text(robust)
    capsys.readouterr()
    assert main(["export", "run"]) == 0
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("run/hub\n", 1)
    assert "run/evaluation.json is not of the exported weights, so the card leaves it out" in err
    assert "Robustness" not in Path("run/hub/README.md").read_text()
    assert main(["report", "run", "--pictures", "0"]) == 0
    assert "run/evaluation.json measured other weights than the run's" in capsys.readouterr().err
    assert f"{100 * before:.1f}" not in Path("report.html").read_text()
    # With the weights that it measured it is told.
    Path("run/best.safetensors").write_bytes(kept)
    assert main(["export", "run"]) == 0
    assert capsys.readouterr().err == ""
    assert f"| pgd-5 | {100 * before:.2f} |" in Path("run/hub/README.md").read_text()
    # One that does not say is told, too, and what is not known is said.
    Path("run/evaluation.json").write_text(json.dumps({k: v for k, v in json.loads(robust).items() if k != "weights"}))
    assert main(["export", "run"]) == 0
    assert "does not say which weights it measured" in capsys.readouterr().err
    assert f"| pgd-5 | {100 * before:.2f} |" in Path("run/hub/README.md").read_text()
    assert main(["export", "run", "--best", "false", "--to", "last"]) == 0
    assert "so the card leaves it out; to measure them: innermax evaluate run --json" in capsys.readouterr().err
    assert "Robustness" not in Path("last/README.md").read_text()
