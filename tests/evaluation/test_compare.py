"""Networks compared: each against the first, on the same examples and in the same rounds."""

import dataclasses

import pytest
import torch
from torch import nn

import onebyone as obo
from onebyone.core.compared import Compared, distinct
from onebyone.core.errors import ModelError, OptionError
from onebyone.core.records import Ratio
from onebyone.data import Data, TensorSplit
from onebyone.evaluation import compare as comparing
from onebyone.evaluation.compare import compare, side_by_side
from onebyone.evaluation.scores import score
from onebyone.evaluation.statistics import paired_difference
from onebyone.networks.subnormals import count_subnormals


def network(width, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(width * 6 * 8, 3)
    ).eval()


def data(n=60):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 1, 6, 8, generator=generator)
    labels = torch.randint(0, 3, (n,), generator=generator)
    split = TensorSplit(inputs, labels)
    return Data(name="d", train=split, validation=split, test=split, classes=("a", "b", "c"))


@pytest.fixture(scope="module")
def record():
    return compare(
        network(4), network(8, 1), network(2, 2), data=data(), names=["four", "eight", "two"],
        runtimes=["eager", "channels-last"], rounds=3, num_threads=1,
    )  # fmt: skip


def test_each_network_is_measured_and_compared_with_the_first(record):
    assert [each.name for each in record.contenders] == ["four", "eight", "two"]
    assert record.first.difference is None
    assert not record.first.latency_ratio
    both = score([network(4), network(2, 2)], data().test)
    last = record.contenders[2]
    assert last.difference == paired_difference(*both.each)
    assert last.divergence == pytest.approx(both.divergences[1])
    assert last.agreement is not None
    assert last.measured.params == sum(p.numel() for p in network(2).parameters())
    assert set(last.latency_ratio) == {"eager", "channels-last"} == set(record.runtimes)
    for ratio in last.latency_ratio.values():
        assert ratio.rounds == 3
        assert ratio.low <= ratio.value <= ratio.high


@pytest.mark.clock
def test_a_slower_network_has_a_ratio_below_one_and_a_faster_one_above():
    def deep(layers):
        return nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(layers))).eval()

    many = compare(deep(6), deep(48), deep(1), input_shape=(1, 8, 40, 30), rounds=9)
    slower, faster = (each.latency_ratio["eager"] for each in many.others)
    assert slower.value < 1 < faster.value
    times = [each.measured.latency["eager"].median_ms for each in many.contenders]
    assert times[1] > times[0] > times[2]


def test_the_record_saves_and_loads(record, tmp_path):
    record.save(tmp_path / "compare.json")
    assert Compared.load(tmp_path / "compare.json") == record


def test_two_of_many_are_what_a_comparison_of_two_says(record):
    pair = record.pair(2)
    assert pair.names == ("four", "two")
    both = side_by_side(
        network(4), network(2, 2), data=data(), example=None, runtimes=["eager"],
        metric="accuracy", num_threads=1, device="cpu", progress=None, rounds=3,
    ).record  # fmt: skip
    for field in ("difference", "agreement", "divergence"):
        assert getattr(pair, field) == getattr(both, field)
    assert pair.before.params == both.before.params
    assert pair.after.metric == both.after.metric


