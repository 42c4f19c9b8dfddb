"""Eigenvalues of symmetric matrices, also of those that LAPACK gives up on."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a symmetric matrix, rising, and its eigenvectors.

    They are found in float64: in float32 LAPACK gives up on some that are nearly singular. Where it
    does so in float64 too they come from the singular vectors, by another algorithm.

    Raises:
        torch.linalg.LinAlgError: If a value is not finite.
    """
    wide = matrix.double()
    unit = float(wide.abs().max())
    if not math.isfinite(unit):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"A matrix of shape {tuple(matrix.shape)} must be finite to have eigenvalues."
        )
    # So that squares neither overflow nor vanish on the way.
    wide = wide / unit if unit > 0 else wide
    try:
        values, vectors = torch.linalg.eigh(wide)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values, vectors = _by_singular_vectors(wide)
    return (values * unit).to(matrix), vectors.to(matrix)


def eigenvalues(matrix: Tensor) -> Tensor:
    """Return the eigenvalues of a symmetric matrix, rising, in float64: faster than :func:`eigen`.

    Raises:
        torch.linalg.LinAlgError: If a value is not finite.
    """
    wide = matrix.double()
    unit = float(wide.abs().max())
    if not 0 < unit < math.inf:
        return eigen(wide)[0]
    try:
        values: Tensor = torch.linalg.eigvalsh(wide / unit)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return eigen(wide)[0]
    return values * unit


def _by_singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, rising, and eigenvectors of a symmetric matrix by its SVD."""
    # A shift makes it positive definite: its singular vectors are then its eigenvectors.
    shift = float(matrix.abs().sum(0).max())
    shifted = (matrix + matrix.T) / 2
    shifted.diagonal().add_(shift)
    left, singular, _ = torch.linalg.svd(shifted)
    return (singular - shift).flip(0), left.flip(1)
