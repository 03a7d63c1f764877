"""Permuted copies equal plain indexing, bit for bit."""

from __future__ import annotations

import pytest
import torch

from pennyweight.solvers.ordering import columns_first, permuted, rows_first


@pytest.mark.parametrize("size", [0, 1, 63, 64, 200])
def test_orders_are_those_of_indexing(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    order = torch.randperm(size, generator=generator)
    matrix = torch.randn(size, size, generator=generator)
    assert torch.equal(permuted(matrix, order), matrix[order][:, order])
    w = torch.randn(7, size, generator=generator)
    turned = columns_first(w, order)
    assert turned.is_contiguous()
    assert torch.equal(turned, w.T[order])
    assert torch.equal(rows_first(turned, order), w)
