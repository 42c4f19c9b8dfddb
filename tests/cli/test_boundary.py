"""Whatever happens inside a command, its user reads a line or two and gets a status."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from onebyone.cli import main
from onebyone.cli.boundary import FAULT, TRACEBACK, guarded
from onebyone.core.errors import BudgetError, DataError


def raises(error):
    """Return a command that raises, in code that is no file of a user's."""
    names = {"error": error}
    exec(compile("def command():\n    raise error\n", "<command>", "exec"), names)
    return names["command"]


def ending(error, capsys, *arguments):
    """Return the status and the standard error of a command that raises."""
    status = guarded(raises(error), arguments)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return status, " ".join(err.split())


def torch_error(text):
    import torch

    return torch.OutOfMemoryError(text)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DataError("no data"), 1, "Error: no data"),
        (BudgetError("no budget"), 2, "Error: no budget"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (BrokenPipeError(), 0, ""),
        (MemoryError(), 1, "There is not enough memory. Give a smaller --batch"),
        (torch_error("CUDA out of memory. Tried 9 GiB"), 1, "not enough memory (CUDA out of"),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory"), 1, "not enough"),
        (OSError(errno.ENOSPC, "No space left on device", "/d/f"), 1, "The disk is full. Free"),
        (OSError(errno.EACCES, "denied", "/d/f"), 1, "does not permit this. .* (/d/f)."),
        (OSError(errno.ENAMETOOLONG, "long"), 1, "A name is too long"),
        (OSError(errno.EIO, "Input/output error"), 1, "The system reports: Input/output error."),
    ],
)  # fmt: skip
def test_what_a_user_can_cause_is_a_line_and_a_status(error, status, message, capsys):
    got, words = ending(error, capsys)
    assert got == status
    for part in message.split(".*"):
        assert part in words


@pytest.mark.parametrize("error", [ZeroDivisionError("x / 0"), RecursionError(), AssertionError()])
def test_any_other_error_is_called_ours_with_a_file_to_send(error, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, words = ending(error, capsys, "profile", "my net")
    assert status == FAULT
    assert f"This is a fault of onebyone, not of your input ({type(error).__name__}" in words
    (file,) = tmp_path.iterdir()
    assert str(file) in words
    text = file.read_text()
    for part in ("command: onebyone profile 'my net'", "torch 2", "python 3", "in guarded"):
        assert part in text


def test_a_fault_that_cannot_be_written_down_is_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert guarded(raises(ZeroDivisionError()), ["x"]) == FAULT
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "with the lines above" in " ".join(err.split())


@pytest.mark.parametrize("raised", ["1 / 0", "raise SystemExit(3)", "open('no')"])
def test_an_error_in_a_users_file_is_the_users_with_its_place(raised, capsys, tmp_path):
    path = tmp_path / "net.py"
    path.write_text(f"def make():\n    {raised}\n")
    names = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    assert guarded(names["make"], []) == 1
    words = " ".join(capsys.readouterr().err.split())
    assert f"Your code failed at {path}, line 2, in make: " in words


def test_the_traceback_of_any_error_is_shown_on_request(capsys, monkeypatch):
    monkeypatch.setenv(TRACEBACK, "1")
    assert guarded(raises(DataError("no data")), []) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("Error: no data\n")


@pytest.mark.parametrize("name", ["caf\udce9", "a\0b"])
def test_arguments_that_no_record_can_hold_are_refused(name, capsys):
    assert main(["profile", name]) == 2
    assert "Arguments must be UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[""], ["net.py:make", "--out", " "], ["x", "--out="]])
def test_an_empty_argument_is_not_taken_for_the_folder_of_the_call(arguments, capsys):
    assert main(["profile", *arguments]) == 2
    assert "Arguments must not be empty" in capsys.readouterr().err


def test_what_a_file_says_can_neither_move_the_cursor_nor_fill_the_screen(capsys):
    _, words = ending(DataError(f"\x1b[2J\u202e {'x' * 5000} is wrong"), capsys)
    assert words.startswith("Error: \\x1b[2J\\u202e xxx")
    assert words.endswith("xxx… is wrong")
    assert len(words) < 300


def test_any_error_while_a_command_is_being_read_is_caught(capsys, monkeypatch):
    def fill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("onebyone.cli._fill", fill)
    assert main(["profile", "--help"]) == 130


def test_a_closed_standard_error_is_no_fault(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert main(["nosuch"]) == 2
    assert main(["profile", "onebyone:clasic"]) == 2
    sys.stderr.close()


def test_output_that_cannot_be_written_or_read_is_no_traceback():
    code = (
        "import sys; from onebyone.cli.boundary import guarded; "
        "sys.exit(guarded(lambda: print('3×3 → 1×1 😀', flush=True) or 0, []))"
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"3\\u00d73 \\u2192 1\\u00d71 \\ud83d\\ude00\n"
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=False
            )
        assert done.returncode == 1
        assert done.stderr.startswith(b"Error: The disk is full.")
        assert b"Exception" not in done.stderr
    closed = subprocess.run(
        [sys.executable, "-c", code.replace("import sys;", "import sys; sys.stdout = None;")],
        capture_output=True, check=False,
    )  # fmt: skip
    assert closed.returncode == 0, closed.stderr


def test_a_request_to_end_is_told_from_an_interruption_also_if_a_library_raises_anew(capsys):
    def swallows():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # as Ray does
        return 0

    assert guarded(swallows, []) == 143
    assert capsys.readouterr().err == "Terminated.\n"
