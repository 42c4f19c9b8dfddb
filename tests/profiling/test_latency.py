import gc
import time

import numpy as np
import pytest
import torch

from onebyone.errors import OptionError
from onebyone.profiling import example_input, latency, profile
from onebyone.profiling.latency import Samples, interleave, threads


class Clock:
    """Time that passes only while a contender runs."""

    def __init__(self, monkeypatch):
        self.ns = 0
        self.calls = []
        monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: self.ns)

    def contender(self, name, ms):
        times = iter(ms) if isinstance(ms, list) else None

        def run():
            self.calls.append(name)
            self.ns += int((next(times) if times else ms) * 1e6)

        return run


def test_contenders_take_turns_and_the_order_alternates(monkeypatch):
    clock = Clock(monkeypatch)
    contenders = {name: clock.contender(name, 5.0) for name in "ab"}
    interleave(contenders, rounds=4, warmup=2)
    warm = 2 + 3
    assert clock.calls == ["a"] * warm + ["b"] * warm + list("abbaabba")


def test_a_slower_contender_is_reported_slower_by_as_much_as_it_is(monkeypatch):
    clock = Clock(monkeypatch)
    samples = interleave(
        {"slow": clock.contender("slow", 6.0), "fast": clock.contender("fast", 2.0)}, rounds=10
    )
    ratio = samples.ratio("slow", "fast")
    assert (ratio.value, ratio.low, ratio.high, ratio.rounds) == (3.0, 3.0, 3.0, 10)
    assert ratio.verdict == "faster"
    assert samples.ratio("fast", "slow").verdict == "slower"
    assert samples.timing("slow", runtime="eager", batch=1).median_ms == 6.0


def test_a_drift_of_the_machine_does_not_move_the_ratio(monkeypatch):
    clock = Clock(monkeypatch)
    drift = [1 + 0.2 * step for step in range(60)]
    slow = clock.contender("slow", [4.0 * d for d in drift])
    fast = clock.contender("fast", [2.0 * d for d in drift])
    assert interleave({"slow": slow, "fast": fast}, rounds=20).ratio(
        "slow", "fast"
    ).value == pytest.approx(2.0)


def test_short_calls_are_repeated_until_the_clock_can_tell(monkeypatch):
    clock = Clock(monkeypatch)
    samples = interleave({"a": clock.contender("a", 0.1)}, rounds=3, warmup=1)
    assert samples.ms["a"] == pytest.approx([0.1] * 3)
    assert len(clock.calls) == 1 + 3 + 3 * 20


def test_equal_contenders_show_no_difference():
    rng = np.random.default_rng(0)
    verdicts = []
    for seed in range(40):
        ms = {name: rng.lognormal(0, 0.1, 30) for name in "ab"}
        ratio = Samples(ms=ms, device="cpu", threads=1).ratio("a", "b", seed=seed, resamples=500)
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
