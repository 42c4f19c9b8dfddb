from __future__ import annotations

import io
import re

import pytest

from onebyone.core.tables import Table, render
from onebyone.report.console import print_error, print_table, progress

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


LONG = "stages.3.blocks.2.a_module_of_a_very_long_name.conv_depthwise.weight_of_everything"


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_progress_stays_one_line_with_its_count_whatever_the_name(monkeypatch, columns):
    stream = terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(columns))
    with progress("shrink") as update:
        update(9_999, 10_000, LONG)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    lines = [line for line in re.split(r"[\r\n]", shown) if line.strip()]
    assert max(map(len, lines)) <= columns
    last = [line for line in lines if "9999/10000" in line]
    assert last
    assert all("…" in line and line.startswith("shrink") for line in last)


def test_progress_has_no_color_where_none_is_wanted(monkeypatch):
    stream = terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    with progress("shrink") as update:
        update(1, 2, "x")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", stream.getvalue())


WIDE = Table(
    columns=("layer", f">{LONG}", ">MACs", "change"),
    rows=[[LONG, "1.23 M → 317 k", "12.3 M → 1.23 M", "1.22× [1.20–1.25] faster"]],
    title=LONG * 2,
    notes=["A sentence on how the figures were obtained. " * 4, LONG],
)


def test_tables_fit_and_lose_neither_number_nor_name_however_long_it_is():
    lines = render(WIDE, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    for number in ("1.23 M → 317 k", "12.3 M → 1.23 M"):
        assert number in "\n".join(lines)
    rule = next(place for place, line in enumerate(lines) if "────" in line)
    body = [line for line in lines[rule + 1 : lines.index("", rule)] if line[1] != " "]
    assert "".join(line[1:].split("  ")[0] for line in body) == LONG


@pytest.mark.parametrize("width", [40, 50])
def test_rows_become_blocks_where_names_have_no_room_beside_the_numbers(width):
    text = render(WIDE, width=width)
    assert max(map(len, text.splitlines())) <= width
    for cell in WIDE.rows[0]:
        assert "".join(cell.split()) in "".join(text.split())
    assert "────" not in text
    assert re.search(r"^  MACs +12.3 M → 1.23 M$", text, flags=re.MULTILINE)


def test_tables_in_a_narrow_terminal_are_as_wide_as_it(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    print_table(WIDE)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert max(map(len, shown.splitlines())) <= 60


def test_notes_are_as_wide_as_the_page_and_not_as_a_narrow_table():
    note = "A note that is longer than the table above it is, and yet on one line."
    table = Table(columns=("a", ">b"), rows=[["1", "2"]], notes=[note])
    assert note in str(table).splitlines()


def test_a_table_in_markdown_has_every_cell_and_note_and_no_cell_breaks_it():
    made = Table(
        columns=("name", ">MACs"),
        rows=[["a|b", "1 k"], ["c", "–"]],
        title="Costs",
        notes=["Of one input.", "Counted."],
    )
    title, grid, *notes = made.to_markdown().strip().split("\n\n")
    assert title == "## Costs"
    assert notes == ["Of one input.", "Counted."]
    head, sides, *rows = grid.splitlines()
    assert sides == "| --- | ---: |"
    bars = [line.replace("\\|", "").count("|") for line in (head, sides, *rows)]
    assert set(bars) == {3}
    assert rows[0] == "| a\\|b | 1 k |"
