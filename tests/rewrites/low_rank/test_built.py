import pytest
import torch
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.calibration.collect import collect
from onebyone.core.errors import ModelError
from onebyone.networks.conv_layers import kernel_of, set_kernel
from onebyone.rewrites.low_rank import factorize
from onebyone.rewrites.low_rank.built import chain_kernel, why_not_as_solved
from onebyone.rewrites.low_rank.reduced_rank import problems_of
from onebyone.rewrites.registry import layer_rewrite

LAYERS = {
    "plain": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "wide kernel": lambda: nn.Conv2d(6, 4, (5, 2), stride=2, padding_mode="circular", padding=1),
    "grouped": lambda: nn.Conv2d(6, 8, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(6, 8, (3, 2), stride=2, groups=2),
    "1-d": lambda: nn.Conv1d(6, 8, 3),
    "linear": lambda: nn.Linear(6, 5),
}


def settings_of(layer):
    """Return settings of every form of every rewrite, of about half rank."""
    for form in factorize.forms_of(layer):
        ranks = [max(1, full // 2) for full in factorize.full_ranks(layer, form)]
        yield "factorize", {"form": form, "ranks": ranks}
    if not isinstance(layer, nn.Linear):
        for form in ("depthwise-pointwise", "pointwise-depthwise"):
            yield "separable", {"form": form, "terms": 2}


def seen(layer):
    axes = {nn.Linear: 0, nn.Conv1d: 1}.get(type(layer), 2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, *[9] * axes, dtype=torch.float64, generator=generator)
    return x, collect(layer, [""], lambda: [x])[""]


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_error_of_the_built_layer_is_the_error_solved_for(case, calibrated):
    torch.manual_seed(0)
    layer = LAYERS[case]().double()
    _, moments = seen(layer)
    for rewrite, settings in settings_of(layer):
        how, problems = layer_rewrite(rewrite), problems_of(layer, moments if calibrated else None)
        chain = how.build(layer, settings)
        solved = how.fit(chain, problems, settings, layer)
        assert why_not_as_solved(chain, problems, layer, solved) is None
        assert why_not_as_solved(chain, problems, layer, solved / 30) is not None
        spoiled = chain[0]
        set_kernel(spoiled, kernel_of(spoiled).flip(1) * 3)
        reason = why_not_as_solved(chain, problems, layer, 1e-4)
        assert "relative squared error" in reason


@pytest.mark.parametrize("case", LAYERS)
def test_the_kernel_of_a_chain_is_what_it_multiplies_with(case):
    torch.manual_seed(0)
    layer = LAYERS[case]().double()
    x, _ = seen(layer)
    for rewrite, settings in settings_of(layer):
        chain = layer_rewrite(rewrite).build(layer, settings)
        with torch.no_grad():
            chain[-1].bias.zero_()
            layer.bias.zero_()
            set_kernel(layer, chain_kernel(chain, layer))
            assert_close(layer(x), chain(x))


def test_a_layer_that_is_not_what_was_solved_for_is_refused_by_name(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    write = set_kernel
    monkeypatch.setattr(factorize, "set_kernel", lambda m, kernel: write(m, kernel * 2))
    x = torch.randn(8, 6, 9, 9)
    plan = obo.uniform_plan(network, x[:1], ranks=0.5)
    with pytest.raises(ModelError, match=r"The layer '0' must have the weights that were solved"):
        obo.apply(network, plan, x)
