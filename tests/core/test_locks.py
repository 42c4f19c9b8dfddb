import contextlib
import tempfile
import threading
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from onebyone.core.errors import OutputError
from onebyone.core.locks import FolderLock, alone_on_machine
from onebyone.core.write_files import make_folder


def test_one_process_at_a_time_measures_on_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with alone_on_machine():
        (file,) = tmp_path.iterdir()
        with pytest.raises(Timeout):
            FileLock(file).acquire(timeout=0)
    with FileLock(file).acquire(timeout=0):
        pass


def test_a_folder_that_another_process_removes_meanwhile_is_made(tmp_path, monkeypatch):
    folder, is_dir = tmp_path / "run", Path.is_dir
    folder.mkdir()

    def removed_first(path):
        with contextlib.suppress(OSError):
            folder.rmdir()
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", removed_first)
    make_folder(folder)
    monkeypatch.undo()
    assert folder.is_dir()


def test_a_locked_folder_is_refused_or_waited_for(tmp_path):
    first = FolderLock(tmp_path / "run")
    with pytest.raises(OutputError, match="is in use by process"):
        FolderLock(tmp_path / "run")
    got = []
    waiting = threading.Thread(target=lambda: got.append(FolderLock(tmp_path / "run", wait=60)))
    waiting.start()
    first.release()
    waiting.join()
    assert len(got) == 1
    got[0].release()
