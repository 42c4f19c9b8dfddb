from __future__ import annotations

import io

import pytest

from onebyone.report.console import print_error, print_table, progress
from onebyone.tables import Table

TABLE = Table(columns=("layer", ">ms"), rows=[["conv[1]", "0.42"]], title="Times")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch) -> Terminal:
    """Make standard error a terminal; in the test itself, for pytest sets the stream before it."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def test_table_goes_to_standard_output(capsys):
    print_table(TABLE)
    out, err = capsys.readouterr()
    assert out == str(TABLE) + "\n"
    assert err == ""


def test_error_goes_to_standard_error_as_written(capsys):
    print_error("No model named 'resnet[18]'.")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "Error: No model named 'resnet[18]'.\n"


def test_progress_is_quiet_where_nobody_looks(capsys):
    with progress("Calibrate") as update:
        update(1, 2, "conv1")
        update(2, 2)
    assert capsys.readouterr() == ("", "")


def test_progress_shows_title_count_and_message(monkeypatch):
    stream = terminal(monkeypatch)
    with progress("Calibrate [all]") as update:
        update(3, 512, "layer[0]")
    shown = stream.getvalue()
    for part in ("Calibrate [all]", "3/512", "layer[0]"):
        assert part in shown


def test_error_is_red_in_a_terminal_unless_colors_are_unwanted(monkeypatch):
    stream = terminal(monkeypatch)
    print_error("x")
    assert "31m" in stream.getvalue()
    stream = terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    print_error("x")
    assert "31m" not in stream.getvalue()


def test_progress_ends_when_the_block_raises(monkeypatch):
    stream = terminal(monkeypatch)

    def stopped():
        with progress("Train") as update:
            update(1, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is back
