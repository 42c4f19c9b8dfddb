"""Network In Network, in the paper's forms: mlpconv blocks, then one average per class."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from onebyone.core.errors import OptionError, UnknownNameError
from onebyone.networks.layers import MLPConv, check_positive

Head = Literal["gap", "fc", "fc-dropout"]


@dataclass(frozen=True)
class Block:
    """One mlpconv block, and what follows it.

    Attributes:
        widths: Channels after each of its three convolutions; a last width of 0 stands for the
            number of classes.
        kernel_size: Side of the first convolution's window, in pixels.
        stride: Stride of the first convolution.
        padding: Zeros around the map, in pixels.
        pooled: Whether a 3×3 max-pooling of stride 2 follows.
        dropped: Whether dropout follows.
    """

    widths: tuple[int, int, int]
    kernel_size: int
    stride: int = 1
    padding: int = 0
    pooled: bool = False
    dropped: bool = False


@dataclass(frozen=True)
class Form:
    """The paper's network for one data set.

    Attributes:
        blocks: Its mlpconv blocks.
        in_channels: Channels of a picture.
        size: Height and width of a picture, in pixels.
        num_classes: Classes to score.
    """

    blocks: tuple[Block, ...]
    in_channels: int
    size: int
    num_classes: int


def _small(first: Block, second: Block, third: Block, *, channels: int, classes: int) -> Form:
    size = 28 if channels == 1 else 32
    return Form((first, second, third), in_channels=channels, size=size, num_classes=classes)


def _middle(*widths: int, kernel_size: int = 5) -> Block:
    first, second, third = widths
    return Block(
        (first, second, third), kernel_size, padding=kernel_size // 2, pooled=True, dropped=True
    )


def _last(*widths: int, kernel_size: int) -> Block:
    first, second = widths
    return Block((first, second, 0), kernel_size, padding=kernel_size // 2)


_CIFAR = (_middle(192, 160, 96), _middle(192, 192, 192), _last(192, 192, kernel_size=3))

# source: the configurations for cuda-convnet that the paper's authors published. For ImageNet:
# "NIN-Imagenet" of the Caffe model zoo, which has one dropout, before its last block.
FORMS: dict[str, Form] = {
    "cifar10": _small(*_CIFAR, channels=3, classes=10),
    "cifar100": _small(*_CIFAR, channels=3, classes=100),
    "mnist": _small(
        _middle(96, 64, 48),
        _middle(128, 96, 48),
        _last(128, 96, kernel_size=5),
        channels=1,
        classes=10,
    ),
    "svhn": _small(
        _middle(128, 96, 64),
        _middle(320, 256, 128),
        _last(384, 256, kernel_size=5),
        channels=3,
        classes=10,
    ),
    "imagenet": Form(
        (
            Block((96, 96, 96), 11, stride=4, pooled=True),
            Block((256, 256, 256), 5, padding=2, pooled=True),
            Block((384, 384, 384), 3, padding=1, pooled=True, dropped=True),
            Block((1024, 1024, 0), 3, padding=1),
        ),
        in_channels=3,
        size=224,
        num_classes=1000,
    ),
}


def nin(
    form: str = "cifar10",
    *,
    head: Head = "gap",
    batch_norm: bool = False,
    dropout: float = 0.5,
    num_classes: int | None = None,
    in_channels: int | None = None,
    size: int | None = None,
) -> nn.Sequential:
    """Return a Network In Network.

    From ``(batch, in_channels, size, size)`` to logits ``(batch, num_classes)``. The form for
    CIFAR-10 has 966,986 parameters and 222,486,528 MACs. Children: ``block1``, ``pool1``,
    ``dropout1``, …, ``average`` or ``linear``. Convolutions use He's initialization: with
    PyTorch's default, the signal vanishes over nine layers of ReLU and plain SGD does not learn.

    The heads are those of the paper's section 4.6, "Global Average Pooling as a Regularizer":

    - ``gap``: the last block makes one map per class and each map is averaged.
    - ``fc``: the same maps (one per class, after their ReLU) are flattened into one fully connected
      layer, "keeping the other parts of the model the same".
    - ``fc-dropout``: the same, with dropout before the fully connected layer.

    In that section's table, the errors on CIFAR-10 are 10.41 % for ``gap``, 10.88 % for
    ``fc-dropout`` and 11.59 % for ``fc``. On a conventional convolutional network, averaging is
    worse than ``fc-dropout`` (16.46 % against 15.99 %).

    Args:
        form: Widths and sizes: ``cifar10``, ``cifar100``, ``mnist``, ``svhn`` or ``imagenet``.
        head: How the last maps become scores.
        batch_norm: Whether each convolution is batch-normalized; the paper's are not.
        dropout: Share of the activations that dropout zeroes in training; 0 leaves it out.
        num_classes: Classes to score; the form's number by default.
        in_channels: Channels of a picture; the form's number by default.
        size: Height and width of a picture, in pixels; the form's size by default. Only the fully
            connected heads depend on it; ``gap`` accepts any picture that is large enough.

    Raises:
        UnknownNameError: If there is no such form or head.
        OptionError: If a count is not a positive int, ``dropout`` is outside [0, 1), or the
            picture is too small for the network.

    References:
        Lin, Chen, Yan, "Network In Network", 2013, arXiv:1312.4400, sections 3 and 4.
        He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", 2015, arXiv:1502.01852, section 2.2.
    """
    if form not in FORMS:
        raise UnknownNameError("form of Network In Network", form, FORMS)
    if head not in get_args(Head):
        raise UnknownNameError("head", head, get_args(Head))
    if not 0 <= dropout < 1:
        raise OptionError(f"`dropout` must be in [0, 1), got {dropout}.")
    chosen = FORMS[form]
    num_classes = chosen.num_classes if num_classes is None else num_classes
    in_channels = chosen.in_channels if in_channels is None else in_channels
    size = chosen.size if size is None else size
    check_positive(num_classes=num_classes, in_channels=in_channels, size=size)

    children: OrderedDict[str, nn.Module] = OrderedDict()
    channels, side = in_channels, size
    for number, block in enumerate(chosen.blocks, start=1):
        first, second, third = block.widths
        widths = (first, second, third or num_classes)
        children[f"block{number}"] = MLPConv(
            channels,
            widths,
            kernel_size=block.kernel_size,
            stride=block.stride,
            padding=block.padding,
            batch_norm=batch_norm,
        )
        if block.pooled:
            # Caffe and cuda-convnet round up: 32 pixels become 16, not 15.
            children[f"pool{number}"] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        if block.dropped and dropout:
            children[f"dropout{number}"] = nn.Dropout(dropout)
        channels, side = widths[-1], _side_after(block, side=side, form=form, size=size)
    children |= _head(head, classes=num_classes, side=side, dropout=dropout)
    network = nn.Sequential(children)
    _initialize(network)
    return network


def _head(head: Head, *, classes: int, side: int, dropout: float) -> OrderedDict[str, nn.Module]:
    if head == "gap":
        return OrderedDict(average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    children: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    if head == "fc-dropout":
        if not dropout:
            raise OptionError("The head 'fc-dropout' needs `dropout` above 0. For 0 use 'fc'.")
        children["dropout"] = nn.Dropout(dropout)
    children["linear"] = nn.Linear(classes * side * side, classes)
    return children


def _side_after(block: Block, *, side: int, form: str, size: int) -> int:
    side = (side + 2 * block.padding - block.kernel_size) // block.stride + 1
    if block.pooled:
        side = -((3 - side) // 2) + 1  # rounded up
    if side < 1:
        raise OptionError(
            f"A picture of {size}×{size} pixels is too small for the form {form!r}, which is made "
            f"for {FORMS[form].size}×{FORMS[form].size}. Give a larger `size`."
        )
    return side


def _initialize(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            _zero(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            _zero(module.bias)


@torch.no_grad()
def _zero(bias: Tensor | None) -> None:
    if bias is not None:
        bias.zero_()
