"""The record saves and loads whole, and its statistics are the textbook's."""

import math

import pytest
from article_records import FITTED, LESS_FITTED, duel, layer, layer_times, network, record
from scipy import stats

from onebyone.article import ArticleRecord
from onebyone.article.record import paired, spread
from onebyone.core.errors import RecordError
from onebyone.core.records import Cost

COST = Cost(params=1, macs=1, bytes=4)


def test_a_saved_record_loads_as_the_same(tmp_path):
    original = record()
    original.save(tmp_path / "article.json")
    assert ArticleRecord.load(tmp_path / "article.json") == original


def test_a_file_that_is_no_record_is_refused(tmp_path):
    (tmp_path / "article.json").write_text('{"onebyone": 3}')
    with pytest.raises(RecordError, match=r"article.json: This is not a saved ArticleRecord"):
        ArticleRecord.load(tmp_path / "article.json")


def test_the_paired_interval_is_that_of_the_t_test():
    before, after = (0.9, 0.93, 0.91, 0.96), (0.95, 0.94, 0.92, 0.99)
    expected = stats.ttest_rel(after, before)
    interval = expected.confidence_interval(0.95)
    found = paired(before, after)
    assert found.value == pytest.approx(0.025)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.n == 4


def test_pairing_removes_what_the_seeds_have_in_common():
    base = (0.5, 0.6, 0.7, 0.8)
    shifted = tuple(
        value + shift for value, shift in zip(base, (0.01, 0.012, 0.009, 0.011), strict=True)
    )
    found = paired(base, shifted)
    assert 0 < found.low < 0.0105 < found.high < 0.02


def test_a_single_seed_has_no_interval():
    assert paired((0.9,), (0.8,)) is None
    assert spread([0.9]).std is None


def test_equal_differences_of_counts_are_not_taken_for_certainty():
    certain = paired((0.9, 0.9), (0.91, 0.91))
    assert certain.low == certain.high == pytest.approx(0.01)
    doubtful = paired((0.9, 0.9), (0.91, 0.91), grain=1 / 400)
    assert doubtful.low < 0 < doubtful.high


def test_differences_of_a_duel_are_after_less_before():
    found = duel(FITTED, LESS_FITTED)
    assert found.test_difference.value == pytest.approx(-0.0602)
    assert found.train_difference.value == pytest.approx(-0.1)
    gap = found.gap_difference.value
    assert gap == pytest.approx(found.train_difference.value - found.test_difference.value)


def test_curves_are_means_and_deviations_over_the_seeds():
    curve = network("a", COST, *FITTED).curve(lambda run, place: run.seed + 10 * place)
    assert [point.mean for point in curve] == [2.0, 12.0]
    assert [point.std for point in curve] == pytest.approx([math.sqrt(2.5)] * 2)


def test_a_run_that_learned_nothing_is_counted():
    accuracies = (0.99, 0.1, 0.98)
    assert network("a", COST, accuracies, accuracies).stuck == 1
    assert network("a", COST, (0.1, 0.1, 0.11), (0.1, 0.1, 0.1)).stuck == 0


def test_times_that_grow_with_the_threads_are_no_basis_for_a_verdict():
    alone, waiting = layer_times(0.1, 0.5), layer_times(0.1, 5.0, threads=2)
    found = layer(times=(alone, waiting))
    assert not found.crowded(alone)
    assert found.crowded(waiting)
    assert found.crowded(layer_times(disturbed=True))


def test_a_layer_without_a_time_for_one_input_is_refused():
    with pytest.raises(RecordError, match="must have batch 1 with one thread"):
        layer(times=(layer_times(batch=8),))
