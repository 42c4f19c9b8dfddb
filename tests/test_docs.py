"""The docs name every field of the record, and the README's commands exist."""

import dataclasses
import re
from pathlib import Path

from onebyone.cli import COMMANDS
from onebyone.records import Comparison, Measured, RunRecord

ROOT = Path(__file__).parents[1]


def test_every_field_of_the_record_is_described():
    text = (ROOT / "docs" / "run-json.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_0-9]+)`", text))
    for record in (RunRecord, Measured):
        missing = {field.name for field in dataclasses.fields(record)} - named
        assert not missing, f"{record.__name__}: {missing}"
    assert {"latency_ratio", "difference"} <= {f.name for f in dataclasses.fields(Comparison)}


def test_every_command_is_in_the_readme_and_every_command_of_the_readme_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"^onebyone ([a-z]+)", text, flags=re.MULTILINE))
    assert used == set(COMMANDS)
