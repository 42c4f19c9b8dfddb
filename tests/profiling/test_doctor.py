"""What `doctor` says of a machine: instructions, runtimes, and how noisy it is."""

import dataclasses
import json

import pytest

from onebyone.cli import main
from onebyone.core.records import Ratio
from onebyone.profiling.doctor import DoctorRecord, doctor, instructions
from onebyone.runtimes import RUNTIMES, find_runtime, runtime_names


@pytest.fixture(scope="module")
def record():
    return doctor(rounds=3)


def test_every_runtime_has_a_state_and_ready_ones_can_be_found(record):
    assert [each.name for each in record.runtimes] == list(runtime_names())
    for each in record.runtimes:
        if each.ready:
            assert find_runtime(each.name).name == each.name
        else:
            assert each.missing


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    absent = dataclasses.replace(RUNTIMES["onnxruntime"], package="no_such_package")
    monkeypatch.setitem(RUNTIMES, "onnxruntime", absent)
    record = doctor(rounds=3)
    state = next(each for each in record.runtimes if each.name == "onnxruntime")
    assert not state.ready
    assert state.version is None
    assert state.missing == "pip install 'onebyone[onnx]'"
    assert state.missing in str(record)


def test_instructions_are_read_in_words(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nflags\t: fpu avx2 avx512f avx512_vnni\n\nflags : fpu\n")
    assert instructions(file) == ("AVX2", "AVX-512", "AVX-512 VNNI (int8)")
    file.write_text("Features\t: fp asimd i8mm\n")
    assert instructions(file) == ("NEON", "I8MM (int8)")
    assert instructions(tmp_path / "none") == ()


@pytest.mark.parametrize(("low", "high", "noise"), [(0.9, 1.02, 0.1), (0.99, 1.2, 0.2)])
def test_noise_is_what_the_interval_cannot_tell_from_equal(record, low, high, noise):
    same = Ratio(value=1.0, low=low, high=high, rounds=10)
    told = dataclasses.replace(record, same=same)
    assert told.noise == pytest.approx(noise)
    assert f"{noise:.0%}".replace("%", ".0 %") in told.verdict()


def test_a_busy_machine_is_told(record):
    busy = dataclasses.replace(record, timing=dataclasses.replace(record.timing, waited=0.5))
    quiet = dataclasses.replace(
        record, timing=dataclasses.replace(record.timing, waited=0.0, disturbed=False)
    )
    assert "Other programs are running" in busy.verdict()
    assert "Other programs" not in quiet.verdict()


def test_the_command_prints_the_record(capsys):
    assert main(["doctor", "--json"]) == 0
    text = capsys.readouterr().out
    assert DoctorRecord.from_json(text).to_json() == text
    assert json.loads(text)["machine"]["processor"]
