"""The three networks of the article on 1×1 convolutions, each for 28×28 pictures of one channel."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from onebyone.core.errors import OptionError
from onebyone.networks.layers import GlobalAverageHead, Pointwise, check_positive


def extra_nonlinearity(
    *,
    pointwise: bool = True,
    classifier: bool = False,
    num_classes: int = 10,
    in_channels: int = 1,
    size: int = 28,
) -> nn.Sequential:
    """Return the article's network with a 1×1 convolution and ReLU as an extra non-linearity.

    As in the article it is a feature extractor: from ``(batch, 1, 28, 28)`` to
    ``(batch, 8, 7, 7)``. Children: ``features``, and if chosen ``pointwise`` and ``head``.

    Args:
        pointwise: Whether to include the 1×1 convolution and its ReLU. The article compares with
            ``False``.
        classifier: Whether to add Flatten and one Linear, so that both variants can be trained;
            the output is then logits. The article does not have this.
        num_classes: Classes to score; used only by the classifier.
        in_channels: Channels of the picture.
        size: Height and width of the picture, in pixels; used only by the classifier.

    Raises:
        OptionError: If a count is not a positive int, or ``size`` is below 4.
    """
    side = _side(size)
    children: OrderedDict[str, nn.Module] = OrderedDict(
        features=_features(in_channels=in_channels, width=8)
    )
    if pointwise:
        children["pointwise"] = nn.Sequential(
            OrderedDict[str, nn.Module](conv=Pointwise(8, 8), relu=nn.ReLU())
        )
    if classifier:
        check_positive(num_classes=num_classes)
        children["head"] = nn.Sequential(
            OrderedDict[str, nn.Module](
                flatten=nn.Flatten(), linear=nn.Linear(8 * side * side, num_classes)
            )
        )
    return nn.Sequential(children)


def classic(*, num_classes: int = 10, in_channels: int = 1, size: int = 28) -> nn.Sequential:
    """Return the article's classic network: two convolutions, then two fully connected layers.

    From ``(batch, 1, 28, 28)`` to logits ``(batch, 10)``; 316,532 parameters, 314,710 of them in
    the head. Children: ``features`` and ``head``. The article returns the sigmoid of the scores;
    this returns the scores, for ``nn.CrossEntropyLoss``.

    Args:
        num_classes: Classes to score.
        in_channels: Channels of the picture.
        size: Height and width of the picture, in pixels; the head accepts only this size.

    Raises:
        OptionError: If a count is not a positive int, or ``size`` is below 4.
    """
    check_positive(num_classes=num_classes)
    side = _side(size)
    head = OrderedDict[str, nn.Module](
        flatten=nn.Flatten(),
        hidden=nn.Linear(64 * side * side, 100),
        relu=nn.ReLU(),
        scores=nn.Linear(100, num_classes),
    )
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            features=_features(in_channels=in_channels, width=64), head=nn.Sequential(head)
        )
    )


def convolution_only(
    *, num_classes: int = 10, in_channels: int = 1, size: int = 28
) -> nn.Sequential:
    """Return the article's network without fully connected layers: 1×1 convolutions and averaging.

    From ``(batch, 1, 28, 28)`` to logits ``(batch, 10)``; 4,232 parameters. The convolutions are
    those of :func:`classic`; the head is 1×1 64→32, ReLU, 1×1 32→10 and the average over all
    pixels, 7×7 at the article's size. Children: ``features`` and ``head``, a
    :class:`~onebyone.networks.layers.GlobalAverageHead`. The article returns the sigmoid of the
    scores; this returns the scores, for ``nn.CrossEntropyLoss``.

    Args:
        num_classes: Classes to score.
        in_channels: Channels of the picture.
        size: Height and width of the picture, in pixels. Only checked, since the network accepts
            any picture of at least 4×4; it is here so that all three networks take the same
            options.

    Raises:
        OptionError: If a count is not a positive int, or ``size`` is below 4.
    """
    _side(size)
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            features=_features(in_channels=in_channels, width=64),
            head=GlobalAverageHead(64, num_classes, hidden=(32,)),
        )
    )


def _features(*, in_channels: int, width: int) -> nn.Sequential:
    # The article pools before the ReLU. The two commute, and this order is cheaper.
    check_positive(in_channels=in_channels)
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(in_channels, 3, 3, padding=1),
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(3, width, 3, padding=1),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
        )
    )


def _side(size: int) -> int:
    check_positive(size=size)
    if size < 4:
        raise OptionError(f"`size` must be at least 4 pixels, to be halved twice, got {size}.")
    return size // 2 // 2
