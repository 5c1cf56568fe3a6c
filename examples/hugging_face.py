"""Adversarial training on a Hugging Face data set: python examples/hugging_face.py

The data set is made from scikit-learn's digits; datasets.load_dataset("ylecun/mnist", split="train") has the same form.
"""

import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PIL

import innermax as im

digits = im.load_data("digits")


def as_dataset(split: im.ImageSet) -> Dataset:
    """A data set with the columns image and label, like image classification data sets on the Hub."""
    columns = {
        "image": [PIL.fromarray(image.squeeze(0).numpy()) for image in split.images],
        "label": split.labels.tolist(),
    }
    return Dataset.from_dict(columns, Features({"image": Image(), "label": ClassLabel(10)}))


dataset = as_dataset(digits.train[:800]).train_test_split(test_size=200, seed=0)
threat = im.Linf(0.15)
torch.manual_seed(0)
model = im.build_model("digits-cnn", input_shape=(1, 8, 8))
run = im.train(model, dataset["train"], im.Standard(im.PGD(threat, steps=3)), epochs=5, batch_size=32, lr=0.05)
evaluation = im.evaluate(run.model, dataset["test"], {"pgd-20": im.PGD(threat, steps=20)}, audit=False)
print(f"clean {evaluation.accuracy['clean'].value:.1%}, under PGD-20 {evaluation.accuracy['pgd-20'].value:.1%}")
