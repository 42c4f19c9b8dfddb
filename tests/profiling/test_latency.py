import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from onebyone.core.errors import OptionError
from onebyone.networks.examples import example_input
from onebyone.profiling import latency, profile
from onebyone.profiling.latency import Samples, interleave, threads

pytestmark = pytest.mark.rounds


class Clock:
    """Time that passes only while a contender runs."""

    def __init__(self, monkeypatch):
        self.ns = 0
        self.calls = []
        self.delay_ns = 0.0
        self.cpu_ns = 0
        monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: self.ns)
        monkeypatch.setattr(latency.time, "process_time_ns", lambda: self.cpu_ns)
        monkeypatch.setattr(latency, "run_delay_ns", lambda tasks: self.delay_ns)

    def contender(self, name, ms, waits=(), helper_waits=0.0):
        """Each call takes its time, and as long as ``waits`` says in the queue for a processor.

        A thread that helps, and has nothing to do, waits for one too while the other works.
        """
        times = iter(ms) if isinstance(ms, list) else None
        queue = iter(waits)

        def run():
            waited = next(queue, 0.0)
            self.calls.append(name)
            worked = next(times) if times else ms
            self.ns += int((worked + waited) * 1e6)
            self.cpu_ns += int(worked * 1e6)
            self.delay_ns += (waited + helper_waits) * 1e6

        return run


def test_contenders_take_turns_and_the_order_alternates(monkeypatch):
    clock = Clock(monkeypatch)
    contenders = {name: clock.contender(name, 5.0) for name in "ab"}
    interleave(contenders, rounds=4, warmup=2)
    warm = 2 + 3 * 2
    # Each sample follows a call that is not timed.
    assert clock.calls == ["a"] * warm + ["b"] * warm + list("aabbbbaaaabbbbaa")


def test_a_slower_contender_is_reported_slower_by_as_much_as_it_is(monkeypatch):
    clock = Clock(monkeypatch)
    samples = interleave(
        {"slow": clock.contender("slow", 6.0), "fast": clock.contender("fast", 2.0)}, rounds=10
    )
    ratio = samples.ratio("slow", "fast")
    assert (ratio.value, ratio.low, ratio.high, ratio.rounds) == pytest.approx((3.0, 3.0, 3.0, 10))
    assert ratio.verdict == "faster"
    assert samples.ratio("fast", "slow").verdict == "slower"
    assert samples.timing("slow", runtime="eager", batch=1).median_ms == 6.0


def test_a_drift_of_the_machine_does_not_move_the_ratio(monkeypatch):
    clock = Clock(monkeypatch)
    drift = [1 + 0.2 * step for step in range(90)]
    slow = clock.contender("slow", [4.0 * d for d in drift])
    fast = clock.contender("fast", [2.0 * d for d in drift])
    assert interleave({"slow": slow, "fast": fast}, rounds=20).ratio(
        "slow", "fast"
    ).value == pytest.approx(2.0)


def test_short_calls_are_repeated_until_the_clock_can_tell(monkeypatch):
    clock = Clock(monkeypatch)
    samples = interleave({"a": clock.contender("a", 0.1)}, rounds=3, warmup=2)
    assert samples.ms["a"] == pytest.approx([0.1] * 3)
    assert len(clock.calls) == 2 + 3 * 2 + 3 * (1 + 20)


def cold_after_reading(monkeypatch, clock, ms):
    """Make the call after the kernel's counts were read take so much longer, as it does."""
    cold = []
    monkeypatch.setattr(latency, "run_delay_ns", lambda tasks: cold.append(ms) or 0.0)

    def contender(name, times):
        run = clock.contender(name, times)

        def called():
            clock.ns += int((cold[-1] if cold else 0.0) * 1e6)
            cold.clear()
            run()

        return called

    return contender


@pytest.mark.parametrize("border_ms", [2.0, 1.0, 0.5, 0.1, 7.6, 100.0])
def test_twins_are_timed_alike_whatever_their_first_calls_took(monkeypatch, border_ms):
    contender = cold_after_reading(monkeypatch, Clock(monkeypatch), 0.4)
    first, calls = 9, 400
    samples = interleave(
        {
            name: contender(name, [border_ms * share] * first + [border_ms] * calls)
            for name, share in {"one": 0.8, "other": 1.3}.items()
        },
        rounds=8,
    )
    # Long ones are called twice before the rounds, where the others are nine times.
    assert samples.ms["one"][-3:] == pytest.approx(samples.ms["other"][-3:], rel=1e-6)


