"""Fits an averaging head to a network's outputs: starts from closed forms, then trains."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from onebyone.calibration.meaning import Part
from onebyone.core.errors import ModelError
from onebyone.core.measures import Classes, Numbers
from onebyone.core.precision import in_full, uses_bf16
from onebyone.networks.layers import GlobalAverageHead, Pointwise
from onebyone.rewrites.low_rank.reduced_rank import LEAST_POWER, damped

RIDGE = 1e-4
# Passes over the features, and steps at least: with few of either, heads with context, which have
# more to learn, would be judged by where they begin.
FIT_PASSES = 20
FIT_STEPS = 300
FIT_BATCH = 128
FIT_RATE = 0.02  # the highest, for channels of unit spread
FIT_RISE = 0.15  # the share of the steps in which the rate rises
FIT_DECAY = 0.1  # of all parameters: with little, the kept features are learned by heart
FIT_BETAS = (0.9, 0.99)
FIT_CLIP = 1.0  # norm of the whole gradient


def fit_gap(
    head: GlobalAverageHead,
    features: Tensor,
    targets: Tensor,
    *,
    part: Part,
    linear: nn.Linear | None = None,
    held_out: float = 0.0,
    seed: int = 0,
) -> float:
    """Fit an averaging head to give the original's outputs; ``head`` is modified in place.

    A head of 1×1 convolutions alone starts from closed forms: its hidden layer from the linear
    layer's weights averaged over the map's places, the last from the ridge regression of the
    outputs on the averaged hidden maps. One with context starts at random: from the same closed
    forms it ends farther from the original, and its layers differ so much in scale that later
    training gains less. Then all layers are improved together in some passes over the kept
    features.

    Args:
        head: With one hidden layer or none.
        features: The maps that the head sees, shape ``(n, channels, height, width)``.
        targets: The original's outputs, shape ``(n, classes)``; where these are probabilities, the
            head gives the scores that they are the softmax of.
        part: What the outputs mean.
        linear: The first linear layer of the original head, on the flattened map.
        held_out: Share of the examples, drawn at random, that are not learned from.
        seed: Of what is held out, of the batches' order and of weights that start at random.

    Returns:
        The mean divergence from the targets on what is held out, if anything is; else on all.

    Raises:
        ModelError: If the maps or outputs are such that the fitted weights are not finite.

    References:
        He et al., "Delving Deep into Rectifiers", ICCV 2015, section 2.2, for the random start.
    """
    _check_finite(features, targets)
    targets, part = part.scores(targets), replace(part, form="scores", scale=part.scale.cpu())
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(features), generator=generator)
    count = int(held_out * len(features))
    unseen = (features[order[:count]].float(), targets[order[:count]].float())
    features, targets = features[order[count:]].float(), targets[order[count:]].float()
    # Channels of any network are made alike, so that one rate fits all.
    # A channel at a time, in float64, in which no square overflows or vanishes.
    spread = torch.stack([c.double().std(correction=0) for c in features.unbind(1)]).float()
    spread = torch.where(spread > 0, spread, 1.0)
    alike = (features / spread[:, None, None]).contiguous(memory_format=torch.channels_last)
    level, unit = _level_and_unit(targets, part)
    wanted = (targets - level) / unit
    numbers = isinstance(part.task.measure, Numbers)
    # In float64, in which the square of no float32 overflows or vanishes.
    fitted = replace(part, scale=part.scale / unit.double() ** 2) if numbers else part
    network = copy.deepcopy(head).float().cpu().train().to(memory_format=torch.channels_last)
    layers = [m for m in network.maps if isinstance(m, nn.Conv2d)]
    if not all(isinstance(layer, Pointwise) for layer in layers):
        _start_at_random(layers, generator)
    else:
        if len(layers) > 1:
            _start_hidden(layers[0], alike, linear, spread, generator)
        _regress_last(network, layers[-1], alike, wanted, fitted)
    _improve(network, alike, wanted, fitted, generator)
    with torch.no_grad():
        by_input = (1, -1, 1, 1) if layers[0].groups == 1 else (-1, 1, 1, 1)
        layers[0].weight.div_(spread.view(by_input))
        assert layers[-1].bias is not None
        layers[-1].weight.mul_(unit)
        layers[-1].bias.mul_(unit).add_(level)
        for mine, theirs in zip(head.parameters(), network.parameters(), strict=True):
            mine.copy_(theirs)
        judged, expected = unseen if count else (features, targets)
        found = float(part.divergence(expected, network(judged)).mean())
    if not math.isfinite(found) or not all(bool(p.isfinite().all()) for p in head.parameters()):
        raise ModelError(
            "An averaging head must have finite weights and outputs, but fitted to these maps and "
            "outputs it has not. Keep the head, or leave out examples of extreme values."
        )
    return found


def _check_finite(features: Tensor, targets: Tensor) -> None:
    for what, tensor in (("The maps that a head sees", features), ("A network's outputs", targets)):
        if not bool(tensor.isfinite().all()):
            raise ModelError(
                f"{what} must be finite on the calibration data, got NaN or infinity. Leave out "
                "examples of extreme values, or check the scale of the weights."
            )


def _level_and_unit(targets: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Return what outputs are measured from, and in: numbers alike, all others as they are."""
    if not isinstance(part.task.measure, Numbers):
        return torch.zeros(()), torch.ones(())
    unit = targets.double().std(correction=0).float()
    return targets.double().mean().float(), torch.where(unit > 0, unit, 1.0)


