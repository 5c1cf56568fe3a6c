"""The guided attack: gradients go where the gauge says that the search has not converged, and to the nearest classes."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from innermax.attacks.base import Problem, VerdictAttack, pursued, reported
from innermax.attacks.search import AttackResult, joined
from innermax.checks import check_count
from innermax.losses import Paired, difference, margin
from innermax.oracle import Answer

FIRST = 1.0  # first step size, over ε
STALLED = 5  # gradients without progress of the gauge after which a step size is halved
PROGRESS = 0.98  # a gauge has made progress where it is below this share of its lowest
CONVERGED = 0.02  # relative FOSC
SMALLEST = 1 / 128  # step size, over ε, below which a search ends
LONGEST = 60  # gradients in one search
START = "uniform"
MOM = 0.0
BACK = True


@dataclass(frozen=True)
class GuidedPGD(VerdictAttack):
    budget: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.budget, "budget")

    def search(self, problem: Problem, clean: Float[Tensor, "b classes"]) -> AttackResult:
        """What was found, without FOSC, given the clean inputs' logits."""
        found = reported(problem, problem.feasible.x, margin(clean, problem.y), clean)
        return pursued(found, partial(self._once, problem, clean), problem.oracle)

    def _once(self, problem: Problem, clean: Float[Tensor, "b classes"], rows: Int[Tensor, " k"]) -> AttackResult:
        problem, clean = problem[rows], clean[rows]
        state = _begun(problem, clean)
        pieces = []
        for step in range(1, self.budget + 1):
            classes = clean.shape[1]
            answer = replace(problem, pair=problem.y * classes + state.aim).gradient(state.point, _towards)
            won = problem.won(answer.logits)
            if bool(won.any()):
                done, going = won.nonzero()[:, 0], (~won).nonzero()[:, 0]
                pieces.append((state.rows[done], reported(problem[done], state.point[done], margin(answer.logits[done], problem.y[done]), answer.logits[done], step, step)))
                if len(going) == 0:
                    return joined(pieces)
                state, problem, answer = state[going], problem[going], answer[going]
            state = state.learned(problem, answer).moved(problem)
        logits = problem.logits(state.nearest)
        pieces.append((state.rows, reported(problem, state.nearest, margin(logits, problem.y), logits, self.budget, self.budget, 1)))
        return joined(pieces)


@dataclass(frozen=True, eq=False)
class _State:
    rows: Tensor
    aim: Tensor
    point: Tensor
    previous: Tensor
    gradient: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    gauge: Tensor
    stalled: Tensor
    step_size: Tensor
    age: Tensor
    number: Tensor
    nearest: Tensor
    nearest_margin: Tensor
    reached: Tensor  # b classes
    tries: Tensor

    def __getitem__(self, rows: Tensor) -> "_State":
        return replace(self, **{name: value[rows] for name, value in vars(self).items()})

    def learned(self, problem: Problem, answer: Answer) -> "_State":
        eps = problem.feasible.threat.eps
        gauge = problem.feasible.gap(answer.gradient, self.point, relative=True).nan_to_num(0.0)
        higher = answer.loss > self.best_loss
        best = _either(higher, self.point, self.best)
        best_gradient = _either(higher, answer.gradient, self.best_gradient)
        best_loss = answer.loss.maximum(self.best_loss)
        stalled = torch.where(gauge < PROGRESS * self.gauge, 0, self.stalled + 1)
        halved = stalled >= STALLED
        step_size = torch.where(halved, self.step_size / 2, self.step_size)
        back = halved & BACK
        m = margin(answer.logits, problem.y)
        near = m > self.nearest_margin
        diffs = answer.logits - answer.logits.gather(1, problem.y[:, None])
        diffs = diffs.scatter(1, problem.y[:, None], m[:, None])
        age = self.age + 1
        state = replace(self, point=_either(back, best, self.point), previous=_either(back, best, self.previous),
            gradient=_either(back, best_gradient, answer.gradient),
            best=best, best_gradient=best_gradient, best_loss=best_loss, gauge=gauge.minimum(self.gauge), stalled=torch.where(halved, 0, stalled),
            step_size=step_size, age=age, nearest=_either(near, self.point, self.nearest), nearest_margin=m.maximum(self.nearest_margin),
            reached=self.reached.maximum(diffs))
        ended = (gauge < CONVERGED) | (step_size < SMALLEST * eps) | (age >= LONGEST)
        return state.anew(problem, ended)

    def anew(self, problem: Problem, ended: Tensor) -> "_State":
        eps = problem.feasible.threat.eps
        number = self.number + ended
        aim = choose(self, problem)
        start = starts(self, problem, number)
        zero = torch.zeros_like
        return replace(self, aim=torch.where(ended, aim, self.aim), point=_either(ended, start, self.point), previous=_either(ended, start, self.previous),
            best_loss=torch.where(ended, -math.inf, self.best_loss), gauge=torch.where(ended, math.inf, self.gauge),
            stalled=torch.where(ended, 0, self.stalled), age=torch.where(ended, 0, self.age), number=number,
            step_size=torch.where(ended, FIRST * eps, self.step_size),
            tries=self.tries.scatter_add(1, aim[:, None], ended[:, None].long()))

    def moved(self, problem: Problem) -> "_State":
        go = self.age > 0
        f = problem.feasible
        d = self.step_size[:, None] * _direction(f, self.gradient)
        z = f.project(self.point + d.reshape(self.point.shape))
        if MOM > 0:
            z2 = f.project(self.point + (1-MOM) * (z - self.point) + MOM * (self.point - self.previous))
            z = _either(self.age > 1, z2, z)
        return replace(self, point=_either(go, z, self.point), previous=self.point)

