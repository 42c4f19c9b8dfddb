"""The record prints: in 80 columns, with the same figures that it holds."""

from article_records import FITTED, LESS_FITTED, duel, record

from onebyone.article.tables import duel_table, over_seeds, trials_table


def test_the_record_prints_within_80_columns():
    assert max(map(len, str(record()).splitlines())) <= 80


def test_the_claims_come_first():
    assert str(record()).startswith("The article on 1×1 convolutions, measured")


def test_a_duels_table_holds_its_figures():
    rows = {
        row[0]: row[1:]
        for row in duel_table(duel(FITTED, LESS_FITTED), names=("a", "b"), title="").rows
    }
    assert rows["parameters"] == ["316,532", "4,232", "74.8× fewer"]
    assert rows["MACs"] == ["674,456", "475,888", "1.42× fewer"]
    assert rows["time, batch 1"] == ["200 µs", "250 µs", "1.25× slower"]
    assert rows["train accuracy"][0] == "100.00 ± 0.00 %"
    assert rows["test accuracy"][2].startswith("−6.02 [")


def test_a_single_seed_prints_without_a_deviation():
    assert over_seeds((0.9,)) == "90.00 %"
    assert over_seeds((-0.01, 0.0)) == "−0.50 ± 0.71 %"


def test_the_rate_that_was_taken_is_marked():
    table = trials_table(record())
    assert [row[1] for row in table.rows if row[3] == "taken"] == ["0.01"] * 4
    assert len(table.rows) == 8
    assert table.notes[0] == "classic: the lowest that was tried is the best of them."
