"""bench/publish.py adds a model to those that come with innermax, in the package or on the Hub."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import innermax as im
from innermax.cli import main
from innermax.models import pretrained

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import publish


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty registry, and a page for its table."""
    weights, page = tmp_path / "weights", tmp_path / "page.md"
    weights.mkdir()
    (weights / "registry.json").write_text("[]")
    page.write_text("before\n```text\nname …\n```\nafter\n")
    monkeypatch.setattr(pretrained, "WEIGHTS", weights)
    monkeypatch.setattr(publish, "PAGE", page)
    monkeypatch.setattr(publish, "IMAGES", 40)
    return weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["--epochs", "1", "--attack.steps", "2", "--attacks", "fgsm", "--progress", "false"]
    assert main(["train", "digits", "--run-dir", str(folder), *words]) == 0
    return folder


def disguise(scores):
    """An evaluation with FGSM as if it were AutoAttack's, which takes minutes."""
    document = json.loads(scores.replace('"fgsm"', '"autoattack"'))
    document["settings"]["precision"] = "auto"
    document["settings"]["attacks"] = {"autoattack": repr(im.AutoAttack(im.Linf(0.15)))}
    return json.dumps(document)


def test_a_run_becomes_a_model_of_the_package(empty, run, tmp_path, capsys):
    entry = publish.publish("small", run)
    assert pretrained.list_pretrained() == {"innermax/small": entry}
    model = im.load_model("innermax/small")
    assert im.Evaluation.from_json((run / "evaluation.json").read_text()).is_of(model)
    assert (entry.data, entry.threat, entry.gradients) == ("digits", {"norm": "linf", "eps": 0.15}, 2.0)
    card = (entry.folder / "README.md").read_text()
    assert "- Command: `" in card
    assert str(tmp_path.parent) not in card  # no path of this machine
    assert "On 40 test examples of digits" in card
    assert "Not measured." in card
    assert "innermax/small" in publish.PAGE.read_text()
    assert publish.PAGE.read_text().endswith("```\nafter\n")
    scores = tmp_path / "scores.json"
    assert main(["evaluate", "innermax/small", "--attacks", "fgsm", "--limit", "10", "--json", str(scores)]) == 0
    with pytest.raises(SystemExit, match="must hold AutoAttack"):
        publish.add_autoattack("small", scores)
    scores.write_text(disguise(scores.read_text()))
    changed = publish.add_autoattack("small", scores)
    assert changed.autoattack.images == 10
    assert pretrained.list_pretrained() == {"innermax/small": changed}
    card = (entry.folder / "README.md").read_text()
    assert f"leaves {100 * changed.autoattack.accuracy:.2f} % of 10 random test images" in card
    assert "(`innermax evaluate innermax/small --attacks autoattack --limit 10 --precision auto`)" in card
    assert "Not measured." not in card
    assert card.count("## AutoAttack\n") == card.count("## Limits\n") == 1
    assert publish.publish("small", run) == entry  # the same again replaces it
    document = json.loads(scores.read_text())
    scores.write_text(json.dumps(document | {"weights": "other"}))
    with pytest.raises(SystemExit, match="measured the weights other, not"):
        publish.add_autoattack("small", scores)


def test_a_larger_one_goes_to_the_hub(empty, run, tmp_path, monkeypatch):
    hub, commit = tmp_path / "hub", "89" * 20

    class Api:
        def __init__(self, **options):
            pass

        def create_repo(self, repo, **options):
            return f"https://hub/{repo}"

        def upload_folder(self, *, repo_id, folder_path, **options):
            shutil.copytree(folder_path, hub / repo_id)

        def model_info(self, repo):
            return SimpleNamespace(sha=commit)

    def download(repo, file, *, revision):
        assert revision == commit
        return str(hub / repo / file)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    entry = publish.publish("large", run, "somebody/large")
    assert entry.hub == pretrained.HubFile("somebody/large", commit)
    assert {path.name for path in entry.folder.iterdir()} == {"README.md"}
    assert im.Evaluation.from_json((run / "evaluation.json").read_text()).is_of(im.load_model("innermax/large"))
    (hub / "somebody" / "large" / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(ValueError, match="is damaged or another file"):
        im.load_model("innermax/large")


def test_a_folder_that_tells_nothing_is_refused(tmp_path):
    im.save_model(tmp_path / "a" / "b" / "c", im.build_model("digits-cnn", input_shape=(1, 8, 8)))
    with pytest.raises(SystemExit, match="is no run folder"):
        publish.read_origin(tmp_path / "a" / "b" / "c")


def test_a_network_of_the_paper_tells_its_training():
    source = publish.ROOT / "results" / "paper" / "models" / "training-a103196736b0"
    if not source.exists():
        pytest.skip("the source distribution has no results")
    origin = publish.read_origin(source)
    assert (origin.data, origin.threat, origin.gradients) == ("mnist", {"norm": "linf", "eps": 0.3}, 100.0)
    assert origin.settings["setting"]["lr"] == 0.05
