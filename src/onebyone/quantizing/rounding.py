"""Weights as integers: to the nearest, or each rounding error compensated by later weights."""

from __future__ import annotations

import torch
from torch import Tensor

# Shares of the largest weight that a channel's scale is tried at.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
_DAMPING = 0.01  # of the mean squared input, so that the inverse exists
_BLOCK = 128  # columns whose errors are gathered before the rest is updated
_WIDE = 1200  # inputs of a kernel from which on float32 is used
_SMALLEST = 1e-20


def largest_integer(bits: int) -> int:
    """Return the largest absolute value of a weight: 127 for 8 bits, 63 for 7."""
    return (1 << (bits - 1)) - 1


def nearest(weight: Tensor, *, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return integers and scales, the largest weight of each channel at the grid's end.

    Args:
        weight: ``(…, out, in)``. Not modified.
        bits: Of a weight.

    Returns:
        Integers of the weights' shape, and scales ``(…, out)``; both floating point.
    """
    scales = _full_scales(weight, bits)
    return _rounded(weight, scales.unsqueeze(-1), bits), scales


def by_moments(weight: Tensor, moments: Tensor, *, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return integers and scales with little error of the layer's outputs.

    Weights are rounded one input after the other, that with the largest activations first; what
    one rounding adds to the outputs the weights not yet rounded take off, as far as they can. Of
    several scales each channel keeps the one with the least error.

    Args:
        weight: ``(groups, out, in)``. Not modified.
        moments: Second moments of the inputs, ``(groups, in, in)``. Not modified.
        bits: Of a weight.

    References:
        Frantar et al., "GPTQ", ICLR 2023 (arXiv:2210.17323); Frantar, Alistarh, "Optimal Brain
        Compression", NeurIPS 2022 (arXiv:2208.11580).
    """
    groups, out, inputs = weight.shape
    dtype = torch.float32 if inputs > _WIDE else torch.float64
    w, h = weight.to(dtype), moments.to(dtype)
    order = h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    index = order.unsqueeze(1)
    w = w.gather(2, index.expand_as(w))
    h = h.gather(1, order.unsqueeze(2).expand_as(h)).gather(2, index.expand_as(h))
    shares = torch.tensor(_SHARES, dtype=dtype)
    scales = _full_scales(w, bits).unsqueeze(1) * shares.reshape(1, -1, 1)  # groups, tried, out
    tried = w.unsqueeze(1).expand(groups, len(shares), out, inputs)
    integers = _compensated(tried.reshape(groups, -1, inputs), scales.reshape(groups, -1), h, bits)
    integers = integers.reshape(tried.shape)
    gaps = integers * scales.unsqueeze(-1) - tried
    flat = gaps.reshape(groups, -1, inputs)
    errors = ((flat @ h) * flat).sum(2).reshape(scales.shape)
    best = errors.argmin(dim=1, keepdim=True)  # groups, 1, out
    chosen = integers.gather(1, best.unsqueeze(-1).expand(groups, 1, out, inputs)).squeeze(1)
    restored = torch.empty_like(chosen).scatter_(2, index.expand_as(chosen), chosen)
    return restored, scales.gather(1, best).squeeze(1)


def _full_scales(weight: Tensor, bits: int) -> Tensor:
    largest = weight.abs().amax(dim=-1) / largest_integer(bits)
    return largest.clamp_min(_SMALLEST).float().to(weight.dtype)


def _rounded(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    limit = largest_integer(bits)
    return torch.round(weight / scales).clamp_(-limit, limit)


def _compensated(weight: Tensor, scales: Tensor, moments: Tensor, bits: int) -> Tensor:
    """Return the integers of ``(groups, rows, in)``, rounded from the first input to the last."""
    factor = _inverse_factor(moments)
    w = weight.clone()
    integers = torch.empty_like(w)
    inputs = w.shape[2]
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        errors = torch.empty_like(w[:, :, start:end])
        for column in range(start, end):
            row = factor[:, column, column:end]
            current = w[:, :, column]
            integers[:, :, column] = _rounded(current, scales, bits)
            error = (current - integers[:, :, column] * scales) / row[:, :1]
            w[:, :, column:end] -= error.unsqueeze(2) * row.unsqueeze(1)
            errors[:, :, column - start] = error
        w[:, :, end:] -= errors @ factor[:, start:end, end:]
    return integers


def _inverse_factor(moments: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of damped moments."""
    eye = torch.eye(moments.shape[-1], dtype=moments.dtype)
    mean = moments.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(_SMALLEST)
    damping = _DAMPING * mean.reshape(-1, 1, 1)
    lower = torch.linalg.cholesky(moments + damping * eye)
    inverse = torch.cholesky_inverse(lower)
    factor: Tensor = torch.linalg.cholesky((inverse + inverse.mT) / 2, upper=True)
    return factor
