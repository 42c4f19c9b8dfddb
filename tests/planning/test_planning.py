import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from onebyone.calibration.inputs import as_calibration
from onebyone.core.errors import (
    BudgetError,
    DataError,
    ModelError,
    PlanError,
    UnknownNameError,
    WeightsError,
)
from onebyone.core.records import Plan
from onebyone.networks.weight_bytes import weight_bytes
from onebyone.planning import plan
from onebyone.planning.joins import is_own
from onebyone.planning.survey import survey
from onebyone.profiling.trace import trace_layers
from onebyone.rewrites import apply, restructure
from onebyone.rewrites.head import fit as head_fit
from onebyone.rewrites.low_rank import reduced_rank as regression


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, padding=1, stride=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(12, 12, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 9, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


EXAMPLES = torch.randn(48, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def short_fits():
    # How well a head is fitted is tested with the head.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_fit, "FIT_STEPS", 20)
        yield


@pytest.fixture(scope="module")
def planned():
    return plan(network(), EXAMPLES, budget="macs=60%", head="keep")


@pytest.fixture(scope="module")
def with_head():
    return plan(network(), EXAMPLES, budget="params=50%", head="gap")


@pytest.mark.parametrize("budget", [
    "macs=60%", "params=50%", "macs=70%,params=60%", "macs=15k", "size=50%", "size=6kB,macs=80%",
])  # fmt: skip
def test_the_plan_and_the_network_built_from_it_meet_the_budget(budget):
    made = plan(network(), EXAMPLES, budget=budget, head="keep")
    built = trace_layers(restructure(network(), made), EXAMPLES[:1])
    assert built.cost == made.after
    saved = restructure(network(), made).state_dict().values()
    assert built.bytes == sum(tensor.nbytes for tensor in saved)
    for bound in made.budgets:
        assert made.after.amount(bound.quantity) <= bound.limit
    assert (made.before.params, made.before.macs) == (
        sum(p.numel() for p in network().parameters()),
        trace_layers(network(), EXAMPLES[:1]).macs,
    )


def judged(model, *, rough):
    """Return the errors of all options, of layers that all count as wide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regression, "WIDE", 1)
        if not rough:
            patch.setattr(regression.Problem, "rough", lambda problem: problem)
        found = survey(model, as_calibration(EXAMPLES.double(), dtype=torch.float64))
    return {
        (o.site, str(o.first.settings)): o.error
        for o in found.options
        if o.first.rewrite != "head" and not is_own(o)
    }


def test_options_of_wide_layers_are_judged_in_float32_to_about_the_same():
    exact, rough = (judged(network().double(), rough=how) for how in (False, True))
    assert rough != exact
    common = exact.keys() & rough.keys()
    assert len(common) > 0.9 * max(len(exact), len(rough))
    for each in common:
        assert rough[each] == pytest.approx(exact[each], rel=1e-2, abs=1e-5)


def test_a_site_for_which_float32_is_not_enough_is_judged_in_float64(monkeypatch):
    monkeypatch.setattr(regression, "DAMPING", 1e-10)
    model = network().double()
    with torch.no_grad():  # every channel twice: half of what is seen has no variance of its own
        for tensor in (model[0].weight, model[0].bias):
            tensor[4:] = tensor[:4]
    exact, rough = (judged(model, rough=how) for how in (False, True))
    assert rough != exact  # of other sites
    site = [key for key in exact if key[0] == "3"]
    assert len(site) > 10
    for each in site:
        assert rough[each] == pytest.approx(exact[each], rel=1e-4)


@pytest.mark.parametrize("choice", ["auto", "gap", "exact"])
def test_with_a_new_head_the_plan_still_counts_what_is_built(choice):
    made = plan(network(), EXAMPLES, budget="params=60%", head=choice)
    built = trace_layers(restructure(network(), made), EXAMPLES[:1])
    assert built.cost == made.after
    heads = [c.first.settings["form"] for c in made.choices if c.first.rewrite == "head"]
    assert choice == "auto" or heads == [choice]


@pytest.mark.parametrize(("choice", "measured"), [("gap", False), ("auto", True)])
def test_layers_of_a_head_that_goes_in_any_case_are_not_measured(choice, measured):
    steps = []
    found = survey(
        network(),
        as_calibration(EXAMPLES),
        head_choice=choice,
        progress=lambda done, total, message: steps.append((done, total, message)),
    )
    sites = {message.removeprefix("options of ").partition(".")[0] for *_, message in steps}
    assert bool(sites & {*found.head.occupies}) == measured
    assert steps[-1][0] == steps[-1][1] == len(steps)  # all that was announced was done
    assert {o.site for o in found.options} >= {"0", "3", found.head.name}


def test_a_plan_is_the_same_each_time(planned, with_head):
    torch.manual_seed(123)
    assert plan(network(), EXAMPLES, budget="macs=60%", head="keep") == planned
    assert plan(network(), EXAMPLES, budget="params=50%", head="gap") == with_head


def test_a_saved_plan_loads_equal_and_gives_the_same_network(planned, with_head, tmp_path):
    for made in (planned, with_head):
        made.save(tmp_path / "plan.json")
        loaded = Plan.load(tmp_path / "plan.json")
        assert loaded == made
        first = apply(network(), made, EXAMPLES)
        second = apply(network(), loaded, EXAMPLES)
        assert_close(dict(second.state_dict()), dict(first.state_dict()), rtol=0, atol=0)
        empty = restructure(network(seed=5), loaded)
        empty.load_state_dict(first.state_dict())
        empty.eval()
        with torch.no_grad():
            assert_close(empty(EXAMPLES), first.eval()(EXAMPLES))


def test_planning_and_applying_leave_the_callers_random_numbers_alone(with_head):
    state = torch.get_rng_state()
    plan(network_without_draws(), EXAMPLES, budget="params=50%", head="gap")
    apply(network_without_draws(), with_head, EXAMPLES)
    assert torch.equal(torch.get_rng_state(), state)


def network_without_draws():
    with torch.random.fork_rng():
        return network()


def test_fitting_on_data_beats_the_kernels_alone(planned):
    original = network().eval()

    def error(calibration):
        rewritten = apply(network(), planned, calibration).eval()
        with torch.no_grad():
            return (rewritten(EXAMPLES) - original(EXAMPLES)).square().mean().item()

    assert error(EXAMPLES) < 0.5 * error(None)


def test_a_larger_budget_never_harms_more():
    harms = [
        plan(network(), EXAMPLES, budget=f"macs={share}%", head="keep").harm
        for share in (40, 60, 80, 100)
    ]
    assert harms == sorted(harms, reverse=True)
    assert harms[-1] == 0


def test_the_plan_prints_its_choices_and_what_was_left_and_why():
    planned = plan(network(), EXAMPLES, budget="macs=90%", head="keep")
    text = " ".join(str(planned).split())
    assert "Plan for Sequential: macs=90%" in text
    assert planned.left_alone
    for item in planned.left_alone:
        assert item.reason
        listed = text.split(f"Left alone, {item.reason}: ", 1)[1].split(". ", 1)[0]
        assert item.site in listed.rstrip(".").split(", ")


# ---------------------------------------------------------------- what is left alone


class Odd(nn.Module):
    """A layer of every kind that must be left alone, and one that need not."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 12, 3, padding=1)
        self.shared = nn.Conv2d(12, 12, 3, padding=1)
        self.again = self.shared
        self.twice = nn.Conv2d(12, 12, 3, padding=1)
        self.hooked = nn.Conv2d(12, 12, 3, padding=1)
        self.hooked.register_forward_hook(lambda module, args, output: output * 2)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.tied = nn.Conv2d(12, 12, 3, padding=1)
        self.tied2 = nn.Conv2d(12, 12, 3, padding=1)
        self.tied2.weight = self.tied.weight
        self.unused = nn.Conv2d(12, 12, 3)
        self.mine = nn.Conv2d(12, 12, 3, padding=1)
        self.tiny = nn.Conv2d(12, 1, 1)

    def forward(self, x):
        x = self.again(F.relu(self.shared(F.relu(self.plain(x)))))
        x = self.twice(F.relu(self.twice(x)))
        x = self.grouped(F.relu(self.hooked(x)))
        return self.tiny(self.mine(F.relu(self.tied2(F.relu(self.tied(x))))))


def test_what_is_left_alone_has_its_reason():
    torch.manual_seed(0)
    made = plan(Odd(), EXAMPLES[:8], budget="macs=98%", leave=["mine"])
    reasons = {item.site: item.reason for item in made.left_alone}
    assert reasons["shared"] == "shared: the same layer as 'again'"
    assert "one pass" not in reasons.get("twice", "")
    assert reasons["hooked"] == "has hooks, which a rewrite would lose"
    assert reasons["grouped"] == "depthwise: no channels to mix"
    assert reasons["tied"] == reasons["tied2"] == "its weight is shared with another layer"
    assert reasons["unused"] == "does not run on this input"
    assert reasons["mine"] == "left alone as asked"
    assert reasons["tiny"] == "one value a place goes in or out: no rank to lower"
    assert "does not end in linear layers" in reasons["(head)"]
    assert [choice.site for choice in made.choices] == ["twice"]


def test_an_unreachable_budget_says_what_is_reachable_and_why():
    torch.manual_seed(0)
    with pytest.raises(
        BudgetError, match=r"Layers that cannot be rewritten hold .* the largest"
    ) as caught:
        plan(Odd(), EXAMPLES[:8], budget="macs=1%")
    share = str(caught.value).rpartition("`macs=")[2].partition("%")[0]
    torch.manual_seed(0)
    made = plan(Odd(), EXAMPLES[:8], budget=f"macs={share}%")
    assert made.after.macs <= made.budgets[0].limit


def test_a_module_left_alone_keeps_all_inside_it():
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Sequential(nn.Conv2d(12, 12, 3), nn.Conv2d(12, 12, 1))
    )
    made = plan(net, EXAMPLES[:8], budget="macs=90%", leave=["1"])
    assert {c.site for c in made.choices} == {"0"}


# ---------------------------------------------------------------- refusals


def edited(made, change):
    content = json.loads(made.to_json())
    change(content)
    return Plan.from_json(json.dumps(content))


def first_choice(**changes):
    def change(content):
        content["choices"] = content["choices"][:1]
        choice = content["choices"][0]
        step = {name: changes[name] for name in ("rewrite", "settings") if name in changes}
        choice["steps"][0].update(step)
        choice.update({name: value for name, value in changes.items() if name not in step})

    return change


@pytest.mark.parametrize(
    "function", [restructure, lambda m, p: apply(m, p, EXAMPLES)], ids=["restructure", "apply"]
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"form": "reduce", "ranks": [99]}}, r"ranks of '3' as 'reduce' must be 1 from 1 up to 8, got \[99\]"),
        ({"settings": {"form": "reduce", "ranks": [0]}}, r"got \[0\]"),
        ({"settings": {"form": "svd", "ranks": [3]}}, r"form of '3' must be one of reduce, expand, tucker2, spatial, spatial-expand, got 'svd'"),
        ({"settings": {"ranks": [3]}}, r"must have a `form` and a list of `ranks`"),
        ({"settings": {"form": "reduce", "ranks": 3}}, r"must have a `form` and a list of `ranks`"),
        ({"site": "conv9"}, r"site 'conv9' must be a layer of the network"),
        ({"site": "1"}, r"site '1' cannot be rewritten: BatchNorm2d is neither a convolution"),
        ({"rewrite": "head", "site": "8", "settings": {"form": "gape"}}, r"form of a head must be one of"),
        ({"rewrite": "head", "site": "3", "settings": {"form": "exact"}}, r"head starts at '8', but the plan says '3'"),
        ({"rewrite": "head", "site": "8", "settings": {"form": "gap", "hidden": 8}}, r"`hidden` widths .* must be a list"),
        ({"rewrite": "head", "site": "8", "settings": {"form": "gap", "context": -1}}, r"`context` of the head '8' must be 0 or more, got -1"),
    ],
)  # fmt: skip
def test_an_edited_plan_that_cannot_be_carried_out_is_refused(planned, function, changes, message):
    broken = edited(planned, first_choice(**{"site": "3", "rewrite": "factorize", **changes}))
    with pytest.raises(PlanError, match=message):
        function(network(), broken)


