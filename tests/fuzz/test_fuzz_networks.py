"""Any network is profiled, planned and rewritten, or an error of ours says why not.

A full rank is the same function; the network that was given is what it was.
"""

import copy

import torch
from cases import some
from hypothesis import assume, example, given
from hypothesis import strategies as st
from random_networks import Steps, networks
from torch import nn

import onebyone as obo
from onebyone.core.errors import OneByOneError

FORMS = ("auto", "reduce", "expand", "tucker2", "spatial", "spatial-expand", "pair")


def or_refused(make):
    """Return what is made, or ``None`` where it is refused in words."""
    try:
        return make()
    except OneByOneError as error:
        assert str(error).strip()
        return None


def outputs(network, x):
    with torch.no_grad():
        return network(x.clone())


def is_close(a, b, *, to):
    scale = float(a.abs().max().clamp(min=1e-30))
    return a.shape == b.shape and float((a - b).abs().max()) <= to * scale


IN_PLACE_FIRST = Steps([nn.ReLU(inplace=True)], ["plain"], nn.Identity()).eval()


@some(dearer=15)
@example((IN_PLACE_FIRST, (2, 1, 6, 6)), "auto", 0.3)
@given(networks(), st.sampled_from(FORMS), st.sampled_from([0.3, 1.0]))
def test_networks(made, form, ranks):
    assume(made is not None)
    network, shape = made
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = outputs(network, x)
    assume(bool(before.isfinite().all()))
    state = copy.deepcopy(network.state_dict())
    modes = {name: module.training for name, module in network.named_modules()}
    given_input = x.clone()

    profile = or_refused(lambda: obo.profile(network, input_shape=shape, timed=False))
    assert profile is None or profile.params == sum(p.numel() for p in network.parameters())
    or_refused(lambda: obo.applies(network, shape))
    plan = or_refused(lambda: obo.uniform_plan(network, shape, ranks=ranks, form=form))
    if plan is not None:
        assert obo.Plan.from_json(plan.to_json()) == plan
        small = or_refused(lambda: obo.apply(network, plan, None))
        if small is not None:
            after = outputs(small, x)
            assert after.shape == before.shape
            assert ranks < 1 or is_close(before, after, to=1e-3), [c.site for c in plan.choices]
    for rewrite in (obo.fold, obo.deepen):
        result = or_refused(lambda rewrite=rewrite: rewrite(network, x))
        if result is not None:
            assert is_close(before, outputs(result[0], x), to=1e-3), result[1].choices

    assert torch.equal(x, given_input)
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert network.state_dict().keys() == state.keys()
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(outputs(network, x), before)
