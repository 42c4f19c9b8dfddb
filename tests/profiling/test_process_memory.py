import subprocess
import sys

import pytest
import torch

from onebyone.core.errors import OptionError
from onebyone.profiling import process_memory as resident
from onebyone.profiling.process_memory import allocator, peak_of_call, settled

linux = pytest.mark.skipif(not resident._STATUS.exists(), reason="the kernel does not tell")
MIB = 2**20


@linux
def test_the_peak_of_a_call_is_what_it_takes_for_a_while():
    def call():
        big = torch.ones(64 * MIB // 4)
        del big
        return torch.ones(8 * MIB // 4)

    assert 60 * MIB < peak_of_call(call) < 90 * MIB
    # A peak of the past does not count.
    assert peak_of_call(lambda: torch.ones(4 * MIB // 4)) < 20 * MIB


@linux
def test_what_is_held_grows_with_what_is_kept():
    before = settled()
    kept = torch.ones(64 * MIB // 4)
    after = settled()
    assert 60 * MIB < after.now - before.now < 80 * MIB
    assert after.peak >= after.now
    del kept


def test_a_system_that_does_not_tell_gives_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(resident, "_STATUS", tmp_path / "none")
    assert resident.resident() is None
    assert settled() is None
    assert peak_of_call(lambda: None) is None


COUNT_FAULTS = """
import resource, sys, torch
from onebyone.profiling.process_memory import allocator, keep_memory
assert allocator() == "default"
if sys.argv[1] == "keep":
    assert keep_memory() == allocator() != "default"
def work():
    for _ in range(20):
        torch.empty(24 * 2**20).fill_(1.0)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@linux
def test_kept_memory_is_not_fetched_anew():
    # In processes of their own: the setting cannot be taken back.
    faults = {}
    for setting in ("default", "keep"):
        command = [sys.executable, "-c", COUNT_FAULTS, setting]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        faults[setting] = int(done.stdout)
    # 20 × 96 MiB in pages of 4 KiB (or of 2 MiB) against nearly none.
    assert faults["keep"] < faults["default"] / 10


def test_without_glibc_it_is_refused_and_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(resident, "_glibc", lambda: None)
    with pytest.raises(OptionError, match="needs glibc's mallopt"):
        resident.keep_memory()
    assert allocator() == "default"
