"""The harm of single layers in int8, simulated with weights and inputs rounded to the nearest."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onebyone.calibration.inputs import CalibrationData
from onebyone.calibration.prefix_cache import ResumedPasses
from onebyone.networks.surgery import module_at
from onebyone.planning.survey import Survey

# Examples that harm in int8 is measured on, at most, and what all passes may cost together.
EXAMPLES = 128
FEWEST = 16
MOST_MACS = 2e12


class RoundedLayer(nn.Module):
    """A layer whose weights and inputs are rounded to 8 bits, between minimum and maximum."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Late: quantizing is of use only here.
        from onebyone.quantizing.rounding import nearest  # noqa: PLC0415

        self.layer = copy.deepcopy(layer)
        with torch.no_grad():
            weight = self.layer.weight
            assert isinstance(weight, Tensor)
            integers, scales = nearest(weight.detach().float().flatten(1))
            weight.copy_((integers * scales.unsqueeze(1)).reshape(weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs for rounded inputs."""
        from onebyone.quantizing.ranges import min_max_grid  # noqa: PLC0415
        from onebyone.quantizing.simulate import on_grid  # noqa: PLC0415

        outputs: Tensor = self.layer(on_grid(x, min_max_grid(x)))
        return outputs


@torch.no_grad()
def int8_harms(
    found: Survey, names: Sequence[str], data: CalibrationData | None
) -> dict[str, float]:
    """Return the divergence of a network's outputs with each layer alone in int8.

    Weights and inputs are rounded to the nearest: the closed forms, which are applied when the
    whole network is quantized, do less harm.

    Args:
        found: Has the network, which is changed only while it runs, and what its outputs mean.
        names: The layers, in order of execution.
        data: ``None``: harm is the relative squared error of the layer's weights.
    """
    network, layers, meaning = found.network, found.layers, found.meaning
    if data is None or meaning is None:
        return {name: _weight_error(module_at(network, name)) for name in names}
    order = {layer.name: place for place, layer in enumerate(layers)}
    each = sum(layer.macs for name in names for layer in layers[order[name] :])
    few = data.within(MOST_MACS, each, fewest=FEWEST).first(EXAMPLES)
    passes = ResumedPasses(network, list(few.batches()), names)
    harms = {}
    for name in names:
        outputs = passes.outputs(name, RoundedLayer(module_at(network, name)))
        pairs = zip(passes.reference, outputs, strict=True)
        apart = torch.cat([meaning.divergence(*pair) for pair in pairs])
        harms[name] = max(float(apart.double().mean()), 0.0)
    return harms


def _weight_error(layer: nn.Module) -> float:
    before, after = layer.weight, RoundedLayer(layer).layer.weight
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    return float((after - before).square().sum() / before.square().sum().clamp_min(1e-30))
