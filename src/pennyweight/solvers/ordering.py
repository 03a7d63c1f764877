"""How a weight is cut and ordered for solving. index_select copies whole rows where indexing copies numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map

# Rows that are permuted together by one thread: they stay in a core's second-level cache.
_ROWS = 64


def row_parts(rows: int) -> list[slice]:
    """Rows that are solved together by one thread: eight parts or more for as many threads, of 128 to 1024 rows, for
    fewer cost more each."""
    return chunks(rows, max(128, min(1024, -(-rows // 8))))


def permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """matrix[order][:, order] for `matrix` [n, n], with one copy of it in memory."""
    found = torch.empty_like(matrix)

    def some(rows: slice) -> None:
        torch.index_select(matrix.index_select(0, order[rows]), 1, order, out=found[rows])

    parallel_map(some, chunks(len(order), _ROWS))
    return found


def columns_first(w: Tensor, order: Tensor) -> Tensor:
    """w.T[order] for `w` [rows, in]: [in, rows], contiguous, in fresh memory."""
    return w.T.contiguous().index_select(0, order)


def rows_first(codes: Tensor, order: Tensor) -> Tensor:
    """The inverse of `columns_first`, as a view [rows, in]."""
    return codes.index_select(0, order.sort().indices).T
