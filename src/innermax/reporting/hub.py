"""Model folders as the Hugging Face Hub has them: safetensors, config.json and a model card; never pickle."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn

from innermax.data.load import hub_id
from innermax.evaluation.result import Evaluation
from innermax.models.files import find_description, save_model
from innermax.models.files import load_saved_model as from_pretrained
from innermax.utils.files import write_bytes
from innermax.utils.validation import summarize_error
from innermax.utils.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["from_pretrained", "model_card", "push_to_hub", "save_pretrained"]
_TAGS = ["pytorch", "adversarial-robustness", "adversarial-training"]


def save_pretrained(model: nn.Module, folder: str | Path, evaluation: Evaluation | None = None, **about: Any) -> None:
    """Writes what belongs into a repository of the Hub: model.safetensors, config.json and the card, README.md.

    evaluation, about: what the card tells, see `model_card`. `load_model` and `from_pretrained` take the folder.
    Raises ValueError where the evaluation is of other weights than the model's.
    """
    if evaluation is not None and evaluation.is_of(model) is False:
        raise ValueError(
            "evaluation must be of this model, got one that measured other weights; evaluate this model, or leave the "
            "evaluation out"
        )
    save_model(folder, model)
    card = model_card(evaluation, described=find_description(model) is not None, **about)
    write_bytes(Path(folder) / "README.md", card.encode())


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    evaluation: Evaluation | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model with innermax",
    token: str | None = None,
    **about: Any,
) -> str:
    """Uploads what `save_pretrained` writes to a repository of the Hub, made where it is not there; its address.

    Args:
        repo_id: "user/name".
        evaluation, about: what the card tells, see `model_card`.
        private: whether a new repository is; None: as the account has it.
        revision: branch, made where it is not there; None: the main one.
        commit_message: of the upload.
        token: the Hub's; None: the one that `hf auth login` or HF_TOKEN has left.

    Raises:
        ValueError: the evaluation is of other weights than the model's; the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    with TemporaryDirectory(prefix="innermax-") as folder:
        save_pretrained(model, folder, evaluation, repo_id=repo_id, **about)
        try:
            api = HfApi(token=token, library_name="innermax", library_version=__version__)
            address = str(api.create_repo(repo_id, private=private, exist_ok=True))
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
        except Exception as error:  # a lost connection comes as the Hub client's own, its HTTP client's or the system's
            raise ValueError(f"{repo_id} cannot be pushed to the Hugging Face Hub: {summarize_error(error)}") from error
    return address


def model_card(
    evaluation: Evaluation | None = None,
    *,
    repo_id: str = "USER/NAME",
    data: str | None = None,
    training: Mapping[str, Any] | None = None,
    license: str | None = None,  # noqa: A002  the card's own word
    described: bool = True,
) -> str:
    """A model card, Markdown with the Hub's metadata in front: what attacks do to the model, and how it was trained.

    Args:
        evaluation: whose table, threat models and audit it holds.
        repo_id: "user/name", by which the card loads the model.
        data: name of the data set that it was evaluated on.
        training: the run's configuration, as its config.yaml has it; its data set is taken where `data` is not told.
        license: as the Hub spells it, such as "apache-2.0".
        described: whether config.json says how to build the network.
    """
    from huggingface_hub import ModelCard, ModelCardData

    training = None if training is None else _without_places(training)
    data = _without_places(data or (dict(training or {}).get("settings") or {}).get("data"))
    known = None if data is None else hub_id(data)
    name = repo_id.rpartition("/")[2]
    results = _results(evaluation, data) if evaluation is not None and data is not None else None
    metadata = ModelCardData(
        library_name="innermax",
        pipeline_tag="image-classification",
        tags=_TAGS,
        license=license,
        datasets=None if known is None else [known],
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=results,
    )
    sections = [f"---\n{metadata.to_yaml()}\n---\n\n# {_plain(name)}\n", _use(repo_id, described)]
    sections += [] if evaluation is None else [_robustness(evaluation, data)]
    sections += [] if training is None else [_trained(training)]
    return str(ModelCard("\n".join(sections)))


def _results(evaluation: Evaluation, data: str) -> "list[EvalResult]":
    """The accuracies, as the Hub's index holds them."""
    from huggingface_hub import EvalResult

    values = {"Accuracy": evaluation.accuracy["clean"].value}
    values |= {f"Accuracy under {name}": evaluation.accuracy[name].value for name in evaluation.rows}
    values |= {"Accuracy in the worst case": evaluation.worst_case.value} if evaluation.rows else {}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=hub_id(data) or data,
            dataset_name=data,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(value, 6),
        )
        for name, value in values.items()
    ]


def _use(repo_id: str, described: bool) -> str:
    """How the model is loaded."""
    call = f'im.load_model("{repo_id}")' if described else f'im.load_model("{repo_id}", your_network)'
    return f"""```python
import innermax as im

model = {call}  # images in [0, 1] → logits
```
"""


def _robustness(evaluation: Evaluation, data: str | None) -> str:
    """The evaluation: what it says, and whether that can be believed."""
    settings, audit = evaluation.settings, evaluation.audit
    where = "" if data is None else f" of {_plain(data)}"
    lines = [
        "## Robustness",
        "",
        "| attack | accuracy % | 95 % interval | relative FOSC of survivors, median | gradients per example |",
        "| --- | ---: | ---: | ---: | ---: |",
        _row(evaluation, "clean", "none", "", ""),
    ]
    for name, convergence in evaluation.convergence.items():
        gauge = convergence.survivors.relative_fosc_median
        told = "–" if gauge != gauge else f"{gauge:.2g}"
        lines.append(_row(evaluation, name, _plain(name), told, f"{convergence.gradients:,.1f}"))
    lines += [_row(evaluation, "worst_case", "**worst case**", "", ""), ""] if evaluation.rows else [""]
    lines += [
        f"On {settings.count:,} test examples{where}, an example's random starts drawn from seed {settings.seed}."
    ]
    lines += ["FOSC is the distance of a search from a stationary point, 0 where it has converged.", ""]
    lines += [f"- {_plain(name)}: `{attack.replace('`', '')}`" for name, attack in settings.attacks.items()]
    if audit is not None:
        lines += ["", _plain(" ".join([audit.sentence, *(f"Cause: {cause}." for cause in audit.causes), audit.advice]))]
    whose = "which weights were measured is not known" if evaluation.weights is None else evaluation.weights
    lines += ["", f"Measured by innermax on torch {settings.torch}, {settings.device}; weights: {_plain(whose)}.", ""]
    return "\n".join(lines)


def _row(evaluation: Evaluation, name: str, shown: str, fosc: str, gradients: str) -> str:
    value = evaluation.worst_case if name == "worst_case" else evaluation.accuracy[name]
    interval = f"{100 * value.low:.2f}–{100 * value.high:.2f}"
    return f"| {shown} | {100 * value.value:.2f} | {interval} | {fosc} | {gradients} |"


def _trained(training: Mapping[str, Any]) -> str:
    """The run's configuration."""
    text = yaml.safe_dump(dict(training), sort_keys=False, allow_unicode=True).replace("```", "")
    return f"## Training\n\n```yaml\n{text}```\n"


def _without_places(value: Any) -> Any:
    """The same values, of absolute paths on this machine only the last name."""
    if isinstance(value, Mapping):
        return {name: _without_places(part) for name, part in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line of a table or a paragraph."""
    for sign in "\\|`*_<>[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
