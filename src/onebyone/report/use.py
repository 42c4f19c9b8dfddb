"""How to use the result: what loads it, applies its plan, and makes the run again."""

from __future__ import annotations

import json
import shlex
from pathlib import PurePath

from markupsafe import Markup

from onebyone.records import RunRecord
from onebyone.report.parts import code, disclosure, section, table
from onebyone.tables import Table
from onebyone.units import format_seconds

# Data that is known by its name alone, as a command without --data, such as the demo, has it.
_NAMED = frozenset({"digits", "mnist", "fashion-mnist", "cifar10"})
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
        parts += [_heading("Make this run again"), *reproduction(record)]
    return section("use", "How to use it", *parts) if parts else Markup("")


def reproduction(record: RunRecord) -> list[str | Markup]:
    """Return the commands that make a run again; nothing where it was not made by a command."""
    if not record.command:
        return []
    words = f"With the same versions, the same data and seed {record.seed}:"
    return [words, code("\n".join([_install(record), _command(record)]), wrap=True)]


def _heading(text: str) -> Markup:
    return Markup("<h3>{}</h3>").format(text)


def _load_code(record: RunRecord) -> str:
    lines = ["import onebyone as obo", ""]
    folder = _quoted(_folder(record))
    if record.source.spec is not None:
        return "\n".join([*lines, f"net = obo.load_model({folder})"])
    lines.append(f"original = ...  # the {record.source.name} that it was made from")
    return "\n".join([*lines, f"net = obo.load_model({folder}, original=original)"])


def _apply_code(record: RunRecord) -> str:
    path = _quoted(f"{_folder(record)}/plan.json")
    lines = [
        "import onebyone as obo",
        "",
        f"net = {_original(record)}",
        *_calibration(record),
        f"plan = obo.Plan.load({path})",
        "small = obo.apply(net, plan, calibration)  # a new network; `net` is untouched",
    ]
    return "\n".join(lines)


def _original(record: RunRecord) -> str:
    source = record.source
    if source.spec is None:
        return f"...  # the original {source.name}, with its weights"
    arguments = [_quoted(source.spec)]
    weights = _option(record, "--weights") or source.weights
    # A run's folder has its weights itself.
    if weights and ":" in source.spec:
        arguments.append(f"weights={_quoted(weights)}")
    arguments += [f"{name}={value!r}" for name, value in source.options.items()]
    return f"obo.load_model({', '.join(arguments)})"


def _calibration(record: RunRecord) -> list[str]:
    made_on = record.plan.calibration if record.plan else None
    spec = _option(record, "--data")
    if spec is None and record.data is not None and record.data.name in _NAMED:
        spec = record.data.name
    if spec is None or made_on is None:
        return ["calibration = ...  # a few hundred unlabelled inputs"]
    arguments = [_quoted(spec), f"seed={made_on.seed}"]
    limit = _option(record, "--limit")
    arguments += [f"limit={limit}"] if limit and limit.isdigit() else []
    return [
        f"data = obo.load_data({', '.join(arguments)})",
        f"calibration = data.train.take({made_on.examples}, {made_on.seed})",
    ]


def _install(record: RunRecord) -> str:
    versions = {"onebyone": record.onebyone, **record.machine.versions}
    # A local part, such as +cpu, names a build that the index may not have.
    pins = [f"{name}=={version.partition('+')[0]}" for name, version in versions.items()]
    return shlex.join(["pip", "install", *(pin for pin in pins if not pin.startswith("python=="))])


def _command(record: RunRecord) -> str:
    return shlex.join([PurePath(record.command[0]).name, *record.command[1:]])


def _quoted(text: str) -> str:
    # A JSON string is a Python string as well.
    return json.dumps(text, ensure_ascii=False)


def _option(record: RunRecord, name: str) -> str | None:
    """Return the value that an option had on the command line, or ``None``."""
    arguments = list(record.command)
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            return argument.removeprefix(f"{name}=")
        if argument == name and index + 1 < len(arguments):
            return arguments[index + 1]
    return None


def _folder(record: RunRecord) -> str:
    folder = record.folder or _option(record, "--out") or "."
    return folder.rstrip("/") or folder


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
