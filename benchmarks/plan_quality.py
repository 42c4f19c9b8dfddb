"""How good plans are: the divergence of planned networks on held-out examples.

    python benchmarks/plan_seconds.py --quality                # ResNet-20, NiN and DnCNN
    python benchmarks/plan_seconds.py --quality --networks resnet20 --efforts normal thorough
    python benchmarks/plan_seconds.py --quality --networks resnet20 --efforts 5x128 2x8 60x16

An effort may also be a number of options of a site and of examples, on which harm is measured.

Real weights. A network is surveyed once for each seed, on 512 calibration inputs drawn by it;
plans for 60, 50, 40 and 32 % of the MACs are made from that and their weights fitted. Held out are
the 1,000 test images of CIFAR-10, or the pictures of Set12 with noise. The same plans of another
version of onebyone, for comparison, are made by the same command with that version on
``PYTHONPATH`` and a ``--label`` of its own; results are appended to a file of JSON lines, and all
labels of the file are compared in one table, example by example.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

import onebyone as obo
from cifar10_data import cifar10_imagenet_statistics, cifar10_nin_statistics
from dncnn import denoising
from networks import cifar10_nin, dncnn_sigma25, resnet20, resnet32
from onebyone.calibration.inputs import CalibrationData
from onebyone.calibration.meaning import Meaning
from onebyone.core.tables import Table
from onebyone.data import Data
from onebyone.networks.outputs import comparable
from onebyone.networks.surgery import run
from onebyone.planning import Planner
from onebyone.planning.probes import LIMITS, Limits

SHARES = (60, 50, 40, 32)
EXAMPLES = 512
HELD_OUT_BATCH = 250
BOOTSTRAPS = 2000

SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Data], str]] = {
    "resnet20": (resnet20, cifar10_imagenet_statistics, "classification"),
    "resnet32": (resnet32, cifar10_imagenet_statistics, "classification"),
    "nin": (cifar10_nin, cifar10_nin_statistics, "classification"),
    "dncnn": (dncnn_sigma25, denoising, "restoration"),
}


@dataclass(frozen=True)
class Quality:
    """The divergence of a planned network on held-out examples; a line of the results."""

    label: str
    network: str
    effort: str
    seed: int
    share: int
    divergences: tuple[float, ...]
    plan_cpu: float
    apply_cpu: float
    predicted: float

    @property
    def key(self) -> tuple[object, ...]:
        """What was asked for."""
        return self.label, self.network, self.effort, self.seed, self.share

    @property
    def mean(self) -> float:
        """Over the examples."""
        return float(np.mean(self.divergences))


def qualities(label: str, name: str, effort: str, seed: int) -> list[Quality]:
    """Plan a network for every share, and compare what comes of it with the original."""
    make, data_of, task = SUBJECTS[name]
    network, data = make().eval(), data_of()
    calibration = CalibrationData(data.train.take(EXAMPLES, seed), data.name, seed)
    cpu = time.process_time()
    with probing(effort) as asked:
        planner = Planner(network, calibration, task=task, head="keep", cache=False, **asked)
    surveyed = time.process_time() - cpu
    meaning = planner.survey().meaning
    assert meaning is not None
    found = []
    for share in SHARES:
        cpu = time.process_time()
        made = planner.plan([f"macs={share}%"])
        planned = time.process_time() - cpu + surveyed
        cpu = time.process_time()
        small = obo.apply(network, made, calibration)
        applied = time.process_time() - cpu
        apart = _divergences(meaning, network, small, data)
        found.append(
            Quality(label, name, effort, seed, share, apart, planned, applied, made.harm or 0.0)
        )
    return found


@contextmanager
def probing(effort: str) -> Iterator[dict[str, str]]:
    """Return what a planner is asked for; inside, an effort's numbers hold, if it is numbers."""
    numbers = re.fullmatch(r"(\d+)x(\d+)", effort)
    if numbers is None:
        yield {} if effort == "default" else {"effort": effort}
        return
    options, examples = map(int, numbers.groups())
    with patch.dict(LIMITS, normal=Limits(options, examples, macs=1e30, cheap=0)):
        yield {"effort": "normal"}


@torch.no_grad()
def _divergences(
    meaning: Meaning, network: nn.Module, small: nn.Module, data: Data
) -> tuple[float, ...]:
    found: list[float] = []
    for inputs, _ in data.test.batches(HELD_OUT_BATCH):
        pair = [comparable(run(each, inputs), each, len(inputs)) for each in (network, small)]
        found += meaning.divergence(*pair).tolist()
    return tuple(found)


def read(path: Path) -> dict[tuple[object, ...], Quality]:
    """Return the results of a file, the last of each plan."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
    rows = [Quality(**json.loads(line)) for line in lines]
    return {row.key: row for row in rows}


def measure(
    path: Path, label: str, names: Sequence[str], efforts: Sequence[str], seeds: Sequence[int]
) -> None:
    """Measure what the file has not yet, and append it."""
    done = read(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        for effort in efforts:
            for seed in seeds:
                if all((label, name, effort, seed, share) in done for share in SHARES):
                    continue
                rows = qualities(label, name, effort, seed)
                with path.open("a", encoding="utf-8") as stream:
                    stream.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def table(path: Path) -> Table:
    """Return for each network and share the divergence of every label, beside the first one's."""
    rows = list(read(path).values())
    kinds = list(dict.fromkeys((row.label, row.effort) for row in rows))
    lines = []
    for network, share in dict.fromkeys((row.network, row.share) for row in rows):
        mine = [row for row in rows if (row.network, row.share) == (network, share)]
        cells = [network, f"{share} %"]
        for label, effort in kinds:
            of_kind = {r.seed: r for r in mine if (r.label, r.effort) == (label, effort)}
            first = {r.seed: r for r in mine if (r.label, r.effort) == kinds[0]}
            both = sorted(of_kind.keys() & first.keys())
            if not both:
                cells += ["–", "–"]
                continue
            cells.append(f"{np.mean([of_kind[seed].mean for seed in both]):.5f}")
            cells.append(_ratio([of_kind[s] for s in both], [first[s] for s in both]))
        lines.append(cells)
    return Table(
        columns=(
            "network", ">MACs",
            *(text for label, effort in kinds for text in (f">{label}, {effort}", ">ratio")),
        ),
        rows=lines,
        title="Divergence from the original on held-out examples, mean over seeds",
        notes=["Ratio to the first column, with the 95 % interval of a bootstrap over examples."],
    )  # fmt: skip


def _ratio(mine: Sequence[Quality], first: Sequence[Quality]) -> str:
    values, others = (np.mean([row.divergences for row in rows], axis=0) for rows in (mine, first))
    drawn = np.random.default_rng(0).integers(0, len(values), (BOOTSTRAPS, len(values)))
    ratios = values[drawn].mean(1) / others[drawn].mean(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return f"{values.mean() / others.mean():.3f} [{low:.2f}–{high:.2f}]"
