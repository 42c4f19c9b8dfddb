"""How to use the result: what loads it, applies its plan, and makes the run again."""

from __future__ import annotations

import json
import shlex
from pathlib import PurePath

from markupsafe import Markup

from onebyone.records import ModelSource, RunRecord
from onebyone.report.parts import code, disclosure, section, table
from onebyone.tables import Table
from onebyone.units import format_seconds

_PLAN_WORDS = (
    "A plan is a small file that can be edited by hand: take a choice out, or change its "
    "settings. Costs and harms in it are there to be read."
)


def use_section(record: RunRecord) -> Markup:
    """Return what loads the network, applies the plan, and makes the run again."""
    parts: list[str | Markup] = []
    if record.after is not None and record.status.state == "finished":
        parts += [_heading("Load the network"), code(_load_code(record), wrap=True)]
    if record.plan is not None:
        parts += [
            _heading("Apply the plan to a fresh copy"),
            _PLAN_WORDS,
            code(_apply_code(record), wrap=True),
            disclosure("The plan, as plan.json", code(record.plan.to_json().strip(), tall=True)),
        ]
    if record.command:
        command = shlex.join([PurePath(record.command[0]).name, *record.command[1:]])
        parts += [_heading("Make this run again"), code(command, wrap=True)]
    return section("use", "How to use it", *parts) if parts else Markup("")


def _heading(text: str) -> Markup:
    return Markup("<h3>{}</h3>").format(text)


def _load_code(record: RunRecord) -> str:
    return (
        "import onebyone as obo\n\n"
        f"net = obo.load_model({_quoted(_folder(record))})"
        "  # the folder of this report"
    )


def _apply_code(record: RunRecord) -> str:
    path = _quoted(f"{_folder(record)}/plan.json")
    lines = [
        "import onebyone as obo\n",
        f"net = {_original(record.source)}",
        f"plan = obo.Plan.load({path})",
        "small = obo.apply(net, plan, calibration)  # a new module; `net` is untouched",
    ]
    return "\n".join(lines)


def _original(source: ModelSource) -> str:
    if source.spec is None:
        return "...  # the original network, with its weights"
    arguments = [_quoted(source.spec)]
    if source.weights:
        arguments.append(f"weights={_quoted(source.weights)}")
    arguments += [f"{name}={value!r}" for name, value in source.options.items()]
    return f"obo.load_model({', '.join(arguments)})"


def _quoted(text: str) -> str:
    # A JSON string is a Python string as well.
    return json.dumps(text, ensure_ascii=False)


def _folder(record: RunRecord) -> str:
    arguments = list(record.command)
    for index, argument in enumerate(arguments):
        if argument.startswith("--out="):
            return argument.removeprefix("--out=").rstrip("/")
        if argument == "--out" and index + 1 < len(arguments):
            return arguments[index + 1].rstrip("/")
    return "."


def conditions_section(record: RunRecord) -> Markup:
    """Return what else decides the figures: seeds, data, machine, versions, time."""
    machine, data = record.machine, record.data
    rows = [["Seed", str(record.seed)]]
    if record.source.weights:
        rows.append(["Weights of the original", record.source.weights])
    if data is not None:
        sizes = f"{data.train:,} train, {data.validation:,} validation, {data.test:,} test"
        rows.append(["Data", f"{data.name}: {sizes}, seed {data.seed}"])
    rows.append(["Machine", f"{machine.processor}, {machine.cores} cores, {machine.device}"])
    rows.append(["System", machine.system])
    versions = {"onebyone": record.onebyone, **machine.versions}
    rows.append(["Versions", ", ".join(f"{name} {value}" for name, value in versions.items())])
    if record.seconds:
        times = (f"{stage} {format_seconds(took)}" for stage, took in record.seconds.items())
        rows.append(["Time by stage", ", ".join(times)])
    return section("conditions", "Conditions", table(Table(columns=("What", "Value"), rows=rows)))
