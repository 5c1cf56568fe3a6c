"""Adversarial training in your own PyTorch loop, on scikit-learn's digits: python examples/plain_loop.py"""

import torch
from torch.nn.functional import cross_entropy

import innermax as im

data = im.load_data("digits")
model = im.build_model("digits-cnn", input_shape=data.train.shape)  # any nn.Module that returns logits
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
epochs, threat = 3, im.Linf(0.15)

# Adversarial training adds at most ten lines: the next two, and those in the loop that use `attack` or `oracle`.
strategy = im.Curriculum(im.PGD(threat, steps=5))
oracle = im.Oracle.fast(model, data.train.batch(torch.arange(16))[0])  # the network, compiled for attacks

for epoch in range(epochs):
    attack = strategy.attack_at(epoch / epochs)
    for index in torch.randperm(len(data.train)).split(64):
        x, y = data.train.batch(index)
        if attack is not None:
            oracle.refresh()  # copies the model's new weights
            x = attack(oracle, x, y, seed=epoch, index=index, final="none").x_adv
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: {0 if attack is None else attack.steps} steps")

model.eval()
evaluation = im.evaluate(model, data.test, {"pgd-20": im.PGD(threat, steps=20)}, audit=False)
print(f"clean {evaluation.accuracy['clean'].value:.1%}, under PGD-20 {evaluation.accuracy['pgd-20'].value:.1%}")
