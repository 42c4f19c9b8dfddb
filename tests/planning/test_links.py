"""Groups with a layer in common: both narrowed, at what that costs, by the best choice there is."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

import onebyone as obo
from onebyone.calibration.inputs import as_calibration
from onebyone.core.errors import BudgetError
from onebyone.core.records import Budget, InputSpec
from onebyone.planning import plan_from
from onebyone.planning.knapsack import choose, least_cost
from onebyone.planning.links import is_link, is_narrow
from onebyone.planning.recount import recounted
from onebyone.planning.survey import survey
from onebyone.profiling.trace import trace_layers

X = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Excited(nn.Module):
    """Two groups that each read a layer that the other writes: they exclude each other."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(6, 8, 1)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 6, 1)

    def forward(self, x):
        inner = self.expand(x).relu()
        gate = self.up(self.down(inner.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.project(inner * gate)


class Branched(nn.Module):
    """The first group's last reader runs after the second group's."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
        self.last, self.beside = nn.Conv2d(4, 3, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        x = self.first(x).relu()
        y = self.last(self.inner(x).relu())
        return y + self.beside(x)


def chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 4, 1)), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 36, 5), nn.ReLU(), nn.Linear(5, 3),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def network():
    return chain()


@pytest.fixture(scope="module")
def data():
    return as_calibration(X, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def found(network, data):
    return survey(network, data, head_choice="keep")


def planned(found, options, budget):
    part = replace(found, options=tuple(options))
    shape = InputSpec.of_shape((1, *X.shape[1:]))
    return plan_from(part, budget, network="n", inputs=shape, calibration=None)


def narrow_alone(found):
    return [option for option in found.options if is_narrow(option) or is_link(option)]


@pytest.mark.parametrize(("quantity", "share"), [("macs", 15), ("macs", 60), ("size", 40)])
def test_a_plan_of_linked_groups_costs_what_it_says(
    network, data, found, quantity, share, tmp_path
):
    made = planned(found, narrow_alone(found), f"{quantity}={share}%")
    assert made.choices
    assert all(map(is_narrow, made.choices))
    small = obo.apply(network, made, data)
    assert trace_layers(small, X[:1]).cost == made.after
    assert obo.restructure(network, made)(X[:2]).shape == (2, 3)
    made.save(tmp_path / "plan.json")
    assert recounted(type(made).load(tmp_path / "plan.json"), network) == made


def test_groups_with_a_layer_in_common_are_both_narrowed(found):
    made = planned(found, narrow_alone(found), "macs=15%")
    assert [option.site for option in made.choices] == ["0", "3", "6", "9"]


def macs_of(widths):
    """Return the MACs of the chain, by hand."""
    a, b, c, d = (
        widths.get(site, whole) for site, whole in (("0", 8), ("3", 6), ("6", 4), ("9", 5))
    )
    return 36 * (9 * 3 * a + 9 * a * b + b * c + c * d) + 3 * d


@pytest.mark.parametrize("share", [0.8, 0.55, 0.3])
def test_the_choice_of_linked_groups_is_the_best_of_all(found, share):
    narrow = [option for option in found.options if is_narrow(option)]
    sites = {site: [None, *(o for o in narrow if o.site == site)] for site in ("0", "3", "6", "9")}
    limit = int(share * macs_of({}))
    best = min(
        sum(option.harm for option in each if option)
        for each in product(*sites.values())
        if macs_of({o.site: o.first.settings["channels"] for o in each if o}) <= limit
    )
    budget = Budget(quantity="macs", limit=limit, asked="macs")
    chosen = choose(narrow_alone(found), [budget], found.start)
    assert sum(option.harm for option in chosen.options) == pytest.approx(best, rel=1e-5)
    widths = {o.site: o.first.settings["channels"] for o in chosen.options if is_narrow(o)}
    assert found.start.macs - sum(o.saved.macs for o in chosen.options) == macs_of(widths)


def test_the_least_of_linked_groups_is_what_one_channel_each_costs(found):
    least = least_cost(narrow_alone(found), "macs", found.start)
    assert least.macs == macs_of({"0": 1, "3": 1, "6": 1, "9": 1})


def test_a_layer_is_narrowed_or_rewritten_and_not_both(found):
    made = planned(found, found.options, "macs=20%")
    narrowed = {name for o in made.choices if is_narrow(o) for name in o.occupies}
    assert narrowed
    assert narrowed.isdisjoint(o.site for o in made.choices if not is_narrow(o))
    assert not any(is_link(option) for option in made.choices)
    assert not any("&" in left.site for left in made.left_alone)


def test_groups_that_meet_in_both_directions_exclude_each_other(data):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), Excited(), nn.Flatten()).eval()
    found = survey(network, data, head_choice="keep")
    links = {option.site.split(" at ")[0] for option in found.options if is_link(option)}
    assert links == {"0 & 2.expand"}
    with pytest.raises(BudgetError, match="least that these rewrites reach"):
        planned(found, narrow_alone(found), "macs=1%")


def test_a_group_that_is_fitted_later_excludes_the_one_that_its_reader_writes(data):
    torch.manual_seed(0)
    network = Branched().eval()
    found = survey(network, data, head_choice="keep")
    assert {group.site for group in found.groups} == {"first", "inner"}
    made = planned(found, narrow_alone(found), "macs=40%")
    assert [option.site for option in made.choices] == ["first"]
    assert trace_layers(obo.apply(network, made, data), X[:1]).cost == made.after


def test_costs_of_chosen_options_save_together_what_they_did_with_links(network, found):
    def timed(option):
        return replace(
            option,
            before=replace(option.before, ms=2.0),
            after=replace(option.after, ms=2.0 - option.saved.macs / macs_of({})),
        )

    narrow = [timed(option) for option in found.options if is_narrow(option)]
    options = [*narrow, *found.links.between(narrow)]
    budget = Budget(quantity="macs", limit=macs_of({}) // 2, asked="macs=50%")
    start = replace(found.start, ms=10.0)
    chosen = choose(options, [budget], start).options
    assert any(map(is_link, chosen))
    settled = found.links.settled(chosen)
    assert not any(map(is_link, settled))
    for quantity in ("macs", "params", "size", "latency"):
        with_links, without = (
            sum(option.saved.amount(quantity) for option in each) for each in (chosen, settled)
        )
        assert without == pytest.approx(with_links, rel=1e-12)


def test_links_count_the_bytes_of_weights_as_they_are_deployed(found):
    halves = found.in_floats_of(2)
    mine = [option for option in halves.options if is_link(option)]
    assert halves.links.between(halves.options) == mine
    made = planned(halves, narrow_alone(halves), "size=40%")
    assert len(made.choices) > 1
    saved = sum(option.saved.bytes for option in made.choices)
    assert made.before.bytes - saved == made.after.bytes
