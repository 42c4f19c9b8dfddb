"""Recipes: options of a training in a file, with the figures that they gave."""

import datetime as dt
import re
import tomllib
from pathlib import Path

import pytest

import onebyone
from onebyone.cli import main, make_parser
from onebyone.cli.option_files import with_recipe
from onebyone.core.records import RunRecord

RECIPES = sorted((Path(onebyone.__file__).parent / "recipes").glob("*.toml"))
TINY = """
model = "net.py:make"
data = "digits"
limit = 32
epochs = 1
batch-size = 8
no-capture = true
[[figure]]
result = "nothing of interest"
"""
NET = "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def options(*arguments):
    return vars(make_parser(["train"]).parse_args(with_recipe(["train", *arguments])))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_published_recipe_is_a_command_and_says_what_it_gave(path):
    assert options("--recipe", path.stem) == options(f"--recipe={path}")
    figures = tomllib.loads(path.read_text(encoding="utf-8"))["figure"]
    assert figures
    for figure in figures:
        assert re.search(r"\d %.* n = [\d,]+$", figure["result"])
        assert isinstance(figure["date"], dt.date)
        assert {"seed", "hardware", "onebyone", "torch"} <= set(figure)


def test_options_of_the_command_line_replace_those_of_a_recipe():
    made = options("--epochs", "3", "--recipe", "classic-digits", "--data", "mnist")
    assert (made["model"], made["epochs"], made["data"]) == ("onebyone:classic", 3, "mnist")


def test_a_recipe_of_ones_own_trains_and_the_run_has_the_whole_command():
    Path("net.py").write_text(NET)
    Path("own.toml").write_text(TINY)
    assert main(["train", "--recipe", "own.toml", "--seed", "2", "--out", "run"]) == 0
    record = RunRecord.load("run/run.json")
    assert len(record.training.epochs) == 1
    assert record.command == (
        "onebyone", "train", "net.py:make", "--data", "digits", "--limit", "32", "--epochs", "1",
        "--batch-size", "8", "--no-capture", "--seed", "2", "--out", "run",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["--recipe", "classic-digit"], "", "No recipe named 'classic-digit'.*'classic-digits'"),
        (["--recipe", "none.toml"], "", "a recipe must be a TOML file, but none.toml does not"),
        (["--recipe", "own.toml"], "epochs = 1", "must have one `model`, got 0"),
        (["--recipe", "own.toml"], "model = 'a'\nepochz = 1", "'--epochz.*Did you mean --epochs"),
        (["--recipe"], "", "expected one argument"),
        (["net.py:make", "--recipe", "classic-digits"], "", "unrecognized argument 'net.py:make'"),
    ],
)
def test_a_slip_in_a_recipe_is_told(arguments, content, message, capsys):
    Path("own.toml").write_text(content)
    assert main(["train", "--data", "digits", *arguments]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()), re.IGNORECASE)