def test_an_unknown_rewrite_is_told_its_neighbor(planned):
    broken = edited(planned, first_choice(rewrite="factorise"))
    with pytest.raises(UnknownNameError, match=r"Did you mean 'factorize'\?"):
        restructure(network(), broken)


def test_a_sensible_edit_is_carried_out(planned):
    mended = edited(
        planned,
        first_choice(site="3", rewrite="factorize", settings={"form": "tucker2", "ranks": [3, 5]}),
    )
    built = apply(network(), mended, EXAMPLES)
    assert [tuple(part.weight.shape) for part in built[3]] == [
        (3, 8, 1, 1),
        (5, 3, 3, 3),
        (12, 5, 1, 1),
    ]


def test_a_layer_of_two_names_is_not_torn_apart(planned):
    torch.manual_seed(0)
    settings = {"form": "reduce", "ranks": [3]}
    broken = edited(planned, first_choice(site="shared", rewrite="factorize", settings=settings))
    with pytest.raises(PlanError, match="one layer of several names, 'shared', 'again'"):
        restructure(Odd(), broken)


def test_a_layer_that_does_not_run_cannot_be_fitted(planned):
    settings = {"form": "reduce", "ranks": [3]}
    broken = edited(planned, first_choice(site="unused", rewrite="factorize", settings=settings))
    with pytest.raises(DataError, match="The layer 'unused' does not run on the calibration data"):
        apply(Odd(), broken, EXAMPLES)


