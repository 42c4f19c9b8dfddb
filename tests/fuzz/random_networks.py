"""Networks made at random from layers and from calls of functions, each with its input's shape."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

SIDE = 8


class Steps(nn.Module):
    """Runs its modules and functions in their order; sums branches, repeats and shares."""

    def __init__(self, layers, ways, head):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.ways = ways
        self.head = head

    def forward(self, x):
        for layer, way in zip(self.layers, self.ways, strict=True):
            x = WAYS[way](layer, x)
        return self.head(x)


def _residual(layer, x):
    y = layer(x)
    return x + y if x.shape == y.shape else y


def _by_function(layer, x):
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
        return F.conv2d(
            x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )
    return layer(x)


def _twice(layer, x):
    y = layer(x)
    return layer(y) if y.shape == x.shape else y


WAYS = {
    "plain": lambda layer, x: layer(x),
    "residual": _residual,
    "function": _by_function,
    "twice": _twice,
    "scaled": lambda layer, x: layer(x) * 0.5 + 0.1,
    "in place": lambda layer, x: layer(x).add_(1.0),
    "cat": lambda layer, x: _cat(layer(x), x),
}


def _cat(y, x):
    return torch.cat([y, x], dim=1)[:, : y.shape[1]] if y.shape[2:] == x.shape[2:] else y


class Doubled(nn.Conv2d):
    """A convolution that is called otherwise than torch's."""

    def forward(self, x):
        return 2 * super().forward(x)


ACTIVATIONS = [
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Identity,
    nn.Dropout,
]
NORMS = [nn.BatchNorm2d, lambda c: nn.GroupNorm(1, c), nn.InstanceNorm2d,
         lambda c: nn.BatchNorm2d(c, affine=False)]  # fmt: skip


@st.composite
def networks(draw):
    """Draw a network in evaluation mode and the shape of its input."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    first = width = draw(st.sampled_from([1, 2, 3, 4]))
    layers, ways = [], []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["conv", "conv", "conv", "norm", "activation", "pool", "up"]))
        if kind == "conv":
            new = draw(st.sampled_from([1, 2, 4, 6, 9]))
            groups = width if new % width == 0 and draw(st.integers(0, 3)) == 0 else 1
            kernel = draw(st.sampled_from([1, 1, 2, 3, (1, 3), (3, 1), 5]))
            options = {
                "stride": draw(st.sampled_from([1, 1, 1, 2, (1, 2)])),
                "padding": draw(st.sampled_from([0, 1, 2, (1, 0)])),
                "dilation": draw(st.sampled_from([1, 1, 1, 2])),
                "groups": groups,
                "bias": draw(st.booleans()),
                "padding_mode": draw(st.sampled_from(["zeros"] * 4 + ["reflect", "circular"])),
            }
            make = draw(st.sampled_from([nn.Conv2d] * 5 + [Doubled]))
            layer, width = make(width, new, kernel, **options), new
            with torch.no_grad():
                layer.weight.mul_(draw(st.sampled_from([1.0, 1.0, 1.0, 0.0, 1e-30, 1e20])))
        elif kind == "norm":
            layer = draw(st.sampled_from(NORMS))(width)
            for buffer in layer.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(torch.rand_like(buffer) + 0.5)
        elif kind == "activation":
            layer = draw(st.sampled_from(ACTIVATIONS))()
        elif kind == "pool":
            layer = draw(
                st.sampled_from([nn.MaxPool2d(2, 1), nn.AvgPool2d(2), nn.MaxPool2d(3, 1, 1)])
            )
        else:
            layer = draw(st.sampled_from([nn.Upsample(scale_factor=2), nn.ZeroPad2d(1)]))
        layers.append(layer)
        ways.append(draw(st.sampled_from(list(WAYS))))
    shape = (2, first, draw(st.integers(6, SIDE)), draw(st.integers(6, SIDE)))
    body = Steps(layers, ways, nn.Identity()).eval()
    try:
        with torch.no_grad():
            out = body(torch.zeros(shape))
    except RuntimeError:
        return None  # kernels larger than what is left
    body.head = draw(st.sampled_from(["none", "gap", "flat", "mean", "softmax"]).map(
        lambda kind: _head(kind, out)
    ))  # fmt: skip
    return body.eval(), shape


class Mean(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


def _head(kind, out):
    channels = out.shape[1]
    if kind == "none":
        return nn.Identity()
    if kind == "gap":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))
    if kind == "mean":
        return Mean(nn.Linear(channels, 3))
    linear = nn.Linear(out[0].numel(), 3)
    return nn.Sequential(nn.Flatten(), linear, *([nn.Softmax(1)] if kind == "softmax" else []))
