"""The page of a sweep: the front of all trials, how each one ended, and their figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from onebyone.core.records import Measured, Metric, RunRecord, SweepRecord, SweepTrial
from onebyone.core.tables import Table
from onebyone.core.units import format_seconds, plural
from onebyone.report.charts import COLORS, Axis, Point, ScatterChart, Series
from onebyone.report.components import chart, page, section, table
from onebyone.report.runs_page import SECTIONS as RUN_SECTIONS
from onebyone.report.runs_page import unlike_notice

_FRONT = "not beaten in both"


def render_sweep(sweep: SweepRecord, runs: Mapping[str, RunRecord]) -> str:
    """Return the page of a sweep: one HTML file, made from records alone.

    Args:
        sweep: Its trials, in the order of the page.
        runs: The records of the finished runs by name.
    """
    makers = [
        ("front", "Front", partial(_front, sweep, runs)),
        ("trials", "Trials", partial(_trials, sweep, runs)),
        # The trade-offs there have a line and a color for each run: here the front shows them.
        *((a, b, partial(make, runs)) for a, b, make in RUN_SECTIONS if a != "tradeoffs"),
    ]
    shown = [(anchor, label, part) for anchor, label, make in makers if runs or anchor == "trials"
             if (part := make())]  # fmt: skip
    notices = [unlike_notice(runs)] if runs else []
    finished = sweep.counted("finished")
    return page(
        f"{finished} of {plural(len(sweep.trials), 'trial')} finished",
        Markup("\n").join(part for part in (*notices, *(part for *_, part in shown)) if part),
        subtitle=", ".join(dict.fromkeys(trial.network for trial in sweep.trials)),
        kicker="report of a sweep",
        contents=[(anchor, label) for anchor, label, _ in shown],
        footer=f"Made by onebyone {sweep.onebyone} from the sweep of {sweep.created}.",
    )


def _trials(sweep: SweepRecord, runs: Mapping[str, RunRecord]) -> Markup:
    rows = [_trial_row(trial, runs.get(trial.name)) for trial in sweep.trials]
    columns = ("Trial", "Runtime", ">Seed", "Precision", "Ended", ">Time", "Machine")
    return section("trials", "How each trial ended", table(Table(columns=columns, rows=rows)))


def _trial_row(trial: SweepTrial, run: RunRecord | None) -> list[str]:
    ended = trial.state if not trial.error else f"{trial.state}: {trial.error}"
    machine = trial.host
    if run is not None:
        machine = f"{trial.host} {run.machine}".strip()
    return [
        Markup("{}<small>{}, {}</small>").format(trial.name, trial.network, trial.budget),
        trial.runtime,
        str(trial.seed),
        trial.precision,
        ended,
        "–" if trial.seconds is None else format_seconds(trial.seconds),
        machine,
    ]


# ---------------------------------------------------------------- the front


@dataclass(frozen=True)
class _Result:
    name: str
    network: str
    x: float
    score: Metric


def _front(sweep: SweepRecord, runs: Mapping[str, RunRecord]) -> Markup:
    charts = []
    for data in dict.fromkeys(trial.data for trial in sweep.trials):
        trials = [trial for trial in sweep.trials if trial.data == data and trial.name in runs]
        charts += [_chart(trials, runs, _latency), _chart(trials, runs, _macs)]
    drawn = Markup("").join(chart(each) for each in charts if each is not None)
    if not drawn:
        return Markup("")
    return section(
        "front",
        "The front of all trials",
        "The line joins the networks that no other one beats in both quantities, the originals "
        "included. Differences within the intervals are noise. Disturbed timings are not drawn.",
        Markup('<div class="charts">{}</div>').format(drawn),
    )


def _latency(run: RunRecord, of: Measured, runtime: str) -> float | None:
    timing = of.latency.get(runtime)
    disturbed = run.comparison is None or run.comparison.disturbed(runtime)
    return None if timing is None or disturbed else timing.median_ms


def _macs(run: RunRecord, of: Measured, runtime: str) -> float | None:  # noqa: ARG001  # as above
    return float(of.macs)


_Quantity = Callable[[RunRecord, Measured, str], float | None]
_AXES: dict[_Quantity, tuple[str, str]] = {
    _latency: ("latency", "milliseconds a call"),
    _macs: ("MACs", "MACs of one input"),
}


def _results(
    trials: Sequence[SweepTrial], runs: Mapping[str, RunRecord], quantity: _Quantity
) -> list[_Result]:
    """Return a result for each trial, and for each network as it was."""
    found: dict[str, _Result] = {}
    for trial in trials:
        run = runs[trial.name]
        if run.comparison is None:
            continue
        before, after = run.comparison.before, run.comparison.after
        # Without labels, how often the networks agree; the original agrees with itself.
        scores = {f"{trial.network}, original": (before, before.metric),
                  trial.name: (after, after.metric or run.comparison.agreement)}  # fmt: skip
        for name, (of, score) in scores.items():
            x = quantity(run, of, trial.runtime)
            if x is not None and score is not None:
                found.setdefault(name, _Result(name, trial.network, x, score))
    results = list(found.values())
    # Only scores of one name can be compared.
    return [each for each in results if each.score.name == results[0].score.name]


def _chart(
    trials: Sequence[SweepTrial], runs: Mapping[str, RunRecord], quantity: _Quantity
) -> ScatterChart | None:
    """Return the score of trials on the same data against a quantity, with the front."""
    results = _results(trials, runs, quantity)
    if not results:
        return None
    metric, (name, axis) = results[0].score, _AXES[quantity]
    networks = list(dict.fromkeys(each.network for each in results))
    front = [results[place] for place in unbeaten([(each.x, each.score.value) for each in results])]
    points = tuple(
        Point(
            name=each.name,
            x=each.x,
            y=each.score.value,
            y_interval=(each.score.low, each.score.high) if each in front else None,
            color=(1 + networks.index(each.network)) % COLORS,
            label=each.name if each in front else "",
            small=each not in front,
        )
        for each in results
    )
    line = Series(
        name=_FRONT,
        x=tuple(each.x for each in front),
        y=tuple(each.score.value for each in front),
    )
    return ScatterChart(
        title=f"{metric.name} against {name}, {trials[0].data}",
        x=Axis(name=axis, log=True),
        y=Axis(name=metric.name, percent=metric.is_fraction),
        points=points,
        lines=(line,),
        caption="Dots: results on the test data, a color a network; upright lines: 95 % intervals.",
        height=360,
    )


def unbeaten(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points no other one beats: none is at most as far right and higher.

    Args:
        points: A cost, less of which is better, and a score, more of which is better.

    Returns:
        Their positions, from the least cost to the greatest.
    """
    order = sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1]))
    best, kept = float("-inf"), []
    for place in order:
        if points[place][1] > best:
            best = points[place][1]
            kept.append(place)
    return kept
