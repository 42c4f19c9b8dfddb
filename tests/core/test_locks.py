import tempfile
import threading

import pytest
from filelock import FileLock, Timeout

from onebyone.core.errors import OutputError
from onebyone.core.locks import FolderLock, alone_on_machine


def test_one_process_at_a_time_measures_on_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with alone_on_machine():
        (file,) = tmp_path.iterdir()
        with pytest.raises(Timeout):
            FileLock(file).acquire(timeout=0)
    with FileLock(file).acquire(timeout=0):
        pass


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
