from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from onebyone.calibration import cached_modules
from onebyone.calibration.collect import Across, collect
from onebyone.core.errors import PlanError
from onebyone.core.records import Cost, InputSpec, Option, Plan
from onebyone.networks.layers import GlobalAverageHead
from onebyone.rewrites import REWRITES, apply, fit_layers, restructure
from onebyone.rewrites.head import fit as head_fit
from onebyone.rewrites.low_rank import factorize

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 10, 3, stride=2, bias=False), nn.ReLU(inplace=True),
        nn.Conv2d(10, 10, 1), nn.ReLU(), nn.Flatten(), nn.Linear(90, 5),
    )  # fmt: skip


def option(site, rewrite="factorize", **settings):
    zero = Cost(params=0, macs=0, bytes=0)
    return Option.of(rewrite, settings, site=site, before=zero, after=zero)


def planned(*choices):
    zero = Cost(params=0, macs=0, bytes=0)
    return Plan(
        network="net", inputs=InputSpec.of_shape((1, 3, 8, 8)), budgets=(), before=zero, after=zero,
        choices=choices, left_alone=(),
    )  # fmt: skip


FULL = planned(
    option("0", form="tucker2", ranks=[3, 8]),
    option("3", form="reduce", ranks=[8]),
    option("5", form="pair", ranks=[10]),
    option("8", form="pair", ranks=[5]),
)
LESS = planned(
    option("0", form="expand", ranks=[3]),
    option("3", form="tucker2", ranks=[4, 5]),
    option("5", form="pair", ranks=[5]),
)


def outputs(net, x=X):
    with torch.no_grad():
        return net.eval()(x)


@pytest.mark.parametrize("calibration", [X, None], ids=["data", "kernels"])
def test_at_full_rank_the_network_keeps_its_function(calibration):
    assert_close(
        outputs(apply(network(), FULL, calibration)), outputs(network()), rtol=1e-3, atol=1e-4
    )


def test_an_exact_head_and_full_rank_on_its_convolution_keep_the_function():
    both = planned(option("8", "head", form="exact"), option("8.0", form="expand", ranks=[5]))
    made = apply(network(), both, X)
    assert_close(outputs(made), outputs(network()), rtol=1e-3, atol=1e-4)
    assert list(dict(made.get_submodule("8.0").named_children())) == ["spatial", "expand"]


def test_the_order_of_head_and_layers_does_not_matter_to_what_is_fitted():
    head = option("8", "head", form="exact")
    first = apply(network(), planned(head, *LESS.choices), X)
    last = apply(network(), planned(*LESS.choices, head), X)
    assert_close(outputs(first), outputs(last), rtol=1e-3, atol=1e-4)


def test_an_empty_plan_is_a_copy():
    net = network()
    assert_close(outputs(apply(net, planned(), X)), outputs(net))


def test_the_structure_is_the_same_with_and_without_weights():
    for made in (FULL, LESS, planned(option("8", "head", form="gap", hidden=[8]))):
        fitted, structure = apply(network(), made, X), restructure(network(), made)
        assert [(n, type(m).__name__) for n, m in fitted.named_modules()] == [
            (n, type(m).__name__) for n, m in structure.named_modules()
        ]
        structure.load_state_dict(fitted.state_dict())
        assert_close(outputs(structure), outputs(fitted))


def test_layers_mend_the_errors_before_them(monkeypatch):
    wanted = outputs(network())

    def error(made):
        return ((outputs(made) - wanted).square().mean() / wanted.var()).item()

    mending = error(apply(network(), LESS, X))
    # The same without: each layer fitted as though those before it were still the original's.
    monkeypatch.setattr(Across, "moments", seen_alone)
    assert mending < error(apply(network(), LESS, X)) < error(apply(network(), LESS, None))


def seen_alone(across, _, names, *, since):
    return collect(across._original, names, across._batches)


