import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import resnet18, squeezenet1_1

import onebyone as obo
from onebyone.core.errors import OptionError, UnknownNameError
from onebyone.core.records import Plan
from onebyone.profiling.trace import trace_layers


def varied():
    """Every geometry that a layer may have: channels, height and width all differ."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, (3, 5), stride=(2, 1), padding=(1, 2), padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding="same", dilation=2, bias=False),
        nn.BatchNorm2d(24),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.Conv2d(24, 40, 3, padding=1, groups=4),
        nn.ConvTranspose2d(40, 28, 3, stride=2, padding=1, output_padding=1),
        nn.Conv2d(28, 12, 1),
        nn.Conv2d(12, 18, 1, stride=2),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(18 * 9, 7),
    ).eval()


SHAPE = (2, 3, 10, 13)


@pytest.mark.parametrize(
    "form", ["auto", "reduce", "expand", "tucker2", "spatial", "spatial-expand", "pair"]
)
def test_full_ranks_are_the_same_function(form):
    model = varied().double()
    x = torch.randn(SHAPE, dtype=torch.float64)
    plan = obo.uniform_plan(model, x, ranks=1, form=form)
    assert plan.choices
    with torch.no_grad():
        assert_close(obo.apply(model, plan, None)(x), model(x))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
@pytest.mark.parametrize(
    "form", ["auto", "reduce", "expand", "tucker2", "spatial", "spatial-expand"]
)
def test_predicted_costs_are_those_counted_and_below_break_even(share, form):
    model = varied()
    plan = obo.uniform_plan(model, SHAPE, ranks=share, form=form)
    for option in plan.choices:
        assert option.after.macs < option.before.macs
        assert option.after.params < option.before.params
    counted = trace_layers(obo.apply(model, plan, None), torch.randn(SHAPE))
    assert counted.cost == plan.after


def test_every_layer_is_chosen_or_left_alone_with_a_reason():
    model = varied()
    layers = {n for n, m in model.named_modules() if hasattr(m, "weight")} - {"3"}
    plan = obo.uniform_plan(model, SHAPE, ranks=0.5, leave=["7"])
    why = {item.site: item.reason for item in plan.left_alone}
    assert {option.site for option in plan.choices} | set(why) == layers
    assert why["4"] == "depthwise: no channels to mix"
    assert why["7"] == "left alone as asked"
    square = obo.uniform_plan(nn.Conv2d(8, 8, 1), (1, 8, 4, 5), ranks=0.5)
    assert square.left_alone[0].reason == "50 % of its ranks would not save parameters and MACs"


def test_a_form_that_a_layer_lacks_leaves_it_alone():
    plan = obo.uniform_plan(squeezenet1_1().eval(), (1, 3, 64, 64), ranks=0.25, form="tucker2")
    assert {option.first.settings["form"] for option in plan.choices} == {"tucker2"}
    reasons = {item.site: item.reason for item in plan.left_alone}
    assert reasons["features.3.squeeze"] == "has no form 'tucker2', only pair"


def test_the_ranks_are_that_share_of_the_full_ranks():
    plan = obo.uniform_plan(resnet18(), (1, 3, 64, 64), ranks=0.25)
    ranks = {option.site: option.first.settings["ranks"] for option in plan.choices}
    assert ranks["layer2.0.conv1"] == [16, 32]
    assert ranks["layer2.0.downsample.0"] == [16]
    assert ranks["conv1"] == [1, 16]  # of 3 channels at least one is left


def test_a_plan_needs_no_data_and_gives_the_same_network_from_its_file(tmp_path):
    model = varied()
    before = copy.deepcopy(model.state_dict())
    plan = obo.uniform_plan(model, SHAPE)
    assert plan.harm is None
    assert all(option.harm is None for option in plan.choices)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    x = torch.randn(SHAPE)
    with torch.no_grad():
        assert_close(obo.apply(model, again, None)(x), obo.apply(model, plan, None)(x))
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert str(plan).startswith("Plan for Sequential")


@pytest.mark.parametrize(
    ("share", "words"),
    [(0, "above 0"), (-0.5, "0 or more"), (1.5, "at most 1"), (float("nan"), "a finite number")],
)
def test_a_share_that_is_none_is_refused(share, words):
    with pytest.raises(OptionError, match=f"`ranks` must be {words}"):
        obo.uniform_plan(varied(), SHAPE, ranks=share)


def test_an_unknown_form_or_module_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'tucker2'"):
        obo.uniform_plan(varied(), SHAPE, form="tucker")
    with pytest.raises(OptionError, match="no module named 'nine'"):
        obo.uniform_plan(varied(), SHAPE, leave=["nine"])


def test_costs_are_right_where_a_layer_sees_more_rows_than_the_network_has_inputs():
    class Windows(nn.Module):
        """Each input becomes six windows, stacked on the batch."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 24, 3, padding=1)
            self.linear = nn.Linear(24, 40)

        def forward(self, x):
            n, c = x.shape[:2]
            x = x.unfold(2, 4, 4).unfold(3, 5, 5).permute(0, 2, 3, 1, 4, 5).reshape(-1, c, 4, 5)
            rows = self.linear(self.conv(x).flatten(2).transpose(1, 2))
            return rows.reshape(n, -1)

    model, x = Windows(), torch.randn(2, 8, 8, 15)
    plan = obo.uniform_plan(model, x, ranks=0.3)
    assert len(plan.choices) == 2
    counted = trace_layers(obo.apply(model, plan, None), x)
    assert counted.cost == plan.after
