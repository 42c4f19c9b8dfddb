"""Options of several steps: each step is carried out on the module that the one before made."""

import copy
import importlib.metadata
import re
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.core import plugins
from onebyone.core.errors import PlanError, UnknownNameError
from onebyone.core.records import Cost, Deployment, InputSpec, Option, Plan, Step
from onebyone.planning.latency.cache import Timings
from onebyone.planning.latency.layer_timer import LayerTimer, _key_of
from onebyone.planning.recount import recounted
from onebyone.profiling.trace import trace_layers
from onebyone.report import section_tradeoff
from onebyone.rewrites.head.rewrite import find_head
from onebyone.rewrites.low_rank import factorize
from onebyone.rewrites.low_rank.reduced_rank import problems_of
from onebyone.rewrites.steps import cost_of

NOTHING = Cost(params=0, macs=0, bytes=0)
X = torch.randn(40, 3, 9, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# ---------------------------------------------------------------- two toy rewrites


def thin_last():
    """Return a rewrite that makes two 1×1 convolutions of the last one of a factorized layer."""
    names = ("expand", "pointwise1")

    def last(module):
        return next(name for name in names if hasattr(module, name))

    def why_not(module):
        there = type(module) is nn.Sequential and any(hasattr(module, name) for name in names)
        return None if there else "it is no chain with a 1×1 convolution at its end"

    def full(module):
        layer = module.get_submodule(last(module))
        return min(layer.in_channels, layer.out_channels)

    def pair(settings):
        return {"form": "pair", "ranks": [settings["rank"]]}

    def cost(module, settings, *, input_size, output_size):
        dtype = next(module.parameters()).dtype
        whole = trace_layers(module, torch.zeros(1, _channels(module), *input_size, dtype=dtype))
        layer = module.get_submodule(last(module))
        (own,) = (each for each in whole.layers if each.name == last(module))
        sizes = own.input_shape[1:], own.output_shape[1:]
        new = factorize.cost(layer, pair(settings), input_size=sizes[0], output_size=sizes[1])
        params = whole.params - own.params + new.params
        return Cost(
            params=params,
            macs=whole.macs - own.macs + new.macs,
            bytes=params * dtype.itemsize,
        )

    def build(module, settings, *, site=""):
        chain = copy.deepcopy(module)
        layer = module.get_submodule(last(module))
        chain.set_submodule(last(module), factorize.build(layer, pair(settings)))
        return chain

    def fit(chain, problems, settings, module, *, rough=False):
        chain.load_state_dict(
            {k: v for k, v in module.state_dict().items() if not k.startswith(last(module))},
            strict=False,
        )
        layer = module.get_submodule(last(module))
        new = chain.get_submodule(last(module))
        return factorize.fit(new, problems_of(layer), pair(settings), layer)

    def errors(problems, module, options):
        layer = module.get_submodule(last(module))
        return factorize.errors(problems_of(layer), layer, [pair(each) for each in options])

    return types.SimpleNamespace(
        why_not=why_not, cost=cost, build=build, fit=fit,
        is_exact=lambda module, settings: settings["rank"] >= full(module),
        grid=lambda module: [{"rank": rank} for rank in (1, full(module))],
        errors=errors,
    )  # fmt: skip


def _channels(module):
    return next(m for m in module.modules() if isinstance(m, nn.Conv2d)).in_channels


def wrap():
    """Return a rewrite that takes anything and puts a copy of it into a container."""

    def fit(chain, problems, settings, module, *, rough=False):
        chain[0].load_state_dict(module.state_dict())
        return 0.0

    return types.SimpleNamespace(
        why_not=lambda module: None,
        cost=lambda module, settings, *, input_size, output_size: NOTHING,
        build=lambda module, settings, *, site="": nn.Sequential(copy.deepcopy(module)),
        fit=fit,
        is_exact=lambda module, settings: True,
        grid=lambda module: [{}],
        errors=lambda problems, module, options: [0.0] * len(options),
    )


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Install both as if they were of another package."""
    made = types.ModuleType("toys")
    made.thin, made.wrap = thin_last(), wrap()
    monkeypatch.setitem(sys.modules, "toys", made)
    entries = [
        importlib.metadata.EntryPoint(name, f"toys:{attribute}", "onebyone.rewrites")
        for name, attribute in (("thin-last", "thin"), ("wrap", "wrap"))
    ]
    monkeypatch.setattr(
        plugins, "_entries", lambda group: tuple(entries) if group == "onebyone.rewrites" else ()
    )


# ---------------------------------------------------------------- plans of composed options


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(160, 5),
    ).double()  # fmt: skip


def step(rewrite, **settings):
    return Step(rewrite=rewrite, settings=settings)


def planned(site, *steps):
    choice = Option(site=site, steps=steps, before=NOTHING, after=NOTHING)
    return Plan(
        network="net", inputs=InputSpec.of_shape((1, 3, 9, 9)), budgets=(), before=NOTHING, after=NOTHING,
        choices=(choice,), left_alone=(),
    )  # fmt: skip


FULL = planned("2", step("factorize", form="tucker2", ranks=[8, 10]), step("thin-last", rank=10))
LESS = planned("2", step("factorize", form="tucker2", ranks=[4, 5]), step("thin-last", rank=3))
DEEPENED = planned(
    "1",
    step("deepen", form="pointwise", where="after", activation="ReLU"),
    step("thin-last", rank=8),
)
WRAPPED_HEAD = planned("5", step("head", form="exact"), step("wrap"))
AVERAGED = planned("5", step("head", form="gap", hidden=[4]), step("wrap"))
SAME = {"full ranks": FULL, "deepened": DEEPENED, "a new head": WRAPPED_HEAD}


def outputs(net):
    with torch.no_grad():
        return net.eval()(X)


@pytest.mark.parametrize("calibration", [X, None], ids=["data", "kernels"])
@pytest.mark.parametrize("plan", SAME.values(), ids=SAME)
def test_exact_steps_together_keep_the_function(plan, calibration):
    assert_close(outputs(obo.apply(network(), plan, calibration)), outputs(network()))


def test_each_step_is_carried_out_on_what_the_one_before_made():
    made = obo.apply(network(), LESS, X).get_submodule("2")
    assert [name for name, _ in made.named_children()] == ["reduce", "spatial", "expand"]
    assert [name for name, _ in made.expand.named_children()] == ["reduce", "expand"]
    sizes = [tuple(each.weight.shape) for each in made.modules() if isinstance(each, nn.Conv2d)]
    assert sizes == [(4, 8, 1, 1), (5, 4, 3, 3), (3, 5, 1, 1), (10, 3, 1, 1)]


def test_the_second_step_begins_with_the_weights_of_the_first():
    first = planned("2", LESS.choices[0].first)
    alone, both = (obo.apply(network(), plan, X).get_submodule("2") for plan in (first, LESS))
    for name in ("reduce", "spatial"):
        assert_close(both.get_submodule(name).weight, alone.get_submodule(name).weight)
    pair = both.expand.expand.weight[:, :, 0, 0] @ both.expand.reduce.weight[:, :, 0, 0]
    whole = alone.expand.weight[:, :, 0, 0]
    # Eckart and Young: of that rank, the nearest.
    least = torch.linalg.svdvals(whole)[3:].square().sum()
    assert_close((pair - whole).square().sum(), least)


@pytest.mark.parametrize("plan", [FULL, LESS, DEEPENED, WRAPPED_HEAD])
def test_structure_and_weights_file_are_the_applied_network(plan):
    net = network()
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    small = obo.apply(net, plan, X)
    blank = obo.restructure(net, plan)
    blank.load_state_dict(small.state_dict())
    assert torch.equal(outputs(blank), outputs(small))
    assert all(torch.equal(weights[name], now) for name, now in net.state_dict().items())


def test_the_cost_is_that_of_what_the_last_step_makes():
    net = network()
    (layer,) = (each for each in trace_layers(net, X[:1]).layers if each.name == "2")
    counted = trace_layers(obo.restructure(net, LESS), X[:1])
    inside = [each for each in counted.layers if each.name.startswith("2.")]
    cost = cost_of(net[2], layer, LESS.choices[0].steps)
    assert cost.params == sum(each.params for each in inside)
    assert cost.macs == sum(each.macs for each in inside)


def test_a_plan_that_was_edited_is_counted_with_all_its_steps():
    net = network()
    found = recounted(LESS, net)
    counted = trace_layers(obo.restructure(net, LESS), X[:1])
    assert (found.after.params, found.after.macs) == (counted.params, counted.macs)
    assert found.choices[0].after.macs == sum(
        each.macs for each in counted.layers if each.name.startswith("2.")
    )


def test_a_saved_plan_has_all_steps_and_prints_them():
    assert Plan.from_json(LESS.to_json()) == LESS
    assert "factorize tucker2 4, 5 + thin-last 3" in str(LESS)


def test_a_rewrite_of_what_another_makes_is_checked_as_any_other():
    obo.check_rewrite(thin_last(), name="thin-last")


@pytest.mark.parametrize(("plan", "place"), [(LESS, "2"), (AVERAGED, "5")])
def test_options_are_timed_with_all_their_steps(plan, place):
    net, (both,) = network(), plan.choices
    deployment = Deployment(runtime="eager")
    layers = {each.name: each for each in trace_layers(net, X[:1]).layers}
    head = find_head(net, X[:1])
    timer = LayerTimer(net, layers, deployment, Timings(deployment, None), head=head)
    assert _key_of(both) == " + ".join(_key_of(replace(both, steps=(s,))) for s in both.steps)
    chain, example = timer._chain(both)
    kinds = [type(part) for part in chain[2].modules()]
    built = obo.restructure(net, plan).get_submodule(place)
    assert kinds == [type(part) for part in built.modules()]
    assert chain(example).isfinite().all()


def test_a_report_shows_every_step():
    (both,) = LESS.choices
    cell = section_tradeoff._steps_cell(both)
    assert re.sub("<.*?>", " ", cell).split() == (
        ["factorize", "form", "tucker2;", "ranks", "4,", "5", "+", "thin-last", "rank", "3"]
    )


# ---------------------------------------------------------------- what does not go together

REFUSED = {
    "another layer is expected": (
        (
            step("factorize", form="tucker2", ranks=[4, 5]),
            step("factorize", form="pair", ranks=[3]),
        ),
        r"site '2' do not go together: 'factorize' does not take the Sequential that 'factorize'",
    ),
    "a head": (
        (step("factorize", form="tucker2", ranks=[4, 5]), step("head", form="exact")),
        r"step 'head' of the plan's site '2' must be a rewrite of one layer to follow another",
    ),
    "out of order": (
        (step("thin-last", rank=3), step("factorize", form="tucker2", ranks=[4, 5])),
        r"site '2' cannot be rewritten: it is no chain",
    ),
}


@pytest.mark.parametrize(
    "function",
    [obo.restructure, lambda net, plan: obo.apply(net, plan, X)],
    ids=["restructure", "apply"],
)
@pytest.mark.parametrize(("steps", "words"), REFUSED.values(), ids=REFUSED)
def test_steps_that_do_not_go_together_are_refused(function, steps, words):
    with pytest.raises(PlanError, match=words):
        function(network(), planned("2", *steps))


def test_an_unknown_second_step_is_told_its_neighbor():
    unknown = planned("2", FULL.choices[0].first, step("thin-lost", rank=3))
    with pytest.raises(UnknownNameError, match=r"Did you mean 'thin-last'\?"):
        obo.restructure(network(), unknown)


def test_a_step_after_a_fold_has_no_module_to_take():
    settings = {"form": "norm-before", "into": "0"}
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    folded = planned("1", step("fold", **settings), step("thin-last", rank=3))
    with pytest.raises(
        PlanError, match=r"'thin-last' does not take the Identity that 'fold' makes"
    ):
        obo.restructure(net, folded)