def test_tables_hold_every_network_and_fit_the_page(record):
    text = str(record)
    for word in ("four", "eight", "two", "McNemar", "Holm", "rounds"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_ratio_of_a_thousand_is_not_shown_as_nothing(record):
    first, second, third = record.contenders
    tiny = Ratio(value=0.0014, low=0.0013, high=0.0015, rounds=3)
    slow = dataclasses.replace(second, latency_ratio=dict.fromkeys(record.runtimes, tiny))
    text = str(dataclasses.replace(record, contenders=(first, slow, third)))
    assert "0.0014×" in text
    assert "0.0013–0.0015" in text


def test_holms_p_values_by_hand(record):
    def with_p(contender, p):
        difference = dataclasses.replace(record.contenders[1].difference, p_value=p)
        return dataclasses.replace(contender, difference=difference)

    first, other = record.contenders[0], record.contenders[1]
    many = dataclasses.replace(
        record, contenders=(first, *(with_p(other, p) for p in (0.01, 0.04, 0.03)))
    )
    # Ordered 0.01 × 3, 0.03 × 2, then 0.04 × 1, which may not be below the one before.
    assert many.p_values() == pytest.approx((0.03, 0.06, 0.06))


def psnr(outputs, targets):
    return -10 * (outputs - targets).square().flatten(1).mean(1).log10()


def denoiser(seed):
    torch.manual_seed(seed)
    return nn.Conv2d(1, 1, 3, padding=1).eval()


@pytest.mark.parametrize(
    ("n", "test"), [(9, "exact sign-flip test"), (40, "sign-flip test, 9,999 draws")]
)
def test_networks_that_are_no_classifiers_are_compared_by_a_function(n, test):
    clean = torch.rand(n, 1, 9, 7, generator=torch.Generator().manual_seed(0))
    examples = TensorSplit(clean + 0.1, clean)
    record = compare(denoiser(0), denoiser(1), denoiser(2), data=examples, metric=psnr, rounds=3)
    assert record.first.measured.metric.name == "psnr"
    assert record.others[0].agreement is None
    assert test in record.others[0].difference.test
    assert "agrees" not in str(record)
    assert max(map(len, str(record).splitlines())) <= 80


def test_without_data_cost_and_time_are_compared():
    record = compare(network(4), network(8), network(2), input_shape=(2, 1, 6, 8), rounds=3)
    assert record.data is None
    assert record.first.measured.metric is None
    assert record.contenders[2].measured.latency["eager"].batch == 2
    assert "Test" not in str(record)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(OptionError, match="at least 2 networks to compare"):
        compare(network(4), data=data())
    with pytest.raises(OptionError, match="`names` must have 2"):
        compare(network(4), network(8), data=data(), names=["a"])
    with pytest.raises(OptionError, match="`input_shape` must be given"):
        compare(network(4), network(8))
    other = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()
    with pytest.raises(ModelError, match="same classes"):
        compare(network(4), other, data=data(), rounds=3)


def test_progress_tells_of_the_timing_too():
    seen = []
    compare(network(4), network(8), data=data(), rounds=3, progress=lambda *news: seen.append(news))
    assert seen[-1] == (0, 1, "timing in eager")
    assert seen[0][1] == 60


def test_networks_of_one_name_are_told_apart():
    assert distinct(["a", "b", "a", "a"]) == ("a", "b", "a (2)", "a (3)")
    assert obo.Compared is Compared


# ---------------------------------------------------------------- subnormal weights


def with_subnormals():
    made = network(4)
    with torch.no_grad():
        made[0].weight[1] = 1e-40
    return made


@pytest.mark.parametrize("others", [[network(4)], [network(4), network(2)]], ids=["two", "three"])
def test_all_are_timed_without_subnormal_weights_and_what_that_gives_is_told_apart(
    others, monkeypatch
):
    timed = []

    def spied(networks, *rest):
        timed.extend(networks)
        return timing(networks, *rest)

    timing = comparing._time_all
    monkeypatch.setattr(comparing, "_time_all", spied)
    given = with_subnormals()
    names = ["small", "plain", "least"][: 1 + len(others)]
    made = compare(given, *others, input_shape=(1, 1, 6, 8), rounds=3, names=names)
    assert count_subnormals(given) == {"0.weight": 9}
    assert all(not count_subnormals(each) for each in timed)
    found = made.first.subnormals
    assert found.weights == {"0.weight": 9}
    assert set(found.before) == set(found.after) == set(found.ratio) == {"eager"}
    assert [each.subnormals for each in made.others] == [None] * len(others)
    text = " ".join(str(made).split())
    assert "small: Subnormal weights" in text
    assert "no gain of a rewrite" in text
    assert "plain: Subnormal" not in text
    assert made.pair().subnormals == (found, None)
    assert Compared.from_json(made.to_json()) == made
    assert type(made.pair()).from_json(made.pair().to_json()) == made.pair()


def test_without_subnormal_weights_nothing_is_told(record):
    assert "ubnormal" not in str(record)
    assert record.pair().subnormals == (None, None)
