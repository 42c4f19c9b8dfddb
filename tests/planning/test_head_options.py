"""The harm of averaging heads whose fits scatter follows the trend over their widths."""

import numpy as np
import pytest

from onebyone.core.records import Cost, Option
from onebyone.planning.head_options import _by_context, _judged


def option(width, harm, *, context=0):
    settings = {"form": "gap", "hidden": [] if width is None else [width]}
    if context:
        settings["context"] = context
    cost = Cost(params=1, macs=1, bytes=4)
    return Option.of("head", settings, site="head", before=cost, after=cost, harm=harm,
        measured=True,
    )  # fmt: skip


def judged(options, *, trials=None):
    """Return heads with their harm where fitting one gives the harm that it has here."""

    def tried(option):
        if trials is not None:
            trials.append(option)
        return [option] if option.harm is not None else []

    return [found for group in _by_context(options) for found in _judged(group, tried)]


def harms(options):
    return [found.harm for found in judged(options)]


def test_harms_that_lie_on_a_line_stay_as_they_are():
    widths = [16, 24, 32, 48, 64]
    exact = [0.7 * width**-0.2 for width in widths]
    assert harms([option(*each) for each in zip(widths, exact, strict=True)]) == pytest.approx(
        exact
    )


@pytest.mark.parametrize("seed", range(5))
def test_scattered_harms_fall_with_the_width_and_come_nearer_to_the_truth(seed):
    widths = np.array([16, 24, 32, 40, 48, 64])
    true = 0.7 * widths**-0.2
    scattered = true * np.exp(0.05 * np.random.default_rng(seed).standard_normal(6))
    found = harms([option(int(w), float(h)) for w, h in zip(widths, scattered, strict=True)])
    assert all(np.diff(found) < 0)
    assert np.abs(np.log(found / true)).mean() < np.abs(np.log(scattered / true)).mean()


def test_heads_of_other_kinds_have_trends_of_their_own():
    plain = [option(w, 1.0 * w**-0.1) for w in (16, 32, 64)]
    context = [option(w, 0.5 * w**-0.3, context=3) for w in (16, 32, 64)]
    without = option(None, 3.0)
    found = harms([without, *plain, *context])
    assert found == pytest.approx([o.harm for o in [without, *plain, *context]])


@pytest.mark.parametrize(
    "given",
    [
        [(16, 0.2), (32, 0.3), (64, 0.25)],  # does not fall
        [(16, 0.3), (32, 0.1)],  # too few
        [(16, 0.0), (32, 0.0), (64, 0.0)],  # nothing is lost at all
    ],
)
def test_without_a_trend_harms_are_as_measured(given):
    assert harms([option(*each) for each in given]) == [harm for _, harm in given]


def test_only_what_was_measured_is_called_so():
    falling = [option(w, 1.0 * w**-0.1) for w in (16, 32, 64)]
    without = option(None, 3.0)
    assert [o.measured for o in judged([without, *falling])] == [True] + 3 * [False]
    assert all(o.measured for o in judged(falling[:2]))


def test_three_widths_are_fitted_where_these_show_a_trend_and_all_where_not():
    widths, trials = (16, 24, 32, 40, 48, 64), []
    falling = [option(w, 1.0 * w**-0.1) for w in widths]
    assert len(judged(falling, trials=trials)) == len(widths)
    assert [o.first.settings["hidden"] for o in trials] == [[16], [40], [64]]
    trials.clear()
    rising = [option(w, 1.0 * w**0.1) for w in widths]
    assert all(o.measured for o in judged(rising, trials=trials))
    assert len(trials) == len(widths)


def test_a_head_that_cannot_be_fitted_is_no_option():
    heads = [option(w, None if w == 40 else 1.0 * w**-0.1) for w in (16, 24, 32, 40, 48, 64)]
    assert [o.first.settings["hidden"][0] for o in judged(heads)] == [16, 24, 32, 48, 64]