def test_a_gain_of_three_percent_is_shown_though_first_calls_take_longer(monkeypatch):
    contender = cold_after_reading(monkeypatch, Clock(monkeypatch), 0.13)
    rng = np.random.default_rng(0)
    noise = {name: ms * (1 + 0.01 * rng.standard_normal(900)) for name, ms in GAIN.items()}
    ready = {name: contender(name, list(values)) for name, values in noise.items()}
    ratio = interleave(ready, rounds=36).ratio("slow", "fast", looks=4)
    assert ratio.verdict == "faster"
    assert 1.02 < ratio.value < 1.035


GAIN = {"slow": 0.515, "fast": 0.5}


def test_only_contenders_that_differ_by_a_factor_are_called_differently_often(monkeypatch):
    clock = Clock(monkeypatch)
    contenders = {str(ms): clock.contender(str(ms), ms) for ms in (0.5, 0.9, 1.9, 30.0)}
    interleave(contenders, rounds=3, warmup=2)
    counts = [clock.calls.count(name) for name in contenders]
    assert counts == [8 + 3 * 5, 8 + 3 * 5, 8 + 3 * 5, 8 + 3 * 2]


def test_a_long_call_is_warmed_up_and_then_timed_each_time(monkeypatch):
    clock = Clock(monkeypatch)
    # The first one took long only because it was the first.
    short = clock.contender("short", [500.0, *[5.0] * 40])
    samples = interleave({"long": clock.contender("long", 200.0), "short": short}, rounds=4)
    assert clock.calls.count("long") == 1 + 1 + 4
    assert clock.calls.count("short") == 3 + 3 * 2 + 4 * 2
    assert samples.ms["long"] == pytest.approx([200.0] * 4)
    assert samples.ms["short"] == pytest.approx([5.0] * 4)


def test_equal_contenders_show_no_difference():
    rng = np.random.default_rng(0)
    verdicts = []
    for seed in range(40):
        ms = {name: rng.lognormal(0, 0.1, 30) for name in "ab"}
        ratio = Samples(ms=ms, device="cpu", threads=1).ratio("a", "b", seed=seed)
        assert ratio.low <= ratio.value <= ratio.high
        verdicts.append(ratio.verdict)
    # The interval covers 1 in about 95 of 100.
    assert verdicts.count("no difference shown") >= 34


@pytest.mark.parametrize(("spread", "disturbed"), [(0.05, False), (0.6, True)])
def test_wide_quartiles_are_flagged(spread, disturbed):
    values = np.linspace(1 - spread / 2, 1 + spread / 2, 21)
    values = np.where(np.arange(21) % 2, 1 - spread / 2, 1 + spread / 2)
    timing = Samples(ms={"a": values}, device="cpu", threads=1).timing(
        "a", runtime="eager", batch=4
    )
    assert timing.disturbed is disturbed
    assert timing.q1_ms <= timing.median_ms <= timing.q3_ms
    assert (timing.repeats, timing.batch, timing.threads) == (21, 4, 1)


def test_one_slow_sample_of_many_moves_neither_median_nor_flag():
    values = np.ones(30)
    values[7] = 100.0
    timing = Samples(ms={"a": values}, device="cpu", threads=1).timing(
        "a", runtime="eager", batch=1
    )
    assert (timing.median_ms, timing.disturbed) == (1.0, False)


def random_waits(seed, busy, n=400):
    """Milliseconds in the queue: a share of the calls waits for long, the others not at all."""
    rng = np.random.default_rng(seed)
    return list(np.where(rng.random(n) < busy, rng.exponential(20.0, n), 0.0))


def one_thread(monkeypatch):
    monkeypatch.setattr(latency.torch, "get_num_threads", lambda: 1)


