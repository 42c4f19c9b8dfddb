"""Where in an image a network sees a class: exact class maps, Grad-CAM, and feature maps.

Grad-CAM is written here, on hooks: the packages that have it bring OpenCV or a plotting library
along for what are twenty lines of autograd, and leave their hooks on the user's network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onebyone.errors import ModelError, OptionError, PlanError, UnknownNameError
from onebyone.outputs import one_tensor
from onebyone.rewrites import head
from onebyone.sites import evaluation_copy, hooks_removed, run

Method = Literal["exact", "grad-cam"]

# How far the mean of a class map may be from the score, as a share of the largest score: float32
# sums of a few thousand products differ by less, and maps of anything else by more.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class ClassMaps:
    """Maps of the evidence for all classes, whose mean over the pixels is the score.

    Attributes:
        scores: Shape ``(n, classes)``.
        maps: Shape ``(n, classes, height, width)``.
        layer: The module that gives the maps; empty for the network's own output.
    """

    scores: Tensor
    maps: Tensor
    layer: str


@dataclass(frozen=True)
class Activation:
    """Class activation maps of some classes of each image.

    Attributes:
        scores: Of all classes, shape ``(n, classes)``.
        classes: Numbers of the classes that have a map, shape ``(n, k)``.
        maps: Shape ``(n, k, height, width)``. Positive speaks for the class. ``exact``: the class's
            score at each pixel less the average class's, for softmax sees only differences of
            scores. ``grad-cam``: not negative, of no unit.
        method: How the maps were obtained.
        layer: The module whose maps were used.
        exact: All classes' maps, where they are exact.
    """

    scores: Tensor
    classes: Tensor
    maps: Tensor
    method: Method
    layer: str
    exact: ClassMaps | None


def class_activation(network: nn.Module, inputs: Tensor, *, top: int = 3) -> Activation:
    """Return class activation maps of the classes with the highest scores.

    Exact where the network averages maps of its classes, Grad-CAM for any other network.

    Args:
        network: A classifier. Not modified.
        inputs: Shape ``(n, channels, height, width)``.
        top: Classes for each image; all where there are fewer.

    Raises:
        OptionError: If ``top`` is below 1.
        ModelError: If the network gives no class scores, or has no feature map that they depend on.
    """
    if top < 1:
        raise OptionError(f"`top` must be 1 or more, got {top}.")
    exact = exact_class_maps(network, inputs)
    if exact is not None:
        classes = exact.scores.topk(min(top, exact.scores.shape[1]), dim=1).indices
        centered = exact.maps - exact.maps.mean(dim=1, keepdim=True)
        return Activation(
            scores=exact.scores,
            classes=classes,
            maps=_of_classes(centered if exact.maps.shape[1] > 1 else exact.maps, classes),
            method="exact",
            layer=exact.layer,
            exact=exact,
        )
    return grad_cam(network, inputs, top=top)


def exact_class_maps(network: nn.Module, inputs: Tensor) -> ClassMaps | None:
    """Return a map for each class whose mean over the pixels is the class's score, if there is one.

    So it is where a network ends in a global average of class maps (Network In Network, and
    :class:`onebyone.GlobalAverageHead`); where it averages features and a linear layer follows,
    since the two can change places; and where its output is a map of scores. Which it is, is not
    guessed from names of layers: maps are taken whose mean on these inputs is the output.

    Args:
        network: Not modified.
        inputs: Shape ``(n, channels, height, width)``.

    Returns:
        The maps, or ``None`` where the network has none of more than one pixel.

    Raises:
        ModelError: If the network fails on the inputs, or gives no class scores.

    References:
        Lin, Chen, Yan, "Network In Network", 2013, arXiv:1312.4400, section 3.2.
        Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016,
        section 2: the linear layer's weights, applied to the maps before the average.
    """
    copied = evaluation_copy(network, device=inputs.device)
    found = _averaged_maps(copied, inputs)
    if found is not None:
        return found
    example = inputs[:1].clone()
    site = head.find_head(copied, example)
    if isinstance(site, head.NoHead) or not site.averaged or len(site.linears) != 1:
        return None
    # Average and linear layer in the other order.
    try:
        rewritten = head.rewrite(copied, example, name=site.name, form="exact", hidden=[])
    except PlanError:
        return None
    found = _averaged_maps(rewritten.eval(), inputs)
    return None if found is None else replace(found, layer=site.name)


def _averaged_maps(network: nn.Module, inputs: Tensor) -> ClassMaps | None:
    with recorded(network) as seen:
        # A first layer that works in place must not write into the images.
        output = one_tensor(run(network, inputs.clone()), network)
    if output.ndim == 4 and output.shape[2:] != (1, 1):
        return ClassMaps(scores=output.mean(dim=(2, 3)), maps=output, layer="")
    scores = class_scores(output)
    near = TOLERANCE * float(scores.abs().max())
    for name, maps in reversed(seen.items()):
        if maps.shape[:2] != scores.shape or maps.shape[2:] == (1, 1):
            continue
        if float((maps.mean(dim=(2, 3)) - scores).abs().max()) <= near:
            return ClassMaps(scores=scores, maps=maps, layer=name)
    return None


def class_scores(output: Tensor) -> Tensor:
    """Return the scores ``(n, classes)`` of a network's output; of a map of scores its mean.

    Raises:
        ModelError: If the output is neither.
    """
    if output.ndim == 4:
        output = output.mean(dim=(2, 3))
    if output.ndim != 2:
        raise ModelError(
            "A network to explain must give class scores, of shape (n, classes) or (n, classes, "
            f"height, width), got {tuple(output.shape)}. Show a layer's maps instead."
        )
    return output


def grad_cam(network: nn.Module, inputs: Tensor, *, top: int = 3) -> Activation:
    """Return Grad-CAM maps of the classes with the highest scores.

    The last feature map that the scores depend on is weighed: each channel by the mean of the
    score's gradient over the pixels, and what is negative in the sum is left out.

    Args:
        network: A classifier. Not modified.
        inputs: Shape ``(n, channels, height, width)``.
        top: Classes for each image; all where there are fewer.

    Raises:
        ModelError: If the network gives no class scores, or no feature map has a gradient.

    References:
        Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
        Localization", ICCV 2017, equations 1 and 2.
    """
    copied = evaluation_copy(network, device=inputs.device).requires_grad_(requires_grad=False)
    with torch.inference_mode(mode=False), torch.enable_grad(), recorded(copied) as seen:
        # A leaf must not be changed in place, and a network's first layer may do so.
        source = inputs.clone().requires_grad_() + 0
        scores = class_scores(one_tensor(copied(source), copied))
        classes = scores.detach().topk(min(top, scores.shape[1]), dim=1).indices
        layer = _last_with_gradient(seen, scores, classes, inputs)
        features = seen[layer]
        maps = []
        for place in range(classes.shape[1]):
            chosen = scores.gather(1, classes[:, place : place + 1]).sum()
            (gradient,) = torch.autograd.grad(chosen, features, retain_graph=True)
            weights = _channels_first(gradient, inputs).mean(dim=(2, 3), keepdim=True)
            weighed = (weights * _channels_first(features, inputs)).sum(dim=1)
            maps.append(weighed.relu().detach())
    return Activation(
        scores=scores.detach(),
        classes=classes,
        maps=torch.stack(maps, dim=1),
        method="grad-cam",
        layer=layer,
        exact=None,
    )


def _last_with_gradient(
    seen: dict[str, Tensor], scores: Tensor, classes: Tensor, inputs: Tensor
) -> str:
    chosen = scores.gather(1, classes[:, :1]).sum()
    for name, features in reversed(seen.items()):
        if not features.requires_grad or not _is_map(features, inputs):
            continue
        (gradient,) = torch.autograd.grad(chosen, features, retain_graph=True, allow_unused=True)
        if gradient is not None:
            return name
    raise ModelError(
        "A network to explain must have a feature map (n, channels, height, width) that its scores "
        "depend on, but none of its layers gives one of more than one pixel."
    )


def feature_maps(network: nn.Module, inputs: Tensor, layer: str) -> Tensor:
    """Return what a layer gives, of its last call in a forward pass.

    Args:
        network: Not modified.
        inputs: Shape ``(n, channels, height, width)``.
        layer: Dotted name of the module.

    Returns:
        Shape ``(n, channels, height, width)``.

    Raises:
        UnknownNameError: If the network has no such layer.
        OptionError: If the layer is not run, or gives no map.
    """
    names = [name for name, _ in network.named_modules() if name]
    if layer not in names:
        raise UnknownNameError("layer", layer, names)
    copied = evaluation_copy(network, device=inputs.device)
    given: list[Any] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # The layer after it may work in place.
        given.append(output.clone() if isinstance(output, Tensor) else output)

    with hooks_removed([copied.get_submodule(layer).register_forward_hook(keep)]):
        run(copied, inputs.clone())
    output = given[-1] if given else None
    if not isinstance(output, Tensor) or output.ndim != 4:
        came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise OptionError(
            f"A layer to show must give a map (n, channels, height, width), but {layer!r} "
            + (f"gives {came}." if given else "is not run in a forward pass.")
        )
    return _channels_first(output, inputs)


@contextmanager
def recorded(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the maps that modules give while the block runs, in the order of execution.

    Args:
        network: Its hooks are removed on the way out.

    Yields:
        Outputs of four dimensions by the modules' names.
    """
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                seen.pop(name, None)  # of several calls the last, in its place
                seen[name] = output

        return keep

    handles = [
        module.register_forward_hook(keeper(name)) for name, module in network.named_modules()
    ]
    with hooks_removed(handles):
        yield seen


def _channels_first(maps: Tensor, inputs: Tensor) -> Tensor:
    """Return maps as ``(n, channels, height, width)``, also where channels come last.

    Transformers keep them last and do not say so; but a map has its image's proportions.
    """
    first, last = _distortions(maps, inputs)
    return maps.permute(0, 3, 1, 2) if first > 0.3 and last < first else maps


def _is_map(maps: Tensor, inputs: Tensor) -> bool:
    """Whether these are maps of more than a pixel, and not, say, attention of heads to tokens."""
    proportioned = min(_distortions(maps, inputs)) <= math.log(2)
    return proportioned and _channels_first(maps, inputs).shape[2:] != (1, 1)


def _distortions(maps: Tensor, inputs: Tensor) -> tuple[float, float]:
    """Return how far the proportions are from the image's if channels come first, or last."""
    height, width = inputs.shape[2:]
    first, last = maps.shape[2:], maps.shape[1:3]
    return (
        abs(math.log(first[0] / first[1] * width / height)),
        abs(math.log(last[0] / last[1] * width / height)),
    )


def _of_classes(maps: Tensor, classes: Tensor) -> Tensor:
    rows = torch.arange(len(maps), device=maps.device)[:, None]
    return maps[rows, classes]
