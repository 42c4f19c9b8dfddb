"""The plan of a run: given by the caller, loaded from a resumed run, or made."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from onebyone.calibration.inputs import CalibrationData
from onebyone.core.budget import check_budgets
from onebyone.core.records import Plan
from onebyone.core.settings.runs import ShrinkSettings
from onebyone.data import Data
from onebyone.pipeline.run import Run
from onebyone.planning import Planner
from onebyone.planning.latency.precision import INT8
from onebyone.planning.max_drop import plan_within
from onebyone.planning.recount import recounted


def planned(
    run: Run,
    original: nn.Module,
    calibration: CalibrationData,
    settings: ShrinkSettings,
    data: Data,
) -> Plan:
    """Return the plan that was given, is in the resumed run, or is made here."""
    if settings.plan is not None:
        return recounted(settings.plan, original)
    if run.record.plan is not None:
        return run.record.plan
    return _fresh_plan(run, original, calibration, settings, data=data)


def _fresh_plan(
    run: Run,
    original: nn.Module,
    calibration: CalibrationData,
    settings: ShrinkSettings,
    *,
    data: Data,
) -> Plan:
    """Plan for the budgets, or for the fastest network within ``max_drop``."""
    asked = settings.budgets
    wants_time = settings.fastest or settings.only_faster or settings.max_drop is not None
    wants_time = wants_time or settings.precision == INT8 or "latency" in check_budgets(asked)
    planner = Planner(
        original,
        calibration,
        asked=() if settings.closest else asked,
        task=run.meaning,
        head=settings.head,
        leave=settings.leave,
        runtime=settings.runtimes[0] if wants_time else None,
        batch=settings.batch,
        num_threads=settings.num_threads,
        name=run.record.source.name,
        device=run.device,
        precision=settings.precision,
        effort=settings.effort,
        progress=run.tell,
    )
    return run.on_main(lambda: _decided(run, original, planner, calibration, settings, data=data))


def _decided(
    run: Run,
    original: nn.Module,
    planner: Planner,
    calibration: CalibrationData,
    settings: ShrinkSettings,
    *,
    data: Data,
) -> Plan:
    if settings.max_drop is None:
        return planner.plan_with_front(
            settings.budgets,
            fastest=settings.fastest,
            closest=settings.closest,
            measured=settings.measure_front,
        )
    made, trials = plan_within(
        original,
        planner,
        calibration,
        data.validation,
        max_drop=settings.max_drop,
        metric=settings.metric,
        task=run.meaning,
        device=run.device,
        progress=run.tell,
    )
    run.keep(max_drop=settings.max_drop, trials=trials)
    return replace(made, front=planner.front("latency", measured=settings.measure_front))
