"""The trade-off section: the plan among the plans for other budgets, and the fine-tuning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from markupsafe import Markup

from onebyone.core.records import SHARES, Cost, Option, Plan, Quantity, RunRecord, TrainLog, Trial
from onebyone.core.tables import Table
from onebyone.core.units import (
    format_bytes,
    format_count,
    format_ms,
    format_percent,
    format_ratio,
    format_seconds,
)
from onebyone.report.charts import Axis, Chart, LineChart, Point, ScatterChart, Series
from onebyone.report.components import chart, disclosure, quantity, section, table
from onebyone.report.layer_rows import settings_words

_LISTED = 12  # rows of a table that are visible without a click
_LEAST_HARM = 1e-4  # smaller harms, including 0, are drawn here on the logarithmic axis
NAMES: dict[Quantity, str] = {
    "macs": "MACs",
    "params": "parameters",
    "size": "bytes of weights",
    "latency": "latency",
}
_CURVE_HEIGHT = 200
_NONE = "–"
_FRONT_COLOR = 5


def tradeoff_section(record: RunRecord) -> Markup:
    """Return the plan among the plans for other budgets, with the fine-tuning beside it."""
    plan, log = record.plan, record.training
    if plan is None:
        return Markup("")
    front, curves = front_chart(record), learning_curves(log)
    words = [*_plan_words(record, plan), *([] if log is None else [_training_words(log)])]
    drawn = _side_by_side(front, curves)
    tried = [table(_trials_table(record))] if record.trials else []
    parts = (*_front_table(plan), *_plan_tables(plan), *tried)
    return section("tradeoff", "The trade-off", *words, drawn, *parts)


def training_section(record: RunRecord) -> Markup:
    """Return the learning curves of a training that has no plan."""
    log = record.training
    if log is None or record.plan is not None:
        return Markup("")
    drawn = _side_by_side(None, learning_curves(log)) or table(log.table())
    return section("training", "Training", _training_words(log), drawn)


def _side_by_side(front: ScatterChart | None, curves: Sequence[Chart]) -> Markup:
    """Return the charts; the front is as high as all curves beside it."""
    drawn = Markup("").join(chart(curve) for curve in curves)
    if front is None:
        return Markup('<div class="charts">{}</div>').format(drawn) if drawn else Markup("")
    if not drawn:
        return chart(front)
    return Markup('<div class="charts tradeoff"><div>{}</div><div>{}</div></div>').format(
        chart(front), drawn
    )


def _plan_tables(plan: Plan) -> list[Markup | str]:
    rows = _choices_table(plan)
    if not plan.choices:
        parts: list[Markup | str] = ["It changes nothing."]
    elif len(plan.choices) > _LISTED:
        parts = [disclosure(f"All {len(plan.choices)} choices", table(rows))]
    else:
        parts = [table(rows)]
    return [*parts, table(_left_alone_table(plan))] if plan.left_alone else parts


def _front_table(plan: Plan) -> list[Markup]:
    """Return the front and how each time was obtained, if times are known."""
    if not plan.front or plan.before.ms is None:
        return []
    shown = table(plan.front_table())
    return [disclosure(f"All {len(plan.front)} other budgets, and how times were obtained", shown)]


def _trials_table(record: RunRecord) -> Table:
    """Return the networks that were tried on the validation data, the fastest first."""
    trials = sorted(record.trials, key=lambda trial: trial.after.ms or 0.0)
    return Table(
        columns=(">Time, predicted", ">MACs", ">Change of the metric", ""),
        rows=[_trial_row(trial) for trial in trials],
        title="Tried on the validation data",
        notes=["Before fine-tuning. The choice did not use the test data."],
    )


def _trial_row(trial: Trial) -> list[str]:
    loss, ms = trial.difference, trial.after.ms or 0.0
    interval = f"{loss.low:+.4g} … {loss.high:+.4g}, n = {loss.n:,}".replace("-", "−")
    return [
        quantity(ms, format_ms(ms)),
        format_count(trial.after.macs),
        quantity(loss.value, f"{loss.value:+.4g}".replace("-", "−"), interval),
        "built and measured" if trial.built else "",
    ]


def front_chart(record: RunRecord) -> ScatterChart | None:
    """Return predicted and measured harm against cost; ``None`` if other budgets are unknown."""
    plan = record.plan
    if plan is None or not plan.front or not plan.budgets:
        return None
    name = counted(plan.budgets[0].quantity)
    share = plan.after.amount(name) / (plan.before.amount(name) or 1)
    line = front_line(plan, _line_name(plan), _FRONT_COLOR)
    points = [
        Point(name=words, x=share, y=harm, color=color)
        for words, harm, color in _harms(record)
        if harm is not None
    ]
    points += _timed_points(plan) if name == "latency" else []
    floor = floor_of([*line.y, *(point.y for point in points)])
    caption = f"Both axes are logarithmic. {len(line.x)} other budgets, none of them carried out."
    if plan.before.ms is not None and plan.latency is not None:
        caption += f" Their times: {plan.front_times()}."
    if floor is not None:
        caption += f" Harm below {floor:g} is drawn there."
    x, y = front_axes(name, floor)
    return ScatterChart(
        title=f"Harm against {NAMES[name]}",
        x=x,
        y=y,
        points=tuple(points),
        lines=(line,),
        caption=caption,
        height=400 if record.training is not None else 320,
    )


def _line_name(plan: Plan) -> str:
    if any(point.ratio is not None for point in plan.front):
        return "other budgets, predicted; dots: time measured"
    return "other budgets, predicted"


def _timed_points(plan: Plan) -> list[Point]:
    """Return the measured points of a front of latency, with their intervals."""
    return [
        Point(
            name=f"another budget: {format_ms(point.after.ms or 0.0)}, {point.how}",
            x=1 / point.ratio.value,
            y=point.harm,
            x_interval=(1 / point.ratio.high, 1 / point.ratio.low),
            color=_FRONT_COLOR,
            small=True,
        )
        for point in plan.front
        if point.ratio is not None
    ]


def counted(bounded: Quantity) -> Quantity:
    """Return the quantity of a front's axis: the bounded one if it is additive, else MACs."""
    return bounded if bounded in NAMES else "macs"


