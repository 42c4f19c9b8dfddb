"""The conversion benchmark's arms do the same work, and its errors are those of the kernels."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ARGS = argparse.Namespace(rounds=1, images=16, threads=1, spectrum=0.5)


@pytest.fixture(scope="module")
def conversion():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import conversion
    finally:
        sys.path.remove(str(BENCHMARKS))
    return conversion


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=4), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=4), nn.ReLU(),
        nn.Conv2d(16, 8, (1, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


def test_layers_alone_are_those_of_the_whole_network(conversion):
    model = network()
    plan = conversion.plan_of(model)
    layers, whole = conversion.new_layers(model, plan), conversion.new_network(model, plan, 0)
    assert list(layers) == [option.site for option in plan.choices]
    for site, chain in layers.items():
        assert_close(chain.state_dict(), whole.get_submodule(site).state_dict())


def test_the_error_is_that_of_what_the_layers_compute(conversion):
    model = network()
    made = conversion.new_layers(model, conversion.plan_of(model))
    lost = total = 0.0
    for site, chain in made.items():
        layer = model.get_submodule(site)
        size = [2 * side - 1 for side in layer.kernel_size]
        # All answers to an impulse, without stride or bias, are the kernel.
        pulses = torch.zeros(layer.in_channels, layer.in_channels, *size)
        for channel in range(layer.in_channels):
            pulses[channel, channel, size[0] // 2, size[1] // 2] = 1
        answers = []
        for module in (layer, chain):
            out = pulses
            for part in module.modules():
                if isinstance(part, nn.Conv2d):
                    out = nn.functional.conv2d(out, part.weight)
            answers.append(out.detach().double())
        lost += float((answers[1] - answers[0]).square().sum())
        total += float(answers[0].square().sum())
    assert conversion.error_of_ours(model, made) == pytest.approx(lost / total, rel=1e-4)


def test_errors_and_ratios_are_of_one_run_and_the_table_shows_them(conversion, monkeypatch):
    pytest.importorskip("tensorly")
    ran = []

    def alone(spec, arm, images, args):
        ran.append((arm, images))
        return {"seconds": 2.0, "wall_seconds": 3.0, "mb": 5.0}

    monkeypatch.setattr(conversion, "network_of", lambda spec, spectrum: network())
    monkeypatch.setattr(conversion, "alone", alone)
    found = conversion.one_network("torchvision:made-up", ARGS)
    kernels = [(arm, 0) for arm in (conversion.TENSORLY, conversion.LAYERS, conversion.NETWORK)]
    # An eighth of the images, then all.
    assert ran == [*kernels, (conversion.NETWORK, 2), (conversion.NETWORK, 16)]
    errors = found["errors"]
    assert errors[conversion.LAYERS] == pytest.approx(errors[conversion.NETWORK])
    assert errors[conversion.LAYERS] == pytest.approx(errors[conversion.TENSORLY], rel=0.07)
    for arm, ratios in found["ratios"].items():
        seconds = found["seconds"]
        assert ratios == [seconds[conversion.TENSORLY][0] / seconds[arm][0]]
    page = conversion.table([found], ARGS)
    assert len(page.rows) == len(ran)
    assert page.rows[-1][1:5] == ["our network, 16 images", "2", "3", "8.00"]
