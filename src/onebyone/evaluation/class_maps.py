"""Maps of where in an image a network sees a class: exact class maps, Grad-CAM, feature maps.

Grad-CAM is twenty lines of autograd here. Packages for it depend on OpenCV or a plotting library,
and leave their hooks on the user's network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onebyone.core.errors import ModelError, OptionError, PlanError, UnknownNameError
from onebyone.core.measures import is_distribution
from onebyone.core.task import TASKS
from onebyone.networks.outputs import one_tensor
from onebyone.networks.surgery import call, evaluation_copy, hooks_removed, run
from onebyone.rewrites.head import rewrite as head

Method = Literal["exact", "grad-cam"]

# The largest difference between a class map's mean and the score, as a share of the largest score.
# Rounding in float32 stays below it; maps that are not class maps exceed it.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class ClassMaps:
    """A map of evidence for each class; its mean over the pixels is the class's score.

    Attributes:
        scores: Shape ``(n, classes)``.
        maps: Shape ``(n, classes, height, width)``.
        layer: Name of the module that outputs the maps; empty for the network itself.
    """

    scores: Tensor
    maps: Tensor
    layer: str


@dataclass(frozen=True)
class Activation:
    """Class activation maps of the top classes of each image.

    Attributes:
        scores: Scores of all classes, shape ``(n, classes)``.
        classes: Numbers of the classes that have a map, shape ``(n, k)``.
        maps: Shape ``(n, k, height, width)``. A positive value is evidence for the class.
            ``exact``: the class's score at each pixel minus the mean score of all classes, since
            softmax depends on differences alone. ``grad-cam``: not negative, without a unit.
        method: ``exact`` or ``grad-cam``.
        layer: Name of the module whose maps were used.
        exact: The maps of all classes; ``None`` for Grad-CAM.
    """

    scores: Tensor
    classes: Tensor
    maps: Tensor
    method: Method
    layer: str
    exact: ClassMaps | None


def class_activation(network: nn.Module, inputs: Tensor, *, top: int = 3) -> Activation:
    """Return class activation maps of the classes with the highest scores.

    The maps are exact if the network averages class maps; otherwise they are Grad-CAM's.

    Args:
        network: A classifier. Not modified.
        inputs: Shape ``(n, channels, height, width)``.
        top: Classes for each image; all where there are fewer.

    Raises:
        OptionError: If ``top`` is below 1.
        ModelError: If the network gives no class scores, or they depend on no feature map.
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
    """Return class maps whose mean over the pixels is the class's score, or ``None``.

    A network has exact class maps if it ends in a global average of class maps (Network In
    Network, :class:`onebyone.GlobalAverageHead`), if a linear layer follows a global average of
    features (the two commute), or if it outputs a map of scores. This is checked on the inputs, not
    guessed from layer names: the mean of the maps must equal the output.

    Args:
        network: Not modified.
        inputs: Shape ``(n, channels, height, width)``.

    Returns:
        The maps; ``None`` if the network has none larger than one pixel.

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
    # Apply the linear layer before the average: the two commute.
    try:
        rewritten = head.rewrite(copied, example, name=site.name, form="exact", hidden=[])
    except PlanError:
        return None
    found = _averaged_maps(rewritten.eval(), inputs)
    return None if found is None else replace(found, layer=site.name)


def _averaged_maps(network: nn.Module, inputs: Tensor) -> ClassMaps | None:
    with recorded(network) as seen:
        output = one_tensor(run(network, inputs), network)
    if output.ndim == 4 and output.shape[2:] != (1, 1) and not is_distribution(output):
        return ClassMaps(scores=output.mean(dim=(2, 3)), maps=output, layer="")
    scores = class_scores(output)
    softened = is_distribution(output)
    near = TOLERANCE * (1.0 if softened else float(scores.abs().max()))
    for name, maps in reversed(seen.items()):
        if maps.shape[:2] != scores.shape or maps.shape[2:] == (1, 1):
            continue
        means = maps.mean(dim=(2, 3))
        # If the network ends in a softmax, its scores are the softmax's inputs.
        apart = (means.softmax(dim=1) - output) if softened else (means - scores)
        if float(apart.abs().max()) <= near:
            return ClassMaps(scores=means if softened else scores, maps=maps, layer=name)
    return None


def class_scores(output: Tensor) -> Tensor:
    """Return class scores ``(n, classes)`` from a network's output.

    A map of scores is averaged over its pixels. For probabilities the scores are their logarithms.

    Raises:
        ModelError: If the output has another shape.
    """
    if output.ndim == 4:
        output = output.mean(dim=(2, 3))
    if output.ndim != 2:
        raise ModelError(
            "A network to explain must give class scores, of shape (n, classes) or (n, classes, "
            f"height, width), got {tuple(output.shape)}. Show a layer's maps instead."
        )
    scores = TASKS["classification"].measure
    return scores.scores(output, scores.form_of(output))


def grad_cam(network: nn.Module, inputs: Tensor, *, top: int = 3) -> Activation:
    """Return Grad-CAM maps of the classes with the highest scores.

    Takes the last feature map that the scores depend on, weights each channel by the mean of the
    score's gradient over the pixels, sums the channels and sets negative values to 0.

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
        # Not a leaf: the network's first layer may work in place, which autograd forbids on leaves.
        source = inputs.clone().requires_grad_() + 0
        scores = class_scores(one_tensor(call(copied, source), copied))
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
    """Return a layer's output in a forward pass; that of the last call if it has several.

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
        # A copy: the next layer may work in place.
        given.append(output.clone() if isinstance(output, Tensor) else output)

    with hooks_removed([copied.get_submodule(layer).register_forward_hook(keep)]):
        run(copied, inputs)
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
    """Collect the four-dimensional outputs of modules while the block runs.

    Args:
        network: Gets hooks, which are removed at the end of the block.

    Yields:
        Outputs by module name, in the order of execution.
    """
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                seen.pop(name, None)  # only the last of several calls counts
                seen[name] = output

        return keep

    handles = [
        module.register_forward_hook(keeper(name)) for name, module in network.named_modules()
    ]
    with hooks_removed(handles):
        yield seen


def _channels_first(maps: Tensor, inputs: Tensor) -> Tensor:
    """Return maps as ``(n, channels, height, width)``, even if channels come last.

    Transformers put channels last. The map's proportions, which are the image's, show the order.
    """
    first, last = _distortions(maps, inputs)
    return maps.permute(0, 3, 1, 2) if first > 0.3 and last < first else maps


def _is_map(maps: Tensor, inputs: Tensor) -> bool:
    """Whether these are maps larger than one pixel, and not, for instance, attention weights."""
    proportioned = min(_distortions(maps, inputs)) <= math.log(2)
    return proportioned and _channels_first(maps, inputs).shape[2:] != (1, 1)


def _distortions(maps: Tensor, inputs: Tensor) -> tuple[float, float]:
    """Return how far the map's proportions are from the image's, with channels first and last."""
    height, width = inputs.shape[2:]
    first, last = maps.shape[2:], maps.shape[1:3]
    return (
        abs(math.log(first[0] / first[1] * width / height)),
        abs(math.log(last[0] / last[1] * width / height)),
    )


def _of_classes(maps: Tensor, classes: Tensor) -> Tensor:
    rows = torch.arange(len(maps), device=maps.device)[:, None]
    return maps[rows, classes]
