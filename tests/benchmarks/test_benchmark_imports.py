"""Benchmarks and scripts follow the package: what they import from it is there."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("scripts/*.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_a_script_imports_is_there(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("onebyone"):
            continue
        module = importlib.import_module(node.module)
        for alias in node.names:
            if not hasattr(module, alias.name):
                importlib.import_module(f"{node.module}.{alias.name}")


def test_the_stages_of_a_plan_are_functions_of_the_package(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    stages = importlib.import_module("plan_seconds").stages_of_a_plan()
    assert [name for owner, name, _ in stages if not callable(getattr(owner, name, None))] == []
