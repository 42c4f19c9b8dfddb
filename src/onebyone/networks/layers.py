"""Layers built from 1×1 convolutions: pointwise, mlpconv, and the global average head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.core.errors import OptionError


class Pointwise(nn.Conv2d):
    """A 1×1 convolution: the same linear map of the channels at every pixel.

    It is a subclass of ``nn.Conv2d``.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        stride: Step in pixels: keeps every ``stride``-th pixel of each row and column.
        groups: Number of groups; each maps its own share of the channels.
        bias: Whether to add a bias to each output channel.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        OptionError: If a count is not a positive int, or ``groups`` does not divide the channels.

    References:
        Lin, Chen, Yan, "Network In Network", 2013, arXiv:1312.4400, section 3.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(
            in_channels=in_channels, out_channels=out_channels, stride=stride, groups=groups
        )
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise OptionError(f"`groups` must divide `{name}`, got {groups} and {channels}.")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size=1,
            stride=stride,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        """Return the channels, and those settings that differ from the defaults."""
        text = f"{self.in_channels}, {self.out_channels}"
        text += f", stride={self.stride[0]}" if self.stride[0] != 1 else ""
        text += f", groups={self.groups}" if self.groups != 1 else ""
        return text + (", bias=False" if self.bias is None else "")


class MLPConv(nn.Sequential):
    """The mlpconv block: a k×k convolution and two 1×1 convolutions, each followed by a ReLU.

    The two 1×1 convolutions are a small perceptron that slides over the map. A single convolution
    is linear in each window; this block adds two more non-linearities.
    Children, in order: ``conv``, ``relu1``, ``pointwise1``, ``relu2``, ``pointwise2``, ``relu3``;
    with ``batch_norm`` also ``norm1`` … ``norm3``, each before its ReLU.

    Args:
        in_channels: Number of input channels.
        widths: Channels after each of the three convolutions.
        kernel_size: Side of the first convolution's window, in pixels.
        stride: Stride of the first convolution, in pixels.
        padding: Zeros around the map before the first convolution, in pixels.
        batch_norm: Whether each convolution is batch-normalized. It then has no bias, because the
            normalization would remove it.

    Raises:
        OptionError: If ``widths`` are not three positive ints, or a size is out of range.

    References:
        Lin, Chen, Yan, "Network In Network", 2013, arXiv:1312.4400, section 3.1 and figure 1.
        Batch normalization is later than the paper: Ioffe, Szegedy, 2015, arXiv:1502.03167.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Iterable[int],
        *,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        batch_norm: bool = False,
    ) -> None:
        widths = tuple(widths)
        if len(widths) != 3:
            raise OptionError(
                f"`widths` must be three ints, one for each convolution of the block, got {widths}."
            )
        check_positive(in_channels=in_channels, kernel_size=kernel_size, stride=stride)
        check_positive(**{f"widths[{i}]": width for i, width in enumerate(widths)})
        if padding < 0:
            raise OptionError(f"`padding` must be an int of at least 0, got {padding}.")
        first, second, third = widths
        bias = not batch_norm
        convolutions: list[tuple[str, nn.Conv2d]] = [
            (
                "conv",
                nn.Conv2d(
                    in_channels, first, kernel_size, stride=stride, padding=padding, bias=bias
                ),
            ),
            ("pointwise1", Pointwise(first, second, bias=bias)),
            ("pointwise2", Pointwise(second, third, bias=bias)),
        ]
        children: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (name, convolution) in enumerate(convolutions, start=1):
            children[name] = convolution
            if batch_norm:
                children[f"norm{number}"] = nn.BatchNorm2d(convolution.out_channels)
            children[f"relu{number}"] = nn.ReLU()
        super().__init__(children)


class GlobalAverageHead(nn.Module):
    """A classifier of 1×1 convolutions and a global average: one map per class, then its mean.

    The last convolution makes one map for each class; a class's score is the mean of its map. So
    the head takes maps of any size, none of its parameters depends on that size, and its maps show
    where the evidence for each class is.

    The scores are logits: pass them to ``nn.CrossEntropyLoss`` directly.

    A 1×1 convolution sees one pixel only, but after few layers the evidence may be spread over
    more. ``context`` adds depthwise 3×3 convolutions between the 1×1 convolutions, as NiN's last
    block has a 3×3 before them. They start as the identity, so the head starts equal to one without
    them (without ``hidden``: where its input is not negative).

    Args:
        in_channels: Number of input channels.
        num_classes: Classes to score.
        hidden: Channels of the 1×1 convolutions before the last, each followed by a ReLU.
        context: Number of extra steps before the last convolution. Each is a depthwise 3×3 with
            padding, a 1×1 of the same width, and a ReLU, and widens the view by one pixel.

    Raises:
        OptionError: If a count is not a positive int.

    References:
        Lin, Chen, Yan, "Network In Network", 2013, arXiv:1312.4400, section 3.2. The paper has a
        ReLU after the last convolution too; there is none here, so that scores may be negative.
        Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016, explains
        how to read the maps.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        hidden: Iterable[int] = (),
        *,
        context: int = 0,
    ) -> None:
        super().__init__()
        hidden = tuple(hidden)
        check_positive(in_channels=in_channels, num_classes=num_classes)
        check_positive(**{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        check_positive(least=0, context=context)
        widths = (in_channels, *hidden)
        children: list[nn.Module] = []
        for before, after in pairwise(widths):
            children += [Pointwise(before, after), nn.ReLU()]
        for _ in range(context):
            children += [*_identity_pair(widths[-1]), nn.ReLU()]
        self.maps = nn.Sequential(*children, Pointwise(widths[-1], num_classes))
        self.in_channels = in_channels
        self.num_classes = num_classes

    def class_maps(self, x: Tensor) -> Tensor:
        """Return each class's score at each pixel; ``forward(x)`` is their mean over the pixels.

        Shapes:
            ``(batch, in_channels, height, width)`` to ``(batch, num_classes, height, width)``.
        """
        maps: Tensor = self.maps(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores.

        Shapes:
            ``(batch, in_channels, height, width)`` to ``(batch, num_classes)``.
        """
        return self.class_maps(x).mean(dim=(-2, -1))


def _identity_pair(channels: int) -> tuple[nn.Conv2d, Pointwise]:
    """Return a depthwise 3×3 and a 1×1 that start as the identity."""
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    pointwise = Pointwise(channels, channels)
    nn.init.dirac_(depthwise.weight, groups=channels)
    nn.init.dirac_(pointwise.weight)
    assert pointwise.bias is not None
    nn.init.zeros_(pointwise.bias)
    return depthwise, pointwise


def check_positive(*, least: int = 1, **counts: Any) -> None:
    """Check that each named count is an int of at least ``least``.

    Raises:
        OptionError: If one is not; names the first.
    """
    for name, count in counts.items():
        # bool is an int to Python, but `True` channels are a mistake.
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise OptionError(f"`{name}` must be an int of at least {least}, got {count!r}.")