def two_threads(monkeypatch):
    monkeypatch.setattr(latency.torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("busy", [0.1, 0.9])
def test_with_one_thread_the_wait_for_a_processor_is_not_counted(monkeypatch, busy):
    one_thread(monkeypatch)
    clock = Clock(monkeypatch)
    slow = clock.contender("slow", 6.0, random_waits(0, busy))
    fast = clock.contender("fast", 4.0, random_waits(1, busy))
    samples = interleave({"slow": slow, "fast": fast}, rounds=30)
    timing = samples.timing("slow", runtime="eager", batch=1)
    assert timing.median_ms == pytest.approx(6.0, rel=1e-6)
    assert samples.ratio("slow", "fast").value == pytest.approx(1.5, rel=1e-3)
    assert (timing.waited > 0.5) is (busy > 0.5)


def test_what_another_thread_waits_is_not_taken_off_the_time_of_the_one_that_works(monkeypatch):
    one_thread(monkeypatch)
    clock = Clock(monkeypatch)
    waits = random_waits(0, 0.5)
    samples = interleave({"a": clock.contender("a", 6.0, waits, helper_waits=50.0)}, rounds=30)
    assert samples.timing("a", runtime="eager", batch=1).median_ms == pytest.approx(6.0, rel=1e-6)


def test_with_several_threads_rounds_that_waited_are_left_out(monkeypatch):
    two_threads(monkeypatch)
    clock = Clock(monkeypatch)
    slow = clock.contender("slow", 6.0, random_waits(0, 0.3))
    fast = clock.contender("fast", 4.0, random_waits(1, 0.3))
    samples = interleave({"slow": slow, "fast": fast}, rounds=40)
    ratio, timing = samples.ratio("slow", "fast"), samples.timing("slow", runtime="e", batch=1)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert 8 <= ratio.rounds < timing.repeats < 40
    assert (timing.q1_ms, timing.q3_ms, timing.disturbed) == (6.0, 6.0, False)
    assert not samples.disturbed("slow", "fast")


def test_with_several_threads_that_always_wait_there_is_no_verdict(monkeypatch):
    two_threads(monkeypatch)
    clock = Clock(monkeypatch)
    waits = [0.5] * 400
    samples = interleave({name: clock.contender(name, 5.0, waits) for name in "ab"}, rounds=20)
    timing = samples.timing("a", runtime="eager", batch=1)
    # The spread is none at all: the wait alone says that these are not the network's own times.
    assert (timing.repeats, timing.median_ms, timing.q3_ms) == (20, 5.5, 5.5)
    assert timing.disturbed
    assert timing.waited == pytest.approx(0.5 / 5.5)


def test_where_the_system_does_not_tell_the_wait_the_clock_on_the_wall_counts(monkeypatch):
    clock = Clock(monkeypatch)
    clock.delay_ns = float("nan")
    samples = interleave({"a": clock.contender("a", 5.0)}, rounds=5)
    assert samples.waited == {}
    timing = samples.timing("a", runtime="eager", batch=1)
    assert (timing.median_ms, timing.waited, timing.disturbed) == (5.0, None, False)


def test_the_wait_is_read_from_the_kernel(tmp_path, monkeypatch):
    for task, text in {"1": "900 30 4\n", "2": "5 70 1\n", "3": "", "4": "x y z"}.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / "schedstat").write_text(text)
    monkeypatch.setattr(latency, "_TASKS", tmp_path)
    assert latency.run_delay_ns() == 100
    assert latency.run_delay_ns("2") == 70
    monkeypatch.setattr(latency, "_TASKS", tmp_path / "none")
    assert np.isnan(latency.run_delay_ns())


@pytest.mark.clock
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not tell")
def test_a_wait_for_a_processor_is_seen_and_taken_off():
    allowed = os.sched_getaffinity(0)
    spinner = "while True: pass"
    core = {min(allowed)}
    neighbor = subprocess.Popen([sys.executable, "-c", spinner])
    try:
        os.sched_setaffinity(neighbor.pid, core)
        os.sched_setaffinity(0, core)
        data = np.ones(20_000_000)
        with threads(1):
            samples = interleave({"a": data.sum}, rounds=15)
        # Two of us on one core: about half of the time is not ours.
        assert np.mean(samples.waited["a"]) > 0.2
    finally:
        os.sched_setaffinity(0, allowed)
        neighbor.kill()
        neighbor.wait()


def test_timing_stops_when_the_seconds_are_over():
    samples = interleave({"a": lambda: time.sleep(0.01)}, rounds=1000, seconds=0.2)
    assert 3 <= len(samples.ms["a"]) < 50


