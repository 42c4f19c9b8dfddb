"""Inner channels of pairs of layers without an activation between them, mixed for less rounding.

Between the factors of a low-rank pair any invertible matrix may go, its inverse into the second
factor: the function is the same, what is rounded is not. Rotations spread outliers over all
channels; whitening makes channels alike.

References:
    Ashkboos et al., "QuaRot", NeurIPS 2024 (arXiv:2404.00456); Liu et al., "SpinQuant", ICLR 2025
    (arXiv:2405.16406).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from onebyone.quantizing.fit import Walk
from onebyone.quantizing.graph import Captured, Layer, with_layer
from onebyone.quantizing.ranges import min_max_grid
from onebyone.quantizing.rounding import nearest
from onebyone.quantizing.simulate import on_grid

EXAMPLES = 16
# How far channels are made alike: the power of their standard deviation that is divided off.
_WHITENED = (0.0, 0.5, 1.0)
_FLOOR = 1e-4  # of the largest variance: directions below it are not blown up further
_BETTER = 0.95  # of the error: less is not worth a change


def mix_pairs(
    captured: Captured, quantized: Collection[str], inputs: Tensor, *, bits: int = 8
) -> tuple[Captured, dict[str, str]]:
    """Return a graph of the same function whose pairs' inner channels round better.

    Args:
        captured: Its layers' weights are replaced, its graph is kept.
        quantized: Nodes of the int8 layers.
        inputs: Examples. Not modified.
        bits: Of a weight.

    Returns:
        The graph, and a remark for the second layer of each pair that was changed.
    """
    walk = Walk(captured, inputs[:EXAMPLES])
    remarks: dict[str, str] = {}
    layers = dict(captured.layers)
    for node in captured.graph.nodes:
        walk.plain[node] = walk.run(node, walk.plain)
        first = _first_of(captured, node, quantized)
        if first is not None:
            source: Any = first.args[0]
            pair = captured.layers[first.name], captured.layers[node.name]
            mixing = _best(pair, walk.plain[source], walk.plain[first], walk.plain[node], bits)
            if mixing is not None:
                # Both may be in other pairs too, whose channels are others.
                both = mixed_pair(layers[first.name], layers[node.name], mixing)
                layers[first.name], layers[node.name] = both
                remarks[node.name] = "input channels mixed"
        _forget(walk, node, captured, quantized)
    for layer in layers.values():
        captured = with_layer(captured, layer)
    return captured, remarks


def _forget(walk: Walk, node: fx.Node, captured: Captured, quantized: Collection[str]) -> None:
    """Drop values, but not the input of a pair's first layer: the second is still to come."""
    users = list(node.users)
    if len(users) == 1 and _first_of(captured, users[0], quantized) is node:
        source: Any = node.args[0]
        kept = walk.plain[source]
        walk.forget(node)
        walk.plain[source] = kept
        return
    walk.forget(node)


def _first_of(captured: Captured, node: fx.Node, quantized: Collection[str]) -> fx.Node | None:
    """Return the first layer of the pair that a node is the second of, if it is."""
    if node.name not in quantized:
        return None
    first: Any = node.args[0]
    if first.name not in quantized or len(first.users) != 1:
        return None
    layers = captured.layers[first.name], captured.layers[node.name]
    same = layers[0].kind == layers[1].kind and all(layer.groups == 1 for layer in layers)
    return first if same else None


def _best(
    pair: tuple[Layer, Layer], x: Tensor, inner: Tensor, exact: Tensor, bits: int
) -> Tensor | None:
    """Return the mixing with which rounding harms the outputs least; ``None`` if none helps."""
    error, best = _harm(pair, x, exact, bits) * _BETTER, None
    for mixing in _mixings(inner):
        harm = _harm(mixed_pair(*pair, mixing), x, exact, bits)
        if harm < error:
            error, best = harm, mixing
    return best


def _mixings(inner: Tensor) -> Iterator[Tensor]:
    """Yield invertible matrices for a pair's inner channels, in float64."""
    rows = inner.transpose(0, 1).flatten(1).double() if inner.ndim == 4 else inner.mT.double()
    rows = rows - rows.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows @ rows.mT / rows.shape[1])
    spread = values.clamp_min(_FLOOR * float(values[-1]) + 1e-30)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(rows), len(rows), generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(drawn).Q
    for power in _WHITENED:
        whitened = spread.pow(-power / 2).unsqueeze(1) * vectors.mT
        yield rotation @ whitened
        if power:
            # As near to the channels that they were as whitening allows.
            yield vectors @ whitened


def mixed_pair(first: Layer, second: Layer, mixing: Tensor) -> tuple[Layer, Layer]:
    """Return a pair of the same function, its inner channels multiplied by an invertible matrix.

    Args:
        first: Gives the inner channels.
        second: Reads them, and nothing else does.
        mixing: ``(inner, inner)``, float64.
    """
    inverse = torch.linalg.inv(mixing)
    before = (mixing @ first.weight.double().flatten(1)).reshape(first.weight.shape)
    after = torch.einsum("oi...,ij->oj...", second.weight.double(), inverse)
    return (
        replace(first, weight=before.float(), bias=(mixing @ first.bias.double()).float()),
        replace(second, weight=after.float()),
    )


def _harm(pair: tuple[Layer, Layer], x: Tensor, exact: Tensor, bits: int) -> float:
    """Return the squared error of a pair's outputs, weights and inner channels rounded."""
    first, second = pair
    inner = first.run(x, _rounded(first, bits))
    given = second.run(on_grid(inner, min_max_grid(inner)), _rounded(second, bits))
    return float((given - exact).square().mean())


def _rounded(layer: Layer, bits: int) -> Tensor:
    integers, scales = nearest(layer.weight.flatten(1), bits=bits)
    return (integers * scales.unsqueeze(1)).reshape(layer.weight.shape)