def front_line(plan: Plan, name: str, color: int) -> Series:
    """Return the line of predicted harm against the remaining share of a budget's quantity."""
    quantity_name = counted(plan.budgets[0].quantity)
    whole = plan.before.amount(quantity_name) or 1
    return Series(
        name=name,
        x=tuple(point.after.amount(quantity_name) / whole for point in plan.front),
        y=tuple(point.harm for point in plan.front),
        color=color,
    )


def front_axes(quantity_name: Quantity, floor: float | None) -> tuple[Axis, Axis]:
    """Return the axes of harm and of the remaining share of a quantity."""
    what = NAMES[quantity_name]
    return (
        Axis(name=f"{what}, share of the original", percent=True, log=True),
        Axis(name="harm, divergence from the original", log=True, floor=floor),
    )


def floor_of(harms: Sequence[float]) -> float | None:
    """Return the position of the least harms on a logarithmic axis, if some are below it."""
    return _LEAST_HARM if min(harms, default=1.0) < _LEAST_HARM else None


def _harms(record: RunRecord) -> list[tuple[str, float | None, int]]:
    """Return the plan's predicted and measured harm, each with its color."""
    plan, comparison = record.plan, record.comparison
    final = None if comparison is None else comparison.divergence
    tuned = record.training is not None
    return [
        ("this plan, predicted", None if plan is None else plan.harm, 0),
        ("before fine-tuning, measured", record.one_shot_divergence, 1),
        ("after fine-tuning, measured", final if tuned else None, 2),
    ]


def _plan_words(record: RunRecord, plan: Plan) -> list[str]:
    count = len(plan.choices)
    asked = ", ".join(budget.asked for budget in plan.budgets) or "none"
    words = (
        f"Budget: {asked}. {count} {'site' if count == 1 else 'sites'} rewritten, "
        f"{len(plan.left_alone)} left alone: MACs {_cost_change(plan, 'macs')}, "
        f"parameters {_cost_change(plan, 'params')}, "
        f"weights {_bytes_change(plan)}."
    )
    latency = [] if plan.latency is None else [str(plan.latency)]
    known = [f"{which} {harm:.3g}" for which, harm, _ in _harms(record) if harm is not None]
    words = " ".join([words, *latency])
    if not known:
        return [words]
    how = "Harm is the divergence of the outputs from the original’s"
    if plan.calibration is not None:
        how += (
            f", predicted on {plan.calibration.examples:,} calibration examples of "
            f"{plan.calibration.data}"
        )
    if record.one_shot_divergence is not None or record.comparison is not None:
        how += ", measured on the test data"
    return [words, f"{how}: {'; '.join(known)}."]


def _cost_change(plan: Plan, quantity: str) -> str:
    before: int = getattr(plan.before, quantity)
    after: int = getattr(plan.after, quantity)
    share = f" ({format_percent(after / before)})" if before else ""
    return f"{format_count(before)} → {format_count(after)}{share}"


