"""onebyone makes a convolutional network smaller and faster with 1×1 convolutions.

It keeps the network's weights and proves the result on the user's own machine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from onebyone.benchmarking import BenchRecord as BenchRecord
    from onebyone.benchmarking import bench as bench
    from onebyone.compared import Compared as Compared
    from onebyone.comparison import compare as compare
    from onebyone.data import Data as Data
    from onebyone.data import load_data as load_data
    from onebyone.errors import OneByOneError as OneByOneError
    from onebyone.evaluation import evaluate as evaluate
    from onebyone.explaining import explain as explain
    from onebyone.exporting import ExportRecord as ExportRecord
    from onebyone.exporting import export as export
    from onebyone.layers import GlobalAverageHead as GlobalAverageHead
    from onebyone.layers import MLPConv as MLPConv
    from onebyone.layers import Pointwise as Pointwise
    from onebyone.pipeline import shrink as shrink
    from onebyone.planning import applies as applies
    from onebyone.planning import plan as plan
    from onebyone.planning import uniform_plan as uniform_plan
    from onebyone.profiling import profile as profile
    from onebyone.reconstruction import reconstruct as reconstruct
    from onebyone.records import Comparison as Comparison
    from onebyone.records import Plan as Plan
    from onebyone.records import Profile as Profile
    from onebyone.records import Reconstruction as Reconstruction
    from onebyone.records import RunRecord as RunRecord
    from onebyone.rewrites import apply as apply
    from onebyone.rewrites import restructure as restructure
    from onebyone.rewrites.deepen import deepen as deepen
    from onebyone.rewrites.fold import fold as fold
    from onebyone.runs import load_model as load_model
    from onebyone.training import distill as distill
    from onebyone.training import train as train

# Torch takes seconds to import: nothing of this is loaded until it is used.
_HOMES = {
    "BenchRecord": "benchmarking",
    "Compared": "compared",
    "Comparison": "records",
    "Data": "data",
    "ExportRecord": "exporting",
    "GlobalAverageHead": "layers",
    "MLPConv": "layers",
    "OneByOneError": "errors",
    "Plan": "records",
    "Pointwise": "layers",
    "Profile": "records",
    "Reconstruction": "records",
    "RunRecord": "records",
    "applies": "planning",
    "apply": "rewrites",
    "bench": "benchmarking",
    "compare": "comparison",
    "deepen": "rewrites.deepen",
    "distill": "training",
    "evaluate": "evaluation",
    "explain": "explaining",
    "export": "exporting",
    "fold": "rewrites.fold",
    "load_data": "data",
    "load_model": "runs",
    "plan": "planning",
    "profile": "profiling",
    "reconstruct": "reconstruction",
    "restructure": "rewrites",
    "shrink": "pipeline",
    "train": "training",
    "uniform_plan": "planning",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - a literal dict of names


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onebyone' has no attribute {name!r}")
    return getattr(importlib.import_module(f"onebyone.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