def test_an_averaging_head_without_data_is_refused(with_head):
    with pytest.raises(PlanError, match="needs calibration data to be fitted to, got None"):
        apply(network(), with_head, None)


def test_weights_that_are_not_finite_are_refused():
    broken = network()
    with torch.no_grad():
        broken[3].weight[0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"9 of 864 values of '3.weight' are NaN or infinite"):
        plan(broken, EXAMPLES, budget="macs=50%")


def test_a_network_that_multiplies_nowhere_is_refused():
    with pytest.raises(ModelError, match="must have a convolution or a linear layer to rewrite"):
        plan(nn.Sequential(nn.ReLU(), nn.Flatten()), EXAMPLES, budget="macs=50%")


def test_data_of_another_shape_is_refused():
    with pytest.raises(ModelError, match=r"must run on an input of shape 4×5×6×6, but it failed"):
        plan(network(), torch.randn(4, 5, 6, 6), budget="macs=50%")


def test_a_network_that_gives_no_tensor_is_refused():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return {"boxes": [len(self.conv(x))]}

    with pytest.raises(
        ModelError, match=r"floating-point numbers in evaluation mode, .* gave dict"
    ):
        plan(Pair(), EXAMPLES, budget="macs=50%")


def test_an_unknown_head_is_refused():
    with pytest.raises(UnknownNameError, match=r"No `head` named 'none'\. Available: auto"):
        plan(network(), EXAMPLES, budget="macs=50%", head="none")


