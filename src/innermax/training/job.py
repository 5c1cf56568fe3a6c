"""A training with checked arguments, in the form that its processes receive."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from innermax.attacks.base import Attack
from innermax.data.augmentation import augment
from innermax.data.image_set import ImageSet
from innermax.data.readers import as_image_set
from innermax.data.streaming import TrainingSet, as_training_set
from innermax.models.wrappers import unwrap
from innermax.objectives import Objective, find_objective, within
from innermax.oracle.compiled import floating_dtype
from innermax.oracle.oracle import Oracle
from innermax.training import run_folder
from innermax.training.options import TrainingOptions, describe_training
from innermax.utils.copying import copy_model
from innermax.utils.files import LOCK, lock_file
from innermax.utils.validation import check_labels


@dataclass(frozen=True, eq=False)
class Job:
    """What is trained, on what and how. It pickles if its parts do.

    Attributes:
        model: learns in place.
        train_set, validation_set: as `train` reads them.
        objective: the function behind options.objective.
        configuration: what identifies the run, as plain YAML.
    """

    model: nn.Module
    train_set: TrainingSet
    validation_set: ImageSet | None
    options: TrainingOptions
    objective: Objective
    configuration: Mapping[str, Any]

    @classmethod
    def of(cls, model: nn.Module, train_set: Any, validation_set: Any, options: TrainingOptions) -> "Job":
        """The job of `train`'s arguments.

        Raises:
            ValueError, TypeError: the sets, the model and the options do not fit together.
        """
        data = as_training_set(train_set)
        validation = None if validation_set is None else as_image_set(validation_set)
        classes = _check_sets(model, data, validation, options)
        if not isinstance(data, ImageSet):
            data = data.with_classes(classes)
        configuration = describe_training(options, model, data, validation)
        threat = getattr(getattr(options.strategy, "attack", None), "threat", None)
        objective = within(find_objective(options.objective), threat)
        return cls(model, data, validation, options, objective, configuration)

    @property
    def validation_attack(self) -> Attack | None:
        """What the validation split is attacked with."""
        return self.options.validation_attack or getattr(self.options.strategy, "attack", None)

    def open_folder(self, stack: contextlib.ExitStack) -> None:
        """Makes or finds the run folder, which is this process's alone until the stack is closed."""
        folder, overwrite = self.options.folder, self.options.overwrite
        if folder is not None:
            run_folder.check_folder(folder, self.configuration, overwrite)
            stack.enter_context(lock_file(folder / LOCK, f"run_dir {folder}"))
            run_folder.open_folder(folder, self.configuration, overwrite)


def _check_sets(
    model: nn.Module, train_set: TrainingSet, validation_set: ImageSet | None, options: TrainingOptions
) -> int:
    """The model's classes; raises, before anything is written, where it does not take the images or lacks a class."""
    if not isinstance(train_set, ImageSet) and getattr(options.strategy, "warm_start", False):
        raise ValueError(
            f"strategy {type(options.strategy).__name__} keeps every example's perturbation, which neither a stream "
            "nor images that random transforms draw anew have a place for"
        )
    if isinstance(model, nn.Module) and "train" in vars(model):
        raise TypeError(
            "model must change between training and evaluation, got one whose own train() keeps it from that, as an "
            "exported program's does: build the network in Python and load the weights"
        )
    oracle, classes = Oracle(model), 0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, images in (("train_set", train_set.head), ("validation_set", validation_set)):
        if images is None:
            continue
        example = torch.arange(min(2, len(images)), device=images.labels.device)
        x, _ = images.batch(example)
        if name == "train_set" and (options.shift or options.flip):
            augment(x, example, shift=options.shift, flip=options.flip)
        with oracle.private_randomness(0):
            logits = oracle.logits(x.to(device))
        if logits.isnan().any():
            raise ValueError(f"the model returns NaN logits for images of {name}")
        classes = logits.shape[1]
        check_labels(images.labels, len(images), classes, f"{name} labels")
        if name == "train_set":
            with oracle.private_randomness(0):
                _check_learning(model, x.to(device))
    return classes


def _check_learning(model: nn.Module, x: Tensor) -> None:
    """Raises ValueError where no gradient of the answer to x reaches a weight."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model must have weights that learn, got none that takes a gradient: model.requires_grad_()")
    network = copy_model(unwrap(model)).eval()
    with torch.inference_mode(False), torch.enable_grad():
        logits = network(x.to(floating_dtype(network) or x.dtype, copy=True))
    if not logits.requires_grad:
        raise ValueError(
            "model must pass gradients back to its weights, got logits without a graph: its forward pass must not "
            "detach them, leave torch, or run in torch.no_grad or inference mode"
        )