def test_collecting_garbage_takes_a_small_share_of_the_time(monkeypatch):
    clock, cleaner = 0.0, latency._Cleaner(share=0.1)

    def collect():
        nonlocal clock
        clock += 0.5

    monkeypatch.setattr(latency.gc, "collect", collect)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock)
    collecting = 0.0
    for _ in range(200):
        before = clock
        cleaner.collect()
        collecting += clock - before
        clock += 0.2  # a measurement
    assert 0.08 < collecting / clock < 0.12


def test_the_garbage_collector_rests_and_then_works_again():
    seen = []
    interleave({"a": lambda: seen.append(gc.isenabled()) or time.sleep(0.003)}, rounds=3)
    assert not any(seen)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 // 0}, rounds=3)
    assert gc.isenabled()


@pytest.mark.parametrize(("contenders", "rounds"), [({}, 5), ({"a": int}, 2)])
def test_too_little_to_time_is_refused(contenders, rounds):
    with pytest.raises(OptionError, match="`rounds` must be 3 or more with something to time"):
        interleave(contenders, rounds=rounds)


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with threads(before + 1) as count:
        assert count == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), threads(1):
        _ = 1 // 0
    assert torch.get_num_threads() == before
    with pytest.raises(OptionError, match="`threads` must be 1 or more, got 0"), threads(0):
        pass


def test_a_profile_adds_up_and_prints():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1)
    )
    made = profile(network, input_shape=(2, 1, 8, 8), rounds=3, num_threads=1, name="tiny")
    assert made.params == sum(layer.params for layer in made.layers) == 40 + 10
    assert made.macs == sum(layer.macs for layer in made.layers) == 36 * (36 + 8)
    assert made.latency["eager"].batch == 2
    assert all(layer.timing is not None for layer in made.layers)
    assert "tiny on 2×1×8×8" in str(made)
    assert type(made).from_json(made.to_json()) == made


def test_counting_alone_takes_no_times():
    made = profile(torch.nn.Linear(3, 2), input_shape=(1, 3), timed=False)
    assert (made.macs, made.latency, made.layers[0].timing) == (6, {}, None)


def test_an_example_is_the_same_each_time_and_positive_in_size():
    assert torch.equal(example_input((2, 3)), example_input((2, 3)))
    for shape in ((), (0, 3), (1, -1)):
        with pytest.raises(OptionError, match="`input_shape` must be positive sizes"):
            example_input(shape)


def test_few_rounds_of_single_calls_are_made_where_the_environment_says_so(monkeypatch):
    monkeypatch.setenv("ONEBYONE_ROUNDS", "4")
    clock = Clock(monkeypatch)
    samples = interleave({name: clock.contender(name, 0.1) for name in "ab"}, rounds=30)
    assert samples.ratio("a", "b").rounds == 4
    assert clock.calls.count("a") == 1 + 4
    assert len(interleave({"a": clock.contender("a", 0.1)}, rounds=3).ms["a"]) == 3


@pytest.mark.parametrize("wrong", ["2", "-5", "many", "1e3", "9" * 30])
def test_a_wrong_number_of_rounds_in_the_environment_is_an_error(monkeypatch, wrong):
    monkeypatch.setenv("ONEBYONE_ROUNDS", wrong)
    with pytest.raises(OptionError, match="ONEBYONE_ROUNDS must be a number of 3 or more"):
        interleave({"a": int}, rounds=9)


def test_the_number_of_threads_is_put_back_whoever_leaves_last():
    before = torch.get_num_threads()
    entered, left = threading.Event(), threading.Event()

    def other():
        with threads(1):
            entered.set()
            left.wait(60)

    worker = threading.Thread(target=other)
    with threads(3):
        worker.start()
        assert entered.wait(60)
    left.set()
    worker.join()
    assert torch.get_num_threads() == before
    with threads(2), pytest.raises(ZeroDivisionError), threads(3):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_a_profile_names_the_layers_whose_activations_are_subnormal():
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    nn.init.constant_(
        net[0].weight, 1e-20
    )  # a normal number, whose products with tiny inputs are not
    found = profile(net, example=torch.full((1, 3, 4, 4), 1e-20), num_threads=1)
    assert found.subnormals.activations == {"0": 64, "1": 64}
    assert "Subnormal activations, which cost time too: in 0 (64), 1 (64)." in str(found)
    assert profile(net, example=torch.ones(1, 3, 4, 4), num_threads=1).subnormals is None
