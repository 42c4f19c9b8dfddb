"""The section on using the result: how to load it, apply its plan, and repeat the run."""

from __future__ import annotations

import json
import shlex
from pathlib import PurePath

from markupsafe import Markup

from onebyone.core.data_names import DATA_NAMES
from onebyone.core.records import RunRecord
from onebyone.core.tables import Table
from onebyone.core.units import capitalized, format_seconds
from onebyone.report.components import code, disclosure, section, table

_PLAN_WORDS = (
    "A plan is a small file that can be edited by hand: remove a choice, or change its settings. "
    "Its costs and harms are only for information."
)

_DEPLOY_WORDS = (
    "Writes the network for ONNX Runtime, loads the file there and compares its outputs. Beside it "
    "lies a loader that needs ONNX Runtime alone. Other formats: openvino, pt2, executorch."
)


def use_section(record: RunRecord) -> Markup:
    """Return code that loads the network, applies the plan, and repeats the run."""
    parts: list[str | Markup] = []
    if record.after is not None and record.status.state == "finished":
        parts += [_heading("Load the network"), code(_load_code(record), wrap=True)]
        if record.source.spec is not None:
            parts += [_heading("Deploy it"), _DEPLOY_WORDS, code(_deploy(record), wrap=True)]
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
    """Return the commands that repeat a run; empty if no command made it."""
    if not record.command:
        return []
    words = f"With the same versions, the same data and seed {record.seed}:"
    return [words, code("\n".join([_install(record), _command(record)]), wrap=True)]


def _heading(text: str) -> Markup:
    return Markup("<h3>{}</h3>").format(text)


def _load_code(record: RunRecord) -> str:
    lines = ["import onebyone as obo", ""]
    folder = _quoted(_folder(record))
    named = _named_original(record)
    if record.source.spec is not None:
        return "\n".join([*lines, f"net = obo.load_model({folder}{named})"])
    lines.append(f"original = ...  # the {record.source.name} that it was made from")
    return "\n".join([*lines, f"net = obo.load_model({folder}, original=original)"])


def _deploy(record: RunRecord) -> str:
    folder = _folder(record)
    source = record.source
    spec = source.spec if source.origin is None else source.origin.spec
    original = ["--original", spec] if spec is not None and ".py:" in spec else []
    out = f"exports/{PurePath(folder).name or 'network'}"
    return shlex.join(["onebyone", "export", folder, *original, "--format", "onnx", "--out", out])


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
    # A run's folder has its own weights.
    if weights and source.origin is None and ":" in source.spec:
        arguments.append(f"weights={_quoted(weights)}")
    arguments += [f"{name}={value!r}" for name, value in source.options.items()]
    named = _named_original(record) if source.origin is not None else ""
    return f"obo.load_model({', '.join(arguments)}{named})"


def _named_original(record: RunRecord) -> str:
    """Return the argument that names the run's Python file, if it started from one."""
    source = record.source
    spec = source.spec if source.origin is None else source.origin.spec
    return f", original={_quoted(spec)}" if spec is not None and ".py:" in spec else ""


def _calibration(record: RunRecord) -> list[str]:
    made_on = record.plan.calibration if record.plan else None
    spec = _option(record, "--data")
    # The demo has no --data, nor has a run that was made in Python.
    if spec is None and record.data is not None and record.data.name in DATA_NAMES:
        spec = record.data.name
    if spec is None or made_on is None:
        return ["calibration = ...  # a few hundred unlabelled inputs"]
    arguments = [_quoted(spec), f"seed={made_on.seed}"]
    limit = _option(record, "--limit")
    arguments += [f"limit={limit}"] if limit and limit.isdigit() else []
    size = _option(record, "--image-size")
    arguments += [f"image_size={size}"] if size and size.isdigit() else []
    return [
        f"data = obo.load_data({', '.join(arguments)})",
        f"calibration = data.train.take({made_on.examples}, {made_on.seed})",
    ]


def _install(record: RunRecord) -> str:
    versions = {"onebyone": record.onebyone, **record.machine.versions}
    # A local version such as +cpu names a build that the package index may not have.
    pins = [f"{name}=={version.partition('+')[0]}" for name, version in versions.items()]
    return shlex.join(["pip", "install", *(pin for pin in pins if not pin.startswith("python=="))])


def _command(record: RunRecord) -> str:
    return shlex.join([PurePath(record.command[0]).name, *record.command[1:]])


def _quoted(text: str) -> str:
    # A JSON string is a Python string as well.
    return json.dumps(text, ensure_ascii=False)


def _option(record: RunRecord, name: str) -> str | None:
    """Return the value of an option on the command line, or ``None``."""
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
    """Return the conditions of the figures: seeds, data, machine, versions and times."""
    machine, data = record.machine, record.data
    rows = [["Seed", str(record.seed)]]
    if record.task is not None:
        said = str(record.task).removeprefix("Task: ")
        rows.append(["Task", f"{capitalized(said)} Harm: {record.task.divergence}."])
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
