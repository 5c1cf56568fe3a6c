"""Adversarial training that measures its inner maximization, and robustness numbers that can be believed.

Every public name is here, and loads what it needs when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from innermax.attacks.apgd import APGD
    from innermax.attacks.ensemble import AutoAttack
    from innermax.attacks.fab import FAB
    from innermax.attacks.gradient import CW, FGSM, PGD
    from innermax.attacks.guided import GuidedPGD
    from innermax.attacks.search import AttackResult
    from innermax.attacks.square import Square
    from innermax.checkpoints import save_model
    from innermax.data import Data, ImageSet, load_data
    from innermax.evaluation import Evaluation, evaluate
    from innermax.export import export_model
    from innermax.hub import from_pretrained, push_to_hub, save_pretrained
    from innermax.models import Normalize, build_model
    from innermax.oracle import Oracle
    from innermax.reporting.exhibit import Exhibit
    from innermax.reporting.gallery import Gallery, gallery
    from innermax.reporting.page import report
    from innermax.sources import load_model
    from innermax.straight_through import StraightThrough
    from innermax.strategies import Curriculum, Dynamic, FGSMThenPGD, Standard, Unsecured, WarmStart
    from innermax.streaming import ImageStream
    from innermax.threat import L1, L2, Linf
    from innermax.training import Run, train
    from innermax.transferability import Transfer, transfer

__version__ = "0.1.0"

_HOMES = {
    "innermax.attacks.apgd": ("APGD",),
    "innermax.attacks.ensemble": ("AutoAttack",),
    "innermax.attacks.fab": ("FAB",),
    "innermax.attacks.gradient": ("CW", "FGSM", "PGD"),
    "innermax.attacks.guided": ("GuidedPGD",),
    "innermax.attacks.search": ("AttackResult",),
    "innermax.attacks.square": ("Square",),
    "innermax.checkpoints": ("save_model",),
    "innermax.data": ("Data", "ImageSet", "load_data"),
    "innermax.evaluation": ("Evaluation", "evaluate"),
    "innermax.export": ("export_model",),
    "innermax.hub": ("from_pretrained", "push_to_hub", "save_pretrained"),
    "innermax.models": ("Normalize", "build_model"),
    "innermax.oracle": ("Oracle",),
    "innermax.reporting.exhibit": ("Exhibit",),
    "innermax.reporting.gallery": ("Gallery", "gallery"),
    "innermax.reporting.page": ("report",),
    "innermax.sources": ("load_model",),
    "innermax.straight_through": ("StraightThrough",),
    "innermax.strategies": ("Curriculum", "Dynamic", "FGSMThenPGD", "Standard", "Unsecured", "WarmStart"),
    "innermax.streaming": ("ImageStream",),
    "innermax.threat": ("L1", "L2", "Linf"),
    "innermax.training": ("Run", "train"),
    "innermax.transferability": ("Transfer", "transfer"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "APGD",
    "CW",
    "FAB",
    "FGSM",
    "L1",
    "L2",
    "PGD",
    "AttackResult",
    "AutoAttack",
    "Curriculum",
    "Data",
    "Dynamic",
    "Evaluation",
    "Exhibit",
    "FGSMThenPGD",
    "Gallery",
    "GuidedPGD",
    "ImageSet",
    "ImageStream",
    "Linf",
    "Normalize",
    "Oracle",
    "Run",
    "Square",
    "Standard",
    "StraightThrough",
    "Transfer",
    "Unsecured",
    "WarmStart",
    "build_model",
    "evaluate",
    "export_model",
    "from_pretrained",
    "gallery",
    "load_data",
    "load_model",
    "push_to_hub",
    "report",
    "save_model",
    "save_pretrained",
    "train",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'innermax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
