"""A small sample of ``make faults``."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "faults.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "shrink"])
def test_what_is_killed_without_room_or_twice_at_once_loses_nothing(kind, tmp_path):
    counts = ["--kills", "2", "--memory", "1", "--pairs", "1", "--writes", "2", "--resumed", "0"]
    command = [sys.executable, str(SCRIPT), "--runs", kind, *counts]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 tried, 0 broken" in done.stdout