@pytest.mark.parametrize("form", ["exact", "gap"])
def test_a_head_that_was_asked_for_and_cannot_be_is_refused(form):
    with pytest.raises(
        ModelError, match=f"cannot be rewritten as {form!r}: it does not end in linear"
    ):
        plan(nn.Sequential(nn.Conv2d(3, 8, 3)), EXAMPLES, budget="macs=50%", head=form)


def test_budgets_are_read_before_anything_is_measured():
    def never(done, total, message):
        raise AssertionError

    with pytest.raises(BudgetError, match="percentage or a number"):
        plan(network(), EXAMPLES, budget="macs=fifty", progress=never)


@pytest.mark.parametrize("head", ["auto", "keep", "exact", "gap"])
@pytest.mark.parametrize("budget", ["macs=0.3%", "params=50%,macs=0.3%", "size=1%"])
def test_what_no_choice_reaches_is_refused_before_anything_is_measured(budget, head):
    steps = []
    with pytest.raises(BudgetError, match="the least that these rewrites reach"):
        plan(
            network(), EXAMPLES, budget=budget, head=head, progress=lambda *step: steps.append(step)
        )
    assert not steps


@pytest.mark.parametrize("head", ["auto", "keep", "exact", "gap"])
@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_the_least_that_a_refusal_names_is_reached(quantity, head):
    torch.manual_seed(0)
    net = network()
    with pytest.raises(BudgetError) as caught:
        plan(net, EXAMPLES, budget=f"{quantity}=0.3%", head=head)
    share = int(re.search(rf"Raise the budget to `{quantity}=(\d+)%`", str(caught.value))[1])
    made = plan(net, EXAMPLES, budget=f"{quantity}={share}%", head=head)
    reached = 100 * made.after.amount(quantity) / made.before.amount(quantity)
    assert share - 1 < reached <= share


