"""Networks that compute their padding from the size are traced in seconds, at one size."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebyone.core.errors import ModelError
from onebyone.networks.exportable import growth_limited
from onebyone.pipeline.exporting import export
from onebyone.quantizing import NO_CLOSED_FORMS, quantize


class Same(nn.Conv2d):
    """A convolution of stride 2 with TensorFlow's padding "SAME"."""

    def forward(self, x: Tensor) -> Tensor:
        """Halve height and width."""
        pads = [max((-(-size // 2) - 1) * 2 + 3 - size, 0) for size in x.shape[-2:]]
        around = [part for pad in reversed(pads) for part in (pad // 2, pad - pad // 2)]
        return super().forward(F.pad(x, around))


def strided(depth: int) -> nn.Sequential:
    """Return some convolutions and an average."""
    layers = [Same(3 if place == 0 else 4, 4, 3, stride=2) for place in range(depth)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def traced(network: nn.Module, size: int) -> None:
    free = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    with growth_limited(network):
        torch.export.export(network, (torch.randn(2, 3, size, size),), dynamic_shapes=free)


def test_tracing_is_given_up_only_where_formulas_grow() -> None:
    traced(strided(1), 32)
    ordinary = nn.Sequential(*(nn.Conv2d(3, 3, 3, stride=2) for _ in range(4)))
    traced(ordinary, 64)
    network = strided(4)
    with pytest.raises(ModelError, match="formulas of more than 30 operations at a Same"):
        traced(network, 64)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_such_a_network_is_exported_at_one_size(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    record = export(strided(4), tmp_path, input_shape=(1, 3, 64, 64))
    (check,) = record.checks
    assert check.dynamic == ("batch",)
    assert "each padding is computed from the size" in check.fixed


def test_an_int8_network_refuses_sizes_that_it_was_not_traced_for(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    inputs = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    made = quantize(strided(4), inputs, forms=NO_CLOSED_FORMS)
    made.network(inputs)
    with pytest.raises(ModelError, match="of the size 3 × 64 × 64, with which it was traced"):
        made.network(torch.zeros(2, 3, 63, 64))
    record = export(made, tmp_path, data=inputs)
    assert record.checks[0].dynamic == ("batch",)
    assert quantize(strided(1), inputs, forms=NO_CLOSED_FORMS).network(inputs[:, :, 1:]).ndim == 2