def _start_at_random(layers: list[nn.Conv2d], generator: torch.Generator) -> None:
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _start_hidden(
    layer: nn.Conv2d,
    features: Tensor,
    linear: nn.Linear | None,
    spread: Tensor,
    generator: torch.Generator,
) -> None:
    """Start hidden channels from the principal directions of the averaged linear weights."""
    width, channels = layer.out_channels, layer.in_channels
    rows = torch.randn(width, channels, generator=generator)
    if linear is not None:
        places = linear.in_features // channels
        means = linear.weight.detach().float().cpu().reshape(-1, channels, places).mean(2)
        order = means.norm(dim=1).argsort(descending=True)[:width]
        rows[: len(order)] = means[order] * spread
    # Each channel on for about half of what is seen, at unit scale.
    seen = features.transpose(0, 1).flatten(1)
    sample = seen[:, torch.randperm(seen.shape[1], generator=generator)[:4096]]
    response = rows @ sample
    scale = response.std(dim=1, keepdim=True).clamp_min(1e-6)
    with torch.no_grad():
        layer.weight.copy_((rows / scale)[:, :, None, None])
        assert layer.bias is not None
        layer.bias.copy_(-(response.median(dim=1).values / scale[:, 0]))


def _regress_last(
    network: GlobalAverageHead,
    layer: nn.Conv2d,
    features: Tensor,
    targets: Tensor,
    part: Part,
) -> None:
    with torch.no_grad():
        hidden = features
        for module in list(network.maps)[:-1]:
            hidden = module(hidden)
        x = hidden.mean((2, 3)).double()
        # Scores are free up to a constant an example: softmax does not see it.
        y = targets.double()
        free = isinstance(part.task.measure, Classes)
        y = y - y.mean(dim=1, keepdim=True) if free else y
        mean_x, mean_y = x.mean(0), y.mean(0)
        x0, y0 = x - mean_x, y - mean_y
        gram = x0.T @ x0 / len(x)
        lower, _ = damped(gram, RIDGE * float(gram.diagonal().mean()) + LEAST_POWER)
        weight = torch.cholesky_solve(x0.T @ y0 / len(x), lower).T
        layer.weight.copy_(weight[:, :, None, None])
        assert layer.bias is not None
        layer.bias.copy_(mean_y - weight @ mean_x)


def _improve(
    network: GlobalAverageHead,
    features: Tensor,
    targets: Tensor,
    part: Part,
    generator: torch.Generator,
) -> None:
    size = min(FIT_BATCH, len(features))
    steps = max(FIT_STEPS, FIT_PASSES * len(features) // size)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=FIT_RATE, weight_decay=FIT_DECAY, betas=FIT_BETAS, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, FIT_RATE, total_steps=steps, pct_start=FIT_RISE, cycle_momentum=False
    )
    bf16 = uses_bf16("auto", features.device)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(features), (size,), generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                outputs = network(features[rows])
            loss = part.imitation_loss(targets[rows], in_full(outputs), 1.0)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), FIT_CLIP)
            optimizer.step()
            schedule.step()
