"""A browser for the page; a test that asks for it is skipped where none is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """Start the browser that the report's tests drive, without importing their folder."""
    path = Path(__file__).parents[1] / "report" / "chromium.py"
    spec = importlib.util.spec_from_file_location("report_chromium", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.CHROMIUM is None or module.DRIVER is None:
        pytest.skip("chromium and chromedriver are not both installed")
    started = module.Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()
