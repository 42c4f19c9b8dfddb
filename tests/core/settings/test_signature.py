"""A function that takes settings shows those of its record: names, defaults and documentation."""

import inspect
from dataclasses import MISSING, dataclass, fields
from typing import get_args

import pytest

import onebyone
from onebyone.core.arguments import KINDS, OneOf
from onebyone.core.errors import OptionError, UnknownNameError
from onebyone.core.precision import Precision
from onebyone.core.settings.planning import Effort, PlanSettings
from onebyone.core.settings.runs import ShrinkArguments, TrainRunSettings
from onebyone.core.settings.signature import docs_of, takes
from onebyone.core.settings.training import DistillSettings, TrainSettings
from onebyone.planning import HeadChoice

RECORDS = {
    "distill": DistillSettings,
    "plan": PlanSettings,
    "shrink": ShrinkArguments,
    "train": TrainSettings,
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_signature_is_that_of_its_record(name):
    first, second, *settings = inspect.signature(getattr(onebyone, name)).parameters.values()
    assert (first.name, second.name) in {("model", "data"), ("model", "calibration")}
    assert {each.name: each.default for each in settings} == {
        field.name: inspect.Parameter.empty if field.default is MISSING else field.default
        for field in fields(RECORDS[name])
    }
    assert all(each.kind is each.KEYWORD_ONLY for each in settings)


@pytest.mark.parametrize("record", [*RECORDS.values(), TrainRunSettings])
def test_each_setting_is_documented_in_whole_sentences(record):
    for name, said in docs_of(record).items():
        assert said.endswith("."), name
        assert said[0].isupper() or said.startswith("``"), name
        assert "  " not in said, name


@pytest.mark.parametrize("name", RECORDS)
def test_the_documentation_of_a_function_has_that_of_each_setting(name):
    text = inspect.getdoc(getattr(onebyone, name))
    assert "settings:" not in text
    words = " ".join(text.split())
    for setting, said in docs_of(RECORDS[name]).items():
        assert f" {setting}: {said}" in words
    assert max(map(len, text.splitlines())) <= 100
    assert text.index("Args:") < text.index("    model:") < text.index("\n\nRaises:")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("effort", get_args(Effort)),
        ("head", get_args(HeadChoice)),
        ("precision", get_args(Precision)),
    ],
)
def test_the_type_of_a_setting_has_the_words_that_its_check_takes(name, words):
    kind = KINDS[name]
    assert isinstance(kind, OneOf)
    assert kind.allowed == words


@dataclass(frozen=True, kw_only=True)
class Base:
    """Base.

    Attributes:
        seed: Random
            seed.
        size: Not this one.
    """

    seed: int = 0
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Settings(Base):
    """Settings.

    Attributes:
        size: Of all.
        steps: How many.

    What follows is no attribute.
    """

    steps: int


@takes(Settings)
def work(model, data, settings):
    """Work.

    Args:
        model: What.
        settings: Which are
            replaced.

    Returns:
        All.
    """
    return model, data, settings


def test_a_record_says_what_differs_from_the_record_that_it_extends():
    assert docs_of(Settings) == {"seed": "Random seed.", "size": "Of all.", "steps": "How many."}


def test_settings_are_given_by_keyword_and_documented_where_they_were():
    assert work("net", "data", steps=3) == ("net", "data", Settings(steps=3))
    assert work(data="data", model="net", steps=3, seed=1)[2] == Settings(steps=3, seed=1)
    assert str(inspect.signature(work)).startswith("(model, data, *, steps: int, seed: int = 0")
    assert work.__doc__ == (
        "Work.\n\nArgs:\n    model: What.\n    steps: How many.\n    seed: Random seed.\n"
        "    size: Of all.\n\nReturns:\n    All."
    )


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"step": 1}, UnknownNameError, r"No argument of work\(\) named 'step'.*mean 'steps'"),
        ({"settings": 1}, UnknownNameError, "named 'settings'"),
        ({}, OptionError, "missing a required argument: 'steps'"),
    ],
)
def test_a_setting_that_is_not_there_is_said(given, error, message):
    with pytest.raises(error, match=message):
        work("net", "data", **given)


def test_settings_are_not_given_by_place():
    with pytest.raises(OptionError, match="too many positional"):
        work("net", "data", 3)
