"""The sections of a run's page, in their order: each makes its markup from the record, or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from markupsafe import Markup

from onebyone.records import (
    Cost,
    Disagreement,
    Option,
    Plan,
    RunRecord,
    TrainLog,
)
from onebyone.report.charts import LineChart, Series
from onebyone.report.matching import settings_words
from onebyone.report.measured import measured_section
from onebyone.report.network import network_picture
from onebyone.report.parts import (
    chart,
    disclosure,
    environment,
    figures,
    notice,
    paragraph,
    quantity,
    section,
    table,
)
from onebyone.report.use import conditions_section, use_section
from onebyone.report.verdict import (
    examples_word,
    verdict,
)
from onebyone.tables import Table
from onebyone.units import (
    format_count,
    format_percent,
    format_seconds,
)

_LISTED = 40  # rows of a table that are shown without being asked for
_PICTURES = 60  # test examples shown; the rest is counted
_NONE = "–"


def subtitle(record: RunRecord) -> str:
    """Return what was run on what, in a line."""
    parts = [record.source.spec or "a network made in memory"]
    if record.data is not None:
        parts.append(f"on {record.data.name}")
    if record.plan is not None and record.plan.budgets:
        parts.append("budget " + ", ".join(budget.asked for budget in record.plan.budgets))
    return ", ".join([*parts, record.created])


def status_notice(record: RunRecord) -> Markup:
    """Return the notice that a run is not whole; nothing for a finished run."""
    state, stage = record.status.state, record.status.stage
    if state == "finished":
        return Markup("")
    heading, text = {
        "failed": ("This run failed", f"It stopped with an error while it was at “{stage}”."),
        "interrupted": ("This run was interrupted", f"It was stopped while it was at “{stage}”."),
        "running": ("This run has not finished", f"It was at “{stage}” when this page was made."),
    }[state]
    return notice(
        heading,
        f"{text} What was measured before is shown below.",
        failed=state == "failed",
        preformatted=record.status.detail,
    )


# ---------------------------------------------------------------- 1: the verdict


def verdict_section(record: RunRecord) -> Markup:
    """Return the sentence, the figures and how they were measured."""
    found = verdict(record)
    lines = Markup("").join(paragraph(line, note=True) for line in found.conditions)
    conditions = Markup('<div class="conditions">{}</div>').format(lines) if lines else ""
    lead = Markup('<p class="lead">{}</p>').format(_kept_together(found.sentence))
    together = [replace(item, detail=_kept_together(item.detail)) for item in found.figures]
    shown = figures(together) if together else ""
    return section("verdict", "The verdict", lead, shown, conditions, heading_shown=False)


def _kept_together(text: str) -> str:
    # No line ends inside an interval or between a number and its unit.
    for joined in (" … ", " → ", " %", " points", " ms", " µs", " images", " examples"):
        text = text.replace(joined, joined.replace(" ", "\u00a0"))
    return text


# ---------------------------------------------------------------- 3: the network


def network_section(record: RunRecord) -> Markup:
    """Return the picture of the network; nothing where it was not profiled."""
    if record.profile_before is None:
        return Markup("")
    drawn = network_picture(record.profile_before, record.profile_after, record.plan)
    return section("network", "The network, layer by layer", drawn)


# ---------------------------------------------------------------- 4: the plan


def plan_section(record: RunRecord) -> Markup:
    """Return what the plan chose, and what it left alone and why."""
    plan = record.plan
    if plan is None:
        return Markup("")
    choices = table(_choices_table(plan)) if plan.choices else paragraph("It changes nothing.")
    if len(plan.choices) > _LISTED:
        choices = disclosure(f"All {len(plan.choices)} choices", choices)
    alone = table(_left_alone_table(plan)) if plan.left_alone else ""
    return section("plan", "The plan", _plan_intro(plan), choices, alone)


def _plan_intro(plan: Plan) -> str:
    count = len(plan.choices)
    asked = ", ".join(budget.asked for budget in plan.budgets) or "none"
    text = (
        f"Budget: {asked}. {count} {'site' if count == 1 else 'sites'} rewritten, "
        f"{len(plan.left_alone)} left alone: MACs {_cost_change(plan, 'macs')}, "
        f"parameters {_cost_change(plan, 'params')}."
    )
    if plan.harm is not None:
        text += f" Predicted harm in all: {plan.harm:.3g}."
    if plan.calibration is not None:
        text += (
            " Harm is the predicted divergence from the original’s outputs, on "
            f"{plan.calibration.examples:,} calibration examples of {plan.calibration.data}."
        )
    return text


def _cost_change(plan: Plan, quantity: str) -> str:
    before: int = getattr(plan.before, quantity)
    after: int = getattr(plan.after, quantity)
    share = f" ({format_percent(after / before)})" if before else ""
    return f"{format_count(before)} → {format_count(after)}{share}"


def _choices_table(plan: Plan) -> Table:
    rows = [
        [
            _name(option.site),
            Markup('<span class="tag r-{}">{}</span><small>{}</small>').format(
                option.rewrite, option.rewrite, settings_words(option.settings)
            ),
            _change(option.before, option.after, "params"),
            _change(option.before, option.after, "macs"),
            _harm_cell(option),
        ]
        for option in plan.choices
    ]
    columns = ("Site", "Rewrite", ">Parameters", ">MACs", ">Harm")
    return Table(columns=columns, rows=rows, title="Rewritten")


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


# ---------------------------------------------------------------- 5: fine-tuning


def training_section(record: RunRecord) -> Markup:
    """Return the learning curves of the fine-tuning."""
    log = record.training
    if log is None or not log.epochs:
        return Markup("")
    curves = [chart(curve) for curve in _curves(log)] if len(log.epochs) > 1 else []
    drawn = Markup('<div class="charts">{}</div>').format(Markup("").join(curves))
    heading = "Fine-tuning" if record.plan is not None else "Training"
    return section(
        "training", heading, _training_words(log), drawn if curves else table(log.table())
    )


def _curves(log: TrainLog) -> list[LineChart]:
    epochs = tuple(float(epoch.epoch) for epoch in log.epochs)
    kept = {float(log.chosen_epoch): "kept"}
    loss = Series(name="loss", x=epochs, y=tuple(epoch.loss for epoch in log.epochs))
    curves = [LineChart(title="Training loss", x="epoch", y="loss", series=(loss,), marks=kept)]
    valid = [(float(e.epoch), e.validation) for e in log.epochs if e.validation is not None]
    if valid:
        fraction = log.metric in {"accuracy", "agreement"}
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
            )
        )
    return curves


def _training_words(log: TrainLog) -> str:
    epochs = "1 epoch" if len(log.epochs) == 1 else f"{len(log.epochs)} epochs"
    return (
        f"Objective: {log.objective.rstrip('.')}. {epochs} of {log.examples:,} examples in "
        f"{format_seconds(log.seconds)} on {log.device}; the weights of epoch "
        f"{log.chosen_epoch} were kept. {log.optimizer}, {log.schedule}, learning rate "
        f"{log.learning_rate:g}, weight decay {log.weight_decay:g}, batch {log.batch_size}, "
        f"{log.precision}, augmentation: {log.augmentation}, seed {log.seed}."
    )


# ---------------------------------------------------------------- 6: where they differ


def disagreements_section(record: RunRecord) -> Markup:
    """Return the test examples that the two networks see differently."""
    if not record.disagreements:
        return Markup("")
    shown = record.disagreements[:_PICTURES]
    markup = (
        environment()
        .get_template("disagreements.html")
        .render(items=[_disagreement(record, item) for item in shown])
    )
    return section(
        "differences",
        "Where they differ",
        _disagreement_words(record, shown),
        Markup(markup),  # noqa: S704  # an autoescaped template's output
    )


def _disagreement_words(record: RunRecord, shown: Sequence[Disagreement]) -> str:
    unit = examples_word(record)
    before = sum(item.before == item.label for item in shown)
    after = sum(item.after == item.label for item in shown)
    agreement = record.comparison.agreement if record.comparison else None
    total = round(agreement.n * (1 - agreement.value)) if agreement else None
    of = f" of the {total:,}" if total is not None and total > len(shown) else ""
    return (
        f"{len(shown)}{of} test {unit} on which the two networks disagree. On these the original "
        f"is right {before} times, the rewritten network {after} times, neither "
        f"{len(shown) - before - after} times."
    )


def _disagreement(record: RunRecord, item: Disagreement) -> dict[str, object]:
    classes = record.data.classes if record.data else ()
    names = ("image", "original’s map", "rewritten network’s map")
    pictures = [
        {"source": source, "what": what}
        for what, source in zip(names, (item.image, *item.maps), strict=False)
        if source.startswith("data:image/")  # a record may come from anywhere: nothing is loaded
    ]
    return {
        "index": item.index,
        "label": _class(classes, item.label),
        "predictions": [
            {"who": who, "name": _class(classes, index), "right": index == item.label}
            for who, index in (("Before", item.before), ("After", item.after))
        ],
        "pictures": pictures,
    }


def _class(classes: Sequence[str], index: int) -> str:
    return classes[index] if 0 <= index < len(classes) else f"class {index}"


SECTIONS: tuple[tuple[str, str, Callable[[RunRecord], Markup]], ...] = (
    ("verdict", "Verdict", verdict_section),
    ("measured", "Before and after", measured_section),
    ("network", "Network", network_section),
    ("plan", "Plan", plan_section),
    ("training", "Training", training_section),
    ("differences", "Where they differ", disagreements_section),
    ("use", "How to use it", use_section),
    ("conditions", "Conditions", conditions_section),
)
