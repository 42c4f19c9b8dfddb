"""A plain network of 3×3 convolutions, as large as digits need: what the demo shrinks."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from onebyone.networks.layers import check_positive


def plain(*, num_classes: int = 10, in_channels: int = 1, width: int = 32) -> nn.Sequential:
    """Return a network in the form of VGG: three stages of two 3×3 convolutions each.

    From ``(batch, 1, height, width)`` to logits ``(batch, 10)``; 288,170 parameters and 29 M MACs
    at 28×28. Its stages have ``width``, ``2·width`` and ``4·width`` channels. Each convolution is
    followed by a batch norm and a ReLU, each of the first two stages by 2×2 max pooling, and the
    last by global average pooling and a linear layer. Children: ``stage1`` to ``stage3``, ``head``.

    Args:
        num_classes: Classes to score.
        in_channels: Channels of the picture.
        width: Channels of the first stage.

    Raises:
        OptionError: If a count is not a positive int.

    References:
        Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
        ICLR 2015.
    """
    check_positive(num_classes=num_classes, in_channels=in_channels, width=width)
    children: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for number, wide in enumerate((width, 2 * width, 4 * width), start=1):
        layers = [*_convolution(1, channels, wide), *_convolution(2, wide, wide)]
        if number < 3:
            layers.append(("pool", nn.MaxPool2d(2)))
        children[f"stage{number}"] = nn.Sequential(OrderedDict(layers))
        channels = wide
    children["head"] = nn.Sequential(
        OrderedDict[str, nn.Module](
            pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), scores=nn.Linear(wide, num_classes)
        )
    )
    return nn.Sequential(children)


def _convolution(number: int, channels: int, wide: int) -> list[tuple[str, nn.Module]]:
    return [
        (f"conv{number}", nn.Conv2d(channels, wide, 3, padding=1, bias=False)),
        (f"norm{number}", nn.BatchNorm2d(wide)),
        (f"relu{number}", nn.ReLU()),
    ]