def _bytes_change(plan: Plan) -> str:
    before, after = plan.before.bytes, plan.after.bytes
    share = f" ({format_percent(after / before)})" if before else ""
    return f"{format_bytes(before)} → {format_bytes(after)}{share}"


def _choices_table(plan: Plan) -> Table:
    timed = plan.latency is not None
    rows = [
        [
            _name(option.site),
            _steps_cell(option),
            *([_saved_cell(option)] if timed else []),
            _change(option.before, option.after, "params"),
            _change(option.before, option.after, "macs"),
            _harm_cell(option),
        ]
        for option in plan.choices
    ]
    saves = (">Saves",) if timed else ()
    columns = ("Site", "Rewrite", *saves, ">Parameters", ">MACs", ">Harm")
    return Table(columns=columns, rows=rows, title="Rewritten")


def _steps_cell(option: Option) -> Markup:
    tag = Markup('<span class="tag r-{}">{}</span><small>{}</small>')
    return Markup(" + ").join(
        tag.format(step.rewrite, step.rewrite, settings_words(step.settings))
        for step in option.steps
    )


def _saved_cell(option: Option) -> str:
    """Return an option's saving in the whole network, and the speedup of its site alone."""
    if option.saved.ms is None:
        return _NONE
    gain = option.gain
    alone = "" if gain is None else f"alone {format_ratio(gain.value)}"
    return quantity(option.saved.ms, format_ms(option.saved.ms), alone)


def _harm_cell(option: Option) -> str:
    if option.harm is None:
        return _NONE
    return quantity(option.harm, f"{option.harm:.2g}", "measured" if option.measured else "")


def _change(before: Cost, after: Cost, quantity: str) -> str:
    first, second = getattr(before, quantity), getattr(after, quantity)
    share = format_percent(second / first, 0) if first else ""
    small = Markup("<small>{}</small>").format(share) if share else ""
    return Markup("{} → {}{}").format(format_count(first), format_count(second), small)


def _left_alone_table(plan: Plan) -> Table:
    sites: dict[str, list[str]] = defaultdict(list)
    for item in plan.left_alone:
        sites[item.reason].append(item.site or "(root)")
    rows = [[_some(names), reason] for reason, names in sites.items()]
    return Table(columns=("Sites", "Why"), rows=rows, title="Left alone")


def _some(names: Sequence[str]) -> Markup:
    if len(names) <= 6:
        return Markup('<span class="mono">{}</span>').format(", ".join(names))
    return Markup(
        '<details><summary>{} sites</summary><span class="mono">{}</span></details>'
    ).format(len(names), ", ".join(names))


def _name(site: str) -> Markup:
    return Markup('<span class="mono">{}</span>').format(site or "(root)")


# ---------------------------------------------------------------- fine-tuning


def learning_curves(log: TrainLog | None) -> list[Chart]:
    """Return the curves of a training with at least two epochs."""
    if log is None or len(log.epochs) < 2:
        return []
    epochs = tuple(float(epoch.epoch) for epoch in log.epochs)
    kept = {float(log.chosen_epoch): "kept"} if log.chosen_epoch else {}
    loss = Series(name="loss", x=epochs, y=tuple(epoch.loss for epoch in log.epochs))
    curves: list[Chart] = [
        LineChart(
            title="Training loss",
            x="epoch",
            y="loss",
            series=(loss,),
            marks=kept,
            height=_CURVE_HEIGHT,
        )
    ]
    valid = [(float(e.epoch), e.validation) for e in log.epochs if e.validation is not None]
    if valid:
        fraction = log.metric in SHARES
        line = Series(
            name=log.metric, x=tuple(x for x, _ in valid), y=tuple(y for _, y in valid), color=2
        )
        curves.append(
            LineChart(
                title=f"Validation {log.metric}",
                x="epoch",
                y=log.metric,
                series=(line,),
                marks=kept,
                percent=fraction,
                height=_CURVE_HEIGHT,
            )
        )
    return curves


def _training_words(log: TrainLog) -> str:
    epochs = "1 epoch" if len(log.epochs) == 1 else f"{len(log.epochs)} epochs"
    waiting = "" if log.waiting is None else f" The training {log.waiting}."
    return (
        f"Objective: {log.objective.rstrip('.')}. {epochs} of {log.examples:,} examples in "
        f"{format_seconds(log.seconds)} on {log.device}; {log.kept} were kept. "
        f"{log.optimizer}, {log.schedule}, learning rate "
        f"{log.learning_rate:g}, weight decay {log.weight_decay:g}, batch {log.batch_size}, "
        f"{log.precision}, augmentation: {log.augmentation}, seed {log.seed}.{waiting}"
    )
