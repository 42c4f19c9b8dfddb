"""The peers, each as one function of one knob, and the search for a share of the MACs.

fasterai's and tltorch's Tucker, AIMET's spatial and weight SVD leave the first convolution alone,
as AIMET's own example does. AIMET chooses each layer's ratio by the accuracy of the network with
that layer alone split, which takes labelled inputs; the others look at no data.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from onebyone.data import Split
from onebyone.evaluation.scores import evaluate
from onebyone.networks.surgery import replace_module

HALVINGS = 8
MOST = 0.98  # of the knob


@dataclass(frozen=True)
class Task:
    """What a peer is given.

    Attributes:
        network: The trained network. Not to be modified.
        example: One input, ``(1, …)``.
        inputs: Labelled examples for a peer that chooses by them.
        folder: Where a peer may keep what all shares have in common.
    """

    network: nn.Module
    example: Tensor
    inputs: Split
    folder: Path


@dataclass(frozen=True)
class Made:
    """A network after a stage, as it is kept: pickled, so that it lives in no script."""

    model: nn.Module
    rate: float  # of the distillation
    seconds: float


# A network with a knob from 0, nothing removed, to 1.
Make = Callable[[Task, float], nn.Module]


@dataclass(frozen=True)
class Peer:
    """A tool by its package and in the table's words."""

    package: str
    label: str  # with a place for the version
    make: Make
    sees_data: bool = False

    @property
    def version(self) -> str:
        """The installed version."""
        return importlib.metadata.version(self.package)


def fasterai_tucker(task: Task, removed: float) -> nn.Module:
    """Every convolution but the first by fasterai's ``Conv_Decomposer``."""
    from fasterai.misc.conv_decomposer import Conv_Decomposer

    first, *_ = convolutions(task.network)
    return Conv_Decomposer().decompose(
        copy.deepcopy(task.network), percent_removed=removed, method="tucker", exclude=[first]
    )


def tltorch_tucker(task: Task, removed: float) -> nn.Module:
    """Every convolution but the first, and none of 1×1, by tltorch's ``FactorizedConv``."""
    from tltorch import FactorizedConv

    small = copy.deepcopy(task.network)
    for name, layer in list(convolutions(small).items())[1:]:
        if layer.kernel_size == (1, 1):
            continue
        ranks = [max(1, round((1 - removed) * size)) for size in layer.weight.shape[:2]]
        factorized = FactorizedConv.from_conv(
            layer,
            rank=(*ranks, *layer.kernel_size),
            factorization="tucker",
            implementation="factorized",
        )
        small = replace_module(small, name, factorized)
    return small


def torch_pruning(task: Task, removed: float) -> nn.Module:
    """Channels of all layers, in groups, by their magnitude, by Torch-Pruning."""
    import torch_pruning as tp

    small = copy.deepcopy(task.network)
    last = [m for m in small.modules() if isinstance(m, nn.Linear)][-1:]
    pruner = tp.pruner.BasePruner(
        small,
        task.example,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=removed,
        ignored_layers=last,
    )
    pruner.step()
    return small


def aimet_svd(task: Task, removed: float, *, scheme: str) -> nn.Module:
    """AIMET's ``ModelCompressor`` in its automatic mode, greedy over ten ratios a layer."""
    from aimet_torch.common.defs import (
        CompressionScheme,
        CostMetric,
        GreedySelectionParameters,
        RankSelectScheme,
    )
    from aimet_torch.common.utils import AimetLogger
    from aimet_torch.compress import ModelCompressor
    from aimet_torch.defs import SpatialSvdParameters, WeightSvdParameters

    AimetLogger.set_level_for_all_areas(logging.WARNING)
    network = copy.deepcopy(task.network)
    folder = task.folder / f"aimet-{scheme}"
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "data" / "greedy_selection_eval_scores_dict.pkl"  # AIMET's own place
    greedy = GreedySelectionParameters(
        target_comp_ratio=Decimal(1 - removed),
        num_comp_ratio_candidates=10,
        saved_eval_scores_dict=str(known.resolve()) if known.exists() else None,
    )
    first = [next(iter(convolutions(network).values()))]
    if scheme == "spatial_svd":
        parameters = SpatialSvdParameters(
            SpatialSvdParameters.Mode.auto,
            SpatialSvdParameters.AutoModeParams(greedy, modules_to_ignore=first),
        )
    else:
        parameters = WeightSvdParameters(
            WeightSvdParameters.Mode.auto,
            WeightSvdParameters.AutoModeParams(
                RankSelectScheme.greedy, greedy, modules_to_ignore=first
            ),
        )

    def accuracy(model: nn.Module, iterations: int | None, use_cuda: bool) -> float:  # noqa: FBT001
        assert not use_cuda
        # Only its statistics, which nobody reads here, ask without a number of iterations.
        return 0.0 if iterations is None else evaluate(model, task.inputs).value

    with contextlib.chdir(folder):  # it writes to the working directory
        small, _ = ModelCompressor.compress_model(
            network,
            eval_callback=accuracy,
            eval_iterations=1,
            input_shape=tuple(task.example.shape),
            compress_scheme=CompressionScheme[scheme],
            cost_metric=CostMetric.mac,
            parameters=parameters,
        )
    return small


PEERS = {
    "fasterai": Peer("fasterai", "fasterai {}, Tucker", fasterai_tucker),
    "tltorch": Peer("tensorly-torch", "tltorch {}, Tucker", tltorch_tucker),
    "torch-pruning": Peer("torch-pruning", "Torch-Pruning {}", torch_pruning),
    "aimet-spatial": Peer(
        "aimet-torch", "AIMET {}, spatial SVD", partial(aimet_svd, scheme="spatial_svd"),
        sees_data=True,
    ),
    "aimet-weight": Peer(
        "aimet-torch", "AIMET {}, weight SVD", partial(aimet_svd, scheme="weight_svd"),
        sees_data=True,
    ),
}  # fmt: skip


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    """Return a network's convolutions by name, the first first."""
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}


def count_macs(network: nn.Module, example: Tensor) -> int:
    """Return multiply-accumulates, half of what torch counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(example)
    return counter.get_total_flops() // 2


def at_share(make: Make, task: Task, share: float) -> nn.Module:
    """Return the largest network found with at most that share of the MACs.

    The knob is bisected. Where the MACs jump up again as it is turned, what was found before is
    kept.

    Raises:
        ValueError: If no setting that was tried leaves so little.
    """
    budget = share * count_macs(task.network, task.example)
    low, high = 0.0, MOST
    best, most = None, -1
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = make(task, middle).eval()
        macs = count_macs(found, task.example)
        if macs <= budget:
            high = middle
            if macs > most:
                best, most = found, macs
        else:
            low = middle
    if best is None:
        raise ValueError(f"no setting leaves {share:.0%} of the MACs")
    return best
