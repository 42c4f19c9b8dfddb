"""The record of a benchmark: all runtimes, interleaved, compared, and which is the best."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import onebyone as obo
from onebyone import runtimes
from onebyone.core.errors import MissingExtraError, OptionError, UnknownNameError
from onebyone.core.records import Ratio
from onebyone.core.tables import render
from onebyone.profiling import bench as benchmarking
from onebyone.profiling.bench import BenchRecord, bench
from onebyone.runtimes import RUNTIMES, Prepared, Runtime

SHAPE = (2, 3, 16, 12)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


@pytest.fixture(scope="module")
def record():
    names = ["eager", "channels-last", "packed"]
    return bench(network(), input_shape=SHAPE, runtimes=names, rounds=3, num_threads=1, name="net")


def test_each_runtime_is_timed_and_compared(record):
    assert [entry.runtime for entry in record.entries] == ["eager", "channels-last", "packed"]
    for entry in record.entries:
        assert entry.timing.batch == 2
        assert entry.timing.threads == 1
        assert entry.timing.repeats == 3
        assert entry.same
        assert entry.version.startswith("2")
        assert entry.prepare_seconds > 0
    assert record.entries[0].ratio is None
    assert sum(entry.behind is None for entry in record.entries) == 1
    assert record.allocator == "default"


def test_it_prints_and_is_saved(record, tmp_path):
    assert "net on 2×3×16×12" in str(record)
    # Wide enough for names beside "(disturbed)", which a busy machine adds.
    text = render(record.table(), width=120)
    assert all(entry.runtime in text for entry in record.entries)
    record.save(tmp_path / "bench.json")
    assert BenchRecord.load(tmp_path / "bench.json") == record


def test_the_network_and_the_threads_are_left_as_they_were():
    net, threads = network().train(), torch.get_num_threads()
    before = copy.deepcopy(net.state_dict())
    obo.bench(net, input_shape=SHAPE, runtimes=["eager", "packed"], rounds=3, num_threads=2)
    assert torch.get_num_threads() == threads
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def fake(name, milliseconds, factor=1.0, fails=False):
    import time

    def prepare(model, example):
        if fails:
            raise OptionError(f"{name} cannot")
        copied = copy.deepcopy(model).eval()

        def run():
            time.sleep(milliseconds / 1e3)
            with torch.no_grad():
                return copied(example) * factor

        return Prepared(run, {"kind": "fake"})

    return Runtime(name, prepare)


@pytest.fixture
def fakes(monkeypatch):
    def install(*some):
        for name in list(RUNTIMES):
            if name != "eager":
                monkeypatch.delitem(runtimes.RUNTIMES, name)
        for runtime in some:
            monkeypatch.setitem(runtimes.RUNTIMES, runtime.name, runtime)

    return install


@pytest.mark.clock
def test_the_best_is_the_fastest_with_the_same_outputs(fakes):
    fakes(fake("slow", 20), fake("quick", 8), fake("quick and wrong", 4, factor=1.01))
    made = bench(
        network(), input_shape=SHAPE, rounds=8, runtimes=["slow", "quick", "quick and wrong"]
    )
    slow, quick, wrong = made.entries
    assert (slow.same, quick.same, wrong.same) == (True, True, False)
    assert made.best == ("quick",)
    assert quick.ratio.value == pytest.approx(2.4, rel=0.3)
    assert slow.behind.value == pytest.approx(quick.ratio.value)
    assert "Fastest with the same outputs: quick." in str(made)


def test_runtimes_that_are_not_shown_to_differ_are_both_named(record):
    fastest = record.entries[0]
    timing = dataclasses.replace(fastest.timing, median_ms=1.0, disturbed=False)

    def entry(name, ms, low, high):
        behind = None if low is None else Ratio(value=ms, low=low, high=high, rounds=9)
        return dataclasses.replace(
            fastest, runtime=name, behind=behind, timing=dataclasses.replace(timing, median_ms=ms)
        )

    entries = (entry("a", 1.0, None, None), entry("b", 1.1, 0.9, 1.3), entry("c", 2.0, 1.8, 2.2))
    made = dataclasses.replace(record, entries=entries)
    assert made.best == ("a", "b")
    assert "not shown to be slower: b." in str(made)
    shaken = dataclasses.replace(entries[0], timing=dataclasses.replace(timing, disturbed=True))
    made = dataclasses.replace(record, entries=(shaken, *entries[1:]))
    assert made.best == ()
    assert "no runtime is shown to be the fastest" in str(made).replace("\n", " ")


def test_what_cannot_run_is_left_out_by_default_and_an_error_when_asked_for(fakes, monkeypatch):
    absent = Runtime("absent", lambda m, x: Prepared(int), package="no_such", extra="openvino")
    fakes(fake("broken", 1, fails=True), absent, Runtime("gpu", absent.prepare, devices=("cuda",)))
    made = bench(network(), input_shape=SHAPE, rounds=3)
    assert [entry.runtime for entry in made.entries] == ["eager"]
    assert made.left_out == {
        "broken": "broken cannot",
        "absent": "not installed: pip install 'onebyone[openvino]'.",
    }
    assert "Not timed: broken: broken cannot" in str(made)
    with pytest.raises(OptionError, match="broken cannot"):
        bench(network(), input_shape=SHAPE, rounds=3, runtimes=["broken"])
    with pytest.raises(MissingExtraError, match="no_such"):
        bench(network(), input_shape=SHAPE, rounds=3, runtimes=["absent"])
    with pytest.raises(UnknownNameError, match="'eger'"):
        bench(network(), input_shape=SHAPE, rounds=3, runtimes=["eger"])


def test_bf16_is_only_tried_by_default_where_the_processor_has_it(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(benchmarking, "has_bf16", lambda device, native=native: native)
        left_out = {}
        names = benchmarking._available("cpu", left_out)
        assert ("eager:bf16" in names) is native
        assert ("eager:bf16" in left_out) is not native
        assert "cuda-graph" not in {*names, *left_out}


def test_memory_is_kept_only_when_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(benchmarking, "keep_memory", lambda: asked.append(1))
    bench(network(), input_shape=SHAPE, runtimes=["eager"], rounds=3)
    assert asked == []
    bench(network(), input_shape=SHAPE, runtimes=["eager"], rounds=3, keep_freed_memory=True)
    assert asked == [1]