def test_a_share_below_half_a_percent_is_a_budget_too():
    with pytest.raises(BudgetError, match="the least that these rewrites reach"):
        plan(network(), EXAMPLES, budget="macs=0.3%", head="keep")


@pytest.mark.parametrize("site", ["", "0"])
def test_a_network_that_is_one_layer_is_rewritten(site):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 16, 3)
    net = nn.Sequential(layer) if site else layer
    made = plan(net, EXAMPLES, budget="macs=60%")
    assert [choice.site for choice in made.choices] == [site]
    assert apply(net, made, EXAMPLES)(EXAMPLES).shape == (48, 16, 4, 4)


def test_dead_and_constant_channels_are_planned_for():
    net = network()
    with torch.no_grad():
        net[0].weight[:3], net[0].bias[:3] = 0, 0
        net[3].weight[5], net[3].bias[5] = 0, 7
    examples = copy.deepcopy(EXAMPLES)
    examples[:, 1] = 2.0
    made = plan(net, examples, budget="macs=60%", head="keep")
    rewritten = apply(net, made, examples)
    assert all(bool(torch.isfinite(p).all()) for p in rewritten.parameters())
    assert all(choice.harm is not None and choice.harm >= 0 for choice in made.choices)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_another_type_is_planned_and_keeps_its_type(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 5),
    ).to(dtype)  # fmt: skip
    made = plan(net, EXAMPLES, budget="macs=70%")
    small = apply(net, made, EXAMPLES)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small(EXAMPLES[:2].to(dtype)).dtype == dtype


def test_bytes_are_those_of_the_precision_that_the_runtime_deploys():
    net, whole = network(), weight_bytes(network())
    smallest = f"size={round(0.3 * whole)}"  # less than any plan reaches in float32
    made = plan(
        net, EXAMPLES, budget=smallest, head="keep", runtime="eager:bf16", cache=False, closest=True
    )
    assert made.before.bytes == weight_bytes(network().to(torch.bfloat16)) < 0.6 * whole
    small = restructure(net, made).to(torch.bfloat16)
    assert made.after.bytes == weight_bytes(small)
    # A group of layers also holds the statistics of its batch norms, which are no parameters.
    for each in made.choices:
        assert 2 * each.after.params <= each.after.bytes < 3 * each.after.params
