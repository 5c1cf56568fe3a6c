"""Adversarial training that measures its inner maximization, and robustness numbers that can be believed.

Every public name is here, and loads what it needs when it is first used.
"""

import ast
import difflib
import importlib
from typing import TYPE_CHECKING, Any

from innermax.utils.version import __version__ as __version__

if TYPE_CHECKING:
    from innermax.attacks.apgd import APGD as APGD
    from innermax.attacks.autoattack import AutoAttack as AutoAttack
    from innermax.attacks.base import Attack as Attack
    from innermax.attacks.bpda import StraightThrough as StraightThrough
    from innermax.attacks.ddn import DDN as DDN
    from innermax.attacks.fab import FAB as FAB
    from innermax.attacks.fmn import FMN as FMN
    from innermax.attacks.guided_pgd import GuidedPGD as GuidedPGD
    from innermax.attacks.pgd import CW as CW
    from innermax.attacks.pgd import FGSM as FGSM
    from innermax.attacks.pgd import PGD as PGD
    from innermax.attacks.search import AttackResult as AttackResult
    from innermax.attacks.square import Square as Square
    from innermax.attacks.targeted import Targeted as Targeted
    from innermax.data.image_set import Data as Data
    from innermax.data.image_set import ImageSet as ImageSet
    from innermax.data.load import load_data as load_data
    from innermax.data.streaming import ImageStream as ImageStream
    from innermax.evaluation.evaluate import evaluate as evaluate
    from innermax.evaluation.result import Evaluation as Evaluation
    from innermax.evaluation.sizes import evaluate_each_eps as evaluate_each_eps
    from innermax.evaluation.transfer import Transfer as Transfer
    from innermax.evaluation.transfer import transfer as transfer
    from innermax.evaluation.verify import HandedImages as HandedImages
    from innermax.evaluation.verify import Verification as Verification
    from innermax.evaluation.verify import verify as verify
    from innermax.models.export import export_model as export_model
    from innermax.models.files import save_model as save_model
    from innermax.models.load import load_model as load_model
    from innermax.models.registry import build_model as build_model
    from innermax.models.wrappers import LogitsOnly as LogitsOnly
    from innermax.models.wrappers import Normalize as Normalize
    from innermax.objectives import AWP as AWP
    from innermax.objectives import MART as MART
    from innermax.objectives import TRADES as TRADES
    from innermax.objectives import CrossEntropy as CrossEntropy
    from innermax.objectives import GradAlign as GradAlign
    from innermax.oracle.oracle import Oracle as Oracle
    from innermax.reporting.contents import Exhibit as Exhibit
    from innermax.reporting.gallery import Gallery as Gallery
    from innermax.reporting.gallery import gallery as gallery
    from innermax.reporting.hub import from_pretrained as from_pretrained
    from innermax.reporting.hub import push_to_hub as push_to_hub
    from innermax.reporting.hub import save_pretrained as save_pretrained
    from innermax.reporting.report import report as report
    from innermax.strategies import ATTA as ATTA
    from innermax.strategies import FAT as FAT
    from innermax.strategies import FGSMPGI as FGSMPGI
    from innermax.strategies import FGSMRS as FGSMRS
    from innermax.strategies import NFGSM as NFGSM
    from innermax.strategies import Curriculum as Curriculum
    from innermax.strategies import Dynamic as Dynamic
    from innermax.strategies import FGSMThenPGD as FGSMThenPGD
    from innermax.strategies import Free as Free
    from innermax.strategies import Standard as Standard
    from innermax.strategies import Strategy as Strategy
    from innermax.strategies import Unsecured as Unsecured
    from innermax.strategies import WarmStart as WarmStart
    from innermax.threat import L1 as L1
    from innermax.threat import L2 as L2
    from innermax.threat import Linf as Linf
    from innermax.threat import LinfBox as LinfBox
    from innermax.threat import Threat as Threat
    from innermax.training.train import Run as Run
    from innermax.training.train import train as train
    from innermax.utils.allocator import keep_freed_memory as keep_freed_memory


def _read_homes() -> dict[str, str]:
    """Public name → its module, read from the imports above: type checkers need them, and once is enough."""
    nodes = ast.walk(ast.parse(__spec__.loader.get_source(__name__)))  # type: ignore[union-attr]
    imports = [
        node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("innermax.")
    ]
    return {alias.name: str(node.module) for node in imports for alias in node.names if alias.name != "__version__"}


_HOMES = _read_homes()
__all__ = sorted(_HOMES)


if not TYPE_CHECKING:  # with it, type checkers would take any name for public

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            close = difflib.get_close_matches(name, __all__, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise AttributeError(f"module 'innermax' has no attribute {name!r}{hint}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
