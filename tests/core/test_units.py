import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebyone.core import units
from onebyone.core.units import format_count, parse_count, parse_percent


@given(st.integers(0, 10**15))
def test_a_formatted_count_reads_back_within_half_a_unit_of_its_third_digit(count):
    read = parse_count(format_count(count))
    assert read is not None
    assert abs(read - count) <= 0.0051 * count


@given(st.integers(1, 10**14))
def test_a_formatted_count_has_at_most_three_digits_and_a_prefix(count):
    number, _, prefix = format_count(count).partition(" ")
    assert len(number.replace(".", "")) <= 3
    assert prefix in {"", "k", "M", "G", "T"}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (9_994, "9.99 k"),
        (9_996, "10.0 k"),
        (99_960, "100 k"),
        (316_532, "317 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (1_234_567, "1.23 M"),
        (5 * 10**15, "5000 T"),
    ],
)
def test_counts_round_to_three_digits_across_the_prefixes(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4232", 4232),
        ("1.5k", 1500),
        ("20M", 20_000_000),
        (" 20 M ", 20_000_000),
        (".5G", 500_000_000),
        ("2K", 2000),
        ("0", 0),
    ],
)
def test_a_count_is_read_with_its_prefix(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "k", "-5", "fifty", "5 m", "1e999", "٥", "5MM", "5%", "0x10", "nan"]
)
def test_what_is_no_count_is_none(text):
    assert parse_count(text) is None


@pytest.mark.parametrize(
    ("text", "fraction"), [("60%", 0.6), (" 50 % ", 0.5), ("0.5%", 0.005), ("-5%", -0.05)]
)
def test_a_percentage_is_read_as_a_fraction(text, fraction):
    assert parse_percent(text) == pytest.approx(fraction)


@pytest.mark.parametrize("text", ["60", "%", "x%", "nan%", "inf%", "1e999%", ""])
def test_what_is_no_percentage_is_none(text):
    assert parse_percent(text) is None


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0.0, "0.00 µs"),
        (0.0123, "12.3 µs"),
        (0.9999, "1.00 ms"),
        (1.5, "1.50 ms"),
        (9.999, "10.0 ms"),
        (33.14, "33.1 ms"),
        (250.0, "250 ms"),
        (9_999.6, "10.0 s"),
        (12_000, "12.0 s"),
    ],
)
def test_times_have_three_digits_and_the_unit_that_reads_best(ms, text):
    assert units.format_ms(ms) == text


@given(st.floats(1e-3, 1e7))
def test_a_formatted_time_is_within_half_a_percent(ms):
    number, unit = units.format_ms(ms).split(" ")
    scale = {"µs": 1e-3, "ms": 1.0, "s": 1e3}[unit]
    assert math.isclose(float(number) * scale, ms, rel_tol=0.0051)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (75, "1 min 15 s"),
        (3600, "1 h 0 min"),
        (3599.7, "1 h 0 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert units.format_seconds(seconds) == text


def test_bytes_percentages_points_and_ratios():
    assert units.format_bytes(999) == "999 B"
    assert units.format_bytes(1_270_000) == "1.27 MB"
    assert units.format_percent(0.915) == "91.5 %"
    assert units.format_points(-0.0123) == "−1.23"
    assert units.format_points(0.0123) == "+1.23"
    assert [units.format_ratio(r) for r in (2.345, 9.96, 74.79, 99.6)] == [
        "2.35×",
        "10.0×",
        "74.8×",
        "100×",
    ]
