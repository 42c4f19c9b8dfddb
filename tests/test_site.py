"""The site: every public name, command and document has its place."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import onebyone as obo
from onebyone.cli import COMMANDS, make_parser

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages():
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "scripts" / "site_pages.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_every_public_name_is_in_the_reference(pages):
    named = [name for names in pages.PYTHON.values() for name in names]
    assert sorted(named) == sorted(set(obo.__all__) - {"__version__"})


def test_every_option_of_every_command_is_in_the_reference(pages):
    text = pages.commands_page()
    parts = dict(re.findall(r"^## (\w+)$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(parts) == list(COMMANDS)
    children = next(a for a in make_parser()._actions if a.dest == "command").choices
    for name, child in children.items():
        for action in child._actions:
            for flag in set(action.option_strings) - {"-h", "--help"}:
                assert f"| `{flag}" in parts[name], (name, flag)


def test_every_document_is_in_the_navigation():
    named = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (ROOT / "docs").rglob("*.md"):
        assert path.relative_to(ROOT / "docs").as_posix() in named


def test_links_of_the_readme_point_into_the_site(pages):
    text = pages.page_from_root("README.md")
    assert "](docs/" not in text
    assert "](CONTRIBUTING.md)" not in text