def test_many_layers_are_fitted_in_groups_and_still_right(monkeypatch):
    monkeypatch.setattr(cached_modules, "KEPT_BYTES", 0)
    monkeypatch.setattr(fit_layers, "MOST_PASSES", 2)
    # The first layer hardly loses a thing, so that the others are fitted to data as well.
    nearly = planned(option("0", form="tucker2", ranks=[3, 7]), *FULL.choices[1:])
    fitted, alone = (outputs(apply(network(), nearly, data)) for data in (X, None))
    wanted = outputs(network())
    assert (fitted - wanted).square().mean() < 0.9 * (alone - wanted).square().mean()
    assert_close(fitted, wanted, rtol=0.1, atol=0.05)


ONE_BY_ONE = (
    option("0", form="expand", ranks=[3]),
    option("3", form="tucker2", ranks=[4, 5]),
    option("5", form="pair", ranks=[5]),
    option("8", form="pair", ranks=[2]),
)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)])
def test_passes_resumed_fit_what_whole_passes_fit(monkeypatch, order):
    plan = planned(*(ONE_BY_ONE[place] for place in order))
    resumed = apply(network().double(), plan, X.double())
    monkeypatch.setattr(cached_modules, "KEPT_BYTES", 0)
    whole = apply(network().double(), plan, X.double())
    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=1e-12)


def test_what_is_fitted_already_is_not_run_again(monkeypatch):
    ran = []
    convolve = F.conv2d

    def counted(x, weight, *others):
        if len(x) == len(X):  # not where it is tried what can be resumed
            ran.append((weight.shape[1], weight.shape[0]))
        return convolve(x, weight, *others)

    monkeypatch.setattr(F, "conv2d", counted)
    monkeypatch.setattr(fit_layers, "curvature_of", lambda *_: {})
    apply(network(), planned(*ONE_BY_ONE), X)
    # What the first two layers became runs in the pass for the next layer, and then no more.
    assert ran.count((3, 3)) == 1
    assert ran.count((8, 4)) == 1
    # Of the original: to see what its outputs mean, for itself, and on the way to the next.
    assert ran.count((8, 10)) == 4


@pytest.mark.parametrize("form", ["exact", "gap"])
def test_a_network_in_double_precision_can_be_restructured(form):
    made = restructure(network().double(), planned(option("8", "head", form=form)))
    assert {p.dtype for p in made.parameters()} == {torch.float64}


def test_a_gap_head_is_fitted_to_the_originals_scores(monkeypatch):
    monkeypatch.setattr(head_fit, "FIT_STEPS", 50)
    made = apply(network(), planned(option("8", "head", form="gap", hidden=[])), X)
    assert isinstance(made.get_submodule("8"), GlobalAverageHead)
    fresh = restructure(network(), planned(option("8", "head", form="gap", hidden=[])))
    wanted = outputs(network())

    def apart(net):
        return (outputs(net) - wanted).log_softmax(1).square().mean()

    assert apart(made) < apart(fresh)


def test_progress_ends_when_all_is_done():
    seen = []
    choices = (*LESS.choices, option("8", "head", form="exact"))
    apply(network(), planned(*choices), X, progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == [1, 2, 3, 4]
    assert {total for _, total, _ in seen} == {4}
    assert [message for _, _, message in seen] == ["factorize"] * 3 + ["head"]


def test_a_network_left_in_training_mode_is_fitted_as_it_evaluates():
    net = network().train()
    made = apply(net, FULL, X)
    assert made.training
    assert_close(outputs(made), outputs(network()), rtol=1e-3, atol=1e-4)


def test_the_weights_of_frozen_layers_stay_frozen():
    net = network()
    net[3].requires_grad_(False)
    made = apply(net, LESS, X)
    assert not any(p.requires_grad for p in made[3].parameters())
    assert all(p.requires_grad for p in made[0].parameters())


def test_every_rewrite_is_described_and_known_forms_are_listed():
    assert set(REWRITES) == {"factorize", "separable", "narrow", "head", "deepen", "fold"}
    assert set(factorize.FORMS) == {
        "reduce",
        "expand",
        "tucker2",
        "spatial",
        "spatial-expand",
        "pair",
    }


@pytest.mark.parametrize("size", [2**63, 2**40, 10**6])
def test_a_plan_for_inputs_that_nothing_holds_is_refused(size):
    made = replace(planned(), inputs=InputSpec.of_shape((1, 3, size, size)))
    with pytest.raises(PlanError, match="which no machine holds"):
        restructure(network(), made)
