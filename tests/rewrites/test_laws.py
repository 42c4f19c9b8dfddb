"""Laws of every rewrite on small random networks: function, cost, structure, and what it leaves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.core.errors import ModelError
from onebyone.core.records import InputSpec, Option, Plan
from onebyone.profiling.trace import trace_layers
from onebyone.rewrites.head import rewrite as head
from onebyone.rewrites.low_rank import separable
from onebyone.rewrites.registry import cost_before

SIDE = 12  # each of three layers leaves enough of it for the next


@st.composite
def networks(draw):
    """Return a network that begins with convolutions on 12×12 maps and ends in class scores."""
    torch.manual_seed(draw(st.integers(0, 99)))
    channels, layers = 3, []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["plain", "plain", "pointwise", "grouped", "transposed"]))
        out, bias = draw(st.sampled_from([4, 6])), draw(st.booleans())
        size, groups = draw(st.sampled_from([(3, 3), (1, 3), (2, 2)])), 1
        if kind == "grouped" and channels % 2 == 0:
            groups = 2
        if kind == "pointwise":
            layer = nn.Conv2d(channels, out, 1, stride=draw(st.integers(1, 2)), bias=bias)
        elif kind == "transposed":
            layer = nn.ConvTranspose2d(channels, out, size, bias=bias)
        else:
            mode = draw(st.sampled_from(["zeros", "circular", "replicate"]))
            layer = nn.Conv2d(
                channels, out, size, padding=1, bias=bias, groups=groups, padding_mode=mode,
                dilation=draw(st.integers(1, 2)),
            )  # fmt: skip
        layers.append(layer)
        channels = out
        if draw(st.booleans()):
            norm = nn.BatchNorm2d(channels, affine=draw(st.booleans()))
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            layers.append(norm)
        if draw(st.booleans()):
            layers.append(draw(st.sampled_from([nn.ReLU(), nn.ReLU(inplace=True), nn.GELU()])))
    pool = draw(st.sampled_from([nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(2)]))
    flat = channels * (1 if isinstance(pool, nn.AdaptiveAvgPool2d) else 4)
    network = nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(flat, 5)).double()
    network.train(draw(st.booleans()))
    return network


def inputs(n=4):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)


def factorized(network):
    return obo.uniform_plan(network, inputs(1), ranks=1)


def separated(network):
    form = "depthwise-pointwise"
    costs = {layer.name: layer for layer in trace_layers(network, inputs(1)).layers}
    choices = []
    for item in obo.applies(network, inputs(1)).sites:
        if item.rewrite == "separable" and item.reason is None:
            layer, seen = network.get_submodule(item.site), costs[item.site]
            asked = {"form": form, "terms": separable.most_terms(layer, form)}
            after = separable.cost(
                layer, asked, input_size=seen.input_shape[1:], output_size=seen.output_shape[1:]
            )
            before = cost_before(layer, seen)
            choices.append(
                Option.of("separable", asked, site=item.site, before=before, after=after)
            )
    return of(network, choices)


def with_exact_head(network):
    found = head.find_head(network, inputs(1))
    if isinstance(found, head.NoHead):
        return of(network, [])
    exact = Option.of("head", {"form": "exact"}, site=found.name, before=found.cost,
        after=head.cost(found, "exact", []),
    )  # fmt: skip
    return of(network, [exact])


def folded(network):
    return obo.fold(network, inputs(1))[1]


def deepened(network):
    try:
        return obo.deepen(network, inputs(1))[1]
    except ModelError:  # it has no activation
        return of(network, [])


def of(network, choices):
    costs = trace_layers(network, inputs(1))
    before = after = costs.cost
    for choice in choices:
        after = after - choice.saved
    return Plan(
        network="net", inputs=InputSpec.of_shape((1, 3, SIDE, SIDE)), budgets=(), before=before, after=after,
        choices=tuple(choices), left_alone=(),
    )  # fmt: skip


def everything_of(network):
    """Return all that a rewrite could change in a network."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    modules = [
        (name, type(m), m.training, len(m._forward_hooks), set(vars(m)))
        for name, m in network.named_modules()
    ]
    return state, modules, [p.requires_grad for p in network.parameters()]


def outputs(network, x):
    modes = [(m, m.training) for m in network.modules()]
    with torch.no_grad():
        given = network.eval()(x.clone())
    for module, training in modes:
        module.training = training
    return given


@pytest.mark.parametrize("plan_of", [factorized, separated, with_exact_head, folded, deepened])
@settings(max_examples=8, deadline=None)
@given(network=networks())
def test_every_exact_rewrite_keeps_its_laws(plan_of, network):
    before = everything_of(network)
    plan = plan_of(network)
    made = obo.apply(network, plan, inputs())
    for x in (inputs(), inputs(1), torch.zeros_like(inputs(2)), 5 * inputs() - 2):
        wanted = outputs(network, x)
        assert_close(outputs(made, x), wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
    counted = trace_layers(made, inputs(1))
    assert plan.after == counted.cost
    structure = obo.restructure(network, Plan.from_json(plan.to_json()))
    structure.load_state_dict(made.state_dict())
    assert_close(outputs(structure, inputs()), outputs(made, inputs()), rtol=0, atol=0)
    assert made.training == structure.training == network.training
    after = everything_of(network)
    assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:] == before[1:]
