"""Users' Python files: modules by path, neighbours of their own, errors with file and line."""

import pickle
import subprocess
import sys

import pytest

from onebyone.core.errors import DataError, OptionError, UnknownNameError
from onebyone.core.user_files import call_user_function, run_user_file, user_function

FILE = """
from helper import NAME

class Items:
    name = NAME

def make():
    from late import LATE
    return Items(), LATE
"""


@pytest.fixture
def two_folders(tmp_path):
    for name in ("first", "second.2"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "data.py").write_text(FILE)
        (folder / "helper.py").write_text(f"NAME = {name!r}\n")
        (folder / "late.py").write_text(f"LATE = {name!r}\n")
    return tmp_path / "first" / "data.py", tmp_path / "second.2" / "data.py"


def made_by(path):
    make = user_function(path, "make", raises=DataError)
    return call_user_function(make, path, raises=DataError)


def test_files_of_one_name_do_not_meet_nor_do_their_neighbours(two_folders):
    first, second = two_folders
    before = list(sys.path)
    items, late = made_by(first)
    others, others_late = made_by(second)
    assert (items.name, late) == ("first", "first")
    assert (others.name, others_late) == ("second.2", "second.2")
    assert made_by(first)[1] == "first"
    assert sys.path == before
    assert type(pickle.loads(pickle.dumps(items))) is type(items)
    assert type(pickle.loads(pickle.dumps(others))) is type(others)


def test_a_module_of_the_users_program_is_not_taken_for_a_neighbour(two_folders, monkeypatch):
    first, second = two_folders
    monkeypatch.syspath_prepend(str(first.parent))
    import helper

    assert made_by(second)[0].name == "second.2"
    assert sys.modules["helper"] is helper


def test_a_process_that_starts_anew_finds_the_module_by_its_name(two_folders, tmp_path):
    items, _ = made_by(two_folders[1])
    (tmp_path / "items.pickle").write_bytes(pickle.dumps(items))
    program = (
        "import pickle, sys\n"
        f"items = pickle.load(open({str(tmp_path / 'items.pickle')!r}, 'rb'))\n"
        "assert items.name == 'second.2'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_file_is_run_again_only_if_it_changed(two_folders):
    path = two_folders[0]
    module = run_user_file(path, raises=DataError)
    assert run_user_file(path, raises=DataError) is module
    path.write_text(FILE + "\nnew = 1\n")
    assert run_user_file(path, raises=DataError).new == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1 +\n", r"own\.py, line 1: SyntaxError: invalid syntax"),
        ("\n\nimport nowhere_at_all\n", r"own\.py, line 3: ModuleNotFoundError"),
        ("import sys\nsys.exit(3)\n", r"own\.py, line 2: SystemExit: 3"),
        ("def f():\n    g()\ndef g():\n    assert 0\nf()\n", r"line 4: AssertionError: \(no"),
        ("x = '\0'\n", r"own\.py.*null byte"),
    ],
)
def test_what_a_file_raises_is_its_own_and_leaves_no_module(tmp_path, text, message):
    (tmp_path / "own.py").write_text(text)
    before = set(sys.modules)
    with pytest.raises(DataError, match=message):
        run_user_file(tmp_path / "own.py", raises=DataError)
    assert not {name for name in set(sys.modules) - before if "user_files" in name}


def test_a_file_or_a_function_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    (tmp_path / "own.py").write_text("def make(): pass\nDATA = []\n")
    with pytest.raises(
        UnknownNameError, match=r"owns\.py' \(it does not exist\)\. Did you .*own\.py"
    ):
        run_user_file(tmp_path / "owns.py", raises=DataError)
    with pytest.raises(UnknownNameError, match=r"named 'mak'\. Did you mean 'make'"):
        user_function(tmp_path / "own.py", "mak", raises=DataError)
    with pytest.raises(UnknownNameError, match=r"'DATA' \(it is a list, not a function\)"):
        user_function(tmp_path / "own.py", "DATA", raises=DataError)
    with pytest.raises(UnknownNameError, match="name that is too long"):
        run_user_file(tmp_path / f"{'x' * 300}.py", raises=DataError)


def test_a_metric_comes_from_a_file_in_the_same_way(tmp_path):
    from onebyone.cli.loading import load_metric

    (tmp_path / "score.py").write_text(
        "def best(outputs, targets): return outputs\nraise OSError\n"
    )
    with pytest.raises(OptionError, match=r"score\.py, line 2: OSError"):
        load_metric(f"{tmp_path}/score.py:best")
    (tmp_path / "score.py").write_text("def best(outputs, targets): return outputs\n")
    assert load_metric(f"{tmp_path}/score.py:best")(3, 4) == 3
    with pytest.raises(UnknownNameError, match="Did you mean 'best'"):
        load_metric(f"{tmp_path}/score.py:bets")
