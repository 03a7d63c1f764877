"""The tiled Cholesky factor, against LAPACK's in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pennyweight.core.errors import NotPositiveDefiniteError
from pennyweight.solvers.factorize import cholesky_

# Backward error of a float32 factorisation, relative to the largest element of the matrix; grows with its size.
BACKWARD_ERROR = 2e-6


def positive_definite(size: int, seed: int = 0) -> Tensor:
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / (2 * size)


@pytest.mark.parametrize(
    ("size", "tile"),
    [(1, 512), (5, 512), (512, 512), (513, 512), (5, 1), (5, 2), (96, 32), (97, 32), (300, 128), (1100, 256)],
)
def test_the_factor_is_that_of_lapack_in_float64(size: int, tile: int) -> None:
    a = positive_definite(size)
    lower = cholesky_(a.clone(), tile=tile)
    expected = torch.linalg.cholesky(a.double())
    assert torch.equal(lower, lower.tril())
    assert (lower.double() - expected).abs().max() < 20 * BACKWARD_ERROR
    assert (lower.double() @ lower.double().T - a.double()).abs().max() < BACKWARD_ERROR * float(a.max())


def test_an_empty_matrix_has_an_empty_factor() -> None:
    assert cholesky_(torch.empty(0, 0)).shape == (0, 0)


@pytest.mark.parametrize(("size", "tile"), [(300, 64), (700, 512), (512, 512)])
def test_the_number_of_threads_changes_no_bit(size: int, tile: int) -> None:
    a = positive_definite(size)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cholesky_(a.clone(), tile=tile))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("where", [0, 40, 99])
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_matrix_that_is_not_positive_definite_is_refused(where: int, bad: float) -> None:
    a = positive_definite(100)
    a[where, where] = bad
    with pytest.raises(NotPositiveDefiniteError, match="not positive definite"):
        cholesky_(a, tile=32)
