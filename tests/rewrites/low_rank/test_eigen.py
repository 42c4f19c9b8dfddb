"""Eigenvalues are found of all that is finite, in any unit."""

import math

import pytest
import torch
from explicit_data import semidefinite
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from onebyone.rewrites.low_rank.eigen import _by_singular_vectors, eigen, eigenvalues


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.0, 1e-250, 1.0, 1e250]))
def test_eigenvectors_rebuild_their_matrix_and_eigenvalues_rise(size, seed, unit):
    matrix = unit * (semidefinite(size, seed=seed) - torch.eye(size, dtype=torch.float64))
    values, vectors = eigen(matrix)
    near = {"rtol": 1e-9, "atol": 1e-9 * unit * size}
    assert_close((vectors * values) @ vectors.T, matrix, **near)
    assert_close(vectors.T @ vectors, torch.eye(size, dtype=torch.float64))
    assert (values.diff() >= 0).all()
    assert_close(eigenvalues(matrix), values, **near)
    other, others = _by_singular_vectors(matrix / (unit or 1.0))
    assert_close(other * unit, values, **near)
    assert_close((others * other) @ others.T * unit, matrix, **near)


def test_eigenvectors_of_float32_are_found_in_float64():
    matrix = semidefinite(6, rank=2).float()
    values, vectors = eigen(matrix)
    exact, exacts = eigen(matrix.double())
    assert torch.equal(values, exact.float())
    assert torch.equal(vectors, exacts.float())
    assert_close(eigenvalues(matrix), exact)


def test_where_lapack_gives_up_the_eigenvalues_are_found_by_singular_values(monkeypatch):
    def fails(*_args):
        raise torch.linalg.LinAlgError

    matrices = [semidefinite(5), -torch.ones(4, 4).double(), semidefinite(3) - 2]
    wanted = [torch.linalg.eigvalsh(matrix) for matrix in matrices]
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    for matrix, values in zip(matrices, wanted, strict=True):
        assert_close(eigenvalues(matrix), values)
        found, vectors = eigen(matrix)
        assert_close(found, values)
        assert_close((vectors * found) @ vectors.T, matrix)


@pytest.mark.parametrize("find", [eigen, eigenvalues])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_eigenvalues_are_given_of_what_is_not_finite(find, value):
    with pytest.raises(torch.linalg.LinAlgError, match=r"shape \(3, 3\) must be finite"):
        find(torch.full((3, 3), value))
