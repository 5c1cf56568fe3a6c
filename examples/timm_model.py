"""Adversarial training of a timm network: python examples/timm_model.py

Needs pip install 'innermax[timm]'. im.load_model("timm:resnet18") loads a pretrained network with its normalisation.
"""

import timm
import torch

import innermax as im

data, threat = im.load_data("digits"), im.Linf(0.15)
torch.manual_seed(0)
network = timm.create_model("test_resnet", pretrained=False, num_classes=10, in_chans=1)
model = torch.nn.Sequential(torch.nn.Upsample(scale_factor=4), network)  # 8×8 digits are small for a residual network
run = im.train(model, data.train, im.Standard(im.PGD(threat, steps=2)), epochs=4, batch_size=32, lr=0.05)
evaluation = im.evaluate(run.model, data.test[:200], {"pgd-10": im.PGD(threat, steps=10)}, audit=False)
print(f"clean {evaluation.accuracy['clean'].value:.1%}, under PGD-10 {evaluation.accuracy['pgd-10'].value:.1%}")
