"""onebyone makes a convolutional network smaller and faster with 1×1 convolutions.

It keeps the network's weights and proves the result on the user's own machine.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from onebyone.core.version import __version__

if TYPE_CHECKING:
    from onebyone.core.average_precision import MeanAveragePrecision as MeanAveragePrecision
    from onebyone.core.compared import Compared as Compared
    from onebyone.core.errors import OneByOneError as OneByOneError
    from onebyone.core.records import Comparison as Comparison
    from onebyone.core.records import Plan as Plan
    from onebyone.core.records import Profile as Profile
    from onebyone.core.records import Reconstruction as Reconstruction
    from onebyone.core.records import RunRecord as RunRecord
    from onebyone.core.task import Task as Task
    from onebyone.data import Data as Data
    from onebyone.data import Shards as Shards
    from onebyone.data import load_data as load_data
    from onebyone.evaluation.compare import compare as compare
    from onebyone.evaluation.scores import evaluate as evaluate
    from onebyone.explaining import explain as explain
    from onebyone.networks.detectors import RawDetector as RawDetector
    from onebyone.networks.layers import GlobalAverageHead as GlobalAverageHead
    from onebyone.networks.layers import MLPConv as MLPConv
    from onebyone.networks.layers import Pointwise as Pointwise
    from onebyone.pipeline.exporting import ExportRecord as ExportRecord
    from onebyone.pipeline.exporting import export as export
    from onebyone.pipeline.importing import import_onnx as import_onnx
    from onebyone.pipeline.loading import load_model as load_model
    from onebyone.pipeline.shrink import shrink as shrink
    from onebyone.planning import applies as applies
    from onebyone.planning import plan as plan
    from onebyone.planning import uniform_plan as uniform_plan
    from onebyone.profiling import profile as profile
    from onebyone.profiling.bench import BenchRecord as BenchRecord
    from onebyone.profiling.bench import bench as bench
    from onebyone.rewrites import apply as apply
    from onebyone.rewrites import restructure as restructure
    from onebyone.rewrites.contract import check_rewrite as check_rewrite
    from onebyone.rewrites.deepen import deepen as deepen
    from onebyone.rewrites.flush import flush_subnormals as flush_subnormals
    from onebyone.rewrites.fold.fold import fold as fold
    from onebyone.runtimes.contract import check_runtime as check_runtime
    from onebyone.training.distill import distill as distill
    from onebyone.training.reconstruct import reconstruct as reconstruct
    from onebyone.training.train import train as train

# Torch takes seconds to import: nothing of this is loaded until it is used.
_HOMES = {
    "BenchRecord": "profiling.bench",
    "Compared": "core.compared",
    "Comparison": "core.records",
    "Data": "data",
    "ExportRecord": "pipeline.exporting",
    "GlobalAverageHead": "networks.layers",
    "MLPConv": "networks.layers",
    "MeanAveragePrecision": "core.average_precision",
    "OneByOneError": "core.errors",
    "Plan": "core.records",
    "Pointwise": "networks.layers",
    "Profile": "core.records",
    "RawDetector": "networks.detectors",
    "Reconstruction": "core.records",
    "RunRecord": "core.records",
    "Shards": "data",
    "Task": "core.task",
    "applies": "planning",
    "apply": "rewrites",
    "bench": "profiling.bench",
    "check_rewrite": "rewrites.contract",
    "check_runtime": "runtimes.contract",
    "compare": "evaluation.compare",
    "deepen": "rewrites.deepen",
    "distill": "training.distill",
    "evaluate": "evaluation.scores",
    "explain": "explaining",
    "export": "pipeline.exporting",
    "flush_subnormals": "rewrites.flush",
    "fold": "rewrites.fold.fold",
    "import_onnx": "pipeline.importing",
    "load_data": "data",
    "load_model": "pipeline.loading",
    "plan": "planning",
    "profile": "profiling",
    "reconstruct": "training.reconstruct",
    "restructure": "rewrites",
    "shrink": "pipeline.shrink",
    "train": "training.train",
    "uniform_plan": "planning",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - a literal dict of names


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onebyone' has no attribute {name!r}")
    # Packages that are imported on the way may draw from the caller's generator.
    random = sys.modules.get("random")
    before = None if random is None else random.getstate()
    try:
        return getattr(importlib.import_module(f"onebyone.{_HOMES[name]}"), name)
    finally:
        if random is not None:
            random.setstate(before)


def __dir__() -> list[str]:
    return __all__
