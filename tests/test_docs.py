"""The docs name every field of the record, and the README's commands exist."""

import dataclasses
import re
from pathlib import Path

from onebyone.cli import COMMANDS
from onebyone.core.compared import Compared, Contender
from onebyone.core.records import Comparison, Difference, LayerCost, Measured, Profile, RunRecord
from onebyone.explaining.record import (
    ClassScore,
    Explanation,
    ImageExplanation,
    LayerMaps,
    Preparation,
)

ROOT = Path(__file__).parents[1]


def test_every_field_of_the_record_is_described():
    text = (ROOT / "docs" / "run-json.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_0-9]+)`", text))
    for record in (RunRecord, Measured):
        missing = {field.name for field in dataclasses.fields(record)} - named
        assert not missing, f"{record.__name__}: {missing}"
    assert {"latency_ratio", "difference"} <= {f.name for f in dataclasses.fields(Comparison)}


def test_every_field_of_what_compare_and_explain_print_is_described():
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_0-9]+)`", text))
    records = (
        Compared, Contender, Difference, Profile, LayerCost,
        Explanation, ImageExplanation, ClassScore, LayerMaps, Preparation,
    )  # fmt: skip
    for record in records:
        missing = {field.name for field in dataclasses.fields(record)} - named
        assert not missing, f"{record.__name__}: {missing}"


def test_every_command_that_prints_json_is_described():
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    table = text.partition("| command |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z]+)`", table)) >= set(COMMANDS)


def test_every_command_is_in_the_readme_and_every_command_of_the_readme_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"(?:^|`)onebyone ([a-z]+)", text, flags=re.MULTILINE))
    assert used == set(COMMANDS)
