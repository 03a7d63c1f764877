"""Tests that take `table` use these kernels, on one thread: on a machine that is busy others are waited for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pennyweight.kernels.native import VARIABLE, kernel_table


@pytest.fixture(autouse=True)
def _chosen_table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "table" not in request.fixturenames:
        yield
        return
    table, threads = request.getfixturevalue("table"), torch.get_num_threads()
    monkeypatch.setenv(VARIABLE, table)
    assert kernel_table() == table
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
