"""The suite itself: a process that dies ends it with the test's name, and the last line tells skips."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path):
    """Return what pytest prints for tests in a folder with this suite's own settings."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")

    def pytest_prints(code, *options):
        (tmp_path / "tests" / "test_made.py").write_text(code)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
            cwd=tmp_path,
            env={**kept, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return ran.returncode, ran.stdout

    return pytest_prints


def test_a_process_that_is_killed_ends_the_suite_with_the_name_of_its_test(run):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    code = """
import os, signal
def test_that_is_killed():
    os.kill(os.getpid(), signal.SIGKILL)
"""
    status, printed = run(code, "-n", "2", "--dist", "loadfile")
    assert status != 0
    assert "tests/test_made.py::test_that_is_killed" in printed
    assert "Its process ended with signal 9." in printed


def test_a_test_that_hangs_ends_the_suite_with_its_name(run):
    pytest.importorskip("pytest_timeout", reason="pytest-timeout is not installed")
    code = """
import time
def test_that_hangs():
    time.sleep(200)
"""
    status, printed = run(code, "--timeout", "2")
    assert status != 0
    assert "test_that_hangs" in printed


def test_the_last_line_says_what_was_skipped_and_why(run):
    code = """
import pytest
@pytest.mark.parametrize("number", range(3))
def test_that_needs_a_browser(number):
    pytest.skip("Chromium is not installed")
def test_that_passes():
    pass
"""
    status, printed = run(code)
    assert status == 0
    assert printed.splitlines()[-1] == "Skipped 3: 3 (Chromium is not installed)"
    _, printed = run("def test_that_passes(): pass")
    assert printed.splitlines()[-1] == "Nothing was skipped."
