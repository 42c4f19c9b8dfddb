"""Shared by the benchmarks of accuracy without labels: options once, any number of budgets."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

import onebyone as obo
from onebyone.calibration.inputs import CalibrationData
from onebyone.core.metrics import MetricFunction
from onebyone.core.records import Difference, Metric, Plan, Reconstruction
from onebyone.data import Data
from onebyone.evaluation.scores import score
from onebyone.evaluation.statistics import Scores, agreement, paired_difference
from onebyone.planning import plan_from
from onebyone.planning.survey import Survey, survey
from onebyone.report.console import progress
from onebyone.training.reconstruct import inputs_for


@dataclass(frozen=True)
class OneShot:
    """A network rewritten for a budget, on the same test examples as the original.

    Attributes:
        seconds: Of the options (once for all budgets), this plan and its weights.
        reconstruction: What the steps after them did, if any were asked for; their time is its own.
    """

    plan: Plan
    before: Scores
    after: Scores
    seconds: float
    reconstruction: Reconstruction | None = None

    @property
    def difference(self) -> Difference:
        """Mean score after less before, paired."""
        return paired_difference(self.before, self.after)

    @property
    def agreement(self) -> Metric | None:
        """Share of the same predictions, of classifiers."""
        return agreement(self.before, self.after)


def one_shot(
    network: nn.Module,
    data: Data,
    budgets: Sequence[str],
    *,
    examples: int,
    seed: int,
    metric: str | MetricFunction = "accuracy",
    sites: Mapping[str, Sequence[str]] | None = None,
    steps: int = 0,
) -> list[OneShot]:
    """Rewrite a network for each budget, without training, and score it on the test data.

    Args:
        network: Not modified.
        data: Calibration inputs are drawn from its training part, without labels.
        budgets: Such as ``"macs=50%"``.
        examples: Calibration inputs.
        seed: That they are drawn with.
        metric: As for :func:`onebyone.evaluate`.
        sites: For some budgets, the only layers that may be rewritten.
        steps: Of reconstruction on training inputs without labels, for each budget; 0 for none.
    """
    calibration = CalibrationData(data.train.take(examples, seed), data.name, seed)
    started = time.perf_counter()
    with progress("options") as update:
        found = survey(network, calibration, progress=update)
    surveyed = time.perf_counter() - started
    made = []
    for budget in budgets:
        only = (sites or {}).get(budget)
        options = [o for o in found.options if only is None or o.site in only]
        part = replace(found, options=tuple(options))
        small, plan, seconds = _carried_out(network, part, data, calibration, budget)
        log = None
        if steps:
            with progress(f"{budget}, reconstruction") as update:
                small, log = obo.reconstruct(
                    small,
                    teacher=network,
                    calibration=inputs_for(data.train, steps, seed),
                    steps=steps,
                    seed=seed,
                    progress=update,
                )
        made.append((small, plan, surveyed + seconds, log))
    with progress("test") as update:
        scored = score([network, *(small for small, *_ in made)], data.test, metric=metric,
                       progress=update)  # fmt: skip
    return [
        OneShot(plan, scored.each[0], after, seconds, log)
        for (_, plan, seconds, log), after in zip(made, scored.each[1:], strict=True)
    ]


def _carried_out(
    network: nn.Module, found: Survey, data: Data, calibration: CalibrationData, budget: str
) -> tuple[nn.Module, Plan, float]:
    started = time.perf_counter()
    plan = plan_from(
        found,
        budget,
        network=type(network).__name__,
        inputs=data.inputs,
        calibration=calibration.info(),
    )
    with progress(budget) as update:
        small = obo.apply(network, plan, calibration, progress=update)
    return small, plan, time.perf_counter() - started
