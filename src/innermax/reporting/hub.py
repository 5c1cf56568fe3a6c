"""Model folders in the Hugging Face Hub's form: safetensors, config.json and a model card; never pickle."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn

from innermax.data.load import hub_id
from innermax.evaluation.audit import write_advice
from innermax.evaluation.result import Evaluation
from innermax.models.files import find_description, save_model
from innermax.models.files import load_saved_model as from_pretrained
from innermax.utils.files import write_text
from innermax.utils.optional import extra
from innermax.utils.validation import summarize_error
from innermax.utils.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["from_pretrained", "model_card", "push_to_hub", "save_pretrained"]
_TAGS = ["pytorch", "adversarial-robustness", "adversarial-training"]


def save_pretrained(model: nn.Module, folder: str | Path, evaluation: Evaluation | None = None, **about: Any) -> None:
    """Writes the files of a repository on the Hub: model.safetensors, config.json and the card, README.md.

    evaluation, about: for the card, see `model_card`. `load_model` and `from_pretrained` read the folder.
    Raises ValueError where the evaluation measured other weights.
    """
    if evaluation is not None and evaluation.is_of(model) is False:
        raise ValueError(
            "evaluation must be of this model, got one that measured other weights; evaluate this model, or leave the "
            "evaluation out"
        )
    save_model(folder, model)
    card = model_card(evaluation, described=find_description(model) is not None, **about)
    write_text(Path(folder) / "README.md", card)


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
    """Uploads what `save_pretrained` writes to a repository on the Hub, and creates that if need be; its address.

    Args:
        model: whose files are uploaded.
        repo_id: "user/name".
        evaluation: for the card, see `model_card`.
        private: whether a new repository is private; None: the account's default.
        revision: branch, created if need be; None: the main one.
        commit_message: of the upload.
        token: for the Hub; None: that of `hf auth login` or HF_TOKEN.
        **about: for the card, see `model_card`.

    Raises:
        ValueError: the evaluation measured other weights; the Hub refuses, or cannot be reached.
    """
    with extra("data"):
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
    """A model card, Markdown after the Hub's metadata: the model's robustness, and how it was trained.

    Args:
        evaluation: its table, threat models and audit are shown.
        repo_id: "user/name", for the line that loads the model.
        data: name of the data set of the evaluation; None: that of `training`.
        training: the run's configuration, as in its config.yaml.
        license: as the Hub spells it, such as "apache-2.0".
        described: whether config.json describes the network.
    """
    with extra("data"):
        from huggingface_hub import ModelCard, ModelCardData

    training = None if training is None else _shorten_paths(training)
    data = _shorten_paths(data or (dict(training or {}).get("settings") or {}).get("data"))
    known = None if data is None else hub_id(data)
    name = repo_id.rpartition("/")[2]
    results = _list_results(evaluation, data) if evaluation is not None and data is not None else None
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
    sections = [f"---\n{metadata.to_yaml()}\n---\n\n# {_escape(name)}\n", _write_usage(repo_id, described)]
    sections += [] if evaluation is None else [_write_robustness(evaluation, data, repo_id)]
    sections += [] if training is None else [_write_training(training)]
    return str(ModelCard("\n".join(sections)))


def _list_results(evaluation: Evaluation, data: str) -> "list[EvalResult]":
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


def _write_usage(repo_id: str, described: bool) -> str:
    """The code that loads the model."""
    call = f'im.load_model("{repo_id}")' if described else f'im.load_model("{repo_id}", your_network)'
    return f"""```python
import innermax as im

model = {call}  # images in [0, 1] → logits
```
"""


def _write_robustness(evaluation: Evaluation, data: str | None, repo_id: str) -> str:
    """The section about the evaluation: its numbers, and whether they can be believed."""
    settings, audit = evaluation.settings, evaluation.audit
    where = "" if data is None else f" of {_escape(data)}"
    lines = [
        "## Robustness",
        "",
        "| attack | accuracy % | 95 % interval | relative FOSC of survivors, median | gradients per example |",
        "| --- | ---: | ---: | ---: | ---: |",
        _format_row(evaluation, "clean", "none", "", ""),
    ]
    for name, convergence in evaluation.convergence.items():
        gauge = convergence.survivors.relative_fosc_median
        told = "–" if gauge != gauge else f"{gauge:.2g}"
        lines.append(_format_row(evaluation, name, _escape(name), told, f"{convergence.gradients:,.1f}"))
    lines += [_format_row(evaluation, "worst_case", "**worst case**", "", ""), ""] if evaluation.rows else [""]
    lines += [
        f"On {settings.count:,} test examples{where}, an example's random starts drawn from seed {settings.seed}."
    ]
    lines += ["FOSC is the distance of a search from a stationary point, 0 where it has converged.", ""]
    lines += [f"- {_escape(name)}: `{attack.replace('`', '')}`" for name, attack in settings.attacks.items()]
    if audit is not None:
        causes = [f"Cause: {cause}." for cause in audit.causes]
        lines += ["", _escape(" ".join([audit.sentence, *causes, write_advice(audit, repo_id)]))]
    whose = "which weights were measured is not known" if evaluation.weights is None else evaluation.weights
    lines += [
        "",
        f"Measured by innermax on torch {settings.torch}, {settings.device}; weights: {_escape(whose)}.",
        "",
    ]
    return "\n".join(lines)


def _format_row(evaluation: Evaluation, name: str, shown: str, fosc: str, gradients: str) -> str:
    value = evaluation.worst_case if name == "worst_case" else evaluation.accuracy[name]
    interval = f"{100 * value.low:.2f}–{100 * value.high:.2f}"
    return f"| {shown} | {100 * value.value:.2f} | {interval} | {fosc} | {gradients} |"


def _write_training(training: Mapping[str, Any]) -> str:
    """The section about the run's configuration."""
    text = yaml.safe_dump(dict(training), sort_keys=False, allow_unicode=True).replace("```", "")
    return f"## Training\n\n```yaml\n{text}```\n"


def _shorten_paths(value: Any) -> Any:
    """The same values, with absolute paths of this machine cut to their last part."""
    if isinstance(value, Mapping):
        return {name: _shorten_paths(part) for name, part in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _escape(text: str) -> str:
    """The text, escaped so that Markdown shows it unchanged, in one line."""
    for sign in "\\|`*_<>[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
