from __future__ import annotations

import pytest
from chromium import CHROMIUM, DRIVER, Browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium without a window; tests that need it are skipped where it is not installed."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not both installed")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()
