"""Options are made from settings: each has the name, the default, the bounds and the help of one."""

import argparse
from dataclasses import dataclass, fields

import pytest

from onebyone.cli import main
from onebyone.cli.loading import settings_of
from onebyone.cli.options import NOT_OPTIONS, OTHERS, add_settings, flag_of, offered, plain
from onebyone.core.records import Plan
from onebyone.core.settings.common import CheckedSettings
from onebyone.core.settings.planning import PlanSettings
from onebyone.core.settings.runs import ShrinkSettings, TrainRunSettings
from onebyone.core.settings.signature import docs_of

COMMANDS = {"shrink": ShrinkSettings, "train": TrainRunSettings, "plan": PlanSettings}

# A value of each setting as it is typed, and as it is meant.
TYPED = {
    "accumulate": (["--accumulate", "4"], 4),
    "augment": (["--no-augment"], False),
    "batch": (["--batch", "8"], 8),
    "batch_size": (["--batch-size", "32"], 32),
    "budget": (["--budget", "macs=40%", "--budget", "params=2k"], ("macs=40%", "params=2k")),
    "calibration_examples": (["--calibration", "64"], 64),
    "capture": (["--no-capture"], False),
    "closest": (["--closest"], True),
    "device": (["--device", "cpu"], "cpu"),
    "effort": (["--effort", "quick"], "quick"),
    "ema": (["--ema", "0.99"], 0.99),
    "epochs": (["--epochs", "3"], 3),
    "fastest": (["--fastest", "--budget", "macs=40%"], True),
    "head": (["--head", "gap"], "gap"),
    "ignore_index": (["--ignore-index", "-1"], -1),
    "int8_epochs": (["--int8-epochs", "2", "--precision", "int8"], 2),
    "label_smoothing": (["--label-smoothing", "0.1"], 0.1),
    "label_weight": (["--label-weight", "0.5"], 0.5),
    "learning_rate": (["--rate", "0.1"], 0.1),
    "leave": (["--leave", "a", "--leave", "b"], ("a", "b")),
    "log": (["--log", "wandb", "--log", "mlflow"], ("wandb", "mlflow")),
    "max_drop": (["--max-drop", "0.5"], 0.5),
    "measure_front": (["--front"], True),
    "metric": (["--metric", "F1"], "F1"),
    "mix": (["--mix", "1"], 1.0),
    "num_threads": (["--threads", "2"], 2),
    "only_faster": (["--only-faster"], True),
    "overwrite": (["--overwrite"], True),
    "patience": (["--patience", "3"], 3),
    "precision": (["--precision", "int8"], "int8"),
    "reconstruct": (["--reconstruct", "10"], 10),
    "runtime": (["--runtime", "packed"], "packed"),
    "runtimes": (["--runtime", "eager", "--runtime", "packed"], ("eager", "packed")),
    "schedule": (["--schedule", "constant"], "constant"),
    "seed": (["--seed", "7"], 7),
    "weight_decay": (["--weight-decay", "0.1"], 0.1),
}
READ_FROM_FILES = {"plan", "resume", "task"}  # below, or needs a folder


def parser_of(record):
    parser = argparse.ArgumentParser()
    add_settings(parser, record)
    return parser


@pytest.mark.parametrize("record", COMMANDS.values())
def test_nothing_typed_is_the_default_of_each_setting(record):
    args = parser_of(record).parse_args([])
    assert record(**settings_of(args, record)) == record()


@pytest.mark.parametrize(
    ("record", "name"), [(record, name) for record in COMMANDS.values() for name in offered(record)]
)
def test_what_is_typed_is_the_setting(record, name):
    if name in READ_FROM_FILES:
        return
    words, value = TYPED[name]
    args = parser_of(record).parse_args(words)
    made = record(**settings_of(args, record))
    assert getattr(made, name) == value
    assert getattr(record(), name) != value or name == "device"


def test_a_plan_and_a_task_are_read(tmp_path):
    plan = tmp_path / "plan.json"
    main(
        [
            "plan",
            "onebyone:classic",
            "--weights",
            "random",
            "--ranks",
            "50%",
            "--out",
            str(tmp_path),
        ]
    )
    args = parser_of(ShrinkSettings).parse_args(["--plan", str(plan), "--task", "classification"])
    made = ShrinkSettings(**settings_of(args, ShrinkSettings))
    assert made.plan == Plan.load(plan)
    assert made.task.name == "classification"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_says_what_the_documentation_says(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([command, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split()).lower()
    record = COMMANDS[command]
    for name, said in docs_of(record).items():
        if name in NOT_OPTIONS or (command, name) == ("plan", "device"):
            continue
        assert flag_of(record, name) in words
        first = plain(said, record).lower().partition(". ")[0].removesuffix(".")
        assert first in words, name
        default = next(field.default for field in fields(record) if field.name == name)
        if isinstance(default, int | float | str) and not isinstance(default, bool):
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            assert f"(default: {shown})" in words


@pytest.mark.parametrize("record", COMMANDS.values())
def test_no_two_settings_have_one_flag_and_none_is_lost(record):
    flags = [flag_of(record, name) for name in offered(record)]
    assert len(set(flags)) == len(flags)
    assert {*offered(record)} == {field.name for field in fields(record)} - NOT_OPTIONS


@dataclass(frozen=True, kw_only=True)
class Grown(CheckedSettings):
    """Settings that grew.

    Attributes:
        rounds: Rounds, at 100% of ``rounds``. By default few.
        keep_freed_memory: Keep memory. Off it goes.
        sites: Names. They are many.
        precision: How precise.
    """

    rounds: int = 3
    keep_freed_memory: bool = True
    sites: "Sequence[str]" = ()  # noqa: F821
    precision: str = "auto"


def test_a_new_setting_is_an_option_without_a_word_more(capsys):
    parser = parser_of(Grown)
    assert parser.parse_args(["--rounds", "9", "--no-keep-freed-memory"]).rounds == 9
    text = " ".join(parser.format_help().split())
    assert OTHERS in text
    assert "--rounds N rounds, at 100% of --rounds. By default few (default: 3)" in text
    assert "--no-keep-freed-memory do not keep memory --sites" in text
    assert "--sites VALUE names. They are many. May be repeated" in text
    assert "{auto,float32,bf16} how precise (default: auto)" in text
    with pytest.raises(SystemExit):
        parser.parse_args(["--rounds", "0"])
    assert "--rounds: must be 1 or more, got 0" in capsys.readouterr().err


def test_markup_of_the_documentation_is_not_printed():
    said = "See :func:`onebyone.plan`, ``out`` and ``fastest``; not ``a b`` of ``(x, y) -> z``."
    assert plain(said, ShrinkSettings) == (
        "See onebyone.plan, --out and --fastest; not 'a b' of (x, y) -> z."
    )
