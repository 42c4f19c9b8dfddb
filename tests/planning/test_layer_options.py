"""Options of one layer that another one beats are not listed."""

from onebyone.core.records import Cost, Option
from onebyone.planning.layer_options import _front


def of_cost(form, error, macs):
    after = Cost(params=macs, macs=macs, bytes=4 * macs)
    before = Cost(params=100, macs=100, bytes=400)
    return Option.of("factorize", {"form": form}, site="a", before=before, after=after, error=error)


def test_of_two_forms_of_one_function_the_cheaper_is_listed_whatever_rounding_says():
    dear, cheap = of_cost("tucker2", 0.2, 50), of_cost("expand", 0.2 * (1 + 1e-7), 40)
    other = of_cost("expand", 0.3, 20)
    assert _front([dear, cheap, other]) == [cheap, other]
    better = of_cost("tucker2", 0.2, 50)
    assert _front([better, of_cost("expand", 0.21, 40)])[0] == better