def starts(state, problem, number):
    from innermax import randomness
    key = randomness.keys(problem.seed, problem.index, 0)
    key = randomness._mix(key + randomness._mix(number + randomness._GOLDEN))
    u = problem.feasible.sample(key)
    if START == "uniform": return u
    if START == "vertex": return problem.feasible.maximizer(u - problem.feasible.x)
    if START == "best": return _either(number % 2 == 0, u, problem.feasible.project(state.nearest + 0.5*(u-problem.feasible.x)))
    if START == "best3": return _either(number % 3 == 0, u, problem.feasible.project(state.nearest + 0.3*(u-problem.feasible.x)))
    if START == "nearest": return _either(number < 3, u, state.nearest)

ORDER = "deficit"
def choose(state, problem):
    if ORDER == "margin": return problem.y
    score = -state.reached * (1 + state.tries)
    if ORDER == "deficit": return score.argmin(1)
    if ORDER == "alt": 
        s = score.scatter(1, problem.y[:, None], math.inf)
        return torch.where(state.number % 2 == 0, s.argmin(1), problem.y)
    if ORDER == "deficit2":
        return (-state.reached * (1 + state.tries)**2).argmin(1)

def _direction(feasible, g):
    from innermax.threat import Linf
    g = g.flatten(1)
    if isinstance(feasible.threat, Linf): return g.sign()
    s = g / g.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return s / s.norm(dim=1, keepdim=True).clamp(min=1e-12)

def _either(take, one, other):
    return torch.where(take.reshape(-1, *[1] * (one.ndim - 1)), one, other)

def _towards(logits, pair):
    C = logits.shape[1]
    y, t = pair // C, pair % C
    return torch.where(t == y, margin(logits, y), difference(logits, y, t))

def _begun(problem, clean):
    b = len(problem.y); x = problem.feasible.x
    zeros = torch.zeros_like(problem.y)
    diffs = clean - clean.gather(1, problem.y[:, None])
    m = margin(clean, problem.y)
    diffs = diffs.scatter(1, problem.y[:, None], m[:, None])
    f = m
    s = _State(rows=torch.arange(b), aim=problem.y, point=x, previous=x, gradient=x, best=x, best_gradient=x, best_loss=f-math.inf, gauge=f+math.inf,
       stalled=zeros, step_size=f*0, age=zeros, number=zeros-1, nearest=x, nearest_margin=m, reached=diffs, tries=torch.zeros_like(diffs).long())
    first = replace(s)
    a = problem.y
    s = s.anew(problem, torch.ones_like(zeros, dtype=torch.bool))
    return replace(s, aim=problem.y, tries=torch.zeros_like(s.tries).scatter(1, problem.y[:, None], 1))
